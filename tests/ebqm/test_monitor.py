"""EBQM on networks with planted redundancy: what it skips, what it leaves, what comes back."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.ela_models import CHANNELS, Network, batch, plant, skipped, train
from torch import nn

import ela_kernels as ek
from ela_kernels.ebqm import Reason

QUICK: dict[str, Any] = {"warmup": 10, "interval": 5, "probe_interval": 5, "smoothing": 0.8}
PLANTED = {3, 6, 11}  # places 3 and 6 of the first stage, 2 of the second


def planted(redundant: set[int], **options: Any) -> tuple[Network, ek.EBQM]:
    network = Network(**{k: options.pop(k) for k in ("depths",) if k in options})
    plant(network, redundant)
    return network, ek.EBQM(network, **{**QUICK, **options})


class TestPlanted:
    @pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
    def test_the_planted_layers_are_skipped_and_no_others(self, mode: str) -> None:
        network, ebqm = planted(PLANTED, skip=mode)
        train(network, ebqm, 9)
        assert skipped(network) == set()
        train(network, ebqm, 31)
        assert skipped(network) == PLANTED
        assert [int(x) for x in _numbers(ebqm.report().skipped)] == sorted(PLANTED)

    def test_they_come_back_when_the_redundancy_ends(self) -> None:
        network, ebqm = planted(PLANTED)
        train(network, ebqm, 20)
        assert skipped(network) == PLANTED
        plant(network, {11})
        train(network, ebqm, 20)
        assert skipped(network) == {11}
        report = ebqm.report()
        row = report.layers[3]
        assert not row.skipped
        assert 20 < row.since <= 40
        assert Reason.RETURNED in [d.reasons[3] for d in report.decisions]

    def test_nothing_happens_without_redundancy(self) -> None:
        network, ebqm = planted(set())
        train(network, ebqm, 30)
        assert min(row.divergence for row in ebqm.report().layers if row.place) > 0.95
        assert skipped(network) == set()

    def test_uniform_weights_diverge_by_the_new_layers_share(self) -> None:
        network = Network()
        plant(network, set(), others=0.0)  # all scores zero
        ebqm = ek.EBQM(network, **{**QUICK, "warmup": 1000})
        train(network, ebqm, 5)
        # weights 1 / t: kl = log(t / (t - 1)), so 1 - exp(-kl) = 1 / t
        want = [1 / t for t in (*range(2, 10), *range(2, 6))]
        seen = [row.divergence for row in ebqm.report().layers if row.place]
        np.testing.assert_allclose(seen, want, rtol=1e-5)

    def test_decisions_are_scipys_by_hand(self) -> None:
        network, ebqm = planted(PLANTED, quantile=0.8, low=0.3, high=0.4)
        seen: list[list[np.ndarray]] = [[] for _ in network.layers]
        network.train()
        for _ in range(10):
            network(batch()).sum().backward()
            for layer, kls in zip(network.layers, seen, strict=True):
                kls.extend(kl.numpy().astype(np.float64) for kl in layer.observations)
            ebqm.step()
        weights = 0.8 ** np.arange(9, -1, -1)
        for row, kls in zip(ebqm.report().layers, seen, strict=True):
            if row.place == 0:
                assert math.isnan(row.divergence)
                assert math.isnan(row.score)
                continue
            z = (-np.expm1(-np.stack(kls))).clip(min=0)
            m, m2 = ((weights * (z**n).mean((1, 2))).sum() / weights.sum() for n in (1, 2))
            want = m  # all alike
            if m2 - m * m > 1e-10:
                c = m * (1 - m) / (m2 - m * m) - 1
                want = stats.beta(m * c, (1 - m) * c).ppf(0.8)
            assert row.divergence == pytest.approx(m, rel=1e-5)
            assert row.deviation == pytest.approx(math.sqrt(max(m2 - m * m, 0)), rel=1e-4, abs=1e-7)
            # in float32 z itself is rounded, to 6e-8
            assert row.score == pytest.approx(want, rel=1e-4, abs=1e-6)
            assert row.skipped == (want < 0.3)


def _numbers(names: list[str]) -> list[int]:
    """Numbers of layers named `stages.<stage>.<place>` in a network of depths 9 and 5."""
    return [9 * int(n.split(".")[1]) + int(n.split(".")[2]) for n in names]


class TestGuards:
    def test_share(self) -> None:
        network, ebqm = planted(PLANTED, max_share=0.15)  # 2 of 14
        train(network, ebqm, 20)
        assert len(skipped(network)) == 2
        assert [r.reason for r in ebqm.report().layers].count(Reason.SHARE) == 1

    def test_row(self) -> None:
        network, ebqm = planted({2, 3, 4}, max_row=2)
        train(network, ebqm, 20)
        assert len(skipped(network)) == 2
        reasons = [r.reason for r in ebqm.report().layers]
        assert reasons.count(Reason.ROW) == 1

    def test_first_layer_of_a_stage(self) -> None:
        network, ebqm = planted({0, 3, 9})
        train(network, ebqm, 20)
        assert skipped(network) == {3}
        report = ebqm.report()
        assert [report.layers[i].reason for i in (0, 9)] == [Reason.FIRST] * 2
        assert [(r.stage, r.place) for r in report.layers] == [
            *((0, p) for p in range(9)),
            *((1, p) for p in range(5)),
        ]

    def test_warm_up_and_interval(self) -> None:
        network, ebqm = planted(PLANTED, warmup=12, interval=6)
        train(network, ebqm, 11)
        assert skipped(network) == set()
        assert [d.step for d in ebqm.report().decisions] == [6]
        assert set(ebqm.report().decisions[0].reasons) == {Reason.WARMUP}
        train(network, ebqm, 1)
        assert skipped(network) == PLANTED
        plant(network, set())
        train(network, ebqm, 5)
        assert skipped(network) == PLANTED
        train(network, ebqm, 7)
        assert [d.step for d in ebqm.report().decisions] == [6, 12, 18, 24]

    def test_layers_never_seen_are_kept(self) -> None:
        network, ebqm = planted(PLANTED)
        network.layers[5].skipped = True
        network.eval()
        network(batch())
        for _ in range(10):
            ebqm.step()
        report = ebqm.report()
        assert skipped(network) == set()
        assert all(math.isnan(r.score) for r in report.layers)
        assert {r.reason for r in report.layers if r.place} == {Reason.NOT_OBSERVED}

    def test_values_not_finite_keep_a_layer(self) -> None:
        network, ebqm = planted(PLANTED)
        train(network, ebqm, 10)
        assert skipped(network) == PLANTED
        network.layers[3].observations.append(torch.tensor([[math.nan, 0.0]]))
        train(network, ebqm, 5)
        assert skipped(network) == PLANTED - {3}
        assert ebqm.report().layers[3].reason is Reason.NOT_FINITE
        train(network, ebqm, 5)  # forgotten once it is past
        assert skipped(network) == PLANTED

    def test_probes_come_at_their_interval(self) -> None:
        network, ebqm = planted(PLANTED, probe_interval=4, warmup=5, interval=5)
        train(network, ebqm, 5)
        layer, seen = network.layers[3], []
        layer.attn.Wq.register_forward_hook(lambda *_: seen.append(ebqm.steps + 1))
        train(network, ebqm, 16)
        # marked after steps 8, 12, 16 and 20, so seen in the passes that follow
        assert seen == [9, 13, 17, 21]


def test_gradients_accumulate_over_passes() -> None:
    network, ebqm = planted(PLANTED)
    for _ in range(15):
        for _ in range(3):
            network(batch()).sum().backward()
        ebqm.step()
    assert skipped(network) == PLANTED
    assert ebqm.steps == 15


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(copied: Any) -> None:
    network, ebqm = planted(PLANTED)
    train(network, ebqm, 12)
    twin, twin_ebqm = copied((network, ebqm))
    plant(network, {3})
    plant(twin, {3})
    for model, monitor in ((network, ebqm), (twin, twin_ebqm)):
        torch.manual_seed(5)
        train(model, monitor, 20)
    assert skipped(twin) == skipped(network) == {3}
    assert repr(twin_ebqm.report()) == repr(ebqm.report())
    assert len(twin_ebqm.report().decisions) == 6


def test_detach_stops_watching() -> None:
    network, ebqm = planted(PLANTED)
    train(network, ebqm, 10)
    ebqm.detach()
    assert not any(layer.watched for layer in network.layers)
    assert skipped(network) == PLANTED
    network(batch())
    assert not any(layer.observations for layer in network.layers)


def test_the_latest_monitor_counts() -> None:
    network, first = planted(PLANTED)
    with pytest.warns(UserWarning, match=r"another EBQM watches; .*detach\(\)"):
        second = ek.EBQM(network, **QUICK)
    train(network, second, 10)
    first.detach()
    assert network.layers[1].watched
    assert skipped(network) == PLANTED


def test_skip_sets_the_layers_mode() -> None:
    network = Network(skip="layer")
    ek.EBQM(network).detach()
    assert {layer.skip for layer in network.layers} == {"layer"}
    ek.EBQM(network, skip="retrieval")
    assert {layer.skip for layer in network.layers} == {"retrieval"}


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"low": math.nan}, ValueError, "low"),
        ({"low": 0.5, "high": 0.5}, ValueError, "low, high"),
        ({"low": 0.6, "high": 0.4}, ValueError, "low, high"),
        ({"high": 1.2}, ValueError, "high"),
        ({"high": "0.4"}, TypeError, "high"),
        ({"quantile": 0.0}, ValueError, "quantile"),
        ({"quantile": 1}, ValueError, "quantile"),
        ({"quantile": 1.5}, ValueError, "quantile"),
        ({"quantile": math.nan}, ValueError, "quantile"),
        ({"quantile": None}, TypeError, "quantile"),
        ({"max_share": 1.1}, ValueError, "max_share"),
        ({"max_row": 0}, ValueError, "max_row"),
        ({"max_row": 1.0}, TypeError, "max_row"),
        ({"warmup": -1}, ValueError, "warmup"),
        ({"interval": 0}, ValueError, "interval"),
        ({"interval": True}, TypeError, "interval"),
        ({"probe_interval": 0}, ValueError, "probe_interval"),
        ({"smoothing": 1.0}, ValueError, "smoothing"),
        ({"smoothing": math.nan}, ValueError, "smoothing"),
        ({"ceiling": 0.25}, TypeError, "ceiling"),
        ({"prior_count": 4.0}, TypeError, "prior_count"),
        ({"prior_concentration": 4.0}, TypeError, "prior_concentration"),
        ({"reference": (2.0, 2.0)}, TypeError, "reference"),
        ({"warm_up": 5}, TypeError, "warm_up"),
        ({"skip": "all"}, ValueError, "skip"),
    ],
)
def test_parameters_are_checked(arguments: dict[str, Any], error: type, name: str) -> None:
    with pytest.raises(error, match=rf"^{name}: got .*allowed"):
        ek.EBQM(Network((2,)), **arguments)


def test_what_went_says_what_stands_in_its_place() -> None:
    with pytest.raises(TypeError, match=r"not there any more, since low and high are absolute"):
        ek.EBQM(Network((2,)), ceiling=0.25)
    with pytest.raises(TypeError, match=r"not there any more, .* quantile says"):
        ek.EBQM(Network((2,)), reference=(2.0, 2.0))


def test_what_went_may_stay_where_it_was_off() -> None:
    settings = ek.EBQM(Network((2,)), ceiling=1.0).settings  # type: ignore[arg-type]
    assert settings == ek.EBQM(Network((2,))).settings


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model: got Linear without an ela_kernels\.ELA layer"):
        ek.EBQM(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^model: got list"):
        ek.EBQM([ek.ELA(CHANNELS)])


class TestReport:
    def test_content(self) -> None:
        network, ebqm = planted(PLANTED)
        empty = ebqm.report()
        assert empty.step == 0
        assert empty.decisions == []
        assert all(r.reason is Reason.UNDECIDED and r.place is None for r in empty.layers)
        train(network, ebqm, 20)
        report = ebqm.report()
        assert report.step == 20
        assert [d.step for d in report.decisions] == [5, 10, 15, 20]
        row = report.layers[3]
        assert row.name == "stages.0.3"
        assert (row.stage, row.place, row.skipped, row.since) == (0, 3, True, 10)
        assert row.reason is Reason.REDUNDANT
        assert [step for step, _ in row.over_time] == [5, 10, 15, 20]
        assert row.over_time[-1][1] == pytest.approx(row.divergence)
        assert 0 <= row.divergence < 0.01
        assert 0 <= row.score < 0.02
        assert row.score == report.decisions[-1].score[3]

    def test_as_text(self) -> None:
        network, ebqm = planted(PLANTED)
        assert str(ebqm.report()).startswith(
            "EBQM at step 0: 0 of 14 layers skipped; entropy, importance"
        )
        train(network, ebqm, 20)
        lines = str(ebqm.report()).splitlines()
        assert lines[0].startswith("EBQM at step 20: 3 of 14 layers skipped; entropy, importance")
        assert len(lines) == 3 + 14
        line = next(text for text in lines if text.startswith("stages.0.3 "))
        assert "skipped" in line
        assert "score below low (since step 10)" in line
        assert "first layer of its stage" in lines[3]
