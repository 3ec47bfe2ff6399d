"""`python -m ela_kernels bench`: what it measures is compared first, and fits into the time that there is."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels
from ela_kernels.__main__ import main
from ela_kernels.benching import command, measuring
from ela_kernels.benching.measuring import WrongResultError, check, measure
from ela_kernels.benching.workloads import FULL, QUICK, Pair, Stage, Workload, network, stage
from ela_kernels.modules.published import ConcatLayerAttention

CPU = torch.device("cpu")
TINY = (stage(3, (2, 16, 6, 6), 8), network("resnet20", (2, 3, 8, 8)))


class Wrong(Stage):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


def wrong(fused: bool) -> nn.Module:
    return (Wrong if fused else Stage)(3, 16, 8, fused)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(command, "_QUICK_SECONDS", 60.0)
    monkeypatch.setattr(measuring, "_MOST_ROUNDS", 4)


@pytest.mark.usefixtures("tiny")
def test_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--threads", "1", "--json", str(path)]) == 0
    shown = capsys.readouterr()
    for name in ("3 layers 2x16x6x6", "resnet20 2x3x8x8"):
        assert f"measuring {name}\n" in shown.err
        assert f"  {name}\n" in shown.out
    assert "3 x LayerAttention: " in shown.out
    found = json.loads(path.read_text())
    assert [(row["workload"], row["mode"]) for row in found["rows"]] == [
        (workload.name, mode) for workload in TINY for mode in ("forward", "training")
    ]
    for row in found["rows"]:
        assert row["ms"]["eager"]["median"] > 0
        assert row["ms"]["ours"]["rounds"] >= 3
        assert row["times_ours"]["eager"]["of_medians"] == pytest.approx(
            row["ms"]["eager"]["median"] / row["ms"]["ours"]["median"]
        )
        assert 0 < row["difference"] < 0.03
    assert (found["threads"], found["device"], found["left_out"]) == (1, "cpu", [])
    assert found["report"]["versions"]["torch"]


def test_both_forms_are_what_they_are_called() -> None:
    for workload in TINY:
        pair = Pair(workload, CPU)
        for name, concatenates in (("eager", True), ("ours", False)):
            kinds = [type(m) for m in pair.modules[name].modules()]
            assert (ConcatLayerAttention in kinds) == concatenates
        assert check(workload.name, pair) < 0.03


def test_wrong_numbers_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Workload("a wrong stage", (2, 16, 6, 6), wrong)
    with pytest.raises(
        WrongResultError, match=r"a wrong stage: the output by the kernels is 1\.\d"
    ):
        measure([bad], CPU, 1.0)
    monkeypatch.setattr(command, "QUICK", (bad,))
    assert main(["bench", "--quick"]) == 1
    assert "error: a wrong stage: the output" in capsys.readouterr().err


def test_gradients_are_compared_too() -> None:
    class Halved(Stage):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out.detach() + (out - out.detach()) / 2

    bad = Workload("x", (2, 16, 6, 6), lambda fused: (Halved if fused else Stage)(3, 16, 8, fused))
    with pytest.raises(WrongResultError, match="the gradient of the input"):
        check("x", Pair(bad, CPU))


def test_nan_is_a_wrong_number() -> None:
    pair = Pair(TINY[0], CPU)
    with torch.no_grad():
        next(pair.modules["ours"].parameters()).fill_(float("nan"))
    with pytest.raises(WrongResultError):
        check("x", pair)


@pytest.mark.usefixtures("tiny")
def test_what_does_not_fit_into_the_time_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(TINY, CPU, 0.0)
    assert (found["rows"], found["left_out"]) == ([], [w.name for w in TINY])
    start = time.monotonic()
    found = measure(TINY[:1], CPU, 0.2)
    assert time.monotonic() - start < 30  # at the least three rounds of each
    assert {row["ms"]["ours"]["rounds"] for row in found["rows"]} <= set(range(3, 61))
    monkeypatch.setattr(command, "_QUICK_SECONDS", 0.0)
    assert main(["bench", "--quick"]) == 0
    assert (
        f"left out, as time was over: {TINY[0].name}, {TINY[1].name}\n" in capsys.readouterr().out
    )


@pytest.mark.usefixtures("tiny")
def test_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One graph for each mode, made before anything is timed."""
    plain, made = torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda module: plain(module, backend=backend))
    timed = measuring._timed

    def counted(*arguments: Any) -> Any:
        assert len(made) == 2
        return timed(*arguments)

    monkeypatch.setattr(measuring, "_timed", counted)
    monkeypatch.setattr(command, "QUICK", TINY[:1])
    assert main(["bench", "--quick", "--compile"]) == 0
    assert "compiled" in capsys.readouterr().out
    assert len(made) == 2


@pytest.mark.usefixtures("tiny")
def test_memory_that_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(command, "measure", fail)
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "error: out of memory; try --quick\n"


def test_the_package_needs_nothing_that_is_not_installed() -> None:
    found = [
        path.name
        for path in Path(ela_kernels.__file__).parent.rglob("*.py")
        if re.search(r"^\s*(from|import) (benchmarks|build_tools|tests)\b", path.read_text(), re.M)
    ]
    assert found == []


def test_the_sizes_are_there() -> None:
    for workloads in (FULL, QUICK):
        assert len({w.name for w in workloads}) == len(workloads) >= 3
        assert sum("layers" in w.name for w in workloads) >= 2
