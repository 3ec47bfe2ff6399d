"""What the divergence costs: the forward with and without previous weights, in CUDA graphs, in turns."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from benchmarks.gpu.floor import Save, input_sets
from benchmarks.gpu.ops import LayerOps, distance, refusing
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import DIVERGENCE_CASES, SMOKE_CASES
from benchmarks.gpu.timing import Budget, graphed, take_turns
from benchmarks.measure import quartiles, summarize
from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.ops.layer_attention.reference import divergence_reference, log_weights_reference

# A kernel of half a millisecond varies by a percent from run to run, so one region holds many.
_CALLS = 8


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """The forward of a stage's last layer, with and without, in percent of the forward alone."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    for case in SMOKE_CASES[:2] if setting.smoke else DIVERGENCE_CASES:
        if budget.left < 2 and report["cases"]:
            report["left_out"].append(case.name)
            continue
        depth = case.shape.depth
        sets = [
            LayerOps(case, depth, setting.device, seed)
            for seed in range(input_sets(case, depth, setting))
        ]
        found: dict[str, Any] = {}
        for backend in setting.backends:
            kernels = KERNELS[backend]
            with refusing(f"{case.name}: {backend}", report["refused"]):
                error = _check(sets[0], kernels, backend)
                runs = {
                    name: graphed(partial(_run_all, sets, kernels, name == "with"), setting.device)
                    for name in ("without", "with")
                }
                seconds = min(1.5, budget.left / 3)
                taken = take_turns(runs, setting.device, 2 * setting.rounds, seconds)
                found[backend] = _report(taken, len(sets) * _CALLS) | {"largest_error": error}
        report["cases"][case.name] = found
        save(report)
    save(report)


def _run_all(sets: list[LayerOps], kernels: KernelBackend, with_divergence: bool) -> list[object]:
    results: list[object] = []
    for _ in range(_CALLS):
        results = [s.forward(kernels, s.prev_weights if with_divergence else None) for s in sets]
    return results


def _check(layer: LayerOps, kernels: KernelBackend, backend: str) -> float:
    prev = layer.prev_weights
    assert prev is not None
    _, weights, kl = layer.forward(kernels, prev)
    logs = log_weights_reference(
        layer.queries[-1].double(), [k.double() for k in layer.keys], layer.heads, layer.scale
    )
    # Weights and divergence are float32 for every dtype of the values.
    worst = distance(f"{backend}: weights", weights, logs.exp(), 2e-5)
    want = divergence_reference(prev.double(), logs)
    return max(worst, distance(f"{backend}: divergence", kl, want, 2e-5))


def _report(taken: dict[str, list[float]], calls: int) -> dict[str, Any]:
    one_call = {name: [s / calls for s in times] for name, times in taken.items()}
    percents = [
        100 * (a - b) / b for a, b in zip(one_call["with"], one_call["without"], strict=True)
    ]
    q1, median, q3 = quartiles(percents)
    return {
        "with": summarize(one_call["with"])._asdict(),
        "without": summarize(one_call["without"])._asdict(),
        "percent_of_forward": {"median": median, "q1": q1, "q3": q3},
        "percent_of_medians": 100
        * (statistics.median(one_call["with"]) / statistics.median(one_call["without"]) - 1),
    }
