"""The parameters of EBQM and their checks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ela_kernels.ebqm.decision import Rules


class Settings(NamedTuple):
    """What a decision depends on, besides the statistics; saved with them and compared when they are loaded."""

    low: float
    high: float
    ceiling: float
    max_share: float
    max_row: int
    warmup: int
    interval: int
    probe_interval: int
    smoothing: float
    prior_count: float
    prior_concentration: float
    reference: tuple[float, float]

    @property
    def rules(self) -> Rules:
        return Rules(self.low, self.high, self.ceiling, self.max_share, self.max_row)

    def decides_at(self, step: int) -> bool:
        """Whether a decision point falls on `step`; those of the warm-up only look."""
        return step > 0 and (step - self.warmup) % self.interval == 0

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "reference": list(self.reference)}


def checked_settings(settings: Settings) -> Settings:
    """`settings` with plain numbers, or an error that names the first parameter that does not fit."""
    s = settings
    low, high = _number("low", s.low, 0.0, 1.0), _number("high", s.high, 0.0, 1.0)
    if low >= high:
        raise ValueError(
            f"low, high: got low={low} and high={high}; allowed is low < high, so that a layer does not come and go"
        )
    smoothing = _number("smoothing", s.smoothing, 0.0, 1.0)
    if smoothing == 1.0:
        raise ValueError(
            "smoothing: got 1.0; allowed is a number in [0, 1), as 1 would never take in anything"
        )
    reference = s.reference
    if not isinstance(reference, (tuple, list)) or len(reference) != 2:
        raise TypeError(
            f"reference: got {reference!r}; allowed is a pair (a, b) of positive numbers"
        )
    return Settings(
        low,
        high,
        _number("ceiling", s.ceiling, 0.0, 1.0),
        _number("max_share", s.max_share, 0.0, 1.0),
        _count("max_row", s.max_row, 1),
        _count("warmup", s.warmup, 0),
        _count("interval", s.interval, 1),
        _count("probe_interval", s.probe_interval, 1),
        smoothing,
        _positive("prior_count", s.prior_count),
        _positive("prior_concentration", s.prior_concentration),
        (_positive("reference[0]", reference[0]), _positive("reference[1]", reference[1])),
    )


def _real(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed is {allowed}")
    return float(value)


def _number(name: str, value: object, lowest: float, highest: float) -> float:
    allowed = f"a number in [{lowest:g}, {highest:g}]"
    number = _real(name, value, allowed)
    if not lowest <= number <= highest:
        raise ValueError(f"{name}: got {number}; allowed is {allowed}")
    return number


def _positive(name: str, value: object) -> float:
    allowed = "a positive, finite number"
    number = _real(name, value, allowed)
    if not math.isfinite(number) or number <= 0.0:
        raise ValueError(f"{name}: got {number}; allowed is {allowed}")
    return number


def _count(name: str, value: object, lowest: int) -> int:
    allowed = f"an int of at least {lowest}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed is {allowed}")
    if value < lowest:
        raise ValueError(f"{name}: got {value}; allowed is {allowed}")
    return value
