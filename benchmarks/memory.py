"""Peak memory of one stage, forward and backward, in maps of B * C * H * W elements.

PyTorch has no max_memory_allocated for the CPU. Its allocator reports every allocation and release to the profiler,
with its running total: the highest total is exact, whatever malloc keeps or gives back, and counts the compiled form as
well, which allocates from the same place. It does not see what a library takes from malloc itself (the convolutions'
scratch), so the process's peak resident memory is measured beside it: the kernel's high-water mark, reset before the
step, with malloc told to give every map back at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Stage
from benchmarks.shapes import StageShape

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def profiled_peak(step: Callable[[], object]) -> int:
    """Most bytes that PyTorch's CPU allocator held at once during `step`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def resident_peak(step: Callable[[], object]) -> int | None:
    """Growth of the peak resident memory in bytes; None where the system cannot reset it."""
    try:
        _CLEAR_REFS.write_text("5")  # the high-water mark falls to the present resident size
        before = _high_water_mark()
        step()
        return _high_water_mark() - before
    except OSError:
        return None


def _high_water_mark() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no high-water mark in /proc/self/status")


def measure_memory(shape: StageShape, names: list[str]) -> dict[str, Any]:
    """Peak of each contender in bytes and in maps, input, output gradient and parameters not counted."""
    stage = Stage(shape)
    forms = stage.forms(names)
    map_bytes = shape.map_elements * stage.x.element_size()
    report = {}
    for name, forward in forms.items():

        def step(forward: Callable[[torch.Tensor], torch.Tensor] = forward) -> None:
            stage.step(forward)

        step()  # compiles, and makes what is made once
        tensors, resident = profiled_peak(step), resident_peak(step)
        report[name] = {
            "bytes": tensors,
            "maps": tensors / map_bytes,
            "resident_maps": None if resident is None else resident / map_bytes,
        }
    return report
