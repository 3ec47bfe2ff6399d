"""The score of a layer: against SciPy and mpmath, at the ends of what moments can be, and by what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import betainc

from ela_kernels.ebqm import BetaFit, fit_beta, score

mpmath = pytest.importorskip("mpmath")  # a dependency of PyTorch's own sympy

# Means and shares of the largest variance, from end to end.
MEANS = [0.0, 1e-300, 1e-30, 1e-12, 1e-7, 1e-4, 0.01, 0.0999, 0.1, 0.1001, 0.3, 0.5, 0.9, 0.9001]
MEANS += [0.99, 1 - 1e-7, 1 - 1e-12, 1 - 2**-53, 1.0]
SHARES = [0.0, 1e-300, 1e-30, 1e-16, 1e-13, 1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999]
SHARES += [1 - 1e-6, 1 - 1e-9, 1 - 1e-12, 1 - 2**-53, 1.0]
QUANTILES = [1e-9, 0.01, 0.5, 0.9, 0.99, 1 - 1e-9]


def of(z: list[float] | np.ndarray, quantile: float = 0.9) -> float:
    """The score of a layer with these z = 1 - exp(-kl)."""
    z = np.asarray(z, dtype=np.float64)
    return score(float(z.mean()), float(np.square(z).mean()), quantile)


def of_kl(kl: np.ndarray) -> float:
    return of(-np.expm1(-kl))


def test_fit_by_hand() -> None:
    # m = 0.25, m2 = 0.1, so v = 0.0375 and c = 0.1875 / 0.0375 - 1 = 4
    fit = fit_beta(0.25, 0.1)
    assert (fit.mean, fit.variance) == pytest.approx((0.25, 0.0375), rel=1e-12)
    assert (fit.a, fit.b, fit.concentration) == pytest.approx((1.0, 3.0, 4.0), rel=1e-12)
    # Beta(1, 3): P(Z <= x) = 1 - (1 - x)**3
    assert fit.quantile(0.9) == pytest.approx(1 - 0.1 ** (1 / 3), rel=1e-12)
    assert score(0.25, 0.1, 0.9) == fit.quantile(0.9)


def test_the_quantile_is_that_of_the_values() -> None:
    z = np.random.default_rng(0).beta(2.0, 9.0, size=20_000)
    # the standard error of a 0.9-quantile of 20000 values is near 0.0015 here; four of them
    assert of(z) == pytest.approx(np.quantile(z, 0.9), abs=0.006)
    assert (z < of(z)).mean() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("quantile", QUANTILES)
def test_degenerate_moments_are_exact(quantile: float) -> None:
    assert of([0.0] * 7, quantile) == 0.0
    assert of([1.0] * 7, quantile) == 1.0
    for value in (1e-300, 1e-6, 0.25, 0.5, 1 - 2**-53):
        assert of([value], quantile) == value  # one sample
        assert of([value] * 4, quantile) == value
    for ones in range(1, 20):
        z = [1.0] * ones + [0.0] * (20 - ones)
        # Of zeros and ones, the least number that so many of them do not exceed.
        if abs((20 - ones) / 20 - quantile) > 1e-12:
            assert of(z, quantile) == float((20 - ones) / 20 < quantile)


@pytest.mark.parametrize("quantile", QUANTILES)
def test_no_moments_whatever_end_in_nan(quantile: float) -> None:
    for mean in MEANS:
        for share in SHARES:
            fit = BetaFit(mean, share * mean * (1.0 - mean))
            x = fit.quantile(quantile)
            # Markov's inequality, and the same from above
            assert 0.0 <= x <= min(1.0, mean / (1 - quantile) * (1 + 1e-6))
            assert 1.0 - x <= (1.0 - mean) / quantile * (1 + 1e-6) + 1e-15
            if 0.0 < fit.concentration < 1e12 and min(fit.a, fit.b) > 0.0:
                # F(x - e) <= p <= F(x + e): x itself may be a number next to that which has p
                below, above = betainc(fit.a, fit.b, [max(x - 1e-7, 0.0), min(x + 1e-7, 1.0)])
                assert below <= quantile * (1 + 1e-6)
                assert above >= quantile * (1 - 1e-6)
            else:
                # no further from the mean than six deviations of 5e-7, or one of zeros and ones
                assert min(abs(x - y) for y in (mean, 0.0, 1.0)) < 4e-6
            # rounding of the second moment beyond what there can be
            for second in (mean * mean * (1 - 1e-7), mean * (1 + 1e-7)):
                assert 0.0 <= score(mean, second, quantile) <= 1.0


@pytest.mark.parametrize("mean", [1e-9, 1e-4, 0.02, 0.15, 0.5, 0.97, 1 - 1e-6])
@pytest.mark.parametrize("share", [1e-8, 1e-4, 0.03, 0.4, 0.8])
def test_against_mpmath(mean: float, share: float) -> None:
    mpmath.mp.dps = 40
    fit = BetaFit(mean, share * mean * (1 - mean))
    a, b, x = mpmath.mpf(fit.a), mpmath.mpf(fit.b), mpmath.mpf(fit.quantile(0.9))
    if max(a, b) < 1e3:  # beyond, mpmath takes minutes or gives up
        below, above = (
            mpmath.betainc(a, b, 0, min(max(x + e, mpmath.mpf(0)), mpmath.mpf(1)), regularized=True)
            for e in (-(mpmath.mpf(10) ** -9), mpmath.mpf(10) ** -9)
        )
        assert float(below) <= 0.9 <= float(above)
    elif min(a, b) > 100:
        # Narrow: normal with the first correction for its skewness (Cornish and Fisher); the next is below 1e-4.
        skewness = 2 * (b - a) * mpmath.sqrt(a + b + 1) / ((a + b + 2) * mpmath.sqrt(a * b))
        normal = stats.norm.ppf(0.9)
        want = normal + (normal**2 - 1) / 6 * float(skewness)
        assert float(x) == pytest.approx(mean + want * math.sqrt(fit.variance), rel=1e-4)
    else:
        # At one end: a gamma distribution, up to a factor of 1 + 1 / b or so.
        first = (
            stats.gamma.ppf(0.9, fit.a) / fit.b
            if a < b
            else 1 - stats.gamma.ppf(0.1, fit.b) / fit.a
        )
        assert float(x) == pytest.approx(first, rel=2e-3, abs=1e-300)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-0.1, 0.1), "mean"),
        ((1.1, 1.0), "mean"),
        ((math.nan, 0.1), "mean"),
        ((0.5, math.nan), "second_moment"),
        ((0.5, math.inf), "second_moment"),
    ],
)
def test_refusals(arguments: tuple[float, float], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed"):
        fit_beta(*arguments)


fractions = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(fractions, st.floats(0.01, 0.99))
def test_it_is_a_quantile_of_something_with_these_moments(z: list[float], quantile: float) -> None:
    mean = float(np.mean(z))
    x = of(z, quantile)
    assert 0.0 <= x <= min(1.0, mean / (1 - quantile) + 1e-9)
    # no later than at a larger share
    assert x <= of(z, min(quantile + 0.005, 0.999)) + 1e-9


@settings(max_examples=200, deadline=None)
@given(fractions, st.floats(0.0, 5.0))
def test_it_grows_when_as_much_is_added_to_all(z: list[float], more: float) -> None:
    before, f = of(z), math.exp(-more)
    after = of([1 - f * (1 - value) for value in z])  # kl + more
    # Beyond 0.59 a wide distribution becomes narrower faster than it moves.
    assert after >= min(before, 0.59) - 1e-6


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["exponential", "gamma", "lognormal", "uniform"]),
    st.integers(0, 2**32 - 1),
    st.floats(-5, 2),
    st.floats(1.0, 20.0),
)
def test_it_grows_when_all_are_multiplied(
    family: str, seed: int, size: float, factor: float
) -> None:
    generator = np.random.default_rng(seed)
    kl = {
        "exponential": lambda: generator.exponential(1, 256),
        "gamma": lambda: generator.gamma(0.3, 1, 256),
        "lognormal": lambda: generator.lognormal(0, 2, 256),
        "uniform": lambda: generator.uniform(0, 1, 256),
    }[family]() * 10**size
    # at 1 - 1e-8 rounding of z decides
    assert of_kl(factor * kl) >= of_kl(kl) - 1e-7


def test_what_it_does_not_promise() -> None:
    """As its documentation says: these are no faults of the code, and no promises either."""
    # The smallest alone grow: narrower.
    assert of([0.1] * 5 + [0.3] * 5) < of([0.0] * 5 + [0.3] * 5)
    # Less than a tenth wholly new, the others exact repeats: nine of ten do not differ.
    assert of([1.0] * 9 + [0.0] * 91) == 0.0
    assert of([0.5] * 9 + [0.0] * 91) > 0.1


@settings(max_examples=100, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_rounding_moves_it_little(mean: float, share: float) -> None:
    """What float64 sums are off by, 1e-14 of the square, and what float32 ones are, 1e-6."""
    assume(share < 0.98)  # next to zeros and ones a quantile jumps by nature
    second = mean * mean + share * mean * (1 - mean)
    x = score(mean, second, 0.9)
    for error, moved in ((1e-14, 1e-6), (1e-6, 5e-3)):
        for other in (second - error * mean * mean, second + error * mean * mean):
            if mean <= 0.5 and x < 0.5:
                assert score(mean, min(other, mean), 0.9) == pytest.approx(x, abs=moved)
