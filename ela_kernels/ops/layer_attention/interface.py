"""The public functions: checks, choice of backend, call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.dispatch import kernels_for, why_eager
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.memory import check_not_freed
from ela_kernels.backends.tracing import needs_dispatcher
from ela_kernels.explaining import refused, retrieved, served, served_without_kernels
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import autocast_inputs, is_autocast_on
from ela_kernels.ops.layer_attention.autograd import layer_attention_autograd
from ela_kernels.ops.layer_attention.reference import (
    divergence_reference,
    layer_attention_reference,
    log_weights_reference,
)


class LayerAttentionOutput(NamedTuple):
    """What a layer retrieves, how, and how much that differs from the layer before."""

    out: Tensor
    weights: Tensor
    kl: Tensor | None


class LayerAttentionWeights(NamedTuple):
    """Attention weights over depth and their divergence from the layer before."""

    weights: Tensor
    kl: Tensor | None


def layer_attention(
    q: Tensor,
    keys: Sequence[Tensor] | Tensor,
    values: Sequence[Tensor] | Tensor,
    heads: int,
    scale: float | None = None,
    prev_weights: Tensor | None = None,
    channels_last: bool = False,
    tolerance: float = 0.0,
) -> LayerAttentionOutput:
    r"""Retrieve from the feature maps of all layers so far, and measure how new that retrieval is.

    Equivalent PyTorch, for values `[B, C, H, W]`::

        k = torch.stack(keys, 1).unflatten(2, (heads, -1))             # [B, T, G, D]
        s = scale * torch.einsum("bgd,btgd->bgt", q.unflatten(1, (heads, -1)), k)
        weights = s.softmax(-1)                                          # [B, G, T]
        v = torch.stack(values, 1).unflatten(2, (heads, -1))           # [B, T, G, D, H, W]
        out = torch.einsum("bgt,btgdhw->bgdhw", weights, v).flatten(1, 2)
        p = F.pad(prev_weights, (0, T - prev_weights.shape[-1]))
        kl = torch.where(p > 0, p * (p.log() - s.log_softmax(-1)), 0).sum(-1)  # [B, G]

    One pass over the values: nothing is concatenated, and the divergence reads no value again.

    Args:
        q: query of this layer, `[B, C]`; float64, float32, bfloat16 or float16.
        keys: T keys `[B, C]`, this layer's own last, or one stacked tensor `[B, T, C]`.
        values: T feature maps `[B, C, *spatial]` in any memory format, or `[B, *spatial, C]` (tokens:
            `[B, N, C]`) with `channels_last=True`, or one stacked tensor `[B, T, ...]`.
        heads: G, a divisor of C; channel c belongs to head c // (C / G). `heads=C` is the channel-wise form.
        scale: factor of the scores; `1 / sqrt(C / G)` if None.
        prev_weights: `weights` of the last layer that retrieved, `[B, G, t']` with t' <= T.
        channels_last: the last dimension of the values is the channel.
        tolerance: retrievals of a smaller weight are left out, for each sample and head, and their values not read:
            `out = torch.einsum("bgt,btgdhw->bgdhw", weights.where(weights >= tolerance, 0), v)`, with the gradient of
            that, in which the terms left out are constant zeros, whatever their values are (infinite ones too).
            `out` is then at most `T * tolerance * max(|v|)` from what it is without; `weights` and `kl` are the same.
            0 leaves out nothing.

    Returns:
        `out`, shape and dtype of one value; `weights` `[B, G, T]`, which sum to 1 over T; `kl` `[B, G]`, in
        nats, or None without `prev_weights`. `weights` and `kl` are float32 (float64 for float64 inputs). All
        three are differentiable.

    Raises:
        TypeError: not a tensor, an integer or sparse tensor, or mixed dtypes.
        ValueError: shapes, heads or devices that do not fit, an empty sequence, or a forced backend that
            cannot serve the call.

    Source:
        Layer attention: MRLA (arXiv 2302.03985), equations 4 to 6, base form. The use of the KL divergence
        between adjacent layers: ELA (arXiv 2503.06473); its direction, previous to current with the previous
        weights padded by zeros, is our definition.
    """
    tolerance = checks.check_tolerance(tolerance)
    found = retrieve(q, keys, values, heads, scale, prev_weights, channels_last, tolerance)
    retrieved(found.weights, tolerance)
    return found


def retrieve(
    q: Tensor,
    keys: Sequence[Tensor] | Tensor,
    values: Sequence[Tensor] | Tensor,
    heads: int,
    scale: float | None,
    prev_weights: Tensor | None,
    channels_last: bool,
    tolerance: float,
    caller: Any = None,
) -> LayerAttentionOutput:
    """:func:`layer_attention` for the layer `caller`, whose history has no pull form for it."""
    q = checks.check_query(q)
    if is_autocast_on(q):
        q, keys, values = autocast_inputs(q, keys, values)
    key_list = checks.check_keys(keys, q)
    heads = checks.check_heads(heads, q.shape[1])
    scale = checks.check_scale(scale, q.shape[1] // heads)
    value_list = checks.check_values(values, q, len(key_list), channels_last)
    prev = checks.check_prev_weights(
        prev_weights, q, heads, len(key_list), accumulate_dtype(q.dtype)
    )
    backend = None
    if not torch.compiler.is_compiling():
        backend = kernels_for("layer_attention", q, len(key_list))
        if backend is None:
            refused(
                caller,
                "op" if caller is None else "push",
                why_eager("layer_attention", q, len(key_list)),
            )
            served_without_kernels(caller, "eager")
            check_not_freed("q", q)
            check_not_freed("keys", *key_list)
            check_not_freed("values", *value_list)
            check_not_freed("prev_weights", prev)
            return LayerAttentionOutput(
                *layer_attention_reference(
                    q, key_list, value_list, heads, scale, prev, channels_last, tolerance
                )
            )
        served(caller, "op" if caller is None else "push", backend.name)
    return LayerAttentionOutput(
        *layer_attention_autograd(
            q, key_list, value_list, heads, scale, prev, channels_last, backend, tolerance
        )
    )


def layer_attention_weights(
    q: Tensor,
    keys: Sequence[Tensor] | Tensor,
    heads: int,
    scale: float | None = None,
    prev_weights: Tensor | None = None,
) -> LayerAttentionWeights:
    """The weights-only pass: scores, softmax and divergence from q and keys alone; no value is read.

    Equivalent PyTorch: the lines of :func:`layer_attention` without `out`. Used to look again at a layer
    whose retrieval is skipped.

    Args:
        q: query of this layer, `[B, C]`.
        keys: T keys `[B, C]`, this layer's own last, or one stacked tensor `[B, T, C]`.
        heads: G, a divisor of C.
        scale: factor of the scores; `1 / sqrt(C / G)` if None.
        prev_weights: `weights` of the last layer that retrieved, `[B, G, t']` with t' <= T.

    Returns:
        `weights` `[B, G, T]` and `kl` `[B, G]` (None without `prev_weights`), float32 (float64 for float64).
        The kernels have no backward: where an input requires grad, eager PyTorch serves the call, and a forced
        backend refuses it.

    Raises:
        TypeError, ValueError: as :func:`layer_attention`.

    Source:
        As :func:`layer_attention`.
    """
    q = checks.check_query(q)
    if is_autocast_on(q):
        q, keys, _ = autocast_inputs(q, keys, ())
    key_list = checks.check_keys(keys, q)
    heads = checks.check_heads(heads, q.shape[1])
    scale = checks.check_scale(scale, q.shape[1] // heads)
    depth = len(key_list)
    prev = checks.check_prev_weights(prev_weights, q, heads, depth, accumulate_dtype(q.dtype))
    if not needs_dispatcher(q):
        needs_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in (q, *key_list, *(() if prev is None else (prev,)))
        )
        backend = kernels_for("layer_attention_weights", q, depth, needs_grad)
        if backend is not None:
            return LayerAttentionWeights(*backend.weights(q, key_list, heads, scale, prev))
    check_not_freed("q", q)
    check_not_freed("keys", *key_list)
    check_not_freed("prev_weights", prev)
    log_weights = log_weights_reference(q, key_list, heads, scale)
    kl = None if prev is None else divergence_reference(prev, log_weights)
    return LayerAttentionWeights(log_weights.exp(), kl)
