"""Peak memory of the attention part of a stage, in maps, by the allocator's own count."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.floor import Save
from benchmarks.gpu.ops import refusing
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import MEMORY_CASES, SMOKE_CASES
from benchmarks.gpu.stages import AttentionStage, contenders_of, eager_bytes
from benchmarks.gpu.timing import Budget
from benchmarks.measure import Contender
from benchmarks.memory import profiled_peak


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """Peak of each contender: values, their gradients and everything in between, inputs and results included.

    The 2 T maps of the values and of their gradients cannot be done without. The rest is the running x, what is
    retrieved, their sum and the output gradient.
    """
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    for case in SMOKE_CASES if setting.smoke else MEMORY_CASES:
        if (budget.left < 1 and report["cases"]) or eager_bytes(case) > setting.free_bytes():
            report["left_out"].append(case.name)
            continue
        stage = AttentionStage(case, setting.device)
        inputs = (case.shape.depth + 2) * case.map_bytes
        found: dict[str, Any] = {
            "depth": case.shape.depth,
            "map_bytes": case.map_bytes,
            "contenders": {},
        }
        for name, step in contenders_of(stage, setting, compiled=False).items():
            with refusing(f"{case.name}: {name}", report["refused"]):
                step()  # compiles, and makes what is made once
                peak = _peak(step, setting, inputs)
                found["contenders"][name] = {"bytes": peak, "maps": peak / case.map_bytes}
        report["cases"][case.name] = found
        save(report)
    save(report)


def _peak(step: Contender, setting: Setting, inputs: int) -> int:
    if not setting.on_gpu:
        return inputs + profiled_peak(step)
    torch.cuda.synchronize(setting.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    step()
    torch.cuda.synchronize(setting.device)
    return inputs + torch.cuda.max_memory_allocated(setting.device) - before
