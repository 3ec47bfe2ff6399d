"""The Beta quantile map against SciPy and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ela_kernels.ebqm import BetaFit, fit_beta, retention
from ela_kernels.ebqm.beta import MARGIN

REFERENCE = (2.0, 2.0)
fractions = st.floats(0.0, 1.0)
samples = st.lists(fractions, min_size=1, max_size=60)
priors = st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
references = st.tuples(st.floats(0.1, 50.0), st.floats(0.1, 50.0))


def test_fit_by_hand() -> None:
    # m = 0.5, v = 0.04; prior variance 0.25 / 5 = 0.05; shrunk (4 * 0.04 + 4 * 0.05) / 8 = 0.045
    fit = fit_beta([0.3, 0.7, 0.3, 0.7], 4.0, 4.0)
    c = 0.25 / 0.045 - 1
    assert fit == pytest.approx((0.5 * c, 0.5 * c, 4), rel=1e-12)


def test_fit_without_a_prior_is_the_method_of_moments() -> None:
    x = np.random.default_rng(0).beta(2.0, 5.0, size=400)
    fit = fit_beta(x.tolist(), 1e-12, 4.0)
    mean, var = stats.beta.stats(fit.a, fit.b)
    assert mean == pytest.approx(x.mean(), rel=1e-9)
    assert var == pytest.approx(x.var(), rel=1e-9)
    # 400 samples: the standard error of a moment estimate of a and b is near 8 %; three of them
    assert (fit.a, fit.b) == pytest.approx((2.0, 5.0), rel=0.25)


def test_scores_are_scipys() -> None:
    x = [0.02, 0.2, 0.5, 0.6, 0.9]
    fit = fit_beta(x, 4.0, 4.0)
    for value, (u, r) in zip(x, retention(x, fit, (3.0, 1.5)), strict=True):
        assert u == pytest.approx(stats.beta.cdf(value, fit.a, fit.b), rel=1e-12)
        assert r == pytest.approx(stats.beta.ppf(u, 3.0, 1.5), rel=1e-9)


def test_the_uniform_reference_leaves_u() -> None:
    x = [0.1, 0.4, 0.8]
    for u, r in retention(x, fit_beta(x, 4.0, 4.0), (1.0, 1.0)):
        assert r == pytest.approx(u, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.01, 0.3, 0.5, 0.8, 0.999, 1.0])
def test_layers_all_alike_stand_in_the_middle(value: float) -> None:
    for count in (1, 5, 50):
        x = [value] * count
        for u, _ in retention(x, fit_beta(x, 4.0, 4.0), REFERENCE):
            # a, b >= 1: the mean lies between the quantiles 1/e and 1 - 1/e
            assert 1 / math.e - 1e-3 < u < 1 - 1 / math.e + 1e-3


@pytest.mark.parametrize("redundant", [1, 3, 6, 10])
def test_redundant_layers_score_low_however_many(redundant: int) -> None:
    x = [0.001] * redundant + [0.9] * (12 - redundant)
    scores = [r for _, r in retention(x, fit_beta(x, 4.0, 4.0), REFERENCE)]
    assert max(scores[:redundant]) < 0.1
    assert min(scores[redundant:]) > 0.5


@pytest.mark.parametrize("x", [[], [0.2, -0.1], [1.5], [float("nan")], [float("inf"), 0.1]])
def test_refusals(x: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^x: got .*in \[0, 1\]"):
        fit_beta(x, 4.0, 4.0)


@settings(max_examples=150, deadline=None)
@given(samples, priors)
def test_fit_is_finite_and_has_no_pole(x: list[float], prior: tuple[float, float]) -> None:
    fit = fit_beta(x, *prior)
    assert math.isfinite(fit.a)
    assert math.isfinite(fit.b)
    assert min(fit.a, fit.b) >= 1 - 1e-9
    mean = sum(min(max(v, MARGIN), 1 - MARGIN) for v in x) / len(x)
    assert fit.a / (fit.a + fit.b) == pytest.approx(mean, rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(samples, priors, references)
def test_map_is_bounded_and_monotone(
    x: list[float], prior: tuple[float, float], reference: tuple[float, float]
) -> None:
    x = sorted(x)
    scores = retention(x, fit_beta(x, *prior), reference)
    assert all(0.0 <= u <= 1.0 and 0.0 <= r <= 1.0 for u, r in scores)
    for (u0, r0), (u1, r1) in itertools.pairwise(scores):
        assert u0 <= u1
        # SciPy's inverse is found by iteration: equal to rounding, not in the last bit
        assert r0 <= r1 + 1e-12


@settings(max_examples=100, deadline=None)
@given(st.floats(1.0, 1e4), st.floats(1.0, 1e4), references)
def test_a_layer_at_the_median_gets_the_median(
    a: float, b: float, reference: tuple[float, float]
) -> None:
    median = float(stats.beta.median(a, b))
    if MARGIN < median < 1 - MARGIN:
        ((u, r),) = retention([median], BetaFit(a, b, 1), reference)
        assert u == pytest.approx(0.5, abs=1e-6)
        assert r == pytest.approx(float(stats.beta.median(*reference)), abs=1e-5)
