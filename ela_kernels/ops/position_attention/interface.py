"""The public function: checks, choice of backend, call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.dispatch import kernels_for, why_eager
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.memory import check_not_freed
from ela_kernels.backends.position import PositionCall
from ela_kernels.explaining import refused, served, served_without_kernels
from ela_kernels.ops.autocast import as_autocast_dtype, is_autocast_on
from ela_kernels.ops.position_attention import checks
from ela_kernels.ops.position_attention.autograd import OP, position_attention_autograd
from ela_kernels.ops.position_attention.reference import Outputs, position_attention_reference


class PositionAttentionOutput(NamedTuple):
    """What every position retrieves, how, and how much that differs from the layer before."""

    out: Tensor
    weights: Tensor
    kl: Tensor | None
    kl_mean: Tensor | None


def position_attention(
    query: Tensor,
    values: Sequence[Tensor],
    keys: Sequence[Tensor] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = checks.DEFAULT_EPS,
    scale: float | None = None,
    prev_weights: Tensor | None = None,
    channels_last: bool | None = None,
) -> PositionAttentionOutput:
    r"""Retrieve from all layers so far at every position: a softmax over depth of query times key.

    With a learned `query` `[C]` and no `keys` this is the aggregation of attention residuals.

    Equivalent PyTorch, for tokens `[B, N, C]`::

        v = torch.stack(values, 1)                                           # [B, T, N, C]
        k = F.rms_norm(v, (C,), norm_weight, eps)                            # or torch.stack(keys, 1)
        s = scale * (query.unsqueeze(1) * k).sum(-1) if query.dim() > 1 else scale * (k @ query)   # [B, T, N]
        weights = s.softmax(1)
        out = torch.einsum("btn,btnc->bnc", weights, v)
        p = F.pad(prev_weights, (0, 0, 0, T - prev_weights.shape[1]))
        kl = torch.where(p > 0, p * (p.log() - s.log_softmax(1)), 0).sum(1)  # [B, N]
        kl_mean = kl.mean(1)                                                 # [B]

    One pass over the values: nothing is concatenated, norms and scores come from the same read of a value as the sum,
    and no more than the weights is kept for the backward. Any depth.

    Args:
        query: one vector `[C]` for all positions, or a query for each, of the values' shape.
        values: a list of T tensors of one shape: tokens `[B, N, C]`, or maps `[B, C, H, W]` in any memory format;
            float64, float32, bfloat16 or float16.
        keys: T tensors like the values. None: each value, divided by its root mean square over the channels.
        norm_weight: `[C]`, a factor of the normalised keys. With `keys` it says besides that these are to be
            normalised too; without it given keys are taken as they are.
        eps: added to the mean square of a key.
        scale: factor of the scores; 1 if None, as in the paper.
        prev_weights: `weights` of the last layer that retrieved, `[B, t, *positions]` with t <= T.
        channels_last: whether the last dimension of a value is the channel. None: of tensors of three dimensions,
            which are tokens; else the second one is.

    Vectors may be in float32 beside values of half precision. Norms, scores, weights and sums are computed in float32
    then, and `out` is rounded once.

    Returns:
        `out`, shape and dtype of one value; `weights` `[B, T, *positions]`, which sum to 1 over T; `kl`
        `[B, *positions]`, the divergence of the previous weights, padded by zeros, from these, in nats; and `kl_mean`
        `[B]`, its mean over a sample's positions (NaN where there is none). The last two are None without
        `prev_weights`. All but `out` are float32 (float64 for float64 inputs). All four are differentiable.

    Raises:
        TypeError: not a tensor, an integer or sparse tensor, mixed dtypes, or one tensor in place of a list.
        ValueError: shapes or devices that do not fit, an empty sequence, or a forced backend that cannot serve the
            call.

    Source:
        Attention Residuals (Kimi Team, arXiv 2603.15031): `phi(q, k) = exp(q^T RMSNorm(k))`, keys that are the values.
        Queries for each position, given keys, maps and the divergence are our definitions; the divergence has the
        direction of :func:`ela_kernels.layer_attention`.
    """
    return retrieve(query, values, keys, norm_weight, eps, scale, prev_weights, channels_last, None)


def retrieve(
    query: Tensor,
    values: Sequence[Tensor],
    keys: Sequence[Tensor] | None,
    norm_weight: Tensor | None,
    eps: float,
    scale: float | None,
    prev_weights: Tensor | None,
    channels_last: bool | None,
    caller: Any,
) -> PositionAttentionOutput:
    """:func:`position_attention` for the layer `caller`."""
    call = checked_call(query, values, keys, norm_weight, eps, scale, prev_weights, channels_last)
    last, depth = call.values[-1], len(call.values)
    backend, form = None, "op" if caller is None else "push"
    if not torch.compiler.is_compiling():
        backend = kernels_for(OP, last, depth)
        if backend is None:
            refused(caller, form, why_eager(OP, last, depth))
            served_without_kernels(caller, "eager")
            check_call_not_freed(call)
            return with_mean(position_attention_reference(call))
        served(caller, form, backend.name)
    return with_mean(position_attention_autograd(call, backend))


def with_mean(found: Outputs) -> PositionAttentionOutput:
    out, weights, kl = found
    return PositionAttentionOutput(
        out, weights, kl, None if kl is None else kl.flatten(1).mean(1) if kl.dim() > 1 else kl
    )


def check_call_not_freed(call: PositionCall) -> None:
    check_not_freed("query", call.row, call.query)
    check_not_freed("values", *call.values)
    check_not_freed("keys", *(call.keys or ()))
    check_not_freed("prev_weights", call.prev_weights)


def checked_call(
    query: object,
    values: object,
    keys: object,
    norm_weight: object,
    eps: object,
    scale: object,
    prev_weights: object,
    channels_last: object,
) -> PositionCall:
    """The call as the kernels know it: scale, norm weight and a query that is a vector in one row of factors."""
    query, values, keys = _cast(query, values, keys)
    value_list = checks.check_maps("values", values)
    key_list = None if keys is None else checks.check_maps("keys", keys)
    first, depth = value_list[0], len(value_list)
    if key_list is not None:
        if len(key_list) != depth:
            raise ValueError(
                f"keys: got {len(key_list)} tensors for {depth} values; allowed is one key for each value, or None"
            )
        checks.check_like("keys[0]", key_list[0], first, "values[0]")
    last = checks.check_channels_last(channels_last, first)
    channels = first.shape[-1 if last else 1]
    query = checks.check_query(query, first, channels)
    places = list(first.shape)
    del places[-1 if last else 1]
    prev = checks.check_prev(prev_weights, first, depth, places)
    return PositionCall(
        row_of(query, norm_weight, checks.check_scale(scale), first, channels),
        None if query.dim() == 1 else query,
        value_list,
        key_list,
        key_list is None or norm_weight is not None,
        checks.check_eps(eps),
        prev,
        last,
    )


def _cast(query: object, values: object, keys: object) -> tuple[object, object, object]:
    """Maps in the dtype of autocast, where it is on; vectors stay as they are."""
    first = values[0] if isinstance(values, (tuple, list)) and values else None
    if not isinstance(first, Tensor) or not is_autocast_on(first):
        return query, values, keys
    dtype = torch.get_autocast_dtype(first.device.type)
    if isinstance(query, Tensor) and query.dim() != 1:
        query = as_autocast_dtype(query, dtype, "query")
    return query, *(as_autocast_dtype(x, dtype, n) for x, n in ((values, "values"), (keys, "keys")))


def row_of(
    query: Tensor, norm_weight: object, scale: float, first: Tensor, channels: int
) -> Tensor:
    """The factor of each channel of a normalised key, `[C]`, contiguous, in the accumulation dtype."""
    dtype = accumulate_dtype(first.dtype)
    factors = [query] if query.dim() == 1 else []
    if norm_weight is not None:
        factors.append(checks.check_vector("norm_weight", norm_weight, first, channels))
    if not factors:
        return torch.full((channels,), scale, dtype=dtype, device=first.device)
    check_not_freed("query", factors[0])
    check_not_freed("norm_weight", factors[-1])
    # A column of a matrix, say: kernels read it by its address, and a gather long after this call.
    row = factors[0].to(dtype).contiguous()
    if len(factors) == 2:
        row = row * factors[1].to(dtype)
    return row if scale == 1.0 else row * scale
