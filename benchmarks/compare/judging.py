"""Which of the measured ratios are beyond noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import quantile_test

SLOWER, FASTER = "slower", "faster"

# Of whole runs in which nothing differs: at most this share marks any row, even with a margin of zero.
FALSE_ALARMS = 0.05


class Judgement(NamedTuple):
    """How long NEW takes, in times of BASE.

    Attributes:
        ratio: the median of the rounds' ratios.
        low, high: the interval that holds the median of what the rounds are drawn from.
        starts: the median of each start of the processes.
        mark: :data:`SLOWER`, :data:`FASTER`, or empty.
    """

    ratio: float
    low: float
    high: float
    starts: list[float]
    mark: str


def level_for(rows: int) -> float:
    """The confidence of one row's interval with which all rows together keep to :data:`FALSE_ALARMS` (Bonferroni)."""
    return 1 - FALSE_ALARMS / rows


def least_rounds(rows: int) -> int:
    """The fewest rounds with which there is an interval at all: from the smallest to the largest of the ratios."""
    return math.ceil(math.log2(2 / (1 - level_for(rows))))


def paired_ratio(base: Sequence[float], new: Sequence[float]) -> float:
    """One round's ratio: what NEW took in its turns over what BASE took in its own, right before and after."""
    return sum(new) / sum(base)


def judge(starts: Sequence[Sequence[float]], level: float, margin: float) -> Judgement:
    """The median of the ratios with its interval, and whether it is beyond noise.

    The interval is of order statistics, from the sign test: it takes nothing of the noise but that rounds are drawn
    alike, so that a round in which the machine did something else counts as one, however long it took. A process may be
    faster or slower than another of the same code for as long as it lives, by where its memory lies, which no number of
    its rounds shows; hence several starts, and a mark only where each of them has its median beyond the margin as well.

    Args:
        starts: the ratios of each start of the two processes, one for each round.
        level: confidence of the interval, in (0, 1).
        margin: how far from 1 counts as the same; a ratio of `1 / (1 + margin)` as far as one of `1 + margin`.
    """
    ratios = [ratio for start in starts for ratio in start]
    interval = quantile_test(ratios, q=1, p=0.5).confidence_interval(level)
    # Where the rounds are too few for the level, SciPy gives no number, with which no comparison holds.
    low, high = float(interval.low), float(interval.high)
    medians = [statistics.median(start) for start in starts]
    mark = ""
    if low > 1 + margin and min(medians) > 1 + margin:
        mark = SLOWER
    elif high < 1 / (1 + margin) and max(medians) < 1 / (1 + margin):
        mark = FASTER
    return Judgement(statistics.median(ratios), low, high, medians, mark)
