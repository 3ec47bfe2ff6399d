"""Which cases of the stand-ins for a GPU `make test` leaves to `make test-all`: they take most of the time.

A test function has up to a hundred cases on each of them, and what goes wrong in one mostly goes wrong in many. Of each
function so many are run as stand here, spread evenly over its cases, which are ordered by what they cover.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import pytest

INTERPRETED, ON_CPU = 2, 8
"""Cases of a function in Triton's interpreter, and of the CUDA kernels on the CPU, which are a tenth as slow."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Give the marker `exhaustive` to the cases that are left."""
    functions: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        usual = usual_cases(item.nodeid)
        if usual is not None:
            functions.setdefault((item.nodeid.partition("[")[0], usual), []).append(item)
    for (_, usual), cases in functions.items():
        for case in left(cases, usual):
            case.add_marker(pytest.mark.exhaustive)


def usual_cases(name: str) -> int | None:
    """How many cases of a test's function and backend are usual; None: all."""
    file, _, case = name.partition("::")
    if "triton_interpreted" in case or re.search(r"tests/triton/", file):
        return INTERPRETED
    if "cuda_on_cpu" in case or re.search(r"tests/cuda_on_cpu/", file):
        return ON_CPU
    return None


def left(cases: Sequence[pytest.Item], usual: int) -> Iterator[pytest.Item]:
    """All but `usual` of them, spread evenly, the first among these."""
    for i, case in enumerate(cases):
        if usual < len(cases) and i and i * usual // len(cases) == (i - 1) * usual // len(cases):
            yield case
