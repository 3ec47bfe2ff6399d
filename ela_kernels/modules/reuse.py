"""The residual block around an earlier layer's retrieval: `x + drop_path(act(norm(o)))`, in one call of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import Refusal, refusal_by
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.explaining import refused, served, served_without_kernels
from ela_kernels.modules.layer_attention import LayerAttention, Turn
from ela_kernels.modules.norms import (
    KNOWN_NORMS,
    is_batch_norm,
    normed,
    takes_batch,
    without_sharing,
)
from ela_kernels.modules.query_key_value import as_before_wrappers
from ela_kernels.modules.residual import (
    epilogue_of,
    kind_of,
    module_obstacles,
    norm_obstacles,
)
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.plan import LayerPlan
from ela_kernels.ops.layer_attention.reuse import reuse_obstacles
from ela_kernels.ops.layer_attention.snapshot import Kept
from ela_kernels.torch_internals import has_hooks


def reused_block(
    attn: nn.Module | None,
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    history: LayerHistory,
    kept: Kept,
    turn: Turn,
    caller: Any,
    counted: Any,
    samples: bool = False,
) -> Tensor:
    """`x + drop_path(act(norm(o)))` with the `o` that was kept; key and value of `x` are given where `turn` says so.

    Args:
        attn: makes key and value; may be None where they are not given.
        caller: the module that is skipped.
        counted: the module that the history counts where no pair is given.
        samples: as of :func:`~ela_kernels.modules.residual.residual_block`.

    Raises:
        ValueError: `x` has another shape than what was retrieved.
    """
    if kept.o.shape != x.shape:
        raise ValueError(
            f"x: got shape {list(x.shape)}; allowed is that of the retrieval that is used again, {list(kept.o.shape)}. "
            "Make a new LayerHistory for each stage and forward pass"
        )
    if not torch.compiler.is_compiling():
        plan = _plan(
            attn if turn.provides else None, norm, act, drop_path, x, history, kept, samples
        )
        if not isinstance(plan, Refusal):
            if turn.probe is not None:
                assert isinstance(attn, LayerAttention)
                attn.look(x, history, turn.probe)
            epilogue = epilogue_of(norm, act, drop_path, x)
            if isinstance(plan, LayerPlan):
                assert isinstance(attn, LayerAttention)
                served(caller, "reuse", plan.backend.name)
                return history.reuse_and_provide(
                    x, kept, epilogue, plan, heads=attn.heads, caller=attn
                )
            served(caller, "reuse", plan.name)
            return history.reuse(x, kept, epilogue, plan, counted)
        refused(caller, "reuse", plan)
    served_without_kernels(caller, "reuse by pieces")
    y = x
    if turn.provides or turn.probe is not None:
        assert attn is not None
        # By its call, not by a method of it: wrappers and hooks work there, which may change what they get in place.
        copy = not torch.compiler.is_compiling() and has_hooks(attn)
        y = as_before_wrappers(attn(x, history, turn=turn._replace(copy=copy)), x)
    if not turn.provides:
        history.pass_by(counted)
    return end_of_block(norm, act, drop_path, y, kept.o, kept.exists)


def block_around(
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    o: Tensor,
    samples: bool = False,
) -> Tensor:
    """`x + drop_path(act(norm(o)))` of any map `o`, by one kernel where the modules allow it.

    `samples` as of :func:`~ela_kernels.modules.residual.residual_block`.
    """
    obstacles, takes, history = (
        module_obstacles(None, norm, act, drop_path, samples),
        False,
        LayerHistory(),
    )
    if is_batch_norm(norm):
        obstacles += norm_obstacles(norm, x)
        takes = takes_batch(norm)
    obstacles += reuse_obstacles(x, Kept.of(o), False)
    plan = history.plan_reuse(x, tuple(obstacles))
    if isinstance(plan, Refusal):
        return end_of_block(norm, act, drop_path, x, o)
    statistics = None
    if takes:
        wide = o.detach().to(accumulate_dtype(o.dtype))
        variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        statistics = torch.stack((mean, variance))
    epilogue = epilogue_of(norm, act, drop_path, x)
    return history.reuse(x, Kept.of(o, statistics), epilogue, plan)


def end_of_block(
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    o: Tensor,
    applies: Tensor | None = None,
) -> Tensor:
    """`x + drop_path(act(norm(o)))` by pieces, which leaves `o` as it is.

    `applies`: whether it is that, or `x` and a norm that has seen nothing, where that is data (a boolean tensor).
    """
    o = without_sharing(norm, o)
    if applies is None:
        out: Tensor = x + drop_path(act(normed(norm, o)))
        return out
    if not norm.training and type(norm) in KNOWN_NORMS:
        return torch.where(applies, x + drop_path(act(normed(norm, o))), x)
    # The norm works on copies of its running statistics.
    buffers = dict(norm.named_buffers())
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    out = x + drop_path(act(normed(norm, o, copies)))
    for name, buffer in buffers.items():
        # Not in a context without gradients: `torch.export.load` refuses one that gives nothing.
        before = buffer.detach()
        before.copy_(torch.where(applies, copies[name].detach(), before))
    return torch.where(applies, out, x)


def _plan(
    attn: nn.Module | None,
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    history: LayerHistory,
    kept: Kept,
    samples: bool,
) -> Any:
    """A `LayerPlan` where `attn` gives a pair, kernels where nothing does, or why there are none."""
    obstacles = module_obstacles(attn, norm, act, drop_path, samples)
    takes = False
    if is_batch_norm(norm):
        obstacles += norm_obstacles(norm, x)
        takes = takes_batch(norm)
    obstacles += reuse_obstacles(x, kept, takes)
    if attn is None:
        return history.plan_reuse(x, tuple(obstacles))
    if kind_of(attn) is not LayerAttention:
        name = type(attn).__name__
        return refusal_by((f"attn is a {name}, and the block is for LayerAttention", *obstacles))
    assert isinstance(attn, LayerAttention)
    return attn.plan(x, history, "reuse", tuple(obstacles))
