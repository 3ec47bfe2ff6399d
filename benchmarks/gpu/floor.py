"""Each operation against the least it must move, at the bandwidth of a copy measured in the same rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from benchmarks.gpu.footprint import OPS, least_bytes
from benchmarks.gpu.ops import LayerOps, refusing
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import FEW_CASES, FLOOR_CASES, SMOKE_CASES, Case
from benchmarks.gpu.timing import Budget, graphed, take_turns
from benchmarks.measure import Contender, summarize

Save = Callable[[dict[str, Any]], None]

# The copied buffers: far beyond any cache.
_COPY_BYTES = 2**30
# Inputs are rotated until together they are this many caches, so that none is read from the cache.
_CACHES = 4
# A timed region is made this long, so that the start of a graph is a small part of it.
_REGION_SECONDS = 1.5e-3


def input_sets(case: Case, depth: int, setting: Setting) -> int:
    """How many sets of inputs are used in turn: one where a set exceeds the cache many times over."""
    touched = (depth + 1) * case.map_bytes
    return max(1, math.ceil(_CACHES * setting.l2_bytes / touched))


def exceeds_cache(case: Case, depth: int, setting: Setting) -> bool:
    """True when what one call reads and writes is larger than the cache twice over."""
    return (depth + 1) * case.map_bytes > 2 * setting.l2_bytes


def copy_contender(setting: Setting, size: int = _COPY_BYTES) -> tuple[Contender, int]:
    """A copy within the device's memory, and the bytes that it reads and writes."""
    size = 2**16 if setting.smoke else size
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return graphed(partial(target.copy_, source), setting.device), 2 * size


def cases_of(setting: Setting) -> list[Case]:
    """Most important first."""
    if setting.smoke:
        return SMOKE_CASES[:1] if setting.few else SMOKE_CASES
    return FEW_CASES if setting.few else FLOOR_CASES


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """All cases, each saved as soon as it is there; what the budget does not reach is named."""

    def inputs(case: Case, seed: int) -> LayerOps:
        return LayerOps(case, case.shape.depth, setting.device, seed)

    def least(case: Case) -> dict[str, int]:
        return {op: least_bytes(op, case, case.shape.depth) for op in OPS}

    measure_cases(cases_of(setting), inputs, least, setting, budget, save, seconds=4)


class Operations(Protocol):
    """One set of inputs, on which operations are checked and timed by their names."""

    def check(self, op: str, backend: str) -> float:
        """Refuse an operation whose results are wrong; return how far the worst is off."""

    def operation(self, op: str, backend: str) -> Contender:
        """One operation of one backend, as something to time."""


def measure_cases(
    cases: Sequence[Case],
    inputs: Callable[[Case, int], Operations],
    least: Callable[[Case], Mapping[str, int]],
    setting: Setting,
    budget: Budget,
    save: Save,
    seconds: float,
) -> None:
    """All cases, each saved as soon as it is there; what the budget does not reach is named.

    Args:
        cases: most important first.
        inputs: makes one set of inputs of a case, of a number that is its seed.
        least: a case's operations, each with the least bytes that it moves.
        setting, budget, save: of the part.
        seconds: with less than these no case but the first is begun.
    """
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    copy = copy_contender(setting)
    for case in cases:
        if budget.left < seconds and report["cases"]:
            report["left_out"].append(case.name)
            continue
        depth, refused = case.shape.depth, report["refused"]
        sets = [inputs(case, seed) for seed in range(input_sets(case, depth, setting))]
        report["cases"][case.name] = {
            "depth": depth,
            "map_bytes": case.map_bytes,
            "input_sets": len(sets),
            "exceeds_cache": exceeds_cache(case, depth, setting),
            "ops": measure_ops(case.name, sets, least(case), setting, budget, copy, refused),
        }
        save(report)
    save(report)


def measure_ops(
    case_name: str,
    sets: Sequence[Operations],
    least: Mapping[str, int],
    setting: Setting,
    budget: Budget,
    copy: tuple[Contender, int],
    refused: list[str],
) -> dict[str, Any]:
    """Times of all operations that `least` has the bytes of, in turns with the copy of so many bytes."""
    found = {}
    for op, least_of_op in least.items():
        contenders: dict[str, Contender] = {"copy": copy[0]}
        calls = _calls(len(sets) * least_of_op)
        errors = {}
        for backend in setting.backends:
            with refusing(f"{case_name}: {backend} {op}", refused):
                error = sets[0].check(op, backend)
                operations = [s.operation(op, backend) for s in sets]
                contenders[backend] = graphed(partial(run_all, operations, calls), setting.device)
                errors[backend] = error
        seconds = take_turns(contenders, setting.device, setting.rounds, min(0.5, budget.left / 4))
        found[op] = report_op(seconds, least_of_op, len(sets) * calls, copy[1], errors)
    return found


def _calls(least_of_sets: int) -> int:
    """How often all sets are gone through in one timed region."""
    optimistic = 4e12  # bytes a second; a slower device only makes the region longer
    return max(1, min(50, round(_REGION_SECONDS * optimistic / least_of_sets)))


def run_all(operations: list[Contender], calls: int) -> list[object]:
    """Every set's operation, all results alive at once so that each is written to memory of its own."""
    results: list[object] = []
    for _ in range(calls):
        results = [run() for run in operations]
    return results


def report_op(
    seconds: dict[str, list[float]],
    bytes_least: int,
    calls: int,
    copy_bytes: int,
    errors: dict[str, float],
) -> dict[str, Any]:
    copy_rate = copy_bytes / statistics.median(seconds["copy"])
    report: dict[str, Any] = {
        "least_bytes": bytes_least,
        "copy_gb_per_s": copy_rate / 1e9,
        "copy": summarize(seconds["copy"])._asdict(),
        "backends": {},
    }
    for backend, error in errors.items():
        one_call = [s / calls for s in seconds[backend]]
        median = statistics.median(one_call)
        report["backends"][backend] = {
            "ms": summarize(one_call)._asdict(),
            "gb_per_s": bytes_least / median / 1e9,
            "percent_of_copy": 100 * bytes_least / median / copy_rate,
            "largest_error": error,
        }
    return report
