"""What a layer costs the CPU: maps so small that the device always waits for the next launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ela_kernels as ek
from benchmarks.gpu.floor import Save
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import Case
from benchmarks.gpu.stages import EAGER, AttentionStage
from benchmarks.gpu.timing import Budget, synchronize
from benchmarks.measure import quartiles
from benchmarks.shapes import OVERHEAD_STAGE

_ROUNDS = 200


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """Microseconds a layer until forward and backward have been handed to the device, which is not waited for."""
    case = Case(OVERHEAD_STAGE)
    stage = AttentionStage(case, setting.device)
    report: dict[str, Any] = {"shape": case.name, "contenders": {}}
    rounds = 5 if setting.smoke else _ROUNDS
    report["contenders"][EAGER] = _microseconds(stage, stage.eager, setting, rounds, budget)
    for backend in setting.backends:
        with ek.use_backend(backend):
            report["contenders"][backend] = _microseconds(
                stage, stage.ours, setting, rounds, budget
            )
        save(report)
    save(report)


def _microseconds(
    stage: AttentionStage,
    forward: Callable[..., Tensor],
    setting: Setting,
    rounds: int,
    budget: Budget,
) -> dict[str, Any]:
    depth = stage.case.shape.depth
    samples: dict[str, list[float]] = {"forward": [], "backward": []}
    warmup = 5
    for i in range(rounds + warmup):
        if i > 2 * warmup and budget.left < 0:
            break
        synchronize(setting.device)
        start = time.perf_counter()
        out = forward(stage.x, stage.queries, stage.keys, stage.values)
        middle = time.perf_counter()
        torch.autograd.grad(out, stage.leaves, stage.dout, allow_unused=True)
        end = time.perf_counter()
        if i >= warmup:
            samples["forward"].append(1e6 * (middle - start) / depth)
            samples["backward"].append(1e6 * (end - middle) / depth)
    report = {}
    for name, values in samples.items():
        q1, _, q3 = quartiles(values)
        report[name] = {"median": statistics.median(values), "q1": q1, "q3": q3}
    return report
