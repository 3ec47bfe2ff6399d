"""The op against the least it must do: read what it needs once, and write its result once."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.measure import Contender, interleave, summarize
from benchmarks.probe import read_probes
from benchmarks.shapes import StageShape
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.types import Saved
from ela_kernels.ops.layer_attention.reference import layer_attention_reference

CPP = KERNELS["cpp"]

# Relative L2 distance from float64: sums of at most 23 products in float32, then a sum over a map for the dots.
TOLERANCE = 1e-5

PHASES = ("forward", "dots", "gather")


class StageOfOps:
    """What the op's three phases work on at every depth of a stage, without modules and without autograd."""

    def __init__(self, shape: StageShape, seed: int = 0) -> None:
        torch.manual_seed(seed)
        size = (shape.batch, shape.channels, shape.size, shape.size)
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.queries = [torch.randn(size[:2]) for _ in range(shape.depth)]
        self.keys = [torch.randn(size[:2]) for _ in range(shape.depth)]
        self.values = [torch.randn(size) for _ in range(shape.depth)]
        self.douts = [torch.randn(size) for _ in range(shape.depth)]
        self.written = torch.zeros(size)  # stands for the map that an op writes, in its probe
        self.weights = [self.forward(t)[1] for t in range(1, shape.depth + 1)]
        # The weights stand in for the score gradients, which only a key's gradient would read.
        self.contributions = [
            CPP.contribution(q, w, w, dout, False)
            for q, w, dout in zip(self.queries, self.weights, self.douts, strict=True)
        ]

    def forward(
        self, t: int, prev_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Layer t's forward."""
        return CPP.attend(
            self.queries[t - 1],
            self.keys[:t],
            self.values[:t],
            self.shape.heads,
            self.scale,
            prev_weights,
            False,
        )

    def dots(self, t: int) -> tuple[Tensor, Tensor]:
        """Layer t's gradients of scores and query."""
        saved = Saved(
            self.queries[t - 1],
            self.keys[:t],
            self.values[:t],
            self.shape.heads,
            self.scale,
            None,
            self.weights[t - 1],
            False,
        )
        found = CPP.attend_backward(saved, self.douts[t - 1], None, None, True, False)
        assert found.dq is not None
        return found.dscores, found.dq

    def gather(self, t: int) -> Tensor:
        """The gradient of value t, from the layers t to T."""
        later = self.contributions[t - 1 :]
        _, dv = CPP.gather(later, t - 1, self.shape.heads, False, False, True)
        assert dv is not None
        return dv

    def phase(self, name: str, t: int) -> Contender:
        """One phase at one depth, as something to time."""
        calls = {"forward": self.forward, "dots": self.dots, "gather": self.gather}
        return partial(calls[name], t)

    def footprint(self, name: str, t: int) -> list[Tensor]:
        """The maps that a phase at depth t must read or write, each once."""
        if name == "forward":
            return [*self.values[:t], self.written]
        if name == "dots":
            return [*self.values[:t], self.douts[t - 1]]
        return [*self.douts[t - 1 :], self.written]


def check_ops(stage: StageOfOps) -> float:
    """Compare all phases at the last depth, and the gather at the first, with autograd in float64."""
    shape, last = stage.shape, stage.shape.depth
    inputs = [t.double().requires_grad_() for t in (stage.queries[-1], *stage.values)]
    q, values = inputs[0], inputs[1:]
    keys = [k.double() for k in stage.keys]
    out, weights, _ = layer_attention_reference(q, keys, values, shape.heads, stage.scale)
    (dq,) = torch.autograd.grad(out, [q], stage.douts[-1].double())
    first = torch.zeros_like(stage.douts[0], dtype=torch.float64)
    for w, dout in zip(stage.weights, stage.douts, strict=True):
        per_channel = w[:, :, 0].double().repeat_interleave(shape.head_dim, dim=1)
        first += per_channel[:, :, None, None] * dout
    got_out, got_weights, _ = stage.forward(last)
    pairs = {
        "out": (got_out, out),
        "weights": (got_weights, weights),
        "dq": (stage.dots(last)[1], dq),
        "dv": (stage.gather(1), first),
    }
    worst = 0.0
    for name, (got, want) in pairs.items():
        distance = float((got.double() - want.detach()).norm() / want.detach().norm())
        if not distance <= TOLERANCE:
            raise RuntimeError(
                f"{name} is {distance:.2e} away from the reference; allowed is {TOLERANCE:.0e}. "
                "A wrong result is not timed"
            )
        worst = max(worst, distance)
    return worst


class Phased(Protocol):
    """A stage whose phases can be timed at every depth, each against the maps that it must touch."""

    shape: StageShape

    def phase(self, name: str, t: int) -> Contender:
        """One phase at one depth, as something to time."""

    def footprint(self, name: str, t: int) -> list[Tensor]:
        """The maps that a phase at depth t must read or write, each once."""


def against_probes(stage: Phased, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Times of phases and of the read probes, summed over the depths of a stage.

    At every depth all probes and the phase take turns. `percent_of_probe` is the probe's time over the phase's: 100
    when the phase takes no longer than reading the maps that it touches, the written ones included.
    """
    shape = stage.shape
    probes = read_probes()
    report: dict[str, Any] = {}
    for name in names:
        sums: dict[str, list[float]] = {}
        best = [0.0] * rounds
        least_bytes = 0
        depths = {}
        for t in range(1, shape.depth + 1):
            footprint = stage.footprint(name, t)
            contenders = {"op": stage.phase(name, t)}
            contenders |= {p: partial(run, footprint) for p, run in probes.items()}
            seconds = interleave(contenders, rounds, warmup=1)
            fastest = min(probes, key=lambda p: statistics.median(seconds[p]))
            best = [a + b for a, b in zip(best, seconds[fastest], strict=True)]
            for contender, times in seconds.items():
                so_far = sums.setdefault(contender, [0.0] * rounds)
                sums[contender] = [a + b for a, b in zip(so_far, times, strict=True)]
            least_bytes += sum(m.numel() * m.element_size() for m in footprint)
            depths[t] = {c: 1e3 * statistics.median(times) for c, times in seconds.items()}
        op, probe = statistics.median(sums["op"]), statistics.median(best)
        report[name] = {
            "least_bytes": least_bytes,
            "op": summarize(sums["op"])._asdict(),
            "op_gb_per_s": least_bytes / op / 1e9,
            "probes": {p: summarize(sums[p])._asdict() for p in probes},
            "probe_gb_per_s": least_bytes / probe / 1e9,
            "percent_of_probe": 100 * probe / op,
            "median_ms_by_depth": depths,
        }
    return report


def percent_of_probe(phases: dict[str, Any], names: Sequence[str]) -> float:
    """Of some phases together."""
    op = sum(phases[name]["op"]["median"] for name in names)
    least = sum(phases[name]["least_bytes"] / phases[name]["probe_gb_per_s"] for name in names)
    return 100 * least / 1e6 / op


def measure_floor(shape: StageShape, rounds: int) -> dict[str, Any]:
    """Times of the op's phases and of the read probes, as :func:`against_probes`."""
    stage = StageOfOps(shape)
    error = check_ops(stage)
    phases = against_probes(stage, PHASES, rounds)
    return {
        "largest_error": error,
        "phases": phases,
        "forward_percent_of_probe": phases["forward"]["percent_of_probe"],
        "backward_percent_of_probe": percent_of_probe(phases, ("dots", "gather")),
    }


def measure_divergence(shape: StageShape, rounds: int) -> dict[str, Any]:
    """The forward with and without previous weights, in turns, summed over the depths 2 to T of a stage."""
    stage = StageOfOps(shape)
    both = {"with": [0.0] * rounds, "without": [0.0] * rounds}
    for t in range(2, shape.depth + 1):
        prev = stage.weights[t - 2]
        contenders = {
            "without": partial(stage.forward, t),
            "with": partial(stage.forward, t, prev),
        }
        for name, times in interleave(contenders, rounds, warmup=1).items():
            both[name] = [a + b for a, b in zip(both[name], times, strict=True)]
    with_kl, without = both["with"], both["without"]
    differences = [a - b for a, b in zip(with_kl, without, strict=True)]
    return {
        "with": summarize(with_kl)._asdict(),
        "without": summarize(without)._asdict(),
        "percent_of_forward": 100 * statistics.median(differences) / statistics.median(without),
    }
