"""Which layers are skipped: thresholds and the guards around them. A pure function of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Reason(Enum):
    """Why a layer is kept or skipped; the value is the sentence of the report."""

    UNDECIDED = "no decision yet"
    WARMUP = "warm-up"
    FIRST = "first layer of its stage"
    NOT_OBSERVED = "no divergence seen"
    NOT_FINITE = "divergence was not finite"
    DISTINCT = "score not below low"
    SHARE = "cap on the share of skipped layers"
    ROW = "cap on skipped layers in a row"
    RETURNED = "came back: score above high"
    REDUNDANT = "score below low"
    HELD = "hysteresis: score not above high"
    PRUNED = "pruned"


class Rules(NamedTuple):
    """Thresholds and guards, as the arguments of :class:`ela_kernels.EBQM`."""

    low: float
    high: float
    max_share: float
    max_row: int


class Candidate(NamedTuple):
    """What is known of one layer when a decision is due.

    `score` is None for a layer of which nothing was seen, and NaN for one with divergences that were not finite.
    """

    stage: int
    first: bool
    skipped: bool
    pruned: bool
    score: float | None


class Verdict(NamedTuple):
    """One layer's decision and its reason."""

    skipped: bool
    reason: Reason


def decide(layers: Sequence[Candidate], rules: Rules) -> list[Verdict]:
    """Decide for every layer whether it is skipped, and which rule or guard settled it.

    A layer in use is dropped at `score < low`, a skipped one comes back at `score > high`. Where the caps leave room
    for only some, those of smaller score go first, then the earlier. A layer that is skipped already counts there with
    `high - low` less than its score: another takes its place only if it is better by more than that, so that two of
    nearly the same score do not swap to and fro. A layer may be the `max_row`-th of skipped neighbours in its stage,
    and not the next.

    Args:
        layers: all layers that can be skipped, in the order of the model; the neighbours of one stage stand together.
        rules: thresholds and guards.

    Returns:
        One verdict a layer.
    """
    verdicts = [_wish(layer, rules) for layer in layers]
    wishes = [i for i, v in enumerate(verdicts) if v.skipped]
    wishes.sort(key=lambda i: (not layers[i].pruned, _rank(layers[i], rules), i))
    most = math.floor(rules.max_share * len(layers) + 1e-9)
    taken: set[int] = set()
    for i in wishes:
        if layers[i].pruned:
            taken.add(i)
        elif len(taken) >= most:
            verdicts[i] = Verdict(False, Reason.SHARE)
        elif _row_with(i, taken, layers) > rules.max_row:
            verdicts[i] = Verdict(False, Reason.ROW)
        else:
            taken.add(i)
    return verdicts


def _wish(layer: Candidate, rules: Rules) -> Verdict:
    """The verdict on one layer before the caps."""
    score = layer.score
    if layer.pruned:
        return Verdict(True, Reason.PRUNED)
    if layer.first:
        return Verdict(False, Reason.FIRST)
    if score is None:
        return Verdict(False, Reason.NOT_OBSERVED)
    if not math.isfinite(score):
        return Verdict(False, Reason.NOT_FINITE)
    if score < rules.low:
        return Verdict(True, Reason.REDUNDANT)
    if not layer.skipped:
        return Verdict(False, Reason.DISTINCT)
    return Verdict(False, Reason.RETURNED) if score > rules.high else Verdict(True, Reason.HELD)


def _rank(layer: Candidate, rules: Rules) -> float:
    if layer.score is None or layer.pruned:
        return 0.0
    return layer.score - (rules.high - rules.low) if layer.skipped else layer.score


def _row_with(i: int, taken: set[int], layers: Sequence[Candidate]) -> int:
    """How many skipped neighbours would stand in a row if layer `i` were skipped too."""
    length = 1
    for direction in (-1, 1):
        j = i + direction
        while j in taken and layers[j].stage == layers[i].stage:
            length += 1
            j += direction
    return length
