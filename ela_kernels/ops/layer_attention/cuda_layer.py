"""A whole layer on the CUDA kernels: query, key and value from a feature map, what they retrieve, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.ops.layer_attention.cuda import backward, gather
from ela_kernels.ops.layer_attention.cuda_attend import attend_produced, rows_of
from ela_kernels.ops.layer_attention.cuda_norm import norm_backward, norm_forward, statistics_of
from ela_kernels.ops.layer_attention.cuda_producer import produce, produce_backward
from ela_kernels.ops.layer_attention.gpu import Retrieved
from ela_kernels.ops.layer_attention.kernels import dense, resolved
from ela_kernels.ops.layer_attention.layer_kernels import (
    Attended,
    Epilogue,
    Filters,
    LayerForward,
    LayerGradients,
)
from ela_kernels.ops.layer_attention.layout import in_form, is_interleaved

__all__ = ["layer_backward", "layer_forward", "norm_backward", "norm_forward", "readable"]


def readable(x: Tensor) -> Tensor:
    """`x` itself where the kernels can read it, else a compact copy."""
    return in_form(x, False, is_interleaved(x, False))


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


def layer_backward(
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    heads: int,
    index: int,
    own: Attended | None,
    retrieved: Sequence[Retrieved],
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: Sequence[bool],
    pending: None = None,
) -> LayerGradients:
    """All gradients of the layer at `index`: its attention's, the gathered ones of key and value, and those before.

    Args:
        own: its attention, where a gradient arrived through it.
        retrieved: what the layers that retrieved this one left, this one included if it did.
        dk, dv: gradients of key and value from elsewhere, if there are any.
        residual: what arrives past the retrieval, added to the gradient of `x`.
        needs: of x, wq, wk, wv.
    """
    need_x, need_wq, need_wk, need_wv = needs
    dq = dprev = None
    if own is not None:
        found = backward(
            own.saved,
            own.dout,
            own.dweights,
            own.dkl,
            need_x or need_wq,
            own.need_prev,
            into=own.dscores,
        )
        dq, dprev = found.dq, found.dprev
    need_key, need_value = need_x or need_wk, need_x or need_wv
    if retrieved:
        more_dk, more_dv = gather(retrieved, index, heads, False, need_key, need_value)
        dk, dv = _sum(dk, more_dk), _sum(dv, more_dv)
    dk = dense(dk) if need_key else None
    dv = resolved(dv) if need_value and dv is not None else None
    return LayerGradients(*produce_backward(x, filters, mean, dq, dk, dv, residual, needs), dprev)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
