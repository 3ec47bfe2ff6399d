"""A whole layer on the CUDA kernels: query, key and value from a feature map, what they retrieve, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from ela_kernels.backends import gpu_tables as gpu
from ela_kernels.backends.cuda.attend import (
    attend_produced,
    rows_of,
)
from ela_kernels.backends.cuda.attention import (
    backward,
    gather,
)
from ela_kernels.backends.cuda.norm import (
    norm_backward,
    norm_forward,
    statistics_of,
)
from ela_kernels.backends.cuda.producer import (
    produce,
    produce_backward,
)
from ela_kernels.backends.types import (
    Epilogue,
    Filters,
    LayerForward,
)

__all__ = ["layer_backward", "layer_forward", "norm_backward", "norm_forward"]


def layer_forward(
    x: Tensor,
    filters: Filters,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    has_residual: bool,
    epilogue: Epilogue | None = None,
    keeps_out: bool = True,
) -> LayerForward:
    """Value and the sums of the mean from `x` in one launch; query, key and what the query retrieves in the next ones.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    gpu.check_produced(x, filters)
    v, sums = produce(x, filters.wv)
    positions = x.shape[2] * x.shape[3]
    if filters.wq is None:
        mean, _, k = rows_of(sums, positions, filters)
        return LayerForward(mean, None, k, v, None, None, None, None)
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
        epilogue is not None and epilogue.statistics is None,
    )
    statistics = None if moments is None else statistics_of(moments)
    return LayerForward(mean, q, k, v, out, weights, kl, statistics)


layer_backward = functools.partial(gpu.layer_backward, backward, gather, produce_backward)
