"""The running averages: by hand, for layers seen every step and for those seen now and then."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ela_kernels.ebqm.statistics import Statistics, bounded_divergence

# float32: a few hundred roundings of 6e-8
ROUNDING = 1e-5


def kl(x: float, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    """A divergence whose bound is `x`."""
    return torch.full(shape, -math.log1p(-x), dtype=torch.float64).float()


def test_bound_first_and_average_then() -> None:
    divergence = torch.tensor([[0.0, 100.0], [math.log(2.0), math.inf]])
    assert float(bounded_divergence(divergence)) == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    # rounding may leave a tiny negative divergence
    assert float(bounded_divergence(torch.tensor([[-1e-7]]))) == 0.0


def test_bias_corrected_average_by_hand() -> None:
    statistics, values = Statistics(1, 0.9), np.random.default_rng(0).uniform(0, 1, 40)
    for step, x in enumerate(values, start=1):
        statistics.update([[kl(x)]])
        weights = 0.9 ** np.arange(step - 1, -1, -1)
        want = (weights * values[:step]).sum() / weights.sum()
        assert statistics.read()[0] == pytest.approx(want, rel=ROUNDING)


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
        pytest.approx(0.2, rel=ROUNDING),
        None,
        pytest.approx(0.6, rel=ROUNDING),
        pytest.approx(0.4, rel=ROUNDING),
    ]
    statistics.update([[], [], [], []])
    assert statistics.read()[1] is None
    assert statistics.read()[2] == pytest.approx(0.6, rel=ROUNDING)


def test_micro_batches_of_a_step_are_one_value() -> None:
    one, two = Statistics(2, 0.9), Statistics(2, 0.9)
    torch.manual_seed(0)
    for _ in range(3):
        divergence = torch.rand(6, 3)
        one.update([[divergence], [kl(0.1)]])
        two.update([[divergence[:4], divergence[4:]], [kl(0.1)]])
    assert two.read() == pytest.approx(one.read(), rel=ROUNDING)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    statistics = Statistics(2, 0.9)
    statistics.update([[kl(0.3)], [kl(0.5)]])
    statistics.update([[torch.tensor([[0.1, math.nan]])], [kl(0.5)]])
    first, second = statistics.read()
    assert math.isnan(first)
    assert second == pytest.approx(0.5, rel=ROUNDING)
    statistics.forget_bad()
    assert statistics.read()[0] == pytest.approx(0.3, rel=ROUNDING)


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
    assert statistics.read()[0] == pytest.approx(0.5, abs=0.005)
