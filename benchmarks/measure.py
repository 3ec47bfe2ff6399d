"""Interleaved timing, as the package has it, and which of the published forms counts."""

from __future__ import annotations

from collections.abc import Mapping

from ela_kernels.benching.timing import (
    Contender,
    Summary,
    interleave,
    quartiles,
    ratio,
    summarize,
)

__all__ = [
    "Contender",
    "Summary",
    "fastest_baseline",
    "interleave",
    "quartiles",
    "ratio",
    "summarize",
]


def fastest_baseline(ms: Mapping[str, Mapping[str, float]]) -> str:
    """The published form that is faster, eager or compiled, of the contenders' summaries; the others do not count."""
    return min((n for n in ("eager", "compiled") if n in ms), key=lambda n: ms[n]["median"])
