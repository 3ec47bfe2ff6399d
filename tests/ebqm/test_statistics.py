"""The running averages: by hand, for layers seen every step and for those seen now and then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ela_kernels.ebqm.statistics import Moments, Statistics, moments
from ela_kernels.modules.observations import totals_of

# float32: a few hundred roundings of 6e-8
ROUNDING = 1e-5


def mean(statistics: Statistics, layer: int = 0) -> float:
    """The mean of one layer's z."""
    found = statistics.read()[layer]
    assert found is not None
    return found.mean


def kl(x: float, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    """A divergence whose bound is `x`."""
    return torch.full(shape, -math.log1p(-x), dtype=torch.float64).float()


def test_bound_first_and_average_then() -> None:
    divergence = torch.tensor([[0.0, 100.0], [math.log(2.0), math.inf]])
    found = [float(moment) for moment in moments(divergence)]
    assert found == pytest.approx([(0 + 1 + 0.5 + 1) / 4, (0 + 1 + 0.25 + 1) / 4])
    # rounding may leave a tiny negative divergence
    assert [float(moment) for moment in moments(torch.tensor([[-1e-7]]))] == [0.0, 0.0]


def test_bias_corrected_average_by_hand() -> None:
    statistics, values = Statistics(1, 0.9), np.random.default_rng(0).uniform(0, 1, 40)
    for step, x in enumerate(values, start=1):
        statistics.update([[kl(x)]])
        weights = 0.9 ** np.arange(step - 1, -1, -1)
        want = (weights * values[:step]).sum() / weights.sum()
        square = (weights * values[:step] ** 2).sum() / weights.sum()
        assert statistics.read()[0] == pytest.approx((want, square), rel=ROUNDING)


def test_a_gap_counts_as_that_many_steps() -> None:
    statistics = Statistics(2, 0.9)
    for _ in range(10):
        statistics.update([[kl(0.1)], [kl(0.1)]])
    for step in range(1, 21):
        statistics.update([[kl(0.8)] if step % 5 == 0 else [], [kl(0.8)]])
    rare, often = statistics.read()
    assert rare == pytest.approx(often, rel=ROUNDING)


def test_layers_are_independent_and_unseen_ones_are_none() -> None:
    statistics = Statistics(4, 0.5)
    statistics.update([[kl(0.2)], [], [kl(0.6, (2, 5))], [kl(0.4)]])
    assert statistics.read() == [
        pytest.approx((0.2, 0.04), rel=ROUNDING),
        None,
        pytest.approx((0.6, 0.36), rel=ROUNDING),
        pytest.approx((0.4, 0.16), rel=ROUNDING),
    ]
    statistics.update([[], [], [], []])
    assert statistics.read()[1] is None
    assert mean(statistics, 2) == pytest.approx(0.6, rel=ROUNDING)


def test_micro_batches_of_a_step_are_one_value() -> None:
    one, two = Statistics(2, 0.9), Statistics(2, 0.9)
    torch.manual_seed(0)
    for _ in range(3):
        divergence = torch.rand(6, 3)
        one.update([[divergence], [kl(0.1)]])
        two.update([[divergence[:4], divergence[4:]], [kl(0.1)]])
    for got, want in zip(two.read(), one.read(), strict=True):
        assert got == pytest.approx(want, rel=ROUNDING)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    statistics = Statistics(2, 0.9)
    statistics.update([[kl(0.3)], [kl(0.5)]])
    statistics.update([[torch.tensor([[0.1, math.nan]])], [kl(0.5)]])
    first, second = statistics.read()
    assert first is not None
    assert second is not None
    assert math.isnan(first.mean)
    assert math.isnan(first.score(0.9))
    assert second.mean == pytest.approx(0.5, rel=ROUNDING)
    statistics.forget_bad()
    assert mean(statistics) == pytest.approx(0.3, rel=ROUNDING)


def test_empty_batches_do_not_count() -> None:
    statistics = Statistics(1, 0.9)
    statistics.update([[torch.empty(0, 3)]])
    assert statistics.read() == [None]


def test_no_value_is_read_on_the_host() -> None:
    # A meta tensor has no values: whatever asked for one would fail.
    statistics = Statistics(3, 0.9)
    for _ in range(3):
        statistics.update(
            [[torch.empty(2, 3, device="meta")], [], [torch.empty(2, 5, device="meta")]]
        )
    assert statistics.state.device.type == "meta"


def test_half_precision_divergence() -> None:
    statistics = Statistics(1, 0.0)
    statistics.update([[kl(0.5).bfloat16()]])
    # bfloat16 keeps 8 bits
    assert mean(statistics) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("smoothing", [0.0, 0.9, 0.98])
def test_layers_that_repeat_exactly_have_a_score_of_0_and_others_their_value(
    smoothing: float,
) -> None:
    values = [0.0, 1e-6, 0.02, 0.2, 0.9, 1.0]
    statistics = Statistics(len(values), smoothing)
    for size in (2, 5, 64) * 20:
        # 100: 1 - exp(-kl) is 1 in float32
        statistics.update(
            [[kl(x, (size, 4)) if x < 1 else torch.full((size, 4), 100.0)] for x in values]
        )
    scores = [found.score(0.9) for found in statistics.read() if found is not None]
    assert scores[0] == 0.0
    assert scores[-1] == 1.0
    # The square root of what a difference of float64 sums is off by: a spread of 1e-7 of the mean, where there is none.
    assert scores == pytest.approx(
        [float(-torch.expm1(-kl(x)[0, 0])) for x in values[:-1]] + [1.0], rel=2e-7
    )


def test_zeros_and_ones_alone() -> None:
    statistics = Statistics(2, 0.9)
    few = torch.zeros(25, 4)
    few[:2] = 100.0  # 8 of 100
    many = torch.zeros(25, 4)
    many[:3] = 100.0  # 12
    for _ in range(50):
        statistics.update([[few], [many]])
    found = [m.score(0.9) for m in statistics.read() if m is not None]
    assert found == [0.0, 1.0]


def test_float32_is_enough_to_decide_by() -> None:
    """Where a device has no float64: some thousandths of the mean."""
    torch.manual_seed(0)
    wide, narrow = Statistics(4, 0.98), Statistics(4, 0.98)
    narrow.state = narrow.state.float()
    for _ in range(300):
        kls = [[kl(0.2)], [torch.rand(8, 4) * 0.2], [torch.rand(8, 4) * 3], [torch.zeros(8, 4)]]
        wide.update(kls)
        narrow.update(kls)
    assert narrow.state.dtype == torch.float32
    for got, want in zip(narrow.read(), wide.read(), strict=True):
        assert got is not None
        assert want is not None
        assert got.score(0.9) == pytest.approx(want.score(0.9), abs=3e-3 * want.mean)


def test_what_graphs_added_up_counts_alike() -> None:
    torch.manual_seed(0)
    one, two = Statistics(2, 0.9), Statistics(2, 0.9)
    for _ in range(5):
        first, second = torch.rand(4, 3), torch.rand(6, 3)
        one.update([[torch.cat((first, second))], []])
        two.update([[first], []], {0: totals_of(second)})
    assert one.read()[1] is two.read()[1] is None
    assert two.read()[0] == pytest.approx(one.read()[0], rel=ROUNDING)
    two.update([[], []], {0: totals_of(torch.tensor([[math.nan]]))})
    assert two.read()[0] == pytest.approx(Moments(math.nan, math.nan), nan_ok=True)
