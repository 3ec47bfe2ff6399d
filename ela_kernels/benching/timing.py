"""Interleaved timing: every contender once, then all of them again, so that a slow moment meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Contender = Callable[[], object]


class Summary(NamedTuple):
    """Times of one contender, in milliseconds."""

    median: float
    q1: float
    q3: float
    fastest: float
    rounds: int
    samples: list[float]


def summarize(seconds: list[float]) -> Summary:
    """Median and quartiles of one contender's times."""
    samples = [1e3 * s for s in seconds]
    q1, median, q3 = quartiles(samples)
    return Summary(median, q1, q3, min(samples), len(samples), [round(s, 5) for s in samples])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def interleave(
    contenders: Mapping[str, Contender], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, in the order A, B, C, then B, C, A, then C, A, B.

    What a contender returns is given back inside the timed part: freeing belongs to a training step too, and with
    glibc's defaults it is a large part of it. Python's collector runs between rounds, never inside one, and only on
    what they made: a walk through all of PyTorch's objects empties the caches, at the cost of whoever comes next.
    """
    for run in contenders.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    turns = list(contenders.items())
    try:
        for i in range(rounds):
            gc.collect()
            first = i % len(turns)
            for name, run in turns[first:] + turns[:first]:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, Any]:
    """How many times longer the numerator takes: of the medians, and the quartiles of the rounds' own ratios."""
    q1, median, q3 = quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])
    return {
        "of_medians": statistics.median(numerator) / statistics.median(denominator),
        "median_of_rounds": median,
        "q1": q1,
        "q3": q3,
    }
