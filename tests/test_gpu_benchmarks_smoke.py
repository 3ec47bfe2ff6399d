"""The GPU benchmarks run from end to end, on the CPU and on tiny shapes, and refuse to time what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dry_runs import CPU, SHAPE, needs_cpp

from benchmarks.gpu import floor, layers, run, stages
from benchmarks.gpu.footprint import OPS, PIECES, least_bytes
from benchmarks.gpu.ops import LayerOps, check_operation, tolerance
from benchmarks.gpu.report import target_table, text_report
from benchmarks.gpu.setting import make_setting
from benchmarks.gpu.shapes import (
    COMPILED_CASES,
    COMPILED_LAYER_CASES,
    DIVERGENCE_CASES,
    FLOOR_CASES,
    INTERLEAVED,
    LAYER_CASES,
    MEMORY_CASES,
    PIECE_CASES,
    STAGE_CASES,
    Case,
)
from benchmarks.gpu.targets import Target, backward_percent, targets
from benchmarks.gpu.timing import Budget, take_turns
from benchmarks.shapes import StageShape
from ela_kernels.backends.dispatch import KERNELS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refusals() -> list[str]:
    return []


def test_least_bytes_by_hand() -> None:
    # Depth 3, 2 samples, 16 channels, 2 heads, bfloat16: a map has 2304 bytes, a row 64, a weight of all heads 16.
    case = Case(SHAPE, "bfloat16")
    assert case.map_bytes == 2304
    assert {op: least_bytes(op, case, 3) for op in OPS} == {
        "forward": 4 * 2304 + 4 * 64 + 3 * 16,
        "dots": 4 * 2304 + 5 * 64 + 6 * 16,
        "gather": 4 * 2304 + 4 * 64 + 6 * 16,
        "push": 7 * 2304 + 8 * 64 + 6 * 16,
        "weights": 4 * 64 + 3 * 16,
    }


def test_cases_are_what_the_results_are_read_for() -> None:
    for cases in (
        FLOOR_CASES,
        STAGE_CASES,
        COMPILED_CASES,
        MEMORY_CASES,
        DIVERGENCE_CASES,
        LAYER_CASES,
        COMPILED_LAYER_CASES,
        PIECE_CASES,
    ):
        assert len({case.name for case in cases}) == len(cases)
    assert {case.shape.depth for case in STAGE_CASES} == {3, 6, 12, 23}
    assert {case.dtype for case in STAGE_CASES} == {torch.float32, torch.bfloat16}
    # The two depths that have targets come first, and no case takes more than half of an 80 GB device.
    assert [case.shape.depth for case in STAGE_CASES[:2]] == [12, 23]
    assert max(stages.eager_bytes(case) for case in STAGE_CASES + COMPILED_CASES) < 40e9


def test_maps_lie_as_their_case_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x = Case(SHAPE, "bfloat16", INTERLEAVED).new_map(CPU, generator)
    assert x.shape == (2, 16, 6, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert Case(SHAPE).new_map(CPU, generator).is_contiguous()


def test_contenders_take_turns_and_stop_in_time() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ABC"}
    seconds = take_turns(contenders, CPU, rounds=3, seconds=60, warmup=1)
    assert "".join(calls) == "ABC" + "ABC" + "BCA" + "CAB"
    assert {name: len(times) for name, times in seconds.items()} == {"A": 3, "B": 3, "C": 3}
    assert {len(t) for t in take_turns(contenders, CPU, rounds=50, seconds=0).values()} == {5}


def test_inputs_are_rotated_until_no_cache_holds_them() -> None:
    setting = make_setting("cpu", None, smoke=True)
    case = Case(SHAPE)  # 4608 bytes a map, and a cache of 16 384 bytes
    assert not floor.exceeds_cache(case, 3, setting)
    assert floor.input_sets(case, 3, setting) * 4 * 4608 >= 4 * 16384
    assert floor.exceeds_cache(Case(StageShape(3, 8, 64, 16, 8)), 3, setting)
    assert floor.input_sets(Case(StageShape(3, 8, 64, 16, 8)), 3, setting) == 1


@needs_cpp
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["channels_first", INTERLEAVED])
def test_operations_pass_their_check(op: str, layout: str) -> None:
    layer = LayerOps(Case(SHAPE, "float32", layout), 3, CPU)
    assert 0 < check_operation(layer, op, "cpp") < tolerance(torch.float32)


@needs_cpp
def test_a_wrong_operation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KERNELS["cpp"].attend

    def wrong(*args: Any) -> Any:
        out, weights, kl = right(*args)
        out[-1, -1, -1, -1] = float("nan")
        return out, weights, kl

    monkeypatch.setitem(vars(KERNELS["cpp"]), "attend", wrong)
    setting, reports = make_setting("cpu", None, smoke=True), list[dict[str, Any]]()
    monkeypatch.setattr(floor, "cases_of", lambda _: [Case(SHAPE)])
    floor.measure(setting, Budget(60), reports.append)
    (found,) = reports[-1]["cases"].values()
    refusals = reports[-1]["refused"]
    assert found["ops"]["forward"]["backends"] == {}
    assert "cpp" in found["ops"]["dots"]["backends"]
    (line,) = refusals
    assert "cpp forward: WrongResultError: " in line
    assert "out is nan away" in line


@needs_cpp
def test_a_wrong_stage_is_not_timed(monkeypatch: pytest.MonkeyPatch, refusals: list[str]) -> None:
    right = KERNELS["cpp"].gather

    def wrong(*args: Any) -> Any:
        dk, dv = right(*args)
        return dk, dv * 1.001

    monkeypatch.setitem(vars(KERNELS["cpp"]), "gather", wrong)
    setting = make_setting("cpu", None, smoke=True)
    found = stages.measure_case(Case(SHAPE), setting, 60, False, refusals)
    assert set(found["contenders"]) == {"eager", "eager in a graph"}
    assert found["over"] == {}
    (line,) = refusals
    assert "cpp: WrongResultError: gradients of the values are" in line


@needs_cpp
def test_a_dry_run_of_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [part for part in run.PARTS if "compiled" not in part]
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--smoke"]
    assert run.main([parts[0], *arguments]) == 0
    assert run.main([f"{parts[1]}=60", *parts[2:], *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["parts"]) == parts
    for part in parts:
        assert results["parts"][part].get("refused", []) == []
        assert results["parts"][part]["seconds"] >= 0
    case = results["parts"]["floor"]["cases"]["3x2x16x6x8 float32 channels_first"]
    assert list(case["ops"]) == list(OPS)
    for op in case["ops"].values():
        ms = op["backends"]["cpp"]["ms"]
        assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
        assert ms["rounds"] == len(ms["samples"]) == 3
    stage = results["parts"]["stages"]["cases"]["3x2x16x6x8 bfloat16 channels_last"]
    assert stage["over"]["cpp"]["eager"]["of_medians"] > 0
    for kind in layers.KINDS:
        whole = results["parts"]["layers"]["cases"][f"3x2x16x6x8 bfloat16 channels_last {kind}"]
        assert whole["over"]["cpp"]["eager"]["of_medians"] > 0
    pieces_of = results["parts"]["pieces"]["cases"]["3x2x16x6x8 float32 channels_first"]["ops"]
    assert list(pieces_of) == list(PIECES)
    assert pieces_of["producer backward"]["backends"]["cpp"]["percent_of_copy"] > 0
    (network,) = results["parts"]["networks"]["cases"].values()
    assert {"published", "ela cpp", "mrla cpp", "ela cpp in a graph"} <= set(network["over_plain"])
    assert results["machine"]["smoke"]
    capsys.readouterr()
    assert run.main(["report", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "cpp: peak memory, maps beyond 2 T" in printed
    assert printed.rstrip("\n") in (tmp_path / "tables.md").read_text()


def fake_results() -> dict[str, Any]:
    def op(cuda: float, triton: float, rate: float = 100.0) -> dict[str, Any]:
        return {
            "least_bytes": 10**6,
            "copy_gb_per_s": rate,
            "backends": {
                name: {"ms": {"median": ms}, "percent_of_copy": 1e8 / (rate * 1e6) / ms}
                for name, ms in (("cuda", cuda), ("triton", triton))
            },
        }

    ops = {"forward": op(0.0125, 0.0125), "dots": op(0.01, 0.0115), "gather": op(0.02, 0.02)}
    over = {"eager": {"of_medians": 6.0}}
    small = {"map_bytes": 1, "contenders": {}, "over": {"cuda": {"eager": {"of_medians": 1.5}}}}
    return {
        "parts": {
            "floor": {
                "cases": {
                    "12x64x1024x14x16 float32 channels_first": {"exceeds_cache": True, "ops": ops},
                    "3x1x8x2x8 float32 channels_first": {
                        "exceeds_cache": False,
                        "ops": {"forward": op(1.0, 9.0)},
                    },
                }
            },
            "stages": {
                "cases": {
                    "12x64x1024x14x16 float32 channels_first": {
                        "contenders": {},
                        "over": {"cuda": over, "triton": over},
                    },
                    "12x128x64x32x16 float32 channels_first": small,
                },
                "refused": ["a case: triton: WrongResultError: wrong"],
            },
            "memory": {
                "cases": {"m": {"depth": 12, "contenders": {"cuda": {"maps": 28.25}}}},
            },
            "divergence": {
                "cases": {
                    "d": {
                        "cuda": {"percent_of_forward": {"median": 0.4, "q1": 0.1, "q3": 0.7}},
                        "triton": {"percent_of_forward": {"median": 1.4, "q1": 0.1, "q3": 2.0}},
                    }
                }
            },
        }
    }


def test_targets_take_the_worst_case_and_look_at_the_right_side() -> None:
    found = {target.what: target for target in targets(fake_results())}
    # At 100 GB/s a megabyte takes 0.01 ms. Maps that a cache holds do not count.
    forward = found["cuda: forward, % of copy bandwidth"]
    assert forward.value == pytest.approx(80)
    assert not forward.met
    assert found["cuda: backward, % of copy bandwidth"].value == pytest.approx(100 * 0.02 / 0.03)
    assert found["cuda: stage, T = 12, times faster than eager"].met
    assert not found["cuda: CIFAR stages, times faster than eager"].met
    assert "cuda: stage, T = 23, times faster than eager" not in found
    assert found["cuda: peak memory, maps beyond 2 T"].value == pytest.approx(4.25)
    assert found["cuda: divergence, % of the forward"].met
    assert not found["triton: divergence, % of the forward"].met
    slower = found["triton: % slower than cuda, worst operation"]
    assert slower.value == pytest.approx(15)
    assert slower.case.endswith("dots")
    assert Target("", "", 5.0, 5.0, True).met
    assert Target("", "", 4.0, 4.0, False).met


def test_a_table_without_some_parts_is_still_a_table() -> None:
    results = fake_results()
    assert backward_percent({"ops": {}}, "cuda") is None
    text = target_table(results)
    assert "| >= 92 " in text
    del results["parts"]["floor"]
    assert "copy bandwidth" not in target_table(results)
    assert "no numbers" in text_report({"parts": {}})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["floors", "--out", "x"], "got 'floors'; allowed are floor, "),
        (["floor"], "--out"),
        (["floor=", "--out", "x"], "got '' seconds; allowed is a positive number"),
        (["floor=inf", "--out", "x"], "got 'inf' seconds; allowed is a positive number"),
        (["floor", "--out", "x", "--seconds", "0"], "allowed is a positive number"),
        (["floor", "--out", "x", "--backends", "eager"], "invalid choice"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
