"""What the rule promises, by divergences given to the layers: who goes, who stays, and that nobody else matters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ela_models import Network, batch, skipped

import ela_kernels as ek
from ela_kernels.ebqm import Reason

QUICK: dict[str, Any] = {"warmup": 10, "interval": 5, "probe_interval": 5, "smoothing": 0.8}
UNCAPPED = {"max_share": 1.0, "max_row": 1000}


class Given:
    """Networks that have run, of which only the divergences that a test gives are seen."""

    def __init__(self, depths: tuple[int, ...], **options: Any) -> None:
        self.network = Network(depths)
        self.network.eval()(batch())  # for the places
        self.ebqm = ek.EBQM(self.network, **{**QUICK, **options})

    @property
    def layers(self) -> list[ek.ELA]:
        """Those that are not the first of their stage."""
        return [layer for layer in self.network.layers if layer.place]

    def step(self, z: list[np.ndarray]) -> None:
        """One step in which the layers show these z = 1 - exp(-kl), `[B, G]` each."""
        for layer, values in zip(self.layers, z, strict=True):
            kl = -np.log1p(-np.clip(values, 0, 1 - 1e-12))
            layer.observations.append(torch.from_numpy(kl).float())
        self.ebqm.step()

    def shows(
        self, means: list[float], steps: int = 20, spread: float = 0.1, seed: int = 0
    ) -> None:
        """Steps of Beta-distributed z with these means; `spread`: share of the largest variance."""
        generator = np.random.default_rng(seed)
        for _ in range(steps):
            self.step([sample(generator, m, spread) for m in means])

    def scores(self) -> list[float]:
        return [row.score for row in self.ebqm.report().layers if row.place]


def sample(generator: np.random.Generator, mean: float, spread: float) -> np.ndarray:
    if mean in (0.0, 1.0) or spread == 0.0:
        return np.full((8, 4), mean)
    c = 1 / spread - 1
    return generator.beta(mean * c, (1 - mean) * c, size=(8, 4))


class TestTheParadox:
    """A fit over all layers let redundant ones stay, the more the more of them there were."""

    def test_thirteen_of_eighteen(self) -> None:
        given_ = Given((18,), **UNCAPPED)
        given_.shows([0.02] * 12 + [0.2] * 5, spread=0.0)
        assert skipped(given_.network) == set(range(1, 13))

    def test_all_exact_repeats(self) -> None:
        given_ = Given((18,), **UNCAPPED)
        given_.shows([0.0] * 17, spread=0.0)
        assert skipped(given_.network) == set(range(1, 18))
        assert given_.scores() == [0.0] * 17

    def test_all_nearly_so(self) -> None:
        given_ = Given((18,), **UNCAPPED)
        given_.shows([0.02] * 17)
        assert skipped(given_.network) == set(range(1, 18))


@pytest.mark.parametrize("count", range(1, 12))
def test_planted_repeats_are_all_found(count: int) -> None:
    generator = np.random.default_rng(count)
    given_ = Given((7, 6), **UNCAPPED)
    planted = set(generator.permutation(11)[:count].tolist())
    given_.shows([0.01 if i in planted else 0.6 for i in range(11)])
    found = {i for i, layer in enumerate(given_.layers) if layer.skipped}
    assert found == planted


@pytest.mark.parametrize("count", range(1, 12))
def test_as_many_as_the_caps_allow_the_smallest_first(count: int) -> None:
    given_ = Given((7, 6), max_share=0.4, max_row=100)  # 5 of 13
    means = np.linspace(0.01, 0.1, count).tolist() + [0.6] * (11 - count)
    order = np.random.default_rng(count).permutation(11)
    given_.shows([means[i] for i in order], spread=0.01)
    found = {int(order[i]) for i, layer in enumerate(given_.layers) if layer.skipped}
    assert found == set(range(min(count, 5)))


@pytest.mark.parametrize("lowest", [0.32, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.2])
def test_none_at_high_divergence(lowest: float, spread: float) -> None:
    given_ = Given((7, 6), **UNCAPPED)
    given_.shows(np.linspace(lowest, 0.99, 11).tolist(), spread=spread)
    assert skipped(given_.network) == set()
    # nor of those that are skipped
    for layer in given_.layers:
        layer.skipped = True
    given_.shows(np.linspace(lowest, 0.99, 11).tolist(), spread=spread, steps=5)
    assert skipped(given_.network) == set()


def test_most_repeat_and_some_are_needed() -> None:
    """The mean alone would let it go: a fifth of its retrievals is new."""
    given_ = Given((3,), **UNCAPPED)
    new = np.zeros((10, 2))
    new[:2] = 0.9
    for _ in range(20):
        given_.step([new, np.full((10, 2), new.mean())])
    assert given_.ebqm.report().layers[1].divergence == pytest.approx(0.18, rel=1e-4)
    assert skipped(given_.network) == {2}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1 - 1e-3), min_size=0, max_size=9),
    st.floats(0, 0.9),
    st.integers(0, 9),
)
def test_no_layers_score_depends_on_another(others: list[float], spread: float, place: int) -> None:
    """Neither on their divergences, nor on their number, nor on the order."""
    mine = sample(np.random.default_rng(1), 0.15, 0.2)
    alone = Given((2,), **UNCAPPED)
    among = Given((len(others) + 2,), **UNCAPPED)
    place = min(place, len(others))
    generator = np.random.default_rng(0)
    for _ in range(10):
        z = [sample(generator, x, spread) for x in others]
        alone.step([mine])
        among.step([*z[:place], mine, *z[place:]])
    row, found = alone.ebqm.report().layers[1], among.ebqm.report().layers[1 + place]
    assert (found.score, found.skipped, found.reason) == (row.score, row.skipped, row.reason)


@pytest.mark.parametrize("threshold", ["low", "high"])
def test_noise_around_a_threshold_does_not_make_it_come_and_go(threshold: str) -> None:
    given_ = Given((9,), **UNCAPPED)
    middle = getattr(given_.ebqm.settings, threshold)
    generator = np.random.default_rng(0)
    flips = 0
    before = [layer.skipped for layer in given_.layers]
    for _ in range(400):
        # each step's level moves by a tenth of the distance between the thresholds
        level = middle + generator.normal(0, 0.01, 8)
        given_.step([np.full((8, 4), z) for z in level])
        now = [layer.skipped for layer in given_.layers]
        flips += sum(a != b for a, b in zip(before, now, strict=True))
        before = now
    # Each may settle once, and does not leave again.
    assert flips <= 8
    assert (flips > 0) == (threshold == "low")


def test_noise_among_equals_does_not_swap_them_where_a_cap_binds() -> None:
    given_ = Given((9,), max_share=4.4 / 9, max_row=100)
    generator = np.random.default_rng(0)
    patterns = set()
    for _ in range(100):
        given_.step([np.full((8, 4), 0.1 + x) for x in generator.normal(0, 0.02, 8)])
        patterns.add(tuple(sorted(skipped(given_.network))))
    assert len(patterns) == 2  # none yet, and those four
    assert max(map(len, patterns)) == 4
    # One that is better by more than high - low takes the place of the worst.
    outside = next(i for i, layer in enumerate(given_.layers) if not layer.skipped)
    z = [0.0 if i == outside else 0.19 for i in range(8)]
    given_.shows(z, steps=40, spread=0.0)
    kept = max(patterns, key=len)
    assert outside + 1 in skipped(given_.network)
    assert len(skipped(given_.network) & set(kept)) == 3
    assert Reason.SHARE in [row.reason for row in given_.ebqm.report().layers]


def test_one_sample_a_step() -> None:
    given_ = Given((4,), **UNCAPPED)
    for _ in range(10):
        given_.step([np.full((1, 1), z) for z in (0.0, 0.1, 1.0)])
    assert given_.scores() == pytest.approx([0.0, 0.1, 1.0], rel=1e-6)
    assert skipped(given_.network) == {1, 2}


def test_from_an_empty_model_on_it_is_finite() -> None:
    given_ = Given((3,))
    assert all(math.isnan(score) for score in given_.scores())
    given_.step([np.zeros((2, 2)), np.ones((2, 2))])
    assert given_.scores()[0] == 0.0
    assert given_.scores()[1] == pytest.approx(1.0)
