"""Forward and backward of a whole stage, `x <- x + layer(x)`, by every contender in turn."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.contenders import LAYER, PULL, Stage, check_forms
from benchmarks.measure import fastest_baseline, interleave, ratio, summarize
from benchmarks.shapes import StageShape


def measure_stage(shape: StageShape, names: list[str], rounds: int) -> dict[str, Any]:
    """Times of the named contenders, all checked first, and how much longer each takes than ours, layer and op."""
    stage = Stage(shape)
    forms = stage.forms(names)
    checked = check_forms(stage, forms)
    steps = {name: partial(stage.step, forward) for name, forward in forms.items()}
    seconds = interleave(steps, rounds)
    report: dict[str, Any] = {
        "contenders": {
            name: checked[name] | {"ms": summarize(times)._asdict()}
            for name, times in seconds.items()
        },
        "times_ours": {
            name: ratio(times, seconds[LAYER]) for name, times in seconds.items() if name != LAYER
        },
        "times_op": {
            name: ratio(times, seconds[PULL]) for name, times in seconds.items() if name != PULL
        },
    }
    report["fastest_baseline"] = fastest_baseline(
        {name: found["ms"] for name, found in report["contenders"].items()}
    )
    report["op_least_bytes"] = least_bytes_of_ops(shape)
    return report


def least_bytes_of_ops(shape: StageShape, element_size: int = 4) -> dict[str, int]:
    """Bytes that the op of a stage must read or write: per layer t of T, in maps, forward t reads and 1 write; backward
    t + 1 reads for the dot products, then T - t + 1 reads and 1 write to gather a value's gradient."""
    T = shape.depth
    triangle = T * (T + 1) // 2
    map_bytes = shape.map_elements * element_size
    return {"forward": (triangle + T) * map_bytes, "backward": 2 * (triangle + T) * map_bytes}
