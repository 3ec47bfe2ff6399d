"""A whole layer's forward on the CUDA kernels: query, key and value from a feature map, and what they retrieve."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.backends.cuda.layer_attention import attend_produced, rows_of
from ela_kernels.backends.cuda.norm import statistics_of
from ela_kernels.backends.cuda.producer import produce
from ela_kernels.backends.gpu_tables import check_produced
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
    """Value and the sums of the mean from `x` in one launch; query, key and what the query retrieves in the next ones.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    check_produced(x, filters)
    v, sums = produce(x, filters.wv)
    positions = x.shape[2] * x.shape[3]
    if filters.wq is None:
        mean, _, k = rows_of(sums, positions, filters)
        return LayerForward(mean, None, k, v)
    mean, q, k, out, weights, kl, moments = attend_produced(
        sums,
        positions,
        filters,
        keys,
        (*values, v),
        heads,
        scale,
        prev_weights,
        x if has_residual else None,
        wants_statistics,
        tolerance,
    )
    statistics = None if moments is None else statistics_of(moments)
    return LayerForward(mean, q, k, v, out, weights, kl, None, statistics)
