"""The comparison of two checkouts: what it marks, refuses, leaves behind, and how the two take turns."""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ela_kernels as ek
from benchmarks.compare import measuring
from benchmarks.compare import worker as worker_module
from benchmarks.compare.checkouts import (
    ROOT,
    Checkout,
    describe_checkout,
)
from benchmarks.compare.command import main, note_on_load, report, status, time_text
from benchmarks.compare.judging import FASTER, SLOWER, judge, least_rounds, level_for
from benchmarks.compare.measuring import Found, LeftOut, Plan, Times, distance, measure
from benchmarks.compare.processes import BASE, NEW, Options, Process, ProcessError, RowError
from benchmarks.compare.rows import Prepared, Row, all_rows
from benchmarks.compare.worker import Worker, serve

HERE = Checkout(ROOT, "abc1234", False)

needs_cpp = pytest.mark.skipif(
    ek.backend_status()["cpp"] != "available", reason="times the cpp backend"
)
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")


def noise(seed: int, spread: float) -> list[list[float]]:
    """Ratios of 3 starts of 6 rounds; in one of ten rounds the machine does something else."""
    rng = np.random.default_rng(seed)
    ratios = rng.lognormal(0, spread, (3, 6))
    ratios[rng.random((3, 6)) < 0.1] *= rng.choice([0.4, 2.5])
    return ratios.tolist()


def scaled(starts: list[list[float]], *factors: float) -> list[list[float]]:
    return [[f * ratio for ratio in start] for f, start in zip(factors, starts, strict=True)]


# What is marked.


def test_noise_marks_a_row_in_one_of_twenty_runs_at_most() -> None:
    """Without a margin; with the usual one in none of them."""
    runs, rows = 40, 20
    level = level_for(rows)
    marked = {0.0: 0, 0.03: 0}
    for run in range(runs):
        samples = [noise(1000 * run + row, 0.03) for row in range(rows)]
        for margin in marked:
            marked[margin] += any(judge(s, level, margin).mark for s in samples)
    # At a rate of one in twenty more than 5 of 40 have a probability of 1 %.
    assert marked[0.0] <= 5
    assert marked[0.03] == 0


@pytest.mark.parametrize(("factor", "mark"), [(1.1, SLOWER), (1 / 1.1, FASTER)])
def test_ten_percent_are_found(factor: float, mark: str) -> None:
    """Nearly always with the usual rounds, of which one in ten is of another kind; with the double always."""
    level, marks = level_for(32), []
    for seed in range(40):
        starts = scaled(noise(seed, 0.015), factor, factor, factor)
        found = judge(starts, level, 0.03)
        assert found.low <= found.ratio <= found.high
        assert abs(found.ratio / factor - 1) < 0.02
        marks.append(found.mark)
        again = scaled(noise(seed + 100, 0.015), factor, factor, factor)
        twice = [a + b for a, b in zip(starts, again, strict=True)]
        assert judge(twice, level, 0.03).mark == mark
    assert set(marks) <= {mark, ""}
    assert marks.count(mark) >= 34


def test_two_percent_are_within_the_margin() -> None:
    for seed in range(40):
        assert judge(scaled(noise(seed, 0.015), 1.02, 1.02, 1.02), level_for(32), 0.03).mark == ""


def test_one_slow_process_is_not_a_slow_checkout() -> None:
    quiet = [[1.0 + 0.001 * i for i in range(20)] for _ in range(3)]
    assert judge(scaled(quiet, 1.2, 1.2, 1.2), 0.99, 0.03).mark == SLOWER
    assert judge(scaled(quiet, 1.2, 1.2, 1.0), 0.99, 0.03).mark == ""
    assert judge(scaled(quiet, 0.8, 0.8, 1.0), 0.99, 0.03).mark == ""


def test_too_few_rounds_mark_nothing() -> None:
    for rows in (1, 5, 32):
        rounds, level = least_rounds(rows), level_for(rows)
        assert judge([[2.0] * rounds], level, 0.03).mark == SLOWER
        assert judge([[2.0] * (rounds - 1)], level, 0.03).mark == ""


def test_a_slow_row_or_one_that_is_wrong_shows_in_the_exit_status() -> None:
    level = level_for(3)
    marks = {f: judge([[f] * 9], level, 0.03) for f in (1.0, 1.2, 0.8)}
    fine, gone = Found({}, {}, {}), Found({}, {"row": LeftOut("BASE: no such name", False)}, {})
    wrong = Found({}, {"row": LeftOut("output: apart", True)}, {})
    assert status(fine, {"a": marks[1.0], "b": marks[0.8]}) == 0
    assert status(gone, {"a": marks[1.0]}) == 0
    assert status(gone, {}) == 2
    assert status(wrong, {"a": marks[1.0]}) == 2
    assert status(wrong, {"a": marks[1.2]}) == 1
    times = Times(3, {BASE: [[[2e-3, 2e-3]] * 9], NEW: [[[2.4e-3, 2.4e-3]] * 9]})
    assert times.ratios() == [[pytest.approx(1.2)] * 9]
    text = report(HERE, HERE, wrong._replace(times={"x": times}), {"x": marks[1.2]}, 0.03)
    assert "| x   | 2.00 ms | 2.40 ms | 1.200" in text
    assert "The same code twice" in text
    assert "row is not measured: output: apart" in text
    assert text.endswith("1 of 1 rows differ beyond noise and 3 %.\nx is slower: 1.200")
    other = Checkout(ROOT.parent, "abc1234", True)
    assert "The same code" not in report(HERE, other, fine, {}, 0.03)
    assert time_text(5e-5) == "50 us"
    assert note_on_load(0.2) == ""
    assert note_on_load(2.0).startswith("The load was 2.00 before the start.")


# What is measured.


class Fake:
    """A worker in this process, which notes when it is asked for the time."""

    def __init__(self, side: str, rows: list[Row], asked: list[str]) -> None:
        self.side, self.worker, self.asked = side, Worker(rows), asked
        self.facts: dict[str, str] = {"package": side}

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if do == "freeze":
            return {}
        if do == "time" and arguments["steps"] != 3:
            self.asked.append(f"{arguments['row']}:{self.side[0]}")
        reply = self.worker.answer({"do": do, **arguments})
        if "error" in reply:
            raise RowError(f"{self.side}: {reply['error']}")
        return reply


class Clock:
    """Time that passes only where a row says so, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def row(name: str, number: float = 1.0, seconds: float = 1e-4, fails: bool = False) -> Row:
    def make() -> Prepared:
        if fails:
            raise AttributeError("no such name")
        return Prepared(
            lambda: CLOCK.pass_by(seconds), lambda: {"output": torch.full((3,), number)}
        )

    return Row(name, make, 1e-3, 1e-2)


def compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: list[Row], new: list[Row], plan: Plan
) -> tuple[Found, list[str]]:
    asked: list[str] = []

    @contextlib.contextmanager
    def fakes(*_: object) -> Any:
        yield {BASE: Fake(BASE, base, asked), NEW: Fake(NEW, new, asked)}

    monkeypatch.setattr(measuring, "processes", fakes)
    monkeypatch.setattr(worker_module, "time", CLOCK)
    monkeypatch.setattr(measuring, "SECONDS", 0.0)
    # A walk through all that the tests have imported takes longer than a fake's steps.
    monkeypatch.setattr(gc, "collect", lambda: 0)
    return measure(HERE, HERE, base, plan, tmp_path, Options()), asked


def test_checkouts_take_turns_and_each_is_as_often_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [row("a"), row("b")]
    found, asked = compared(monkeypatch, tmp_path, rows, rows, Plan(rounds=5, starts=2))
    one = ["a:B", "a:N", "a:N", "a:B", "b:N", "b:B", "b:B", "b:N"]
    other = ["a:N", "a:B", "a:B", "a:N", "b:B", "b:N", "b:N", "b:B"]
    assert asked == [*one, *other, *one, *one, *other]
    for times in found.times.values():
        assert times.steps == 1
        for side in (BASE, NEW):
            assert [[len(two) for two in start] for start in times.seconds[side]] == [
                [2, 2, 2],
                [2, 2],
            ]
        assert [len(start) for start in times.ratios()] == [3, 2]


def test_what_is_wrong_or_missing_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = [row("same"), row("off", 1.0), row("newer", fails=True), row("lost"), row("slow")]
    new = [row("same"), row("off", 1.01), row("newer"), row("lost", fails=True), row("slow")]
    new[4] = row("slow", seconds=0.003)
    base[4] = row("slow", seconds=0.001)
    found, asked = compared(monkeypatch, tmp_path, base, new, Plan(rounds=4, starts=2))
    assert {a.split(":")[0] for a in asked} == {"same", "slow"} == set(found.times)
    assert {n: left.is_fault for n, left in found.left_out.items()} == {
        "off": True,
        "newer": False,
        "lost": True,
    }
    assert "9.90e-03 apart" in found.left_out["off"].why
    assert found.left_out["newer"].why == "BASE: AttributeError: no such name"
    ratios = found.times["slow"].ratios()
    assert ratios == [[pytest.approx(3)] * 2] * 2


def test_distances() -> None:
    one = torch.ones(4)
    assert distance(one, one) == distance(0 * one, 0 * one) == 0
    assert distance(0 * one, one) == distance(one, 0 * one) == 1
    assert distance(one, one.double()) == distance(one, one[:3]) == float("inf")
    assert not distance(one, one * float("nan")) <= 1
    assert not distance(one * float("nan"), one * float("nan")) <= 1


def test_requests_are_answered_line_by_line() -> None:
    worker, replies = Worker([row("a")]), io.StringIO()
    asked: list[dict[str, Any]] = [
        {"do": "time", "row": "a", "steps": 2},  # before it is prepared
        {"do": "prepare", "row": "a"},
        {"do": "time", "row": "a", "steps": 2},
        {"do": "prepare", "row": "b"},
        {"do": "hello"},
    ]
    serve(worker, [json.dumps(request) for request in asked], replies)
    early, prepared, timed, unknown, hello = map(json.loads, replies.getvalue().splitlines())
    assert early == {"error": "KeyError: 'a'"}
    assert prepared["seconds"] >= 0
    assert len(timed["seconds"]) == 2
    assert unknown == {"error": "KeyError: 'b'"}
    assert hello["package"] == str(Path(ek.__file__).parent)


def test_rows_use_public_names_alone() -> None:
    """Else an older checkout could not run them."""
    for name in ("rows.py", "worker.py"):
        tree = ast.parse((ROOT / "benchmarks" / "compare" / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                first, *rest = node.module.split(".")
                names = {alias.name for alias in node.names}
                assert first != "ela_kernels" or (not rest and names == {"models"})
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "ek" or node.attr in {*ek.__all__, "__file__"}
    names = [row.name for row in all_rows(compiled=True)]
    assert len(set(names)) == len(names)
    assert {n for n in names if n.startswith("compiled/")} == set(names) - {
        row.name for row in all_rows()
    }


def held_to_eager(rows: list[Row], backend: str = "auto") -> None:
    for row in rows:
        prepared = row.make()
        prepared.step()
        with ek.use_backend(backend):
            found = prepared.numbers()
        with ek.use_backend("eager"):
            expected = prepared.numbers()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            allowed = row.outputs if name == "output" else row.gradients
            assert distance(tensor, expected[name]) <= allowed, (row.name, name)
            assert distance(tensor * 1.1, expected[name]) > allowed, (row.name, name)


@needs_cpp
def test_the_kernels_serve_all_stages_and_are_within_the_tolerances_of_eager() -> None:
    stages = [row for row in all_rows() if not row.name.startswith("network/")]
    assert len(stages) > 25
    held_to_eager(stages, "cpp")


@pytest.mark.slow
@needs_cpp
def test_networks_and_compiled_rows_are_within_the_tolerances_of_eager() -> None:
    held_to_eager([row for row in all_rows() if row.name.startswith("network/")])
    (compiled,) = (r for r in all_rows(compiled=True) if r.name.startswith("compiled/layer/"))
    held_to_eager([compiled])


# From end to end.


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.004)


@needs_cpp
@pytest.mark.usefixtures("short")
def test_a_changed_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One layer waits, the op's scale is another, and the light form is as it was."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ela_kernels", tmp_path / "ela_kernels", ignore=ignored)
    for name, function, more in (
        ("ops/checks.py", "def check_scale(", "    return 0.5\n"),
        (
            "modules/layer_attention.py",
            "    def forward(",
            "        import time; time.sleep(0.001)\n",
        ),
    ):
        changed = tmp_path / "ela_kernels" / name
        before, signature, after = changed.read_text().partition(function)
        arguments, arrow, body = after.partition(":\n")
        changed.write_text(before + signature + arguments + arrow + more + body)
    out = tmp_path / "out.json"
    rows = [a for kind in ("op", "layer", "light") for a in ("--rows", f"overhead/{kind}/*")]
    options = ["--rounds", "8", "--starts", "1", "--threads", "1", "--margin", "0.6"]
    arguments = [str(ROOT), "--new", str(tmp_path), *rows, *options, "--json", str(out)]
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert f"NEW: {tmp_path} (not of git)" in said.out
    op, layer, light = (
        f"overhead/{k}/12x1x16x4x16/float32/planar" for k in ("op", "layer", "light")
    )
    assert f"{op} is not measured: output: " in said.out
    assert "1 of 2 rows differ beyond noise and 60 %." in said.out
    assert f"\n{layer} is slower: " in said.out
    found = json.loads(out.read_text())
    assert {n: r["mark"] for n, r in found["rows"].items()} == {layer: SLOWER, light: ""}
    assert found["rows"][layer]["ratio"] > 2
    assert found["left_out"][op]["is_fault"]
    for side, folder in ((BASE, ROOT), (NEW, tmp_path)):
        assert found["checkouts"][side]["package"] == str(folder / "ela_kernels")
        samples = found["rows"][light]["seconds"][side]
        assert [[len(two) for two in start] for start in samples] == [[2] * 8]
    assert found["machine"]["torch"] == torch.__version__
    assert found["settings"]["rounds"] == 8


@needs_cpp
def test_a_process_answers_and_its_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", ".")  # as the tests of the oldest PyTorch have it
    with pytest.raises(ProcessError, match=r"^NEW: got the package in .*; allowed is that of "):
        Process(NEW, Checkout(tmp_path, None, False), tmp_path, Options())
    process = Process(BASE, describe_checkout(ROOT), tmp_path, Options(threads=1))
    try:
        assert process.facts["threads"] == 1
        with pytest.raises(RowError, match=r"^BASE: KeyError: 'nothing'"):
            process.ask("prepare", row="nothing")
        os.killpg(process._process.pid, signal.SIGKILL)
        with pytest.raises(ProcessError, match=r"^BASE: ended with -9, asked to hello"):
            process.ask("hello")
    finally:
        process.close()
