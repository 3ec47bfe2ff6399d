"""Time and peak memory of a stage against its depth, maps of one shape: what concatenating costs as a stage grows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.contenders import COMPILED, EAGER, LAYER, Stage, check_forms
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.memory import profiled_peak
from benchmarks.shapes import StageShape, parse_shape
from benchmarks.tables import table

# The third stage of ResNet-18 and 34 at 224x224, which there is 2 and 6 layers deep.
BATCH, CHANNELS, SIZE, HEAD_DIM = 8, 256, 14, 16
DEPTHS = (3, 6, 12, 24, 48)
# Beyond it the compilation alone would take longer than all the rest of this part.
DEEPEST_COMPILED = 24
SMALL = (StageShape(2, 2, 16, 6, 8), StageShape(4, 2, 16, 6, 8))


def shapes(small: bool) -> Sequence[StageShape]:
    """The stages that are measured, the shallowest first."""
    return (
        SMALL if small else [StageShape(depth, BATCH, CHANNELS, SIZE, HEAD_DIM) for depth in DEPTHS]
    )


def measure_depth(names: Sequence[str], rounds: int, small: bool = False) -> dict[str, Any]:
    """Of each depth: a forward and backward of every contender in turn, all checked first, and the most bytes held."""
    report: dict[str, Any] = {}
    for shape in shapes(small):
        torch.compiler.reset()  # graphs of the depths before are of no use to this one
        stage = Stage(shape)
        wanted = [n for n in (EAGER, COMPILED, LAYER) if n in names]
        if shape.depth > DEEPEST_COMPILED and COMPILED in wanted:
            wanted.remove(COMPILED)
        forms = stage.forms(wanted)
        checked = check_forms(stage, forms)
        steps = {name: partial(stage.step, forward) for name, forward in forms.items()}
        seconds = interleave(steps, rounds)
        report[shape.name] = {
            name: checked[name]
            | {
                "ms": summarize(times)._asdict(),
                "times_ours": ratio(times, seconds[LAYER]),
                "peak_bytes": profiled_peak(steps[name]),
            }
            for name, times in seconds.items()
        }
    return report


def depth_rows(found: dict[str, Any]) -> list[tuple[int, str, float, float]]:
    """Depth, contender, median milliseconds and peak MiB: what a picture or a table of this part is made of."""
    return [
        (int(shape.split("x")[0]), name, of["ms"]["median"], of["peak_bytes"] / 2**20)
        for shape, contenders in found.items()
        for name, of in contenders.items()
    ]


def depth_lines(found: dict[str, Any]) -> list[str]:
    """A table: a row for each depth."""
    rows = []
    for shape, contenders in found.items():
        of = parse_shape(shape)
        cells = [str(of.depth), f"[{of.batch}, {of.channels}, {of.size}, {of.size}], {of.head_dim}"]
        for values in (
            {name: f"{c['ms']['median']:.1f}" for name, c in contenders.items()},
            {name: f"{c['peak_bytes'] / 2**20:.1f}" for name, c in contenders.items()},
        ):
            cells += [values.get(name, "-") for name in (EAGER, COMPILED, LAYER)]
        rows.append(cells)
    head = ["layers", "maps, head_dim", "eager, ms", "compiled", "ours"]
    return table([*head, "eager, peak MiB", "compiled", "ours"], rows)
