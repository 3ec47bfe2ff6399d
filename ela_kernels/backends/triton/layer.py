"""Launches of a whole layer: query, key and value from a feature map, what they retrieve, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from ela_kernels.backends import gpu_tables as gpu
from ela_kernels.backends.triton.attention import attend
from ela_kernels.backends.triton.attention_backward import (
    backward,
    gather,
)
from ela_kernels.backends.triton.norm import (
    norm_backward,
    norm_forward,
    statistics_of,
)
from ela_kernels.backends.triton.producer import (
    produce,
    producer_backward,
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
    """Query, key and value from `x` in two launches, and what the query retrieves in one or two more.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    mean, q, k, v = produce(x, filters)
    if q is None:
        return LayerForward(mean, None, k, v, None, None, None, None)
    out, weights, kl, moments = attend(
        q,
        (*keys, k),
        (*values, v),
        heads,
        scale,
        prev_weights,
        False,
        x if has_residual else None,
        epilogue is not None and epilogue.statistics is None,
    )
    statistics = None if moments is None else statistics_of(moments)
    return LayerForward(mean, q, k, v, out, weights, kl, statistics)


layer_backward = functools.partial(gpu.layer_backward, backward, gather, producer_backward)
