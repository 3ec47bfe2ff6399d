"""The residual block around a layer: `x + drop_path(act(norm(o)))`, by one kernel where the modules allow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import refusal_by
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.tracing import is_plain
from ela_kernels.backends.types import NormAct, Running
from ela_kernels.explaining import refused, served
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.light import LightLayerAttention
from ela_kernels.modules.norms import (
    is_batch_norm,
    is_frozen,
    normed,
    takes_batch,
    without_sharing,
)
from ela_kernels.modules.query_key_value import QueryKeyValue
from ela_kernels.ops.autocast import layer_dtype
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.in_graph.history import GraphPlan
from ela_kernels.ops.layer_attention.plan import LayerPlan
from ela_kernels.ops.light_layer_attention.layer import light_layer
from ela_kernels.ops.light_layer_attention.plan import LightPlan
from ela_kernels.torch_internals import has_hooks, own_buffer, tensors_of_norm

# Dtypes of a norm and of its input: beside half precision it may stay in float32.
MIXED = ((torch.float32, torch.bfloat16), (torch.float32, torch.float16))


def residual_block(
    attn: nn.Module,
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    history: LayerHistory,
    samples: bool = False,
    keeps: bool = False,
) -> Tensor:
    """`x + drop_path(act(norm(attn(x, history))))`, in one call of the kernels where they can serve all of it.

    `samples`: `drop_path`, whatever its class, multiplies each sample with a number. `keeps`: the history keeps what is
    retrieved, for blocks that take it over.
    """
    if torch.compiler.is_compiling():
        block = block_in_graph(attn, norm, act, drop_path, x, history, samples, keeps)
        if block is not None:
            return block
        obstacles = None
    else:
        obstacles = _obstacles(attn, LayerAttention, norm, act, drop_path, x, samples)
    if obstacles is not None:
        assert isinstance(attn, LayerAttention)
        plan = attn.plan(x, history, "block", obstacles)
        if isinstance(plan, LayerPlan):
            served(attn, "block", plan.backend.name)
            epilogue = epilogue_of(norm, act, drop_path, x)
            return history.attend_layer(
                x, plan, heads=attn.heads, epilogue=epilogue, caller=attn, keeps=keeps
            )
        refused(attn, "block", plan)
    elif kind_of(attn) is not LayerAttention and isinstance(attn, LayerAttention):
        why = f"attn is a {type(attn).__name__}, and the block is for LayerAttention"
        refused(attn, "block", refusal_by((why,)))
    o = attn(x, history)
    # What hooks or a class of its own made of the retrieval could not be made again from weights and values.
    is_plain = kind_of(attn) is LayerAttention and (
        torch.compiler.is_compiling() or not has_hooks(attn)
    )
    if keeps or not is_plain:
        history.keep(o)
        o = without_sharing(norm, o)
    out: Tensor = x + drop_path(act(normed(norm, o)))
    return out


def block_in_graph(
    attn: nn.Module,
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    history: LayerHistory,
    samples: bool,
    keeps: bool,
    active: Tensor | None = None,
) -> Tensor | None:
    """The block by one operator in a graph that is being compiled; None where PyTorch's pieces are it.

    `active` as of `LayerHistory.attend_in_graph`.
    """
    if _obstacles(attn, LayerAttention, norm, act, drop_path, x, samples) != ():
        return None
    assert isinstance(attn, LayerAttention)
    # The cumulative mean of a norm without momentum is a number that would have to be read when the graph runs.
    if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.momentum is None:
        return None
    if active is not None and not history.takes_decision(x, keeps, takes_batch(norm)):
        return None
    plan = attn.plan_in_graph(x, history, "block")
    if not isinstance(plan, GraphPlan):
        return None
    epilogue = epilogue_of(norm, act, drop_path, x)
    return history.attend_in_graph(
        x, plan, heads=attn.heads, epilogue=epilogue, caller=attn, keeps=keeps, active=active
    )


def light_residual_block(
    attn: LightLayerAttention,
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    prev_out: Tensor,
    samples: bool = False,
    decay: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`x + drop_path(act(norm(o)))` with `o = attn(x, prev_out)`, and `o`; in one call where the kernels can.

    `samples` as of :func:`residual_block`, `decay` as of the layer's forward.
    """
    obstacles = None
    if not torch.compiler.is_compiling():  # there the light form is made of PyTorch's own pieces
        obstacles = _obstacles(attn, LightLayerAttention, norm, act, drop_path, x, samples)
    if obstacles is not None:
        plan = attn.plan(x, prev_out, "light_block", obstacles, decay)
        if isinstance(plan, LightPlan):
            served(attn, "block", plan.backend.name)
            epilogue = epilogue_of(norm, act, drop_path, x)
            scale = attn.head_dim**-0.5
            o, block = light_layer(
                plan.backend,
                x,
                plan.filters,
                prev_out,
                attn.heads,
                scale,
                epilogue,
                attn.value_act,
            )
            assert block is not None
            return block, o
        refused(attn, "block", plan, tells=plan.forced is None)
    o = attn(x, prev_out) if decay is None else attn(x, prev_out, decay)
    # It goes on to the next layer, so neither norm nor activation may change it in place.
    out: Tensor = x + drop_path(act(normed(norm, o)))
    return out, o


def _obstacles(
    attn: nn.Module,
    kind: type[QueryKeyValue],
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    x: Tensor,
    samples: bool,
) -> tuple[str, ...] | None:
    """Why no kernel may do the work of a block without calling its modules; empty where one may.

    None where that is not asked: of another layer than `kind`, and of an input that the layer will refuse.
    """
    if kind_of(attn) is not kind:
        return None
    found = module_obstacles(attn, norm, act, drop_path, samples)
    if not found:
        assert isinstance(attn, QueryKeyValue)
        attn.check_input(x)  # not before hooks on it have seen it
    elif not isinstance(x, Tensor) or x.dim() != 4:
        return None
    if is_batch_norm(norm):
        found += norm_obstacles(norm, x)
    return tuple(found)


def kind_of(attn: nn.Module) -> type[nn.Module]:
    """The class whose forward a layer runs: its own, or what it stands for where it is a converted one."""
    own = type(attn)
    kind: type[nn.Module] = getattr(own, "stands_for", own)
    return kind


def module_obstacles(
    attn: nn.Module | None,
    norm: nn.Module,
    act: nn.Module,
    drop_path: nn.Module,
    samples: bool = False,
) -> list[str]:
    """Modules that kernels do not know, or that do more than their kind; `attn` None where it is not called."""
    found = []
    called = [m for m in (attn, norm, act, drop_path) if m is not None]
    of_norm, of_act, of_drop_path = type(norm), type(act), type(drop_path)
    if of_norm is not nn.BatchNorm2d and not is_frozen(norm):
        found.append(f"norm is {of_norm.__name__}, and the kernels know BatchNorm2d")
    if of_act is not nn.ReLU and of_act is not nn.Identity:
        found.append(f"act is {of_act.__name__}, and the kernels know ReLU and Identity")
    if not samples and of_drop_path is not DropPath:
        found.append(f"drop_path is {of_drop_path.__name__}, and the kernels know DropPath")
    found += [
        f"{type(module).__name__} has a forward of its own"
        for module in called
        if "forward" in module.__dict__
    ]
    if has_hooks(*called):
        found.append("attn, norm, act or drop_path has hooks, or all modules have")
    return found


def norm_obstacles(norm: Any, x: Tensor) -> list[str]:
    """Why the kernels do not serve this norm on `x`; where they do not, PyTorch's own may have something to say.

    They add to `x` in one dtype, which under autocast need not be that of `x`.
    """
    found = []
    of_norm, shape, dtype = tensors_of_norm(norm), x.shape, layer_dtype(x)
    channels = shape[1]
    features = channels if is_frozen(norm) else norm.num_features
    if features != channels or (of_norm[0] is None) != (of_norm[1] is None):
        found.append("norm is for another number of channels, or has one parameter of two")
    if x.dtype != dtype:
        found.append(f"x is {x.dtype}, and autocast computes the layer in {dtype}")
    if not has_usual_parameters(norm, x, of_norm):
        found.append(
            "norm's parameters or statistics are not plain ones that fit x in dtype and device"
        )
    # One number a channel has no variance.
    if shape[0] * shape[2] * shape[3] <= 1 and takes_batch(norm):
        found.append("one number a channel has no variance")
    return found


def has_usual_parameters(norm: Any, x: Tensor, of_norm: tuple[Tensor | None, ...]) -> bool:
    """Whether parameters and running statistics are plain ones of a shape and dtype that PyTorch takes with `x`."""
    given = [t for t in of_norm if t is not None]
    if (of_norm[2] is None) != (of_norm[3] is None) or not norm.eps > 0:
        return False
    dtype = given[0].dtype if given else x.dtype
    # PyTorch's own gives the dtype of x, a frozen one that of the product with its scale.
    if dtype != x.dtype and (is_frozen(norm) or (dtype, x.dtype) not in MIXED):
        return False
    shape, device = (x.shape[1],), x.device
    return all(
        t.dtype == dtype and t.shape == shape and t.device == device and is_plain(t) for t in given
    )


def _mask(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """What each sample of `x` is multiplied with, `[B, 1, 1, 1]`, newly drawn; None where nothing is dropped."""
    if isinstance(drop_path, DropPath):
        return drop_path.mask(x)
    if type(drop_path) is nn.Identity:
        return None
    ones = x.new_ones((x.shape[0],) + (1,) * (x.dim() - 1))
    mask: Tensor = drop_path(ones)
    return None if mask is ones else mask


def epilogue_of(norm: Any, act: nn.Module, drop_path: nn.Module, x: Tensor) -> NormAct:
    """What follows the retrieval, and keeps the norm's running statistics as `nn.BatchNorm2d` keeps them."""
    statistics = None
    gamma, beta, mean, variance = tensors_of_norm(norm)
    if not takes_batch(norm):
        statistics = torch.stack((mean, variance)).to(accumulate_dtype(x.dtype))
    mask, track = _mask(drop_path, x), None
    if not is_frozen(norm) and norm.training and norm.track_running_stats:
        track = _Track(norm, x.numel() // x.shape[1])
    return NormAct(
        gamma,
        beta,
        statistics,
        None if mask is None else mask.view(-1),
        norm.eps,
        isinstance(act, nn.ReLU),
        track,
    )


class _Track:
    """Takes the statistics of a batch, of `count` numbers a channel, into those of a norm."""

    __slots__ = ("_count", "_norm")

    def __init__(self, norm: nn.BatchNorm2d, count: int) -> None:
        self._norm, self._count = norm, count

    @property
    def running(self) -> Running | None:
        """None also for a cumulative mean, whose factor is the count of batches, and with no number to correct by."""
        _, _, mean, variance = tensors_of_norm(self._norm)
        momentum = self._norm.momentum
        if mean is None or variance is None or momentum is None or self._count < 2:
            return None
        return Running(mean, variance, own_buffer(self._norm, "num_batches_tracked"), momentum)

    def __call__(self, statistics: Tensor, applies: Tensor | None = None) -> None:
        _track(self._norm, self._count, statistics, applies)


# A function, since the compiler cannot trace a method that is decorated so.
@torch.no_grad()
def _track(
    norm: nn.BatchNorm2d, count: int, statistics: Tensor, applies: Tensor | None = None
) -> None:
    """The variance unbiased; without momentum a cumulative mean.

    `applies`: whether the norm has seen anything, where that is data; None: it has.
    """
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1 if applies is None else applies.long())
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
        if applies is not None:
            moved = (1 - factor) * running.to(found.dtype) + weight * found
            running.copy_(torch.where(applies, moved, running.to(found.dtype)))
        elif running.dtype == found.dtype:
            running.mul_(1 - factor).add_(found, alpha=weight)
        else:  # in half precision, rounded once
            running.copy_((1 - factor) * running.to(found.dtype) + weight * found)
