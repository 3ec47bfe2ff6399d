"""`benchmarks/run_gpu.sh`: its options and plans, and dry runs of it on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.dry_runs import needs_cpp

from benchmarks.gpu import run

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script's own limit is nine minutes; on a slow machine a dry run takes some of them."""
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=ROOT.parent,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@needs_bash
def test_the_script_parses() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "run_gpu.sh OUT_DIR"),
        (["{out}", "--quick"], "unknown option --quick"),
        (["{out}", "other"], "one OUT_DIR"),
        (["{out}", "--seconds", "9m"], "allowed is a whole number"),
        (["{out}", "--steps", "build tsts"], "got 'tsts'; allowed are build first tests"),
        (["{out}", "--plan", "third"], "got 'third'; allowed are all, first, second"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = script(*(a.format(out=tmp_path) for a in arguments))
    assert done.returncode == 2
    assert words in done.stderr


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = script(str(tmp_path / "out"), "--steps", "floor")
    assert done.returncode == 2
    assert "no PyTorch that finds a GPU" in done.stdout
    done = script(str(tmp_path / "out"), "--steps", "floor", PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no-such-python" in (tmp_path / "out" / "run.log").read_text()


@needs_bash
@needs_cpp
def test_a_dry_run_of_the_script(tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    done = script(str(out), "--smoke", "--steps", "memory")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"run.log", "results.json", "tables.md"} <= {path.name for path in out.iterdir()}
    assert list(json.loads((out / "results.json").read_text())["parts"]) == ["memory"]
    assert done.stdout.rstrip().splitlines()[-1].startswith("| cpp: peak memory")


# Most important first; a step that is in no plan would never be measured.
FIRST = ["build", "first", "sanitizer", "floor", "layers", "positions", "rivals"]
SECOND = [
    *("build", "tests", "layers", "networks", "floor", "positions", "rivals", "memory", "pieces"),
    *("stages", "divergence", "overhead", "compiled", "layers_compiled"),
]


@needs_bash
@pytest.mark.parametrize(
    ("arguments", "seconds", "steps"),
    [
        ("--plan first", 200, FIRST),
        ("--plan second", 400, SECOND),
        ("--steps first,overhead,layers", 540, ["layers", "overhead", "first"]),
        ("--plan first --steps overhead,layers,floor", 200, ["floor", "layers", "overhead"]),
    ],
)
def test_the_steps_of_a_plan(arguments: str, seconds: int, steps: list[str]) -> None:
    done = script("--list", *(word.replace(",", " ") for word in arguments.split()))
    assert (done.returncode, done.stderr) == (0, "")
    head, *listed = done.stdout.splitlines()
    assert [line.split()[0] for line in listed] == steps
    assert all(int(line.split()[1]) > 0 for line in listed)
    assert int(head.split()[-2]) <= seconds


@pytest.mark.slow
@needs_bash
@needs_cpp
@pytest.mark.parametrize("plan", ["first", "second"])
def test_a_dry_run_of_a_plan(plan: str, tmp_path: Path) -> None:
    done = script(str(tmp_path), "--smoke", "--plan", plan, "--seconds", "590")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.iterdir())) <= 8
    results = json.loads((tmp_path / "results.json").read_text())
    measured = [part for part in (FIRST if plan == "first" else SECOND) if part in run.PARTS]
    assert list(results["parts"]) == measured
    assert all(not part.get("refused") for part in results["parts"].values())
    assert results["machine"]["few"] == (plan == "first")
    assert " passed" in (tmp_path / "tests.log").read_text()
    assert ("compute-sanitizer" in done.stdout) == (plan == "first")
    assert re.search(r"compiled ahead: (\d+) of \1, ", done.stdout)


@needs_bash
@pytest.mark.parametrize("plan", ["second", "all"])
def test_a_plan_that_measures_everything(plan: str) -> None:
    listed = script("--list", "--plan", plan).stdout.splitlines()[1:]
    assert {*run.PARTS} <= {line.split()[0] for line in listed}


def test_the_script_looks_where_the_tests_for_a_gpu_are() -> None:
    (listed,) = re.findall(r"^with_gpu_tests=\((.*)\)$", SCRIPT.read_text(), flags=re.MULTILINE)
    paths = [ROOT / path for path in listed.split()]
    assert all(path.exists() for path in paths)
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "mark.gpu" in path.read_text() and path != Path(__file__):
            assert any(path.is_relative_to(folder) for folder in paths), path


# In place of compute-sanitizer: what it says, what it does with the program, and what the script makes of that.
SANITIZERS = {
    "refuses": (
        'echo "========= Error: Device not supported. Please refer to the documentation"; exit 255',
        0,
        "compute-sanitizer: skipped, it refuses this machine: ========= Error: Device not supported",
    ),
    "finds nothing": (
        'shift 2; [ "$1" != --error-exitcode ] || shift 2; "$@" || exit; '
        'echo "========= ERROR SUMMARY: 0 errors"',
        0,
        "compute-sanitizer memcheck: ========= ERROR SUMMARY: 0 errors",
    ),
    "finds an error": (
        'case "$*" in *exercise*) echo "========= Invalid __global__ write of size 4 bytes"; exit 77 ;; esac',
        1,
        "compute-sanitizer memcheck: FAILED with code 77",
    ),
}


@needs_bash
@needs_cpp
@pytest.mark.parametrize("kind", SANITIZERS)
def test_what_a_sanitizer_says(kind: str, tmp_path: Path) -> None:
    does, code, said = SANITIZERS[kind]
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    fake = folder / "compute-sanitizer"
    fake.write_text(
        f'#!/usr/bin/env bash\necho "$*" | tr "\\n" " " >>"{calls}"\necho >>"{calls}"\n{does}\n'
    )
    fake.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    arguments = "--smoke", "--plan", "first", "--steps", "sanitizer", "--seconds", "590"
    done = script(str(tmp_path / "out"), *arguments, PATH=path)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr
    # Of a machine that it refuses it is asked once, for a second, and not with all the kernels.
    made = [line for line in calls.read_text().splitlines() if "benchmarks.gpu.exercise" in line]
    assert len(made) == (0 if kind == "refuses" else 1)


# The device has a fault at the second test, and from then on in this process.
FAULTY = """
import pytest, torch
from support import on_gpu

faults = []

@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    def wait():
        if faults:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    yield
    on_gpu.synchronize()

def test_one(): pass
def test_two(): faults.append(1)
def test_three(): pass
def test_four(): pass
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_device_is_one_test_s(workers: int, tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    # This process may itself be a worker of pytest-xdist, which that one is not.
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), "."],
        cwd=tmp_path,
        env=env | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    if workers:
        assert "crashed while running 'test_faulty.py::test_two'" in done.stdout
        assert "1 failed, 4 passed" in done.stdout  # the call of the second had passed
    else:  # nobody takes over
        assert "4 passed, 3 errors" in done.stdout
        assert "illegal memory access" in done.stdout


@pytest.mark.parametrize("kind", ["light_blocks", "a_mix", "a_tolerance"])
def test_the_first_tests_on_the_cuda_kernels(kind: str) -> None:
    """Where these run on a CPU: that a test itself is wrong for a backend must not show on a device first."""
    tests = ["tests/gpu/test_first.py", "-k", f"test_{kind} and float32 and odd"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *tests],
        cwd=ROOT,
        env=os.environ | {"ELA_KERNELS_TEST_DEVICE": "cuda_on_cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@needs_bash
@needs_cpp
def test_a_script_without_time_measures_nothing_and_says_so(tmp_path: Path) -> None:
    done = script(str(tmp_path), "--smoke", "--seconds", "1", "--steps", "floor")
    assert "floor: no time left" in done.stdout
    assert not (tmp_path / "results.json").exists()
