"""The record of decisions has a bound, in memory and in checkpoints."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.ela_models import Network, plant, train

import ela_kernels as ek
from ela_kernels.ebqm import DecisionRecord, Reason
from ela_kernels.ebqm import history as record
from ela_kernels.ebqm.history import MOST, thinned

SETTINGS: dict[str, Any] = {"warmup": 4, "interval": 1, "probe_interval": 1, "smoothing": 0.5}


def records(skipped: list[bool]) -> list[DecisionRecord]:
    """A decision a step, of one layer."""
    return [
        DecisionRecord(i, [0.5], [0.5], [is_skipped], [Reason.UNDECIDED], [0.0])
        for i, is_skipped in enumerate(skipped)
    ]


def steps(found: list[DecisionRecord]) -> list[int]:
    return [d.step for d in found]


def test_few_are_all_kept() -> None:
    found = records([False] * MOST)
    assert thinned(found) is found


def test_every_second_goes_but_those_that_changed_something() -> None:
    skipped = [False] * (MOST + 1)
    skipped[101:104] = [True] * 3
    kept = steps(thinned(records(skipped)))
    assert len(kept) == pytest.approx(MOST / 2, abs=3)
    assert {0, 101, 104, MOST} <= set(kept)
    assert max(b - a for a, b in pairwise(kept)) <= 3


def test_where_all_change_something_every_second_goes() -> None:
    kept = steps(thinned(records([i % 2 == 0 for i in range(MOST + 1)])))
    assert kept[0] == 0
    assert kept[-1] == MOST
    assert len(kept) <= MOST / 2 + 2


@pytest.mark.parametrize("flips", [1, 2, 3, 7, 50, 10**9])
def test_it_never_grows_beyond_its_bound(flips: int) -> None:
    kept: list[DecisionRecord] = []
    for found in records([i // flips % 2 == 0 for i in range(4 * MOST)]):
        kept = thinned([*kept, found])
        assert len(kept) <= MOST
        assert kept[-1] is found
        assert kept[0].step == 0
    assert len(kept) > MOST / 4  # and says something of all of the run


@pytest.mark.parametrize("interval", [1, 100])
def test_a_long_run_is_recorded_evenly(interval: int) -> None:
    """Its beginning too, however often the record was thinned out."""
    kept: list[DecisionRecord] = []
    changes = {1000: True, 1003: False, 9000: True}
    decisions, is_skipped = 20 * MOST, False
    for i in range(decisions):
        is_skipped = changes.get(i, is_skipped)
        found = DecisionRecord(
            interval * (i + 1), [0.5], [0.5], [is_skipped], [Reason.UNDECIDED], [0.0]
        )
        kept = thinned([*kept, found])
    assert {interval * (i + 1) for i in changes} <= set(steps(kept))
    gaps = [b - a for a, b in pairwise(steps(kept))]
    assert max(gaps) <= 4 * interval * decisions / MOST + interval


def test_a_resumed_run_has_the_record_of_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MOST", 8)

    def run(seed: int) -> tuple[Network, ek.EBQM]:
        torch.manual_seed(seed)
        network = Network((4,))
        plant(network, {2})
        return network, ek.EBQM(network, **SETTINGS)

    def trained(pair: tuple[Network, ek.EBQM], some: range) -> None:
        for step in some:
            torch.manual_seed(step)
            train(*pair, 1)

    whole, first, second = run(0), run(0), run(1)
    trained(whole, range(40))
    trained(first, range(17))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    trained(second, range(17, 40))
    found = whole[1].report().decisions
    assert len(found) <= 8
    assert found[-1].step == 40
    assert len(whole[1].state_dict()["decisions"]) == len(found)
    # as text, in which NaN is equal to itself
    assert repr(second[1].report().decisions) == repr(found)


def test_a_state_of_before_what_was_left_out_was_recorded() -> None:
    network = Network((3,))
    ebqm = ek.EBQM(network, **SETTINGS)
    train(network, ebqm, 2)
    state = ebqm.state_dict()
    for decision in state["decisions"]:
        del decision["left_out"]
    ebqm.load_state_dict(state)
    assert all(math.isnan(x) for d in ebqm.report().decisions for x in d.left_out)
    state["decisions"][0]["left_out"] = [0.0]
    with pytest.raises(ValueError, match="damaged"):
        ebqm.load_state_dict(state)


class TestWeights:
    def test_are_those_of_the_pass_before_the_decision(self) -> None:
        network = Network((4, 2))
        ebqm = ek.EBQM(network, **{**SETTINGS, "interval": 3, "warmup": 99})
        assert [row.weights for row in ebqm.report().layers] == [()] * 6
        for step in range(1, 6):
            train(network, ebqm, 1)
            found = [row.weights for row in ebqm.report().layers]
            assert ([len(w) for w in found] == [1, 2, 3, 4, 1, 2]) is (step >= 3)
            assert all(sum(w) == pytest.approx(1, abs=1e-6) for w in found if w)

    def test_are_the_layers_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = Network((3,))
        ebqm = ek.EBQM(network, **{**SETTINGS, "warmup": 100})
        seen: list[torch.Tensor] = []
        attend = ek.LayerHistory.attend_layer

        def keep(self: ek.LayerHistory, *arguments: Any, **more: Any) -> Any:
            out = attend(self, *arguments, **more)
            assert self.weights is not None
            seen.append(self.weights.detach())
            return out

        monkeypatch.setattr(ek.LayerHistory, "attend_layer", keep)
        train(network, ebqm, 1)
        for row, weights in zip(ebqm.report().layers, seen, strict=True):
            torch.testing.assert_close(torch.tensor(row.weights), weights.mean((0, 1)))

    def test_a_state_has_none(self) -> None:
        network = Network((3,))
        ebqm = ek.EBQM(network, **SETTINGS)
        train(network, ebqm, 2)
        assert all(row.weights for row in ebqm.report().layers)
        ebqm.load_state_dict(ebqm.state_dict())
        assert [row.weights for row in ebqm.report().layers] == [()] * 3
        train(network, ebqm, 1)
        assert all(row.weights for row in ebqm.report().layers)
