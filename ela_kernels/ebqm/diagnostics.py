"""What the report tells of a layer besides its divergence: sampled at decision points, and nothing decides by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.modules.watched import Watched
from ela_kernels.ops.layer_attention.reference import is_left_out

ADDED_LATER = frozenset({"left_out"})
"""Fields that a state of an earlier version may lack: NaN, then."""


class Diagnostics(NamedTuple):
    """One number a layer in each list, NaN where there is none.

    Attributes:
        entropy: of the layer's weights, the mean over batch and heads of `-sum_j w_j log w_j`, as a share of `log T`,
            the most that T pairs can have: 0 where all weight is on one pair, 1 where all pairs have the same.
        importance: of the block by the scale and shift of its norm, the mean over their elements of
            `(scale * dL/dscale + shift * dL/dshift) ** 2`: the square of what the loss would change, to first order, if
            the norm gave zeros.
        left_out: the share of the layer's retrievals, over batch and heads, whose weight was below its tolerance.
    """

    entropy: list[float]
    importance: list[float]
    left_out: list[float]

    @classmethod
    def none(cls, layers: int) -> Diagnostics:
        return cls(*([math.nan] * layers for _ in cls._fields))

    def keep(self, numbers: Sequence[int | None]) -> Diagnostics:
        """For other layers, each with the number that it had, or None for a new one."""
        return Diagnostics(
            *([math.nan if i is None else values[i] for i in numbers] for values in self)
        )


def take_weights(layers: Sequence[Watched]) -> list[Tensor | None]:
    """The weights that the layers kept of their last pass; they let go of them."""
    found = [layer.kept_weights for layer in layers]
    for layer, weights in zip(layers, found, strict=True):
        if weights is not None:
            layer.kept_weights = None
    return found


def mean_weights(weights: Sequence[Tensor | None]) -> list[tuple[float, ...]]:
    """Of each layer's weights `[B, G, T]` the mean over samples and heads; empty without any. Waits for the device."""
    return [
        () if w is None or not w.numel() else tuple(w.float().mean((0, 1)).tolist())
        for w in weights
    ]


def diagnosed(layers: Sequence[Watched], weights: Sequence[Tensor | None]) -> Diagnostics:
    """The present diagnostics, by the weights `[B, G, T]` and by the gradients as they are. Waits for the device."""
    count = len(layers)
    return Diagnostics(
        _on_host(_entropies(weights), count),
        _on_host(_importances(layers), count),
        _on_host(_left_out(layers, weights), count),
    )


def _on_host(values: Mapping[int, Tensor], count: int) -> list[float]:
    numbers = [math.nan] * count
    if values:
        device = next(iter(values.values())).device
        together = torch.stack([t.to(device) for t in values.values()]).tolist()
        for i, number in zip(values, together, strict=True):
            numbers[i] = number
    return numbers


def _entropies(weights: Sequence[Tensor | None]) -> Mapping[int, Tensor]:
    # One pair has nothing to be spread over.
    known = {i: w for i, w in enumerate(weights) if w is not None and w.numel() and w.shape[-1] > 1}
    if not known:
        return {}
    device = next(iter(known.values())).device
    flat = torch.cat([w.to(device, torch.float32).reshape(-1) for w in known.values()])
    # A weight of zero adds none: a finite logarithm of it, times zero.
    terms = flat.clamp_min(torch.finfo(torch.float32).tiny).log_().mul_(flat)
    parts = terms.split([w.numel() for w in known.values()])
    return {
        i: part.sum() * (w.shape[-1] / (-w.numel() * math.log(w.shape[-1])))
        for (i, w), part in zip(known.items(), parts, strict=True)
    }


def _left_out(layers: Sequence[Watched], weights: Sequence[Tensor | None]) -> Mapping[int, Tensor]:
    known = (
        (i, w, layer.kept_tolerance)
        for i, (layer, w) in enumerate(zip(layers, weights, strict=True))
        if w is not None
    )
    return {i: is_left_out(w, tolerance).float().mean() for i, w, tolerance in known if w.numel()}


@torch.no_grad()
def _importances(layers: Sequence[Watched]) -> Mapping[int, Tensor]:
    # All layers of a kind at once.
    groups: dict[tuple[object, ...], list[tuple[int, list[Tensor]]]] = {}
    for i, layer in enumerate(layers):
        tensors = _scale_and_shift(getattr(layer, "norm", None))
        if tensors:
            kind = (len(tensors), *((t.shape, t.dtype, t.device) for t in tensors))
            groups.setdefault(kind, []).append((i, tensors))
    found: dict[int, Tensor] = {}
    for members in groups.values():
        stacked = [torch.stack(t).float() for t in zip(*(t for _, t in members), strict=True)]
        change = stacked[0] * stacked[1]
        if len(stacked) > 2:
            change += stacked[2] * stacked[3]
        means = change.square().flatten(1).mean(1)
        found.update(zip((i for i, _ in members), means.unbind(), strict=True))
    return found


def _scale_and_shift(norm: nn.Module | None) -> list[Tensor]:
    """Scale, its gradient, shift and its gradient; of one alone where the norm has but that. Empty where neither is."""
    tensors: list[Tensor] = []
    for name in ("weight", "bias"):
        p = getattr(norm, name, None)
        gradient = p.grad if isinstance(p, nn.Parameter) else None
        # Those of a sharded parameter are a part of them, of a class of its own.
        if type(p) is nn.Parameter and type(gradient) is Tensor and not gradient.is_sparse:
            tensors += [p, gradient]
    return tensors
