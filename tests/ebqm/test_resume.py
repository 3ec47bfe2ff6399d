"""A run resumed from a checkpoint decides as the uninterrupted one."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from support.ela_models import Network, batch, plant, skipped

import ela_kernels as ek

SETTINGS: dict[str, Any] = {"warmup": 8, "interval": 4, "probe_interval": 3, "smoothing": 0.9}


class Run:
    """Training that learns: decisions move with it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = Network((6, 4), drop_path=0.1)
        if seed == 0:
            plant(self.network, {2, 4, 8}, others=0.3)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9)
        self.ebqm = ek.EBQM(self.network, **SETTINGS)

    def train(self, steps: range) -> None:
        for step in steps:
            torch.manual_seed(1000 + step)
            self.optimizer.zero_grad()
            self.network(batch(4)).square().mean().backward()
            self.optimizer.step()
            self.ebqm.step()

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = (self.network, self.optimizer, self.ebqm)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((self.network, self.optimizer, self.ebqm), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("at", [3, 8, 10, 18])
def test_resume_is_exact(at: int) -> None:
    whole, first, second = Run(0), Run(0), Run(1)
    whole.train(range(40))
    first.train(range(at))
    second.load(first.save())
    second.train(range(at, 40))
    assert skipped(whole.network)
    changes = {tuple(d.skipped) for d in whole.ebqm.report().decisions}
    assert len(changes) > 1
    # as text, in which NaN is equal to itself
    assert repr(second.ebqm.report()) == repr(whole.ebqm.report())
    for (name, got), want in zip(
        second.network.state_dict().items(), whole.network.state_dict().values(), strict=True
    ):
        assert torch.equal(got, want), name
    assert torch.equal(
        second.ebqm.state_dict()["statistics"], whole.ebqm.state_dict()["statistics"]
    )


def test_decisions_are_set_on_the_layers() -> None:
    run, network = Run(0), Network((6, 4))
    run.train(range(12))
    ebqm = ek.EBQM(network, **SETTINGS)
    ebqm.load_state_dict(run.ebqm.state_dict())
    assert skipped(network) == skipped(run.network) != set()
    assert all(layer.probe_next for layer in network.layers if layer.skipped)  # 12 steps: due


class TestRefusals:
    def test_other_settings(self) -> None:
        network = Network((3,))
        state = ek.EBQM(network, low=0.1).state_dict()
        other = ek.EBQM(network, low=0.2)
        with pytest.raises(ValueError, match=r"^state: .*low=0\.1 \(here 0\.2\).*strict=False"):
            other.load_state_dict(state)
        other.load_state_dict(state, strict=False)
        assert other.settings.low == 0.2

    def test_other_layers(self) -> None:
        state = ek.EBQM(Network((3,))).state_dict()
        with pytest.raises(ValueError, match=r"^state: got the layers \['stages\.0\.0'"):
            ek.EBQM(Network((4,))).load_state_dict(state)

    def test_something_else(self) -> None:
        ebqm = ek.EBQM(Network((3,)))
        with pytest.raises(TypeError, match=r"^state: got list"):
            ebqm.load_state_dict([])
        with pytest.raises(TypeError, match=r"^state: got \['steps'\]"):
            ebqm.load_state_dict({"steps": 3})
        with pytest.raises(ValueError, match=r"^state: got version 99"):
            ebqm.load_state_dict({**ebqm.state_dict(), "version": 99})

    @pytest.mark.parametrize(
        "entry",
        [
            {"steps": "many"},
            {"steps": -1},
            {"statistics": torch.zeros(4, 2)},
            {"statistics": torch.zeros(4, 3, dtype=torch.int64)},
            {"statistics": None},
            {"reasons": ["UNDECIDED"] * 2},
            {"reasons": ["BECAUSE"] * 3},
            {"since": [0, 0]},
            {"skipped": None},
            {"settings": None},
            {"layers": 3},
            {"decisions": [{"step": 1}]},
            {"decisions": None},
        ],
    )
    def test_a_damaged_one_changes_nothing(self, entry: dict[str, Any]) -> None:
        network = Network((3,))
        ebqm = ek.EBQM(network, warmup=1, interval=1)
        for _ in range(3):
            network(batch()).sum().backward()
            ebqm.step()
        before = repr(ebqm.state_dict())
        with pytest.raises(ValueError, match=r"^state: got "):
            ebqm.load_state_dict({**ebqm.state_dict(), "steps": 7, **entry})
        assert repr(ebqm.state_dict()) == before

    def test_a_pruned_layer_in_use(self) -> None:
        network = Network((3,))
        state = ek.EBQM(network).state_dict()
        network(batch())
        network.layers[1].skipped = True
        ek.prune(network)
        with pytest.raises(ValueError, match=r"^state: got layer 'stages\.0\.1' in use"):
            ek.EBQM(network).load_state_dict(state)


def earlier_state(network: Network) -> dict[str, Any]:
    """As a version saved it that fitted one distribution to all layers; two of these are skipped."""
    return {
        "version": 1,
        "settings": {
            "low": 0.3,
            "high": 0.45,
            "ceiling": 0.25,
            "max_share": 0.5,
            "max_row": 3,
            "warmup": 8,
            "interval": 4,
            "probe_interval": 3,
            "smoothing": 0.9,
            "prior_count": 4.0,
            "prior_concentration": 4.0,
            "reference": [2.0, 2.0],
        },
        "layers": ek.EBQM(network).state_dict()["layers"],
        "steps": 22,
        "statistics": torch.ones(4, 10),
        "skipped": [i in (2, 8) for i in range(10)],
        "reasons": ["CEILING", "RETURNED_CEILING"] * 5,
        "since": [12 * (i in (2, 8)) for i in range(10)],
        "decisions": [
            {
                "step": 20,
                "fit": [1.0, 2.0, 10],
                "divergence": [0.1] * 10,
                "fitted": [0.5] * 10,
                "retention": [0.5] * 10,
                "skipped": [i in (2, 8) for i in range(10)],
                "reasons": ["CEILING"] * 10,
            }
        ],
    }


class TestTheEarlierRule:
    def test_decisions_are_kept_and_statistics_start_anew(self) -> None:
        run, other = Run(0), Network((6, 4))
        plant(run.network, {2, 8}, others=2.0)
        with pytest.warns(
            UserWarning, match=r"^state: got one of EBQM's earlier .*low=0\.2"
        ) as seen:
            run.ebqm.load_state_dict(earlier_state(other))
        assert len(seen) == 1
        report = run.ebqm.report()
        assert report.step == 22
        assert skipped(run.network) == {2, 8}
        assert [row.since for row in report.layers] == [12 * (i in (2, 8)) for i in range(10)]
        assert report.decisions == []
        assert str(report).count("no decision yet") == 10
        assert run.ebqm.settings == ek.EBQM(other, **SETTINGS).settings
        assert all(layer.probe_next for layer in run.network.layers)
        # The next decisions are by what is seen from here on: what still repeats stays skipped all along.
        for step in range(12):
            run.train(range(step, step + 1))
            assert {2, 8} <= skipped(run.network), step
        assert run.ebqm.state_dict()["version"] == 2

    @pytest.mark.parametrize("entry", [{"skipped": [True]}, {"since": None}, {"steps": -1}])
    def test_a_damaged_one(self, entry: dict[str, Any]) -> None:
        network = Network((6, 4))
        ebqm = ek.EBQM(network)
        with pytest.raises(ValueError, match=r"^state: got a damaged one"):
            ebqm.load_state_dict({**earlier_state(Network((6, 4))), **entry})
        assert ebqm.steps == 0

    def test_other_layers(self) -> None:
        with pytest.raises(ValueError, match=r"^state: got the layers"):
            ek.EBQM(Network((5, 5))).load_state_dict(earlier_state(Network((6, 4))))


def test_names_do_not_depend_on_wrappers() -> None:
    network = Network((3,))
    wrapped = torch.nn.Module()
    wrapped.module = network  # as DistributedDataParallel holds it
    state = ek.EBQM(wrapped).state_dict()
    ek.EBQM(network).load_state_dict(state)
    ek.EBQM(torch.compile(network)).load_state_dict(state)


def test_names_stay_apart_where_the_prefix_is_the_models_own() -> None:
    model = torch.nn.ModuleDict({"layer": ek.ELA(16), "module": Network((2,))})
    model["module"].layer = ek.ELA(16)
    report = ek.EBQM(model).report()
    assert sorted(row.name for row in report.layers) == [
        "layer",
        "module.layer",
        "stages.0.0",
        "stages.0.1",
    ]
