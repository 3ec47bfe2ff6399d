"""A whole layer's forward in Triton: query, key and value from a feature map, and what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.backends.triton.attention import attend_with
from ela_kernels.backends.triton.norm import statistics_of
from ela_kernels.backends.triton.producer import produce
from ela_kernels.backends.types import Filters, LayerForward


def retrieve(
    x: Tensor,
    filters: Filters,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    has_residual: bool,
    wants_statistics: bool,
    tolerance: float,
) -> LayerForward:
    """Query, key and value from `x` in two launches, and what the query retrieves in one or two more.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    mean, q, k, v = produce(x, filters)
    if q is None:
        return LayerForward(mean, None, k, v)
    out, weights, kl, moments = attend_with(
        q,
        (*keys, k),
        (*values, v),
        heads,
        scale,
        prev_weights,
        False,
        x if has_residual else None,
        wants_statistics,
        tolerance,
    )
    statistics = None if moments is None else statistics_of(moments)
    return LayerForward(mean, q, k, v, out, weights, kl, None, statistics)
