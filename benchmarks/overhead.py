"""What Python, autograd and the calls cost: a stage so small that there is hardly anything else."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ela_kernels as ek
from benchmarks.measure import quartiles
from benchmarks.shapes import OVERHEAD_STAGE, StageShape


def measure_overhead(rounds: int, shape: StageShape = OVERHEAD_STAGE) -> dict[str, Any]:
    """Microseconds a layer, forward and backward, of the op with a history and of the whole module."""
    torch.manual_seed(0)
    size = (shape.batch, shape.channels, shape.size, shape.size)
    x = torch.randn(size, requires_grad=True)
    triples = [
        (
            torch.randn(size[:2], requires_grad=True),
            torch.randn(size[:2], requires_grad=True),
            torch.randn(size, requires_grad=True),
        )
        for _ in range(shape.depth)
    ]
    douts = [torch.randn(size) for _ in range(shape.depth)]
    layers = [ek.LayerAttention(shape.channels, shape.head_dim) for _ in range(shape.depth)]
    inputs = [tensor for triple in triples for tensor in triple]
    parameters = [p for layer in layers for p in layer.parameters()]

    def op() -> list[Tensor]:
        history = ek.LayerHistory()
        return [history.attend(q, k, v, heads=shape.heads) for q, k, v in triples]

    def module() -> list[Tensor]:
        history = ek.LayerHistory()
        return [layer(x, history) for layer in layers]

    return {
        "shape": shape.name,
        "op": _microseconds_a_layer(op, inputs, douts, rounds),
        "module": _microseconds_a_layer(module, [x, *parameters], douts, rounds),
    }


def _microseconds_a_layer(
    forward: Callable[[], list[Tensor]], inputs: list[Tensor], douts: list[Tensor], rounds: int
) -> dict[str, Any]:
    samples: dict[str, list[float]] = {"forward": [], "backward": [], "both": []}
    for i in range(rounds + 5):
        start = time.perf_counter()
        outs = forward()
        middle = time.perf_counter()
        # Allowing for unused inputs: the first layer has one key only, so its query has no influence on anything.
        torch.autograd.grad(outs, inputs, douts, allow_unused=True)
        end = time.perf_counter()
        if i >= 5:
            for name, seconds in (
                ("forward", middle - start),
                ("backward", end - middle),
                ("both", end - start),
            ):
                samples[name].append(1e6 * seconds / len(outs))
    report = {}
    for name, values in samples.items():
        q1, _, q3 = quartiles(values)
        report[name] = {"median": statistics.median(values), "q1": q1, "q3": q3}
    return report
