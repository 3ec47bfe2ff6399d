"""Layer attention in plain PyTorch: what every kernel is compared with, and the fallback.

Readable before fast. Differentiable twice, on any device, in any memory format.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.ops.autograd.saved_tensors import past_hooks


def log_weights_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    heads: int,
    scale: float,
    given: Sequence[Tensor | None] = (),
) -> Tensor:
    """Logarithm of the attention weights over depth, `[B, G, T]`, in the accumulation dtype.

    `given`: for each key a boolean of no dimension that says whether it is there; None for one that always is.
    """
    dtype = accumulate_dtype(q.dtype)
    query = q.to(dtype).unflatten(1, (heads, -1)).unsqueeze(2)  # [B, G, 1, D]
    # Multiplied and summed, not a matrix product: autocast would take that to half precision.
    scores = scale * (query * _by_head(keys, heads, dtype)).sum(-1)  # [B, G, T]
    if any(is_given is not None for is_given in given):
        always = torch.ones((), dtype=torch.bool, device=q.device)
        there = torch.stack([always if is_given is None else is_given for is_given in given])
        scores = scores.masked_fill(~there, -torch.inf)
    return torch.log_softmax(scores, dim=-1)


def _by_head(rows: Sequence[Tensor], heads: int, dtype: torch.dtype) -> Tensor:
    """T keys `[B, C]` as `[B, G, T, D]`."""
    stacked = torch.stack(tuple(rows), dim=1).to(dtype)  # [B, T, C]
    by_head: Tensor = stacked.unflatten(2, (heads, -1)).transpose(1, 2)
    return by_head


def divergence_reference(prev_weights: Tensor, log_weights: Tensor) -> Tensor:
    """KL(prev_weights, padded with zeros || exp(log_weights)), `[B, G]`: our definition of the direction.

    A zero of `prev_weights` contributes zero, to the value and to both gradients.
    """
    with past_hooks():
        prev = prev_weights.to(log_weights.dtype)
        shared = log_weights[..., : prev.shape[-1]]
        is_zero = prev == 0
        safe = prev.masked_fill(is_zero, 1.0)
        terms = safe * (safe.log() - shared)
        return terms.masked_fill(is_zero, 0.0).sum(dim=-1)


def is_left_out(weights: Tensor, tolerance: float) -> Tensor:
    """Which weights are below the tolerance. A NaN is not: what it is multiplied with shows it."""
    return weights < tolerance


def aggregate_reference(
    weights: Tensor, values: Sequence[Tensor], channels_last: bool, tolerance: float = 0.0
) -> Tensor:
    """`sum_j weights[:, g(c), j] * values[j][:, c]`, shape, dtype and memory format of the values.

    With a tolerance above zero the sum is over weights that are not below it; the others are as a constant zero.
    """
    heads = weights.shape[1]
    last = values[-1]
    channels = last.shape[-1] if channels_last else last.shape[1]
    per_channel = weights.repeat_interleave(channels // heads, dim=1)  # [B, C, T]
    shape = [last.shape[0]] + [1] * (last.dim() - 1)
    shape[-1 if channels_last else 1] = channels
    total: Tensor | None = None
    for j, value in enumerate(values):
        weight = per_channel[..., j].reshape(shape)
        if tolerance > 0:
            # Not the weight: a value that is not read may be infinite, or its gradient. By masked_fill it would lose
            # its memory format.
            value = torch.where(is_left_out(weight, tolerance), 0.0, value)
        term = weight * value.to(weights.dtype)
        total = term if total is None else total + term
    assert total is not None  # the public functions refuse an empty history
    return total.to(last.dtype)


def dots_reference(
    dout: Tensor, values: Sequence[Tensor], heads: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """`<dout, values[j]>` of each sample and head, `[B, G, T]` in `dtype`: the gradient of the weights of a sum."""
    channel_dim = -1 if channels_last else 1
    dots = []
    for value in values:
        products = (dout.to(dtype) * value.to(dtype)).movedim(channel_dim, 1)
        of_channels = products if products.dim() == 2 else products.flatten(2).sum(2)
        dots.append(of_channels.unflatten(1, (heads, -1)).sum(2))  # [B, G]
    return torch.stack(dots, dim=-1)


def layer_attention_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None = None,
    channels_last: bool = False,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` as :func:`ela_kernels.layer_attention` defines them."""
    log_weights = log_weights_reference(q, keys, heads, scale)
    weights = log_weights.exp()
    kl = None if prev_weights is None else divergence_reference(prev_weights, log_weights)
    return aggregate_reference(weights, values, channels_last, tolerance), weights, kl


def layer_attention_backward_reference(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """`(dq, dkeys, dvalues, dprev_weights)` by hand: what the kernels compute, in a form to read."""
    dtype = weights.dtype
    total = torch.zeros_like(weights) if dweights is None else dweights  # gradient of the weights
    dvalues = [torch.zeros_like(v) for v in values]
    if dout is not None:
        dots = dots_reference(dout, values, heads, dtype, channels_last)
        if tolerance > 0:
            dots = dots.masked_fill(is_left_out(weights, tolerance), 0.0)
        total = total + dots
        dvalues = [
            aggregate_reference(weights[..., j : j + 1], [dout], channels_last, tolerance)
            for j in range(len(values))
        ]
    # Softmax, then the divergence's own part: d kl / d s = mass of prev * weights - prev.
    dscores = weights * (total - (weights * total).sum(-1, keepdim=True))
    dprev = None
    if prev_weights is not None and dkl is not None:
        padded = torch.nn.functional.pad(
            prev_weights, (0, weights.shape[-1] - prev_weights.shape[-1])
        )
        mass = prev_weights.sum(-1, keepdim=True)
        dscores = dscores + dkl.unsqueeze(-1) * (mass * weights - padded)
        shared = log_weights_reference(q, keys, heads, scale)[..., : prev_weights.shape[-1]]
        dprev = dkl.unsqueeze(-1) * (prev_weights.log() + 1 - shared)
        dprev = dprev.masked_fill(prev_weights == 0, 0.0)
    dscores = (scale * dscores).unsqueeze(-1)  # [B, G, T, 1]
    dq = (dscores * _by_head(keys, heads, dtype)).sum(2).flatten(1).to(q.dtype)
    dkeys = (dscores * q.to(dtype).unflatten(1, (heads, 1, -1))).to(q.dtype)  # [B, G, T, D]
    return dq, [d.flatten(1) for d in dkeys.unbind(2)], dvalues, dprev
