"""The glue to the CUDA kernels of a layer's rows, its query and key, and of an attention that makes them itself.

As in `attention.py`, every call takes the current stream, allocates before its launches and waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.cuda.norm import Moments, parameter, parameter_view
from ela_kernels.backends.gpu_tables import (
    Sizes,
    alike_maps,
    alike_rows,
    compact_strides,
    new_divergence,
    new_weights,
)
from ela_kernels.backends.layout import dense, empty_map, is_interleaved, kernel_sizes
from ela_kernels.backends.memory import address, addresses, check_readable
from ela_kernels.backends.types import Filters

__all__ = ["attend_produced", "rows_of"]

_NAMES = ("sums of x", "Wq", "Wk", "keys", "values", "prev_weights")


def _readable(filters: Filters) -> Filters:
    wk = parameter(filters.wk)
    assert wk is not None
    return filters._replace(wq=parameter(filters.wq), wk=wk)


def _new_rows(
    sums: Tensor, filters: Filters, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor, Any]:
    """Mean, query and key, unwritten, and what a call takes for all that the rows are made of."""
    batch, groups, channels = sums.shape
    mean, k = (sums.new_empty((batch, channels), dtype=dtype) for _ in range(2))
    q = None if filters.wq is None else torch.empty_like(mean)
    rows = cuda._kernels().cuda_row_group(
        sums=address(sums),
        groups=groups,
        wq=parameter_view(filters.wq),
        wk=parameter_view(filters.wk),
        filter_size=filters.wk.numel(),
        mean=address(mean),
        query=address(q),
        key=address(k),
    )
    return mean, q, k, rows


def rows_of(
    sums: Tensor, positions: int, filters: Filters, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(mean, q, k)` in one launch, of `dtype` (of `filters.wv` where left out); q is None without `filters.wq`.

    Args:
        sums: float32 `[B, groups, C]`, of `positions` numbers in all groups together.
    """
    dtype = filters.wv.dtype if dtype is None else dtype
    check_readable(sums.get_device(), _NAMES, (sums, *filters[:2], None, None, None))
    sums, filters = sums.contiguous(), _readable(filters)
    batch, _, channels = sums.shape
    mean, q, k, rows = _new_rows(sums, filters, dtype)
    cuda._launched(
        cuda._kernels().cuda_rows(
            cuda._device(sums),
            cuda._DTYPE_CODES[dtype],
            sizes=(batch, channels, 1, positions, 0),
            rows=rows,
        )
    )
    return mean, q, k


@functools.lru_cache(maxsize=1024)
def _moments(dtype: int, sizes: Sizes, sources: int) -> int:
    return int(cuda._kernels().cuda_attend_moments(dtype, sizes=sizes, sources=sources))


def attend_produced(
    sums: Tensor,
    positions: int,
    filters: Filters,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    residual: Tensor | None,
    wants_statistics: bool,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Moments | None]:
    """`(mean, q, k, out, weights, kl, moments)`: what a layer retrieves, from the sums that its producer left.

    One launch; two or three where each block's share of rows and scores would cost too much (see
    layer_attention_plan.h).

    Args:
        sums: float32 `[B, groups, C]`, over the positions of the maps.
        keys, values: keys of the layers before, values with this layer's own last; maps `[B, C, H, W]`.
        residual: a map to be added before `out` is rounded.
        wants_statistics: whether moments of `out` are wanted, for `cuda_norm.statistics_of`.
        tolerance: values of a smaller weight are left out, the residual never.
    """
    last = values[-1]
    given = (sums, *filters[:2], keys[0] if keys else None, last, prev_weights)
    check_readable(last.get_device(), _NAMES, given)
    dtype = last.dtype
    interleaved = is_interleaved(last, False)
    sizes = kernel_sizes(last, heads, False, interleaved)
    assert sizes[3] == positions
    sums, filters = sums.contiguous(), _readable(filters)
    mean, q, k, rows = _new_rows(sums, filters, dtype)
    assert q is not None
    # A new row is contiguous, so it is never one that is copied.
    (*keys, own), key_stride = alike_rows((*keys, k))
    assert own is k
    maps = values if residual is None else (*values, residual)
    maps, strides = alike_maps(maps, False, interleaved)
    out = empty_map(last, False, interleaved)
    weights = new_weights(q, heads, len(values))
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    partial = None
    if wants_statistics:
        elements = _moments(cuda._DTYPE_CODES[dtype], sizes, len(maps))
        partial = torch.empty(elements, dtype=torch.float32, device=last.device)
    attention = cuda._kernels().cuda_attention(
        scale=scale,
        tolerance=tolerance,
        query=address(q),
        query_stride=sizes[1],
        keys=addresses(keys),
        key_stride=key_stride,
        values=addresses(maps[: len(values)]),
        value_strides=strides,
        prev=address(prev_weights),
        prev_depth=0 if prev_weights is None else prev_weights.shape[2],
        weights=address(weights),
    )
    code, chunks, span = cuda._kernels().cuda_attend(
        cuda._device(last),
        cuda._DTYPE_CODES[dtype],
        sizes=sizes,
        rows=rows,
        attention=attention,
        residual=0 if residual is None else address(maps[-1]),
        kl=address(kl),
        out=(address(out), *compact_strides(sizes)),
        moments=address(partial),
    )
    cuda._launched(code)
    moments = None if partial is None else Moments(partial, sizes, chunks, span)
    return mean, q, k, out, weights, kl, moments
