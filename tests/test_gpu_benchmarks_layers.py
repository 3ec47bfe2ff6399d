"""The GPU benchmarks of whole layers, of their pieces and of networks, on the CPU and on tiny shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import METHODS, Cpp
from support.dry_runs import CPU, SHAPE, needs_cpp

import ela_kernels as ek
from benchmarks.contenders import WrongResultError
from benchmarks.gpu import exercise, layers, networks, pieces, run, warm
from benchmarks.gpu.footprint import PIECES, piece_bytes
from benchmarks.gpu.ops import tolerance
from benchmarks.gpu.report import text_report
from benchmarks.gpu.setting import make_setting
from benchmarks.gpu.shapes import (
    FEW_CASES,
    FLOOR_CASES,
    INTERLEAVED,
    LAYER_CASES,
    STAGE_CASES,
    Case,
)
from benchmarks.gpu.targets import targets
from ela_kernels.backends.dispatch import KERNELS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_least_bytes_of_pieces_by_hand() -> None:
    # 2 samples, 16 channels, bfloat16: a map has 2304 bytes, a row 64.
    case = Case(SHAPE, "bfloat16")
    # A 3x3 filter a channel and five numbers of a filter over the channels: 149 of two bytes.
    assert {piece: piece_bytes(piece, case, 5) for piece in PIECES} == {
        "producer": 2 * 2304 + 2 * 64 + 298,
        "producer backward": 3 * 2304 + 2 * 64 + 596,
        "epilogue": 3 * 2304 + 4 * 64,
        "epilogue backward": 5 * 2304 + 6 * 64,
    }


def test_the_network_that_has_a_target_comes_first() -> None:
    network = networks.CASES[0]
    assert (network.model, network.batch, network.size) == ("resnet50", 128, 224)


@needs_cpp
@pytest.mark.parametrize("kind", layers.KINDS)
def test_a_wrong_whole_layer_is_not_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = KERNELS["cpp"].layer_backward

    def wrong(*args: Any) -> Any:
        found, own = right(*args)
        return found._replace(wv=found.wv * 1.1), own

    stage = layers.LayerStage(Case(SHAPE), CPU, kind)
    with ek.use_backend("cpp"):
        results = stage.step(stage.fused)
    check = stage.checker(stage.expected())
    assert 0 < check("cpp", results) < 1e-2
    monkeypatch.setitem(vars(KERNELS["cpp"]), "layer_backward", wrong)
    with ek.use_backend("cpp"):
        results = stage.step(stage.fused)
    with pytest.raises(WrongResultError, match=r"gradients of Wv\.weight: .* away from float64"):
        check("cpp", results)


@needs_cpp
@pytest.mark.parametrize("layout", ["channels_first", INTERLEAVED])
@pytest.mark.parametrize("piece", PIECES[:2])
def test_pieces_pass_their_check(piece: str, layout: str) -> None:
    of_layer = pieces.LayerPieces(Case(SHAPE, "float32", layout), CPU)
    kernels = KERNELS["cpp"]
    assert of_layer.is_alone(piece, kernels)
    assert 0 < of_layer.check(piece, kernels) < tolerance(torch.float32)
    assert not of_layer.is_alone("epilogue", kernels)


@needs_cpp
def test_a_network_with_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = networks.TrainingStep(networks.SMOKE_CASES[0], "ela", CPU)
    assert step.check("cpp") < 0.02
    right = KERNELS["cpp"].layer

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        return found if found.statistics is None else found._replace(out=3 * found.out)

    monkeypatch.setitem(vars(KERNELS["cpp"]), "layer", wrong)
    with pytest.raises(WrongResultError, match="without the kernels"):
        step.check("cpp")


@needs_cpp
@pytest.mark.usefixtures("no_graph_was_compiled")
def test_all_kernels_are_exercised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method of a backend, also by the few calls that there is time for in a first look."""
    made = Cpp().spied(monkeypatch)
    tolerances: set[bool] = set()
    right = KERNELS["cpp"].gather

    def seen(left: Any, *args: Any) -> Any:
        tolerances.update(one.tolerance > 0 for one in left)
        return right(left, *args)

    monkeypatch.setitem(vars(KERNELS["cpp"]), "gather", seen)
    few = exercise.exercise("cpp", CPU, few=True)
    assert set(made) == set(METHODS)
    assert tolerances == {False, True}
    assert 0 < few < exercise.exercise("cpp", CPU) / 4


@needs_cpp
def test_compiling_ahead(capsys: pytest.CaptureFixture[str]) -> None:
    setting = make_setting("cpu", None, smoke=True)
    todo = warm.jobs(setting, ["floor", "pieces", "networks", "layers", "stages"])
    assert len(todo) == 6
    assert [warm.run_job(job, setting, 0.1) for job in todo] == [None] * 6

    def failing(setting: Any) -> None:
        raise RuntimeError("no such kernel")

    problem = warm.run_job(failing, setting, 0.1)
    assert problem is not None
    assert "RuntimeError: no such kernel" in problem
    # Everything that is measured, the first of each part before the second of any.
    everything = warm.jobs(replace(setting, smoke=False), [*run.PARTS, "sanitizer"])
    assert len(everything) > len(FLOOR_CASES) + len(STAGE_CASES) + 2 * len(LAYER_CASES)
    few = warm.jobs(replace(setting, smoke=False, few=True), ["floor", "layers", "sanitizer"])
    assert len(few) == 3 * len(FEW_CASES) + 1


@needs_cpp
def test_a_failing_part_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any) -> None:
        raise RuntimeError("an illegal address, say")

    monkeypatch.setitem(run.PARTS, "memory", failing)
    arguments = ["memory", "overhead", "--out", str(tmp_path), "--device", "cpu", "--smoke"]
    assert run.main(arguments) == 1
    assert list(json.loads((tmp_path / "results.json").read_text())["parts"]) == ["overhead"]
    printed = capsys.readouterr().err
    assert "an illegal address, say" in printed
    assert "memory: FAILED" in printed


def test_targets_of_pieces_layers_and_networks() -> None:
    def piece(percent: float) -> dict[str, Any]:
        ms = {"median": 1.0, "q1": 1.0, "q3": 1.0}
        return {
            "copy_gb_per_s": 1.0,
            "backends": {"triton": {"percent_of_copy": percent, "ms": ms}},
        }

    ms = {"median": 10.0, "q1": 9.0, "q3": 11.0}
    results = {
        "parts": {
            "pieces": {
                "cases": {
                    "large": {"exceeds_cache": True, "ops": {"producer": piece(80.0)}},
                    "small": {"exceeds_cache": False, "ops": {"producer": piece(10.0)}},
                },
            },
            "layers": {
                "cases": {
                    f"{shape} float32 channels_first layer": {
                        "contenders": {},
                        "over": {"triton": {"eager": {"of_medians": over}}},
                    }
                    for shape, over in (
                        ("12x64x1024x14x16", 7.5),
                        ("23x64x1024x14x16", 9.0),
                        ("12x128x64x32x16", 2.5),
                        ("3x32x256x56x16", 4.5),
                    )
                }
            },
            "layers_compiled": {
                "cases": {
                    "12x64x1024x14x16 float32 channels_first block": {
                        "contenders": {},
                        "over": {"triton": {"compiled": {"of_medians": 1.5}}},
                    }
                }
            },
            "networks": {
                "cases": {
                    "resnet50 [128, 3, 224, 224]": {
                        "contenders": {"plain": {"ms": ms}, "ela triton": {"ms": ms}},
                        "over_plain": {
                            "published": {"of_medians": 3.0},
                            "ela triton": {"of_medians": 1.2},
                            "mrla triton": {"of_medians": 1.3},
                        },
                    },
                    "resnet56 [128, 3, 32, 32]": {
                        "contenders": {"ela triton": {"ms": ms}},
                        "over_plain": {"ela triton": {"of_medians": 1.9}},
                    },
                }
            },
        }
    }
    found = {target.what: target for target in targets(results)}
    assert found["triton: producer, % of copy bandwidth"].value == 80.0
    assert not found["triton: producer, % of copy bandwidth"].met
    deep = found["triton: whole layer, T >= 12, times faster than eager"]
    assert (deep.value, deep.met) == (7.5, False)
    cifar = found["triton: whole layer, CIFAR stages, times faster than eager"]
    assert (cifar.value, cifar.met) == (2.5, True)
    shallow = found["triton: whole layer, T < 12, times faster than eager"]
    assert (shallow.value, shallow.met) == (4.5, True)
    assert not found["triton: whole layer, times faster than torch.compile"].met
    network = found["triton: ELA's training step, of the plain network's"]
    assert (network.value, network.met) == (1.2, False)
    assert found["triton: fused MRLA's training step, of the plain network's"].met
    assert not any(what.startswith("published") for what in found)
    text = text_report(results)
    assert "| resnet56 [128, 3, 32, 32] " in text
