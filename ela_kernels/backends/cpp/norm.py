"""What the compiled CPU kernels of a whole layer take for a residual block's end: `x + mask * act(norm(o))`, and back.

The end is done in the call of the layer: with given statistics right after each sample's retrieval, with those of the
batch as soon as they are known; backward, right before each sample's attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ela_kernels.backends.checks import check_norm_sizes
from ela_kernels.backends.cpp.addresses import one_map
from ela_kernels.backends.cpp.attention import DTYPE_CODES, NO_MAP, new_map, thread_count
from ela_kernels.backends.cpp.attention import kernels as compiled
from ela_kernels.backends.layout import (
    MapView,
    accumulate_dtype,
    contiguous,
    dense,
    is_interleaved,
    kernel_sizes,
)
from ela_kernels.backends.memory import address, cast
from ela_kernels.backends.types import NormAct, NormGradients, Running

ImageSizes = tuple[int, int, int, int, int]
"""B, C, H, W, interleaved."""


class NormCall(NamedTuple):
    """The arguments as the extension takes them, and what must live until the kernel has run.

    Attributes:
        tracks: whether the kernel moves the norm's running statistics on.
    """

    arguments: Any
    batch_statistics: bool
    keeps: list[Any]
    tracks: bool = False


NO_RUNNING = (0, 0, 0)


def _vector(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else dense(cast(tensor, dtype, "a parameter of the norm"))


def _running(norm: NormAct, dtypes: tuple[torch.dtype, torch.dtype]) -> Running | None:
    """What the kernel can move on by itself; None where that is left to PyTorch, or nobody wants it.

    `dtypes`: of the statistics, and of the maps.
    """
    running = None if norm.track is None or norm.statistics is not None else norm.track.running
    if running is None:
        return None
    mean, variance, batches, _ = running
    dtype = mean.dtype
    plain = dtype in dtypes and variance.dtype == dtype and mean.shape == variance.shape
    if not plain or not all(_is_plain(t) for t in running[:3] if t is not None):
        return None
    return running if batches is None or batches.dtype == torch.int64 else None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may change it: on the CPU, and with a version to count up, which inference mode's have not."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )


def moments(statistics: Tensor | None) -> tuple[int, int]:
    """Addresses of mean and variance in contiguous `[2, C]`, without a view of each; zeros for None."""
    if statistics is None:
        return 0, 0
    mean = address(statistics, "statistics")
    return mean, mean + statistics.stride(0) * statistics.element_size()


def norm_call(
    sizes: ImageSizes,
    statistics: Tensor,
    norm: NormAct,
    dtype: torch.dtype,
    *,
    o: MapView,
    x: MapView,
    out: MapView,
    also: MapView = NO_MAP,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    tracks: bool = False,
) -> NormCall:
    """Of the maps o, x and out; in the backward `x` is the gradient of `out`, and `out` that of o, plus `also`.

    `dtype` is that of the maps, in which gradients of parameters are, where those are; `tracks`: move the norm's
    running statistics on, if the kernel can.
    """
    check_norm_sizes(sizes[1], norm)
    accumulate = statistics.dtype
    narrow = is_narrow(norm, dtype)
    gamma, beta = (_vector(t, dtype if narrow else accumulate) for t in (norm.gamma, norm.beta))
    mask = _vector(norm.mask, accumulate)
    statistics = contiguous(statistics)
    mean, variance = moments(statistics)
    running = _running(norm, (accumulate, dtype)) if tracks else None
    factor, narrow_running, of_running = 0.0, False, NO_RUNNING
    if running is not None:
        factor, narrow_running = running.factor, running.mean.dtype != accumulate
        of_running = (
            address(running.mean, "running_mean"),
            address(running.variance, "running_var"),
            address(running.batches, "num_batches_tracked"),
        )
        increment_version([t for t in running[:3] if t is not None])
    arguments = compiled().norm(
        o=o,
        x=x,
        out=out,
        also=also,
        mean=mean,
        variance=variance,
        gamma=address(gamma, "a parameter of the norm"),
        beta=address(beta, "a parameter of the norm"),
        mask=address(mask, "a parameter of the norm"),
        dgamma=address(dgamma),
        dbeta=address(dbeta),
        running=of_running,
        eps=norm.eps,
        factor=factor,
        relu=norm.relu,
        narrow=narrow,
        narrow_running=narrow_running,
    )
    keeps = [gamma, beta, mask, statistics, dgamma, dbeta, running]
    return NormCall(arguments, norm.statistics is None, keeps, running is not None)


def is_narrow(norm: NormAct, dtype: torch.dtype) -> bool:
    """Whether the parameters are in `dtype`, that of the maps, which the kernels then read and write them in."""
    if dtype.itemsize == accumulate_dtype(dtype).itemsize:
        return False
    gamma, beta = norm.gamma, norm.beta
    return gamma is not None and beta is not None and gamma.dtype == dtype == beta.dtype


def norm_forward(o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
    """`x + mask * act(norm(o))`, in the form of `o`."""
    interleaved = is_interleaved(o, False)
    sizes = (*o.shape, int(interleaved))
    out, out_view = new_map(o, kernel_sizes(o, 1, False, interleaved), False)
    o_view, kept_o = one_map(o, False, interleaved)
    x_view, kept_x = one_map(x, False, interleaved)
    call = norm_call(sizes, statistics, norm, o.dtype, o=o_view, x=x_view, out=out_view)
    compiled().norm_forward(
        DTYPE_CODES[o.dtype], sizes=sizes, norm=call.arguments, threads=thread_count(3 * o.numel())
    )
    del kept_o, kept_x
    return out


def norm_backward(
    o: Tensor, dout: Tensor, statistics: Tensor, norm: NormAct, also: Tensor | None = None
) -> NormGradients:
    """The gradients of what :func:`norm_forward` does, in a call of their own; `also` is added to that of `o`."""
    do, dgamma, dbeta, call = norm_backward_call(o, dout, statistics, norm, also)
    compiled().norm_backward(
        DTYPE_CODES[o.dtype],
        sizes=(*o.shape, int(is_interleaved(o, False))),
        norm=call.arguments,
        batch_statistics=call.batch_statistics,
        threads=thread_count(5 * o.numel()),
    )
    return NormGradients(do, dgamma, dbeta)


class NormBackward(NamedTuple):
    """What a layer's backward will fill in the same call: gradients of the retrieval, and of gamma and beta."""

    o: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    call: NormCall


def norm_backward_call(
    o: Tensor, dout: Tensor, statistics: Tensor, norm: NormAct, also: Tensor | None = None
) -> NormBackward:
    """What the backward of the layer will fill in the same call. `also` is added to the gradient of `o`."""
    interleaved = is_interleaved(o, False)
    sizes = (*o.shape, int(interleaved))
    do, do_view = new_map(o, kernel_sizes(o, 1, False, interleaved), False)
    o_view, kept_o = one_map(o, False, interleaved)
    dout_view, kept_dout = one_map(dout, False, interleaved)
    also_view, kept_also = (NO_MAP, None) if also is None else one_map(also, False, interleaved)
    of_parameters = o.dtype if is_narrow(norm, o.dtype) else accumulate_dtype(o.dtype)
    dgamma, dbeta = (
        None if t is None else torch.empty(t.shape, dtype=of_parameters, device="cpu")
        for t in (norm.gamma, norm.beta)
    )
    call = norm_call(
        sizes,
        statistics,
        norm,
        o.dtype,
        o=o_view,
        x=dout_view,
        out=do_view,
        also=also_view,
        dgamma=dgamma,
        dbeta=dbeta,
    )
    keeps = [*call.keeps, kept_o, kept_dout, kept_also]
    return NormBackward(do, dgamma, dbeta, call._replace(keeps=keeps))
