"""A stage of retrievals whose weights are as training leaves them, with a tolerance: what is left out, and time.

The weights are drawn. Query and key are Gaussian, and the length of a query is drawn for each sample and head from a
log-normal distribution, whose two parameters were fitted to the weights of ELA networks of two stages of nine blocks on
Fashion-MNIST: at their start, after 50 steps, and at the end of 468 steps, to the shares of the weights below 1e-2,
1e-3, 1e-4, 1e-6 and 2 ** -24. Beside them even weights, of which nothing is left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ela_kernels as ek
from benchmarks.contenders import check_close
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.shapes import StageShape


class Lengths(NamedTuple):
    """Mean and standard deviation of the logarithm of the standard deviation of a head's scores."""

    mean: float
    deviation: float


# The shares that the fit was made to, and those of the draw, are at most 0.04 apart.
WEIGHTS: dict[str, Lengths | None] = {
    "even": None,
    "as at the start": Lengths(5.5, 4.78),
    "as after 50 steps": Lengths(2.0, 1.27),
    "as at the end": Lengths(1.5, 1.58),
}
FORMS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCES: dict[str, float] = {"0": 0.0, "2^-24": 2.0**-24, "1e-3": 1e-3}
# Relative L2 distance from eager PyTorch in float64: a weight that lies within rounding of a tolerance may be on its
# other side.
SAME = 1e-3
LONGEST = 8.0  # of a logarithm: beyond it a head reads one value, and its scores overflow


class Retrievals:
    """Layers that retrieve from a history, their inputs and the gradients of what they retrieve."""

    def __init__(
        self, shape: StageShape, lengths: Lengths | None, form: torch.memory_format
    ) -> None:
        torch.manual_seed(0)
        self.shape = shape
        rows = shape.batch, shape.channels
        maps = (*rows, shape.size, shape.size)

        def a_query() -> Tensor:
            q = torch.randn(shape.batch, shape.heads, shape.head_dim)
            if lengths is None:
                return 0.1 * q.flatten(1)
            logs = lengths.mean + lengths.deviation * torch.randn(shape.batch, shape.heads, 1)
            return (q * logs.clamp_max(LONGEST).exp()).flatten(1)

        def a_map() -> Tensor:
            return torch.randn(maps).contiguous(memory_format=form)

        self.q = [a_query().requires_grad_() for _ in range(shape.depth)]
        self.k = [torch.randn(rows).requires_grad_() for _ in range(shape.depth)]
        self.v = [a_map().requires_grad_() for _ in range(shape.depth)]
        self.douts = [a_map() for _ in range(shape.depth)]

    def forward(self, tolerance: float, weights: list[Tensor] | None = None) -> list[Tensor]:
        history, outs = ek.LayerHistory(tolerance=tolerance), []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            outs.append(history.attend(q, k, v, heads=self.shape.heads))
            if weights is not None:
                assert history.weights is not None
                weights.append(history.weights.detach())
        return outs

    def step(self, tolerance: float) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of every query, key and value."""
        return torch.autograd.grad(self.forward(tolerance), [*self.q, *self.k, *self.v], self.douts)

    def infer(self, tolerance: float) -> list[Tensor]:
        with torch.no_grad():
            return self.forward(tolerance)

    def left_out(self, tolerance: float) -> float:
        """The share of all retrievals, of every layer, sample and head: that of the elements that need no read."""
        weights: list[Tensor] = []
        with torch.no_grad():
            self.forward(tolerance, weights)
        below = sum(int((w < tolerance).sum()) for w in weights)
        return below / sum(w.numel() for w in weights)

    def double(self) -> Retrievals:
        other = copy.copy(self)
        for name in ("q", "k", "v"):
            leaves = [t.detach().double().requires_grad_() for t in getattr(self, name)]
            setattr(other, name, leaves)
        other.douts = [d.double() for d in self.douts]
        return other


def measure_left_out(shape: StageShape, rounds: int) -> dict[str, Any]:
    """For each distribution of weights, form of maps and tolerance: the share left out, and times beside those of 0."""
    return {
        form: {
            name: _measure(Retrievals(shape, lengths, memory_format), rounds)
            for name, lengths in WEIGHTS.items()
        }
        for form, memory_format in FORMS.items()
    }


def _measure(stage: Retrievals, rounds: int) -> dict[str, Any]:
    shares = {name: stage.left_out(tolerance) for name, tolerance in TOLERANCES.items()}
    errors = {name: _check(stage, tolerance) for name, tolerance in TOLERANCES.items()}
    phases = {"training": stage.step, "inference": stage.infer}
    times = {
        phase: interleave({name: partial(run, t) for name, t in TOLERANCES.items()}, rounds)
        for phase, run in phases.items()
    }
    return {"left_out": shares, "largest_error": errors, **{p: _times(s) for p, s in times.items()}}


def _times(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "times_faster": {name: ratio(seconds["0"], times) for name, times in seconds.items()},
    }


def _check(stage: Retrievals, tolerance: float) -> float:
    """The largest distance from float64, of the outputs and of the values' gradients: what a tolerance is about."""
    count = stage.shape.depth
    exact = stage.double()
    with ek.use_backend("eager"):
        outs = exact.forward(tolerance)
        want = [*outs, *torch.autograd.grad(outs, exact.v, exact.douts)]
    outs = stage.forward(tolerance)
    found = [*outs, *torch.autograd.grad(outs, stage.v, stage.douts)]
    worst = 0.0
    for i, (got, expected) in enumerate(zip(found, want, strict=True)):
        what = f"output {i}" if i < count else f"gradient of value {i - count}"
        worst = max(worst, check_close(f"tolerance {tolerance}: {what}", got, expected, SAME))
    assert math.isfinite(worst)
    return worst
