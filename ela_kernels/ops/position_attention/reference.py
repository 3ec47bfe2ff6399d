"""Attention over depth at every position in plain PyTorch: what every kernel is compared with, and the fallback.

Readable before fast. Differentiable twice, on any device, in any memory format.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.position import PositionCall
from ela_kernels.ops.autograd.saved_tensors import past_hooks

Outputs = tuple[Tensor, Tensor, Tensor | None]


def channel_of(channels_last: bool) -> int:
    """The dimension of the channels."""
    return -1 if channels_last else 1


def direction_reference(call: PositionCall) -> Tensor:
    """What a key is multiplied with: `row`, shaped to the values' channels, times the query where that is a map."""
    value = call.values[-1]
    shape = [1] * value.dim()
    shape[channel_of(call.channels_last)] = -1
    row = call.row.reshape(shape)
    return row if call.query is None else row * call.query.to(row.dtype)


def inverse_rms_reference(key: Tensor, channels_last: bool, eps: float) -> Tensor:
    """`1 / sqrt(mean(key^2) + eps)` over the channels, `[B, *positions]`."""
    key = key.to(accumulate_dtype(key.dtype))
    return (key.square().mean(channel_of(channels_last)) + eps).rsqrt()


def scores_reference(call: PositionCall) -> Tensor:
    """Scores over depth at every position, `[B, T, *positions]`, in the accumulation dtype."""
    direction = direction_reference(call)
    dim = channel_of(call.channels_last)
    scores = []
    for key in call.values if call.keys is None else call.keys:
        score = (direction * key.to(direction.dtype)).sum(dim)
        if call.normed:
            score = score * inverse_rms_reference(key, call.channels_last, call.eps)
        scores.append(score)
    return torch.stack(scores, dim=1)


def divergence_over_depth_reference(prev_weights: Tensor, log_weights: Tensor) -> Tensor:
    """KL(prev_weights, padded with zeros || exp(log_weights)) over dimension 1.

    Direction and zeros are those of layer attention: previous to current, a zero of `prev_weights` contributes zero, to
    the value and to both gradients.
    """
    with past_hooks():
        prev = prev_weights.to(log_weights.dtype)
        shared = log_weights[:, : prev.shape[1]]
        is_zero = prev == 0
        safe = prev.masked_fill(is_zero, 1.0)
        terms = safe * (safe.log() - shared)
        return terms.masked_fill(is_zero, 0.0).sum(dim=1)


def aggregate_over_depth_reference(
    weights: Tensor, values: Sequence[Tensor], channels_last: bool
) -> Tensor:
    """`sum_t weights[:, t] * values[t]`, summed in the accumulation dtype, rounded once."""
    dim = channel_of(channels_last)
    total: Tensor | None = None
    for t, value in enumerate(values):
        term = weights[:, t].unsqueeze(dim) * value.to(weights.dtype)
        total = term if total is None else total + term
    assert total is not None  # the public functions refuse an empty sequence
    return total.to(values[-1].dtype)


def position_attention_reference(call: PositionCall) -> Outputs:
    """`(out, weights, kl)` as :func:`ela_kernels.position_attention` defines them."""
    as_value, dtype = call.values[-1].dtype, call.row.dtype
    # Widened once: what comes back to a value from its score and from the sum is added before it is rounded.
    call = call._replace(
        query=None if call.query is None else call.query.to(dtype),
        values=[v.to(dtype) for v in call.values],
        keys=None if call.keys is None else [k.to(dtype) for k in call.keys],
    )
    log_weights = torch.log_softmax(scores_reference(call), dim=1)
    weights = log_weights.exp()
    kl = None
    if call.prev_weights is not None:
        kl = divergence_over_depth_reference(call.prev_weights, log_weights)
    out = aggregate_over_depth_reference(weights, call.values, call.channels_last)
    return out.to(as_value), weights, kl


def position_attention_backward_reference(
    call: PositionCall,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor], Tensor | None]:
    """`(drow, dquery, dvalues, dkeys, dprev_weights)` by hand: what the kernels compute, in a form to read.

    `dkeys` is empty where the keys are the values, whose gradients then hold both parts.
    """
    dtype, dim = weights.dtype, channel_of(call.channels_last)
    total = torch.zeros_like(weights) if dweights is None else dweights.to(dtype)
    dvalues = [torch.zeros_like(v, dtype=dtype) for v in call.values]
    if dout is not None:
        wide = dout.to(dtype)
        total = total + torch.stack([(wide * v.to(dtype)).sum(dim) for v in call.values], dim=1)
        dvalues = [weights[:, t].unsqueeze(dim) * wide for t in range(len(call.values))]
    # Softmax, then the divergence's own part: d kl / d s = mass of prev * weights - prev.
    dscores = weights * (total - (weights * total).sum(1, keepdim=True))
    scores = scores_reference(call)
    dprev = None
    prev = call.prev_weights
    if prev is not None and dkl is not None:
        there = prev.shape[1]
        mass = prev.sum(1, keepdim=True)
        dscores = dscores + dkl.unsqueeze(1) * mass * weights
        dscores = torch.cat(
            (dscores[:, :there] - dkl.unsqueeze(1) * prev, dscores[:, there:]), dim=1
        )
        shared = torch.log_softmax(scores, dim=1)[:, :there]
        dprev = (dkl.unsqueeze(1) * (prev.log() + 1 - shared)).masked_fill(prev == 0, 0.0)
    direction = direction_reference(call)
    keys = call.values if call.keys is None else call.keys
    dkeys = []
    towards = torch.zeros_like(call.values[-1], dtype=dtype)  # gradient of the direction
    for t, key in enumerate(keys):
        dscore, wide = dscores[:, t].unsqueeze(dim), key.to(dtype)
        if call.normed:
            inverse = inverse_rms_reference(key, call.channels_last, call.eps).unsqueeze(dim)
            shrink = inverse.square() * scores[:, t].unsqueeze(dim) / key.shape[dim]
            towards = towards + dscore * inverse * wide
            dkeys.append(dscore * (inverse * direction - shrink * wide))
        else:
            towards = towards + dscore * wide
            dkeys.append(dscore * direction)
    if call.keys is None:
        dvalues = [of_out + of_score for of_out, of_score in zip(dvalues, dkeys, strict=True)]
        dkeys = []
    dquery, of_row = None, towards
    if call.query is not None:
        shape = [1] * key.dim()
        shape[dim] = -1
        dquery = (towards * call.row.reshape(shape)).to(call.query.dtype)
        of_row = towards * call.query.to(dtype)
    drow = of_row.movedim(dim, -1).flatten(0, -2).sum(0)
    as_value = call.values[-1].dtype
    return (
        drow,
        dquery,
        [d.to(as_value) for d in dvalues],
        [d.to(as_value) for d in dkeys],
        dprev,
    )
