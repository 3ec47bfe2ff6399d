"""The parameters of EBQM and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ela_kernels.ebqm.decision import Rules

# Arguments of the rule that compared the layers with each other.
REMOVED = {
    "ceiling": "low and high are absolute themselves now, and hold for an upper quantile of a layer's divergences",
    "prior_count": "each layer has a fit of its own, to its own divergences, and needs no prior",
    "prior_concentration": "each layer has a fit of its own, to its own divergences, and needs no prior",
    "reference": "the score is on the scale of the divergences themselves, from 0 to 1; quantile says how many of them "
    "lie below it",
}


# Of these, values that say what holds without them: a ceiling of 1 was none.
_WITHOUT_EFFECT: dict[str, object] = {"ceiling": 1.0}


class Settings(NamedTuple):
    """What a decision depends on, besides the statistics; saved with them and compared when they are loaded."""

    low: float
    high: float
    quantile: float
    max_share: float
    max_row: int
    warmup: int
    interval: int
    probe_interval: int
    smoothing: float

    @property
    def rules(self) -> Rules:
        return Rules(self.low, self.high, self.max_share, self.max_row)

    def decides_at(self, step: int) -> bool:
        """Whether a decision point falls on `step`; those of the warm-up only look."""
        return step > 0 and (step - self.warmup) % self.interval == 0

    def as_dict(self) -> dict[str, Any]:
        return self._asdict()


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
    quantile = _number("quantile", s.quantile, 0.0, 1.0)
    if not 0.0 < quantile < 1.0:
        raise ValueError(
            f"quantile: got {quantile}; allowed is a number between 0 and 1, neither of them: every distribution's "
            "would be the same"
        )
    return Settings(
        low,
        high,
        quantile,
        _number("max_share", s.max_share, 0.0, 1.0),
        _count("max_row", s.max_row, 1),
        _count("warmup", s.warmup, 0),
        _count("interval", s.interval, 1),
        _count("probe_interval", s.probe_interval, 1),
        smoothing,
    )


def refuse_removed(given: Mapping[str, object], allowed: Iterable[str]) -> None:
    """Say of an argument that EBQM had what stands in its place; one that said what holds anyway may stay.

    Raises:
        TypeError: there is one of a name that EBQM does not know.
    """
    for name, value in given.items():
        if name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name]:
            continue
        why = REMOVED.get(name, "it is not known")
        if name in REMOVED:
            why = f"it is not there any more, since {why}"
        raise TypeError(f"{name}: got {value!r}, but {why}; allowed are {', '.join(allowed)}")


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


def _count(name: str, value: object, lowest: int) -> int:
    allowed = f"an int of at least {lowest}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}; allowed is {allowed}")
    if value < lowest:
        raise ValueError(f"{name}: got {value}; allowed is {allowed}")
    return value
