"""A layer's score: an upper quantile of the Beta distribution with the moments of its divergences. Plain numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

# From here on the distribution is taken for a normal one, which it is to 1e-8 or so: its deviation is below 2e-5.
# SciPy's betaincinv ends in NaN at 1e12 or at 1e16, by its version.
_NARROW = 1e9


class BetaFit(NamedTuple):
    """The Beta distribution of that mean and variance, the latter in [0, mean * (1 - mean)].

    At the ends it is none: without variance all values are the mean; with the largest they are zeros and ones.
    """

    mean: float
    variance: float

    @property
    def concentration(self) -> float:
        """`a + b`: infinite where all values are alike, 0 where there are zeros and ones only."""
        room = self.mean * (1.0 - self.mean)
        return math.inf if self.variance <= 0.0 else max(room - self.variance, 0.0) / self.variance

    @property
    def a(self) -> float:
        """The first parameter; 0 or infinite at the ends."""
        return 0.0 if self.mean == 0.0 else self.mean * self.concentration

    @property
    def b(self) -> float:
        """The second parameter; 0 or infinite at the ends."""
        return 0.0 if self.mean == 1.0 else (1.0 - self.mean) * self.concentration

    def quantile(self, p: float) -> float:
        """The least x in [0, 1] with `P(Z <= x) >= p`, for `p` in (0, 1)."""
        from scipy.special import betaincinv, ndtri

        c = self.concentration
        if c >= _NARROW:
            x = self.mean + float(ndtri(p)) * math.sqrt(self.variance)
            # Not out of what Markov's inequality leaves, where the mean lies next to an end.
            return min(max(x, 1.0 - (1.0 - self.mean) / p, 0.0), self.mean / (1.0 - p), 1.0)
        a, b = self.mean * c, (1.0 - self.mean) * c
        if a == 0.0 or b == 0.0:  # zeros and ones alone
            return 0.0 if 1.0 - self.mean >= p else 1.0
        return float(betaincinv(a, b, p))


def fit_beta(mean: float, second_moment: float) -> BetaFit:
    """Fit a Beta distribution by the method of moments.

    With m and m2 the two arguments::

        v = m2 - m * m, not below 0 nor above m * (1 - m)
        c = m * (1 - m) / v - 1,    a = m * c,    b = (1 - m) * c

    Args:
        mean: of numbers in [0, 1].
        second_moment: the mean of their squares.

    Returns:
        The fit.

    Raises:
        ValueError: `mean` outside [0, 1], or `second_moment` not finite.
    """
    if not 0.0 <= mean <= 1.0:
        raise ValueError(f"mean: got {mean}; allowed is a number in [0, 1]")
    if not math.isfinite(second_moment):
        raise ValueError(f"second_moment: got {second_moment}; allowed is a finite number")
    most = mean * (1.0 - mean)
    if second_moment >= mean:  # zeros and ones, whatever is lost in the difference below
        return BetaFit(mean, most)
    return BetaFit(mean, min(max(second_moment - mean * mean, 0.0), most))


def score(mean: float, second_moment: float, quantile: float) -> float:
    """`fit_beta(mean, second_moment).quantile(quantile)`: below it lies that share of a layer's divergences.

    It is never above `mean / (1 - quantile)`, whatever the second moment: rounding of the latter cannot make a layer
    look distinct whose divergences are next to nothing. All values alike give that value.

    Source:
        Our definition. SciPy's `betaincinv` does the work.
    """
    return fit_beta(mean, second_moment).quantile(quantile)
