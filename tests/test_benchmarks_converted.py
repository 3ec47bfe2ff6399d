"""The part that measures converted networks: what it compares, refuses, reports and asks for."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ela_kernels as ek
from benchmarks import converted
from benchmarks.contenders import WrongResultError
from benchmarks.converted import CONVERTED, FAMILIES, ORIGINAL, measure_converted
from benchmarks.published.networks import NETWORKS
from benchmarks.report import targets, text_report
from benchmarks.run import Run, _arguments
from benchmarks.worker import ONCE, PARTS

LEFT = {"stages.0.0": "a reason"}


@pytest.fixture
def two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: FAMILIES[name] for name in ("resnet101 base", "deit-tiny light")}
    monkeypatch.setattr(converted, "FAMILIES", kept)


def convert_nothing(model: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(converted=["stages.0.1"], left=LEFT)


def first(model: nn.Module, name: str) -> nn.Module:
    return next(module for n, module in model.named_modules() if n.endswith(name))


def results(found: dict, small: bool) -> dict:
    machine = {
        "cpu": "a processor",
        "threads": 1,
        "simd_level": "avx2",
        "torch": torch.__version__,
        "date": "today",
        "load_before": [0.0],
    }
    others = {part: {} for part in PARTS}
    return {"machine": machine, "small": small, **others, "converted": found}


def test_every_family_has_a_small_network_of_its_shape() -> None:
    for family in FAMILIES.values():
        assert NETWORKS[family.small].softmax
        kinds = []
        # On the meta device: a whole network's parameters take seconds to draw.
        with torch.device("meta"):
            for make in (family.make, NETWORKS[family.small].make):
                layer = [n for n, m in make().named_modules() if hasattr(m, "Wq")][-1]
                kinds.append([part for part in layer.split(".") if not part.isdigit()])
        strip = [[p.rstrip("1234") for p in kind] for kind in kinds]
        assert strip[0] == strip[1]


@pytest.mark.usefixtures("two_families")
def test_both_forms_are_measured_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ek, "convert", convert_nothing)
    found = measure_converted(rounds=2, small=True)
    assert list(found) == ["resnet101 base", "deit-tiny light"]
    for family in found.values():
        for phase in ("training", "inference"):
            assert list(family[phase]["ms"]) == [ORIGINAL, CONVERTED]
            assert family[phase]["ms"][ORIGINAL]["rounds"] == 2
            assert family[phase]["times_faster"]["of_medians"] > 0
        # Both are the same network here, and the allocator's totals are exact.
        assert family["peak_bytes"][ORIGINAL] == family["peak_bytes"][CONVERTED] > 0
        assert (family["converted"], family["left"]) == (1, LEFT)
    found = json.loads(json.dumps(found))
    table = text_report(results(found, small=True))
    assert "| resnet101 base [3, 3, 32, 32] | 1 of 2 |" in " ".join(table.split(" ")).replace(
        "  ", " "
    )
    assert "- deit-tiny light: left alone: a reason" in table
    assert targets(results(found, small=True)) == []
    asked = targets(results(found, small=False))
    assert [(t.shape, t.bound, t.at_least) for t in asked] == [
        ("resnet101 base", 1.3, True),
        ("resnet101 base", 1.3, True),
        ("resnet101 base", 0.5, False),
        ("deit-tiny light", 1.0, True),
        ("deit-tiny light", 1.0, True),
    ]
    assert asked[2].value == 1.0
    assert not asked[2].met


@pytest.mark.parametrize(
    ("name", "what"), [("mrla", "output"), ("bn1", "output"), ("mrla.Wk", "inference|output")]
)
@pytest.mark.usefixtures("two_families")
def test_a_network_with_other_numbers_is_not_timed(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module) -> SimpleNamespace:
        for parameter in first(model, name).parameters():
            parameter.data.mul_(1.001)
        return convert_nothing(model)

    monkeypatch.setattr(ek, "convert", wrong)
    with pytest.raises(WrongResultError, match=what):
        measure_converted(rounds=1, small=True)


@pytest.mark.usefixtures("two_families")
def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> SimpleNamespace:
        # The last layer's: where there is one layer to attend to, gradients of queries are zero.
        queries = [m for n, m in model.named_modules() if n.endswith("mrla.Wq")]
        queries[-1].weight.register_hook(lambda grad: 1.001 * grad)
        return convert_nothing(model)

    monkeypatch.setattr(ek, "convert", wrong)
    with pytest.raises(WrongResultError, match=r"gradients of stages\.mrla\.mrla\.Wq"):
        measure_converted(rounds=1, small=True)


@pytest.mark.usefixtures("two_families")
def test_a_buffer_that_got_lost_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(model: nn.Module) -> SimpleNamespace:
        first(model, "bn_mrla").register_buffer("running_mean", None)
        first(model, "bn_mrla").register_buffer("running_var", None)
        return convert_nothing(model)

    monkeypatch.setattr(ek, "convert", lose)
    with pytest.raises(RuntimeError, match=r"bn_mrla\.running_mean"):
        measure_converted(rounds=1, small=True)


def test_sizes_of_a_run(tmp_path) -> None:
    def run(*options: str) -> Run:
        args: argparse.Namespace = _arguments([*options, "--out", str(tmp_path)])
        return Run(args, tmp_path)

    smoke, quick, full = run("--smoke"), run("--quick"), run("--full")
    assert smoke.small
    assert set(smoke.rounds.values()) == {2}
    assert "converted" in ONCE
    assert "converted" in smoke.parts
    assert "compiled" not in smoke.parts
    assert not {"networks", "converted"} & set(quick.parts)
    assert (quick.small, full.small) == (False, False)
    assert full.parts == list(PARTS)
    assert run("--quick", "--parts", "converted").parts == ["converted"]
    assert run("--smoke", "--rounds", "3").rounds["converted"] == 3
