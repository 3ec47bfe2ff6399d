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


class _Bare(torch.autograd.Function):
    """As many inputs, outputs and saved tensors as a whole layer has, and nothing but their allocation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        prev_weights: Tensor,
        token: Tensor,
        row: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        out, v = torch.empty_like(x), torch.empty_like(x)
        mean, q, k = (torch.empty_like(row) for _ in range(3))
        weights, kl, own = (torch.empty_like(t) for t in (prev_weights, prev_weights, token))
        ctx.save_for_backward(x, wq, wk, wv, prev_weights, mean, q, weights, k, v)
        return out, weights, kl, own, k, v

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        x, wq, wk, wv, prev_weights, *_, weights, _k, _v = ctx.saved_tensors
        torch.empty_like(weights)  # the score gradients, which stay inside
        made = [torch.empty_like(t) for t in (x, wq, wk, wv, prev_weights)]
        return *made, douts[3], None


def measure_overhead(rounds: int, shape: StageShape = OVERHEAD_STAGE) -> dict[str, Any]:
    """Microseconds a layer, forward and backward: the op with a history, a layer, a residual block, PyTorch alone."""
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
    blocks = [ek.ELA(shape.channels, shape.head_dim) for _ in range(shape.depth)]
    inputs = [tensor for triple in triples for tensor in triple]
    parameters = [p for layer in layers for p in layer.parameters()]
    of_blocks = [p for block in blocks for p in block.parameters()]

    def op() -> list[Tensor]:
        history = ek.LayerHistory()
        return [history.attend(q, k, v, heads=shape.heads) for q, k, v in triples]

    def module() -> list[Tensor]:
        history = ek.LayerHistory()
        return [layer(x, history) for layer in layers]

    def residual_block() -> list[Tensor]:
        history = ek.LayerHistory()
        return [block(x, history) for block in blocks]

    row, weights = torch.randn(size[:2]), torch.randn(size[0], shape.heads, 1)

    def bare() -> list[Tensor]:
        prev, token, outs = weights, torch.zeros(1, requires_grad=True), []
        for layer in layers:
            wq, wk, wv = (p for p in layer.parameters())
            out, prev, _, token, _, _ = _Bare.apply(x, wq, wk, wv, prev, token, row)
            outs.append(out)
        return outs

    return {
        "shape": shape.name,
        "bare": _microseconds_a_layer(bare, [x, *parameters], douts, rounds),
        "op": _microseconds_a_layer(op, inputs, douts, rounds),
        "module": _microseconds_a_layer(module, [x, *parameters], douts, rounds),
        "block": _microseconds_a_layer(residual_block, [x, *of_blocks], douts, rounds),
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
