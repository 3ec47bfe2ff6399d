"""The Beta quantile map: from the layers' divergences to retention scores. Plain numbers, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# A divergence of exactly 0 or 1 is a matter of rounding; the Beta distribution has no density for it.
MARGIN = 1e-4
# SciPy's betaincinv gives NaN for some probabilities below 1e-100, which decide nothing anyway.
_TAIL = 1e-12


class BetaFit(NamedTuple):
    """Beta(a, b), fitted to the divergences of that many layers."""

    a: float
    b: float
    layers: int


class Retention(NamedTuple):
    """One layer's place among the layers: `u` in the fitted distribution, `r` in the reference."""

    u: float
    r: float


def fit_beta(x: Sequence[float], prior_count: float, prior_concentration: float) -> BetaFit:
    """Fit Beta(a, b) by the method of moments, its variance shrunk toward a prior's by pseudo-counts.

    With `x` clipped to `[MARGIN, 1 - MARGIN]`, n values, mean m and (population) variance v::

        v0 = m * (1 - m) / (1 + prior_concentration)           # the prior's variance, at the layers' own mean
        v* = (n * v + prior_count * v0) / (n + prior_count)
        c  = max(m * (1 - m) / v* - 1, 1 / min(m, 1 - m))
        a  = m * c,    b = (1 - m) * c

    Layers all alike (v = 0) so take the middle of a distribution that has a spread of its own, instead of the halves of
    one that has none. The second bound makes a, b >= 1: without it many layers near 0 and many near 1 give a density
    with poles there, in which the layers near 0 are so common that their score is ordinary. Since v* > 0, `a` and `b`
    are finite. The mean is not shrunk: this map is about a layer's place among the others, the absolute ceiling about
    its size.

    Args:
        x: divergences in [0, 1], one a layer, at least one.
        prior_count: weight of the prior, in layers; > 0.
        prior_concentration: a + b of the prior; > 0. The larger, the smaller the differences that count.

    Returns:
        The fit.

    Raises:
        ValueError: no value, or one outside [0, 1].

    Source:
        Our definition; the published abstract (arXiv 2503.06473) names the method and gives no formula.
    """
    n = len(x)
    if n == 0 or not all(0.0 <= value <= 1.0 for value in x):
        raise ValueError(f"x: got {list(x)}; allowed is at least one number, all of them in [0, 1]")
    clipped = [_clip(value) for value in x]
    m = math.fsum(clipped) / n
    v = math.fsum((value - m) ** 2 for value in clipped) / n
    v0 = m * (1.0 - m) / (1.0 + prior_concentration)
    shrunk = (n * v + prior_count * v0) / (n + prior_count)
    c = max(m * (1.0 - m) / shrunk - 1.0, 1.0 / min(m, 1.0 - m))
    return BetaFit(m * c, (1.0 - m) * c, n)


def retention(x: Sequence[float], fit: BetaFit, reference: tuple[float, float]) -> list[Retention]:
    """Map divergences to retention scores: `u = BetaCDF(x; a, b)`, `r = BetaQuantile(u; *reference)`.

    Both steps are monotone: a larger divergence never has a smaller score. `u` is kept 1e-12 from 0 and 1.

    Args:
        x: divergences in [0, 1].
        fit: the distribution that :func:`fit_beta` gave.
        reference: (a, b) of the distribution on whose scale the thresholds are.

    Returns:
        `u` and `r` in [0, 1] for each value.

    Source:
        Our definition. SciPy's `betainc` and `betaincinv` do the work.
    """
    from scipy.special import betainc, betaincinv

    scores = []
    for value in x:
        u = min(max(float(betainc(fit.a, fit.b, _clip(value))), _TAIL), 1.0 - _TAIL)
        scores.append(Retention(u, float(betaincinv(*reference, u))))
    return scores


def _clip(value: float) -> float:
    return min(max(value, MARGIN), 1.0 - MARGIN)
