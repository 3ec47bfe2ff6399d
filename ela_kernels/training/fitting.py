"""Values of unknown origin: refused where they are not of the kind, size or number that is expected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.training.plain import shown

LARGEST = 1e100


class UnfitError(Exception):
    """What of a state does not fit, and what would."""


def check_values(where: str, value: Any, count: int, types: tuple[type, ...]) -> None:
    if (
        not isinstance(value, list)
        or len(value) != count
        or any(type(v) not in types for v in value)
    ):
        names = " or ".join(t.__name__ for t in types)
        raise UnfitError(f"{where} is {shown(value)}; allowed is a list of {count}, each {names}")


def check_like(where: str, value: Any, expected: Any) -> None:
    """A tensor of the same kind, or a list as long with values of the same type."""
    if isinstance(expected, Tensor):
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
    elif not isinstance(value, type(expected)):
        raise UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
    elif isinstance(expected, list):
        if len(value) != len(expected):
            raise UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
        for number, (one, other) in enumerate(zip(value, expected, strict=True)):
            if type(one) is not type(other):
                raise UnfitError(f"{where}[{number}] is {shown(one)}; allowed is {shown(other)}")


def check_mapping(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise UnfitError(f"{where} is {shown(value)}; allowed is a dict")


def check_entries(where: str, value: Any, expected: Mapping[str, Any] | Sequence[str]) -> None:
    """A dict with these entries and no others."""
    check_mapping(where, value)
    missing = [name for name in expected if name not in value]
    extra = [name for name in value if name not in expected]
    if missing or extra:
        words = [f"has no {', '.join(missing[:3])}"] if missing else []
        words += [f"has {', '.join(map(shown, extra[:3]))} besides"] if extra else []
        raise UnfitError(
            f"{where} {' and '.join(words)} ({len(missing)} entries too few, {len(extra)} too many)"
        )


def check_no_others(where: str, value: Mapping[str, Any], expected: Iterable[str]) -> None:
    for name in value:
        if name not in expected:
            raise UnfitError(
                f"{where} has {shown(name)} besides; allowed are {', '.join(expected)}"
            )


def check_number(where: str, value: Any, most: float = LARGEST) -> None:
    # NaN is in no order; an int may be too large for a float.
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise UnfitError(f"{where} is {shown(value)}; allowed is a number from 0 to {most:g}")


def check_count(where: str, value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise UnfitError(f"{where} is {shown(value)}; allowed is an int from 0 to {most}")
    return value
