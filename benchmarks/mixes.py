"""The mix by given weights against PyTorch's own ways to it, and against a probe that moves the least bytes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ela_kernels as ek
from benchmarks.contenders import COMPILED, check_close
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.probe import transfer_probes
from benchmarks.shapes import StageShape

Mix = Callable[[Tensor, Sequence[Tensor]], Tensor]

EINSUM, SUMS, OURS = "stack and einsum", "one after the other", "ours"
# Weights for each sample and head, as of layer attention, and one number for each map, as of DenseFormer.
FORMS = ("[B, G, T]", "[T]")


def einsum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """All maps stacked, and one product of matrices for each sample and head."""
    v = torch.stack(list(values), 1)
    if weights.dim() == 1:
        return torch.einsum("t,btchw->bchw", weights, v)
    by_head = v.unflatten(2, (weights.shape[1], -1))
    return torch.einsum("bgt,btgdhw->bgdhw", weights, by_head).flatten(1, 2)


def sums(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """A product and a sum for each map."""
    total: Tensor | None = None
    for t, value in enumerate(values):
        by = weights[..., t]
        if weights.dim() == 3:
            by = by.repeat_interleave(value.shape[1] // weights.shape[1], 1)[..., None, None]
        term = by * value
        total = term if total is None else total + term
    assert total is not None
    return total


class Mixes:
    """Inputs of a mix over all maps of a stage."""

    def __init__(self, shape: StageShape, form: str) -> None:
        torch.manual_seed(0)
        sizes = {"[B, G, T]": (shape.batch, shape.heads, shape.depth), "[T]": (shape.depth,)}
        maps = (shape.batch, shape.channels, shape.size, shape.size)
        self.weights = torch.randn(sizes[form]).requires_grad_()
        self.values = [torch.randn(maps).requires_grad_() for _ in range(shape.depth)]
        self.dout = torch.randn(maps)

    def forward(self, mix: Mix) -> Tensor:
        with torch.no_grad():
            return mix(self.weights, self.values)

    def step(self, mix: Mix) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the weights and of every value."""
        return torch.autograd.grad(
            mix(self.weights, self.values), [self.weights, *self.values], self.dout
        )

    def check(self, name: str, mix: Mix) -> float:
        """The largest distance from float64."""
        exact = [t.detach().double().requires_grad_() for t in (self.weights, *self.values)]
        out = sums(exact[0], exact[1:])
        wanted = [out, *torch.autograd.grad(out, exact, self.dout.double())]
        found = [self.forward(mix), *self.step(mix)]
        pairs = zip(found, wanted, strict=True)
        return max(check_close(f"{name}: {i}", a, b.detach()) for i, (a, b) in enumerate(pairs))


def measure_mixes(shape: StageShape, contenders: Sequence[str], rounds: int) -> dict[str, Any]:
    """For each form of weights: milliseconds of the forward and of forward and backward, and of the probe."""
    return {form: _measure(shape, form, COMPILED in contenders, rounds) for form in FORMS}


def _measure(shape: StageShape, form: str, compiles: bool, rounds: int) -> dict[str, Any]:
    inputs = Mixes(shape, form)
    mixes: dict[str, Mix] = {EINSUM: einsum, SUMS: sums}
    if compiles:
        mixes[COMPILED] = torch.compile(sums, fullgraph=True, dynamic=False)
    mixes[OURS] = ek.depth_mix
    errors = {name: inputs.check(name, mix) for name, mix in mixes.items()}
    # Read T maps and write one; with the backward the maps and what arrives once more, and T gradients written.
    new = [torch.zeros_like(inputs.dout) for _ in range(shape.depth + 1)]
    values = [v.detach() for v in inputs.values]
    footprints = {
        "forward": (values, new[:1]),
        "forward and backward": ([*values, *values, inputs.dout], new),
    }
    found: dict[str, Any] = {"largest_error": errors}
    for phase, run in (("forward", inputs.forward), ("forward and backward", inputs.step)):
        read, written = footprints[phase]
        probes = transfer_probes()
        runs: dict[str, Callable[[], object]] = {n: partial(run, mix) for n, mix in mixes.items()}
        runs |= {probe: partial(move, read, written) for probe, move in probes.items()}
        seconds = interleave(runs, rounds)
        of_probes = {probe: statistics.median(seconds.pop(probe)) for probe in probes}
        ours = seconds[OURS]
        found[phase] = {
            "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
            "times_ours": {name: ratio(times, ours) for name, times in seconds.items()},
            "least_bytes": 4 * shape.map_elements * (len(read) + len(written)),
            "probe_ms": 1e3 * min(of_probes.values()) if of_probes else None,
        }
    return found


def mix_rows(results: dict[str, Any]) -> list[list[str]]:
    """A row for each stage, form of weights and phase."""
    rows = []
    for shape, forms in results.items():
        for form, found in forms.items():
            for phase in ("forward", "forward and backward"):
                of_phase = found[phase]
                probe = of_phase["probe_ms"]
                rows.append(
                    [
                        shape,
                        f"`{form}`",
                        phase,
                        *(
                            f"{of_phase['ms'][name]['median']:.2f}"
                            if name in of_phase["ms"]
                            else "-"
                            for name in (EINSUM, SUMS, COMPILED, OURS)
                        ),
                        "-" if probe is None else f"{probe:.2f}",
                    ]
                )
    return rows


MIX_HEAD = ["", "weights", "", EINSUM, SUMS, "compiled", OURS, "least bytes moved"]
