"""A whole layer against the least it must do: read every map that it needs once, and write what it makes once."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.floor import CPP, against_probes, percent_of_probe
from benchmarks.measure import Contender, interleave
from benchmarks.probe import transfer_probes
from benchmarks.shapes import StageShape
from ela_kernels.backends.types import (
    RESIDUAL,
    Arrived,
    Filters,
    LayerForward,
    LayerGradients,
    LayerNeeds,
    Saved,
    SavedLayer,
)
from ela_kernels.modules.query_key_value import default_kernel_size
from ela_kernels.ops.layer_attention.reference import layer_attention_reference

# Relative L2 distance from float64, as in floor.py; the mean over space is one more sum over a map.
TOLERANCE = 2e-5

DIRECTIONS = ("forward", "backward")
BLOCK_PHASES = ("block forward", "block backward", "block inference")


class Transfers(NamedTuple):
    """The maps that something must read, and those that it must write."""

    read: list[Tensor]
    written: list[Tensor]


class StageOfLayers:
    """What a layer `x + out` works on at every depth of a stage, without modules and without autograd."""

    def __init__(self, shape: StageShape, seed: int = 0) -> None:
        torch.manual_seed(seed)
        size = (shape.batch, shape.channels, shape.size, shape.size)
        taps = default_kernel_size(shape.channels)
        self.shape = shape
        self.scale = shape.head_dim**-0.5
        self.inputs = [torch.randn(size) for _ in range(shape.depth)]
        self.douts = [torch.randn(size) for _ in range(shape.depth)]
        self.filters = [
            Filters(
                torch.randn(1, 1, taps), torch.randn(1, 1, taps), torch.randn(size[1], 1, 3, 3) / 3
            )
            for _ in range(shape.depth)
        ]
        self.written = [torch.zeros(size) for _ in range(3)]  # stand for what a block writes
        self.retrieved = torch.zeros(size)  # stands for what a block's layer retrieved
        self.made: list[LayerForward] = []
        for t in range(1, shape.depth + 1):
            self.made.append(self.forward(t))
        # The weights stand in for the score gradients of later layers, which only a key's gradient would read.
        self.contributions = [
            CPP.contribution(
                _present(made.q), _present(made.weights), _present(made.weights), dout, False
            )
            for made, dout in zip(self.made, self.douts, strict=True)
        ]

    def forward(self, t: int) -> LayerForward:
        """Layer t's forward, after those before it."""
        before = self.made[: t - 1]
        return CPP.layer(
            self.inputs[t - 1],
            self.filters[t - 1],
            [m.k for m in before],
            [m.v for m in before],
            self.shape.heads,
            self.scale,
            None,
            RESIDUAL,
        )

    def backward(self, t: int) -> LayerGradients:
        """Layer t's backward, after those of the layers that follow it."""
        made, dout, heads = self.made[t - 1], self.douts[t - 1], self.shape.heads
        weights = _present(made.weights)
        keys, values = [m.k for m in self.made[:t]], [m.v for m in self.made[:t]]
        saved = Saved(_present(made.q), keys, values, heads, self.scale, None, weights, False)
        x, filters = self.inputs[t - 1], self.filters[t - 1]
        found, _ = CPP.layer_backward(
            SavedLayer(x, filters, made.mean, heads, saved, RESIDUAL, None, None),
            Arrived(dout, None, None, None, None),
            self.contributions[t:],
            t - 1,
            LayerNeeds(True, True, True, True, False),
        )
        return found

    def phase(self, name: str, t: int) -> Contender:
        """One direction at one depth, as something to time."""
        return partial({"forward": self.forward, "backward": self.backward}[name], t)

    def footprint(self, name: str, t: int) -> list[Tensor]:
        """The maps that a direction at depth t must read or write, each once.

        Forward: x, the t - 1 values before, the value and the output: t + 2. x is read for the residual as well, and
        the value again for the retrieval; both are counted once, as if they stayed in cache. Backward: the t values,
        the output gradients of the layers t to T (the first of them its own, for the scores, the gather and the
        residual), x, and its gradient: T + 3.
        """
        values = [m.v for m in self.made[:t]]
        if name == "forward":
            return [self.inputs[t - 1], *values[:-1], *self.written[:2]]
        return [*values, *self.douts[t - 1 :], self.inputs[t - 1], self.written[0]]

    def transfers(self, name: str, t: int) -> Transfers:
        """What a layer or a residual block at depth t reads and what it writes.

        A layer: the maps of :meth:`footprint`. A block's inference, with a norm of given statistics, moves the same.
        In training its forward has to know the statistics of the batch first, so it writes the retrieval, reads it
        and x again, and writes the output; its backward reads the output's gradient and the retrieval twice, and
        writes the gradient of the retrieval, which the layers before it will read.
        """
        x, values, later = self.inputs[t - 1], [m.v for m in self.made[:t]], self.douts[t:]
        written, dout = self.written, self.douts[t - 1]
        if name == "backward":
            return Transfers([*values, dout, *later, x], written[:1])
        if name == "block forward":
            return Transfers([x, *values[:-1], self.retrieved, x], written)
        if name == "block backward":
            return Transfers([*values, *later, x, *(dout, self.retrieved) * 2], written[:2])
        return Transfers([x, *values[:-1]], written[:2])


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # every layer of this stage retrieves
    return tensor


def check_layers(stage: StageOfLayers) -> float:
    """Compare the last layer, whose gradients come from itself alone, with autograd in float64."""
    shape, last, made = stage.shape, stage.shape.depth, stage.made
    x, *filters = (
        _present(t).double().requires_grad_() for t in (stage.inputs[-1], *stage.filters[-1])
    )
    y = x.mean((2, 3)).unsqueeze(1)
    q, k = (F.conv1d(y, w, padding=w.shape[-1] // 2).squeeze(1) for w in filters[:2])
    v = F.conv2d(x, filters[2], padding=1, groups=shape.channels)
    keys = [*(m.k.double() for m in made[:-1]), k]
    values = [*(m.v.double() for m in made[:-1]), v]
    out = x + layer_attention_reference(q, keys, values, shape.heads, stage.scale)[0]
    wanted = torch.autograd.grad(out, (x, *filters), stage.douts[-1].double())
    found = stage.backward(last)
    pairs = {"out": (stage.forward(last).out, out)}
    names = ("dx", "dwq", "dwk", "dwv")
    pairs |= {n: both for n, *both in zip(names, found[:4], wanted, strict=True)}
    worst = 0.0
    for name, (got, want) in pairs.items():
        # One layer has one key, and its score no influence: those gradients are zero but for rounding.
        scale = max(float(want.detach().norm()), 1e-3 * float(wanted[3].norm()))
        distance = float((_present(got).double() - want.detach()).norm()) / scale
        if not distance <= TOLERANCE:
            raise RuntimeError(
                f"{name} is {distance:.2e} away from the reference; allowed is {TOLERANCE:.0e}. "
                "A wrong result is not timed"
            )
        worst = max(worst, distance)
    return worst


def transfer_ms(stage: StageOfLayers, rounds: int) -> dict[str, float]:
    """Milliseconds of the faster transfer probe, summed over the depths of a stage; nothing without a compiler."""
    probes = transfer_probes()
    sums = dict.fromkeys((*DIRECTIONS, *BLOCK_PHASES) if probes else (), 0.0)
    for name in sums:
        for t in range(1, stage.shape.depth + 1):
            moved = stage.transfers(name, t)
            seconds = interleave({p: partial(run, *moved) for p, run in probes.items()}, rounds, 1)
            sums[name] += 1e3 * min(statistics.median(times) for times in seconds.values())
    return sums


def measure_layer_floor(shape: StageShape, rounds: int) -> dict[str, Any]:
    """Times of a layer's two directions and of the read probes, as :func:`benchmarks.floor.against_probes`,
    and those of the transfer probes."""
    stage = StageOfLayers(shape)
    error = check_layers(stage)
    phases = against_probes(stage, DIRECTIONS, rounds)
    return {
        "largest_error": error,
        "phases": phases,
        "transfer_ms": transfer_ms(stage, rounds),
        "percent_of_probe": percent_of_probe(phases, DIRECTIONS),
    }
