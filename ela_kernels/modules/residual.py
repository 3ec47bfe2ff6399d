"""The residual block around a layer: `x + drop_path(act(norm(o)))`, by one kernel where the modules allow it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.tracing import needs_dispatcher
from ela_kernels.backends.types import Epilogue
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.layer_attention import LayerAttention, runs_as
from ela_kernels.modules.light import LightLayerAttention
from ela_kernels.ops.autocast import layer_dtype
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.light_layer_attention.choice import choose_light_kernels
from ela_kernels.ops.light_layer_attention.layer import light_block
from ela_kernels.torch_internals import has_hooks

# Dtypes of a norm and of its input: beside half precision it may stay in float32.
MIXED = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))

FusedBlock = Callable[[Epilogue], tuple[Tensor, Tensor]]
"""From what follows the retrieval to the block's output and the statistics that it was normed with."""


def residual_block(
    attn: nn.Module,
    norm: nn.Module,
    act: nn.Module,
    drop_path: DropPath,
    x: Tensor,
    history: LayerHistory,
) -> Tensor:
    """`x + drop_path(act(norm(attn(x, history))))`, in one call of the kernels where they can serve all of it."""
    if type(attn) is LayerAttention and may_pass_by(attn, norm, act, drop_path):
        attn.check_input(x)
        layer, filters = attn, None
        if fits(norm, x):
            filters = attn.filters(lambda: history.serves_layer(x, (), layer))
        if filters is not None and history.serves_layer(x, filters, attn):
            served, heads = filters, attn.heads
            return fused_block(
                lambda epilogue: history.attend_block(
                    x, served, epilogue, heads=heads, caller=attn
                ),
                norm,
                act,
                drop_path,
                x,
            )
    out: Tensor = x + drop_path(act(norm(attn(x, history))))
    return out


def light_residual_block(
    attn: LightLayerAttention,
    norm: nn.Module,
    act: nn.Module,
    drop_path: DropPath,
    x: Tensor,
    prev_out: Tensor,
) -> tuple[Tensor, Tensor]:
    """`x + drop_path(act(norm(o)))` with `o = attn(x, prev_out)`, and `o`; in one call where the kernels can."""
    if type(attn) is LightLayerAttention and may_pass_by(attn, norm, act, drop_path):
        attn.check_input(x)
        filters = attn.light_filters(x, prev_out) if fits(norm, x) else None
        kernels = None if filters is None else choose_light_kernels(x, filters, prev_out)
        if filters is not None and kernels is not None:
            served, found = filters, []

            def run(epilogue: Epilogue) -> tuple[Tensor, Tensor]:
                result, o, statistics = light_block(
                    kernels, x, served, prev_out, epilogue, attn.heads, attn.head_dim**-0.5
                )
                found.append(o)
                return result, statistics

            return fused_block(run, norm, act, drop_path, x), found[0]
    o = attn(x, prev_out)
    # It goes on to the next layer, so neither norm nor activation may change it in place.
    out: Tensor = x + drop_path(act(norm(o)))
    return out, o


def may_pass_by(attn: nn.Module, norm: nn.Module, act: nn.Module, drop_path: DropPath) -> bool:
    """Whether a kernel may do the work of these modules without calling them."""
    return (
        type(norm) is nn.BatchNorm2d
        and type(act) in (nn.ReLU, nn.Identity)
        and type(drop_path) is DropPath
        and all(runs_as(module, type(module)) for module in (attn, norm, act, drop_path))
        and not has_hooks(attn, norm, act, drop_path)
    )


def fits(norm: nn.Module, x: Tensor) -> bool:
    """Whether the kernels serve this norm on `x`; where they do not, PyTorch's own may have something to say.

    They add to `x` in one dtype, which under autocast need not be that of `x`.
    """
    assert isinstance(norm, nn.BatchNorm2d)
    # One number a channel has no variance.
    enough = x.shape[0] * x.shape[2] * x.shape[3] > 1
    given = norm.num_features == x.shape[1] and (norm.weight is None) == (norm.bias is None)
    return (
        given
        and x.dtype == layer_dtype(x)
        and has_usual_parameters(norm, x)
        and (enough or not takes_batch(norm))
    )


def has_usual_parameters(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether parameters and running statistics are plain ones of a shape and dtype that PyTorch takes with `x`."""
    given = [
        t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None
    ]
    if (norm.running_mean is None) != (norm.running_var is None) or not norm.eps > 0:
        return False
    dtype = given[0].dtype if given else x.dtype
    if dtype != x.dtype and (dtype, x.dtype) not in MIXED:
        return False
    return all(
        t.dtype == dtype
        and t.shape == (x.shape[1],)
        and t.device == x.device
        and not needs_dispatcher(t)
        for t in given
    )


def takes_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm takes the statistics of the batch, as `nn.BatchNorm2d` decides it."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def fused_block(
    run: FusedBlock, norm: nn.Module, act: nn.Module, drop_path: DropPath, x: Tensor
) -> Tensor:
    """The block by `run`, and the norm's running statistics kept as `nn.BatchNorm2d` keeps them."""
    assert isinstance(norm, nn.BatchNorm2d)
    statistics = None
    if not takes_batch(norm):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        statistics = torch.stack((norm.running_mean, norm.running_var)).to(
            accumulate_dtype(x.dtype)
        )
    mask, track = drop_path.mask(x), None
    if norm.training and norm.track_running_stats:
        track = partial(_track, norm, x.numel() // x.shape[1])
    out, _ = run(
        Epilogue(
            norm.weight,
            norm.bias,
            statistics,
            None if mask is None else mask.view(-1),
            norm.eps,
            isinstance(act, nn.ReLU),
            track,
        )
    )
    return out


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, count: int, statistics: Tensor) -> None:
    """The variance unbiased; without momentum a cumulative mean."""
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    if factor is None:
        factor = 0.0
    if norm.running_mean is None or norm.running_var is None:
        return
    mean, variance = statistics
    for running, found, weight in (
        (norm.running_mean, mean, factor),
        (norm.running_var, variance, factor * count / (count - 1)),
    ):
        if running.dtype == found.dtype:
            running.mul_(1 - factor).add_(found, alpha=weight)
        else:  # in half precision, rounded once
            running.copy_((1 - factor) * running.to(found.dtype) + weight * found)
