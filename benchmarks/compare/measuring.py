"""Two checkouts measured in turns: their numbers compared first, then short measurements, one process at a time."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.compare.checkouts import Checkout
from benchmarks.compare.judging import paired_ratio
from benchmarks.compare.processes import (
    BASE,
    NEW,
    Options,
    Process,
    Processes,
    RowError,
    processes,
)
from benchmarks.compare.rows import Row

# What a measurement's steps take together: as many steps as fit, at least one.
SECONDS = 0.03
MOST_STEPS = 100
# Whatever becomes slower or faster over time meets both alike, and each is as often the first.
ORDERS = ((BASE, NEW, NEW, BASE), (NEW, BASE, BASE, NEW))


class Plan(NamedTuple):
    """How much is measured: so many rounds of each row, spread over so many starts of the processes."""

    rounds: int
    starts: int

    def rounds_of(self, start: int) -> int:
        return self.rounds // self.starts + (start < self.rounds % self.starts)


class LeftOut(NamedTuple):
    """Why a row was not measured; `is_fault`: not only for what BASE does not have yet."""

    why: str
    is_fault: bool


class Times(NamedTuple):
    """Of a row: its steps in a measurement, and by side, start and round the seconds of its two measurements.

    A measurement counts by the median of its steps.
    """

    steps: int
    seconds: dict[str, list[list[list[float]]]]

    def ratios(self) -> list[list[float]]:
        """NEW over BASE, by start and round."""
        return [
            [paired_ratio(b, n) for b, n in zip(base, new, strict=True)]
            for base, new in zip(self.seconds[BASE], self.seconds[NEW], strict=True)
        ]

    def median(self, side: str) -> float:
        """Seconds of a step."""
        return statistics.median(s for start in self.seconds[side] for two in start for s in two)


class Found(NamedTuple):
    """What was measured, and what could not be."""

    times: dict[str, Times]
    left_out: dict[str, LeftOut]
    facts: dict[str, dict[str, str]]


def measure(
    base: Checkout,
    new: Checkout,
    rows: Sequence[Row],
    plan: Plan,
    folder: Path,
    options: Options,
) -> Found:
    """Times of all rows that both checkouts run with the same numbers."""
    found = Found({}, {}, {})
    for start in range(plan.starts):
        rounds, begin = plan.rounds_of(start), time.perf_counter()
        print(f"start {start + 1} of {plan.starts}, {rounds} rounds", file=sys.stderr)
        with processes(base, new, folder, options) as sides:
            found.facts.update({side: process.facts for side, process in sides.items()})
            ready = [row for row in rows if prepare(row, sides, start == 0, folder, found)]
            for process in sides.values():
                process.ask("freeze")
            prepared = time.perf_counter()
            for i in range(rounds):
                for j, row in enumerate(ready):
                    _one_round(row, sides, ORDERS[(i + j) % 2], found)
                if start == i == 0:
                    a_round = time.perf_counter() - prepared
                    left = (plan.starts - 1) * (prepared - begin) + (plan.rounds - 1) * a_round
                    print(f"about {left:.0f} s are left", file=sys.stderr)
    return found


def prepare(row: Row, sides: Processes, is_first: bool, folder: Path, found: Found) -> bool:
    """Make a row in both processes, for the first time compare its numbers too; False where it is left out."""
    if row.name in found.left_out:
        return False
    failures = {side: _failure(process, row) for side, process in sides.items()}
    wrong = {side: failure for side, failure in failures.items() if failure}
    why = "; ".join(wrong.values())
    if not wrong and is_first:
        why = differences(row, sides, folder) or ""
    if why:
        found.times.pop(row.name, None)
        found.left_out[row.name] = LeftOut(why, list(wrong) != [BASE])
        print(f"{row.name} is not measured: {why}", file=sys.stderr)
        return False
    if is_first:
        steps = _steps(row, sides)
        found.times[row.name] = Times(steps, {BASE: [], NEW: []})
    for starts in found.times[row.name].seconds.values():
        starts.append([])
    return True


def _failure(process: Process, row: Row) -> str | None:
    try:
        process.ask("prepare", row=row.name)
    except RowError as error:
        return str(error)
    return None


def differences(row: Row, sides: Processes, folder: Path) -> str | None:
    """What a row gives that is not the same within its tolerances; None if nothing."""
    numbers: dict[str, dict[str, Tensor]] = {}
    for side, process in sides.items():
        file = folder / f"{side}.numbers"
        process.ask("numbers", row=row.name, file=str(file))
        numbers[side] = torch.load(file)
        file.unlink()
    if numbers[BASE].keys() != numbers[NEW].keys():
        return f"{BASE} has {', '.join(numbers[BASE])}; {NEW} has {', '.join(numbers[NEW])}"
    for name, base in numbers[BASE].items():
        tolerance = row.outputs if name == "output" else row.gradients
        apart = distance(base, numbers[NEW][name])
        if not apart <= tolerance:
            return (
                f"{name}: {apart:.2e} apart (relative L2 norm); allowed is {tolerance:.0e}. One of them is wrong, and "
                "what is wrong is not timed"
            )
    return None


def distance(base: Tensor, new: Tensor) -> float:
    """Relative L2 distance; infinite for other shapes or dtypes, NaN where one holds something that is not finite."""
    if (base.shape, base.dtype) != (new.shape, new.dtype):
        return math.inf
    base, new = base.double(), new.double()
    norm = float(torch.maximum(base.norm(), new.norm()))
    return float((base - new).norm()) / norm if norm != 0 else 0.0


def _steps(row: Row, sides: Processes) -> int:
    """The same for both: as many as the faster one does in the time of a measurement."""
    seconds = [
        statistics.median(process.ask("time", row=row.name, steps=3)["seconds"])
        for process in sides.values()
    ]
    return max(1, min(MOST_STEPS, int(SECONDS / min(seconds))))


def _one_round(row: Row, sides: Processes, order: Sequence[str], found: Found) -> None:
    times = found.times[row.name]
    two: dict[str, list[float]] = {BASE: [], NEW: []}
    for side in order:
        seconds = sides[side].ask("time", row=row.name, steps=times.steps)["seconds"]
        two[side].append(statistics.median(seconds))
    for side, values in two.items():
        times.seconds[side][-1].append(values)
