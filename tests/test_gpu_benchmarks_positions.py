"""The GPU benchmarks of attention at every position and of its rivals, on the CPU and on tiny shapes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.dry_runs import CPU, SHAPE, needs_cpp
from torch import Tensor

from benchmarks.contenders import WrongResultError
from benchmarks.gpu import kernels, rivals, run, warm
from benchmarks.gpu.footprint import POSITION_OPS, position_bytes
from benchmarks.gpu.ops import tolerance
from benchmarks.gpu.positions import PositionOps, cases_of
from benchmarks.gpu.report import text_report
from benchmarks.gpu.setting import make_setting
from benchmarks.gpu.shapes import FEW_POSITION_CASES, INTERLEAVED, PLANAR, POSITION_CASES, Case
from benchmarks.gpu.targets import backends_of, targets
from benchmarks.gpu.timing import Budget
from ela_kernels.backends.dispatch import KERNELS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_least_bytes_by_hand() -> None:
    # Depth 3, 2 samples, 16 channels, 36 positions, 2 heads, bfloat16: a map has 2304 bytes, a number for every
    # position 288, one for every channel 64, a weight of every sample, head and value 48.
    case = Case(SHAPE, "bfloat16")
    assert {op: position_bytes(op, case, 3) for op in POSITION_OPS} == {
        "position forward": 4 * 2304 + 3 * 288 + 64,
        "position dots": 4 * 2304 + 9 * 288 + 128,
        "position gather": 5 * 2304 + 9 * 288 + 192,
        "position push": 7 * 2304 + 3 * 288 + 128,
        "mix": 4 * 2304 + 48,
        "mix backward": 7 * 2304 + 96,
    }


def test_the_cases_are_beyond_any_cache_and_both_forms_come_first() -> None:
    assert len({case.name for case in POSITION_CASES}) == len(POSITION_CASES)
    assert {case.layout for case in FEW_POSITION_CASES} == {PLANAR, INTERLEAVED}
    for case in FEW_POSITION_CASES:
        assert (case.shape.depth + 1) * case.map_bytes > 200e6
    setting = make_setting("cpu", None, smoke=False, few=True)
    assert cases_of(setting) == FEW_POSITION_CASES
    assert rivals.sizes_of(setting) == rivals.SIZES[:1]


@needs_cpp
@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", POSITION_OPS)
def test_operations_pass_their_check(op: str, dtype: str, layout: str) -> None:
    case = Case(SHAPE, dtype, layout)
    assert 0 < PositionOps(case, CPU).check(op, "cpp") < tolerance(case.dtype)


# What an operation calls, and how it is made a little wrong.
CALLS = {
    "position forward": ("position_attend", lambda r: (r[0] * 1.001, *r[1:])),
    "position dots": (
        "position_attend_backward",
        lambda r: r._replace(coefficients=r.coefficients * 1.01),
    ),
    "position push": (
        "position_attend_backward",
        lambda r: r._replace(values=[*r.values[1:], None]),
    ),
    "position gather": ("position_gather", lambda r: r * float("nan")),
    "mix": ("mix", lambda r: r + 1e-3),
    "mix backward": ("mix_backward", lambda r: r._replace(weights=r.weights * 1.001)),
}


@needs_cpp
@pytest.mark.parametrize("op", POSITION_OPS)
def test_a_wrong_operation_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, spoil = CALLS[op]
    right: Callable[..., Any] = getattr(KERNELS["cpp"], method)
    monkeypatch.setitem(vars(KERNELS["cpp"]), method, lambda *args: spoil(right(*args)))
    with pytest.raises(WrongResultError, match=f"cpp {op}: .* A wrong result is not timed"):
        PositionOps(Case(SHAPE), CPU).check(op, "cpp")


def stacked_attend(stacked: Tensor, query: Tensor, norm: Tensor) -> Tensor:
    """In float32 inside, as a kernel."""
    return rivals.eager(list(stacked.float()), query, norm).to(stacked.dtype)


def of_no_norm(values: list[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    return rivals.eager(
        [v.float() for v in values], query, norm.square().sqrt().detach()
    ).bfloat16()


@pytest.fixture
def fake_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is right and takes a stack, one whose norm weight gets no gradient, one that is not there."""

    def without_gradient(values: list[Tensor], query: Tensor, norm: Tensor) -> Tensor:
        return of_no_norm(values, query, norm) + 0 * norm.sum().bfloat16()

    fakes = {
        "right": rivals.Rival("torch", lambda: stacked_attend, stacked=True, searches=True),
        "wrong": rivals.Rival("json", lambda: without_gradient, stacked=False, searches=False),
        "absent": rivals.Rival("no_such_package", lambda: stacked_attend, True, False),
    }
    monkeypatch.setattr(rivals, "RIVALS", fakes)


@needs_cpp
def test_rivals_are_compared_with_ours(
    tmp_path: Path, fake_rivals: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["rivals", "--out", str(tmp_path), "--device", "cpu", "--smoke"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    part = results["parts"]["rivals"]
    assert part["rivals"] == {"right": "installed", "wrong": "installed", "absent": "not installed"}
    (line,) = part["refused"]
    assert "wrong: WrongResultError: wrong: gradient of the norm is" in line
    (case,) = part["cases"].values()
    assert list(case) == [
        "forward",
        "forward and backward",
        "forward in a graph",
        "forward and backward in a graph",
    ]
    for found in case.values():
        assert set(found["ms"]) == {"cpp", "eager", "compiled", "right"}
        assert set(found["over"]["cpp"]) == {"eager", "compiled", "right"}
        assert 0 < found["largest_error"]["cpp"] < rivals._ALLOWED
    text = text_report(results)
    assert "absent: not installed" in text
    assert "| right " in text
    assert backends_of(results) == ["cpp"]
    said = {target.what for target in targets(results)}
    assert (
        "cpp: position attention, forward and backward, times faster than the fastest rival" in said
    )
    assert "cpp: position attention, forward, times faster than eager" in said


@needs_cpp
def test_a_first_look_leaves_out_what_searches(fake_rivals: None) -> None:
    setting = dataclasses.replace(make_setting("cpu", None, smoke=True), few=True)
    attends, said = rivals.load(setting, [])
    assert list(attends) == ["wrong"]
    assert said["right"].startswith("left out of a first look")
    inputs = rivals.Inputs(rivals.SMOKE_SIZES[0], CPU)
    assert set(rivals.contenders_of(inputs, setting, attends)) == {"cpp", "eager", "wrong"}


@needs_cpp
def test_no_rival_searches_where_there_is_no_time(fake_rivals: None) -> None:
    found: list[dict[str, Any]] = []
    rivals.measure(make_setting("cpu", None, smoke=True), Budget(5), found.append)
    assert found[-1]["left_out"] == ["T=3 [2, 5, 16] bfloat16: right"]
    (case,) = found[-1]["cases"].values()
    assert set(case["forward"]["ms"]) == {"cpp", "eager", "compiled"}


@needs_cpp
def test_all_of_it_is_compiled_ahead(fake_rivals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_CACHE_RESULTS", "1")  # and is put back
    setting = make_setting("cpu", None, smoke=True)
    todo = warm.jobs(setting, ["positions", "rivals"])
    assert len(todo) == 2
    assert [warm.run_job(job, setting, 0.1) for job in todo] == [None, None]
    assert {"positions", "rivals"} <= set(kernels.PARTS) <= set(kernels.WHOLE_PARTS)


def test_targets_of_positions() -> None:
    def op(ms: float, percent: float) -> dict[str, Any]:
        numbers = {"ms": {"median": ms}, "percent_of_copy": percent}
        return {"least_bytes": 10**6, "copy_gb_per_s": 100.0, "backends": {"cuda": numbers}}

    ops = {
        "position forward": op(0.0125, 80.0),
        "position dots": op(0.01, 100.0),
        "position gather": op(0.02, 50.0),
        "mix": op(0.0105, 95.0),
    }
    cases = {
        "large": {"exceeds_cache": True, "ops": ops},
        "small": {"exceeds_cache": False, "ops": {}},
    }
    results = {"parts": {"positions": {"cases": cases}}}
    found = {target.what: target for target in targets(results)}
    forward = found["cuda: position forward, % of copy bandwidth"]
    assert (forward.value, forward.met) == (80.0, False)
    # A megabyte takes 0.01 ms at 100 GB/s.
    backward = found["cuda: position backward, % of copy bandwidth"]
    assert backward.value == pytest.approx(100 * 0.02 / 0.03)
    assert found["cuda: mix, % of copy bandwidth"].met
    assert "cuda: mix backward, % of copy bandwidth" not in found
