"""The glue to the CUDA kernels of a residual block's end: `x + mask * act(norm(o))`, and back.

As in `attention.py`, every call takes the current stream, allocates before its launches and waits for nothing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import (
    Sizes,
    check_norm,
    compact_strides,
    map_view,
)
from ela_kernels.backends.layout import MapView, dense, empty_map, is_interleaved, kernel_sizes
from ela_kernels.backends.memory import address, cast
from ela_kernels.backends.types import NormAct, NormGradients

__all__ = [
    "Moments",
    "norm_backward",
    "norm_forward",
    "parameter",
    "parameter_view",
    "statistics_of",
]


class Moments(NamedTuple):
    """Partial means of a map's channels and sums of squared distances from them, `[2, B * chunks, C]`, in `partial`.

    A part is `span` positions of a sample, or what is left of them. `partial` may be longer.
    """

    partial: Tensor
    sizes: Sizes
    chunks: int
    span: int


def parameter(given: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it."""
    given = dense(given)
    if given is None or given.dtype in cuda._DTYPE_CODES:
        return given
    return cast(given, torch.float32, "a parameter")


def parameter_view(parameter: Tensor | None) -> tuple[int, int]:
    """Address, 0 for none, and the code of the dtype."""
    dtype = torch.float32 if parameter is None else parameter.dtype
    return address(parameter), cuda._DTYPE_CODES[dtype]


def statistics_of(moments: Moments) -> Tensor:
    """Mean and biased variance of each channel `[2, C]` from the partial ones."""
    partial, sizes, chunks, span = moments
    statistics = torch.empty((2, sizes[1]), dtype=torch.float32, device=partial.device)
    cuda._launched(
        cuda._kernels().cuda_norm_statistics(
            cuda._device(partial),
            sizes=sizes,
            chunks=chunks,
            span=span,
            moments=address(partial),
            statistics=address(statistics),
        )
    )
    return statistics


@functools.lru_cache(maxsize=1024)
def _partials(dtype: int, sizes: Sizes) -> int:
    return int(cuda._kernels().cuda_norm_partials(dtype, sizes=sizes))


def _sizes(o: Tensor, interleaved: bool) -> Sizes:
    return kernel_sizes(o, o.shape[1], False, interleaved)


def _norm_group(
    statistics: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mask: Tensor | None,
    norm: NormAct,
) -> Any:
    return cuda._kernels().cuda_norm(
        statistics=address(statistics),
        gamma=parameter_view(gamma),
        beta=parameter_view(beta),
        mask=parameter_view(mask),
        eps=norm.eps,
        relu=norm.relu,
    )


def norm_forward(o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
    """`x + mask * act(norm(o))` in one launch."""
    check_norm(o, x, statistics, norm)
    interleaved = is_interleaved(o, False)
    sizes = _sizes(o, interleaved)
    out = empty_map(o, False, interleaved)
    if not o.numel():
        return out
    o, o_view = map_view(o, False, interleaved)
    x, x_view = map_view(x, False, interleaved)
    statistics = statistics.contiguous()
    gamma, beta, mask = (parameter(p) for p in (norm.gamma, norm.beta, norm.mask))
    cuda._launched(
        cuda._kernels().cuda_norm_forward(
            cuda._device(o),
            cuda._DTYPE_CODES[o.dtype],
            sizes=sizes,
            norm=_norm_group(statistics, gamma, beta, mask, norm),
            o=o_view,
            x=x_view,
            out=(address(out), *compact_strides(sizes)),
        )
    )
    return out


def norm_backward(
    o: Tensor, dout: Tensor, statistics: Tensor, norm: NormAct, also: Tensor | None = None
) -> NormGradients:
    """The gradients of what :func:`norm_forward` does. `also` is added to the gradient of `o`.

    Three launches with the batch's statistics, the sums first; two with given ones, or one without parameters.
    """
    check_norm(o, dout, statistics, norm, also)
    interleaved = is_interleaved(o, False)
    sizes = _sizes(o, interleaved)
    do = empty_map(o, False, interleaved)
    gamma, beta, mask = (parameter(p) for p in (norm.gamma, norm.beta, norm.mask))
    if not o.numel():
        dgamma, dbeta = (None if p is None else torch.zeros_like(p) for p in (gamma, beta))
        return NormGradients(do, dgamma, dbeta)
    dgamma, dbeta = (None if p is None else torch.empty_like(p) for p in (gamma, beta))
    o, o_view = map_view(o, False, interleaved)
    dout, dout_view = map_view(dout, False, interleaved)
    also_view: MapView = (0, 0, 0)
    if also is not None:
        also, also_view = map_view(also, False, interleaved)
    statistics = statistics.contiguous()
    partial = moved = None
    if norm.statistics is None:
        moved = torch.empty_like(statistics)
    if moved is not None or dgamma is not None or dbeta is not None:
        elements = _partials(cuda._DTYPE_CODES[o.dtype], sizes)
        partial = torch.empty(elements, dtype=torch.float32, device=o.device)
    cuda._launched(
        cuda._kernels().cuda_norm_backward(
            cuda._device(o),
            cuda._DTYPE_CODES[o.dtype],
            sizes=sizes,
            norm=_norm_group(statistics, gamma, beta, mask, norm),
            o=o_view,
            dout=dout_view,
            also=also_view,
            gradient=(address(do), *compact_strides(sizes)),
            dgamma=address(dgamma),
            dbeta=address(dbeta),
            partial=address(partial),
            moved=address(moved),
        )
    )
    return NormGradients(do, dgamma, dbeta)
