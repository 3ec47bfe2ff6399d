"""Whole runs through the command line: every source of data, what they leave behind, resuming, what is refused."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.program import DIGITS, assert_same, read_log, run_program, without_times

from ela_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from ela_kernels.training.logs import columns_of

for library in ("sklearn", "tqdm", "rich"):
    pytest.importorskip(library)

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
ROOT = Path(__file__).resolve().parents[2]
RECIPE = "--label-smoothing 0.1 --model-ema --schedule cosine --lr-warmup-epochs 1 --workers 1"


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(tmp_path, f"{DIGITS} --epochs 2 --tensorboard") == 0
    rows = read_log(tmp_path)
    assert list(rows[0]) == list(columns_of(has_top=True, averaged=False))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10")]
    assert int(rows[1]["layers_skipped"]) > 0
    # A random guess among ten classes has a loss of log 10.
    assert float(rows[1]["train_loss"]) < math.log(10)
    shown = capsys.readouterr().out
    assert "test accuracy, last epoch" in shown
    assert "first layer of its stage" in shown
    assert list((tmp_path / "tensorboard").iterdir())


def test_resume_is_exact_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ela_kernels.training import loop

    more = f"{DIGITS} --epochs 3 --log-every 2"
    assert run_program(tmp_path / "whole", more) == 0

    step = loop.Trainer._step

    def step_and_stop(self: loop.Trainer, *args: Any) -> None:
        step(self, *args)
        if self.steps + 1 in stops:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Trainer, "_step", step_and_stop)
    # Steps 5, 10 and 15 end an epoch of five; layers have been skipped since the 4th.
    for stops in ({3}, {8}, {10}):
        # Reading ahead changes nothing, and a run may be resumed with it.
        resume = "" if stops == {3} else "--resume --workers 2"
        assert run_program(tmp_path / "parts", f"{more} {resume}") == 130
        state = load_checkpoint(tmp_path / "parts")
        assert state["epoch"] * 5 + state["batch"] == stops.pop()
    assert run_program(tmp_path / "parts", f"{more} --resume") == 0

    whole, parts = (without_times(load_checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    assert any(whole["ebqm"]["skipped"])
    assert_same(whole, parts)
    for log, rows in (("log.csv", 3), ("steps.csv", 7)):
        logs = [read_log(tmp_path / name, log) for name in ("whole", "parts")]
        assert len(logs[0]) == rows
        for a, b in zip(*logs, strict=True):
            assert {**a, "seconds": ""} == {**b, "seconds": ""}


def test_resume_finds_another_seed_different(tmp_path: Path) -> None:
    """What the test above compares does depend on the run."""
    for seed in (0, 1):
        assert run_program(tmp_path / str(seed), f"{DIGITS} --epochs 1 --seed {seed}") == 0
    a, b = (without_times(load_checkpoint(tmp_path / str(seed)))["model"] for seed in (0, 1))
    with pytest.raises(AssertionError):
        assert_same(a, b)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint(tmp_path: Path, number: int, status: int) -> None:
    command = [sys.executable, "-m", "ela_kernels", "train", "--out", str(tmp_path)]
    command += f"{DIGITS} --batch-size 60 --epochs 500".split()
    errors = tmp_path / "errors"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with errors.open("w") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, env=environment, cwd=tmp_path)
        # The bar shows that steps are being taken.
        end = time.monotonic() + 60
        while "step/s" not in errors.read_text() and "s/step" not in errors.read_text():
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < end, "no step within a minute"
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(timeout=60) == status
    assert "with --resume goes on from" in errors.read_text()
    assert "Traceback" not in errors.read_text()
    state = load_checkpoint(tmp_path)
    assert state["epoch"] + state["batch"] > 0
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data cifar100", "data-dir: got none"),
        (f"{DIGITS} --resume", "checkpoint.pt not found"),
        ("--epochs 0", "epochs: got 0"),
        ("--batch-size 2000", "batch-size: got 2000"),
        ("--lr nan", "lr: got nan"),
        ("--threads 0", "threads: got 0"),
        ("--workers -1", "workers: got -1"),
        ("--log-every 0", "log-every: got 0"),
        ("--seed -1", "seed: got -1"),
        ("--ebqm low=0.1 --no-ebqm", "ebqm: got both"),
        ("--attention mrla --ebqm low=0.1", "with attention 'mrla'; allowed with 'ela' only"),
        ("--attention none --ebqm", "with attention 'none'; allowed with 'ela' only"),
        ("--ebqm low=x", "ebqm: got 'low=x'; allowed is NAME=NUMBER"),
        ("--ebqm quantil=0.8", "ebqm: got 'quantil=0.8'; did you mean quantile? allowed is"),
        ("--ebqm low=0.9", "low, high"),
        ("--model resnet50 --block basic", "block: got 'basic'"),
        ("--attention none --unfused", "fused: got False"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert run_program(tmp_path / "out", more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_not_overwritten_nor_mixed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(tmp_path, f"{DIGITS} --epochs 1") == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert run_program(tmp_path, f"{DIGITS} --epochs 1") == 2
    assert "is there already" in capsys.readouterr().err
    assert run_program(tmp_path, f"{DIGITS} --epochs 1 --resume --lr 0.5") == 2
    assert "lr=0.03 (now 0.5)" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "checkpoint.pt").write_bytes(before[:1000])
    assert run_program(tmp_path, f"{DIGITS} --epochs 1 --resume") == 2
    assert "is no checkpoint" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint({"options": {}, "epoch": 1}, tmp_path)

    def fail(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"options": {}, "epoch": 2}, tmp_path)
    assert load_checkpoint(tmp_path)["epoch"] == 1


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script or, after `-m`, a module."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_distributed
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    done = torchrun(str(ROOT / "tests" / "support" / "training_process.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # 1437 images: an epoch has four steps of two batches of 178, and no image comes up twice.
    seen = torch.cat((first["images"], second["images"])).flatten(1)
    assert len(seen) == len(seen.unique(dim=0)) == 4 * 2 * 178
    assert any(first["ebqm"]["skipped"])
    assert_same(first["parameters"], second["parameters"])
    assert_same(first["ebqm"], second["ebqm"])
    times = [{k: v for k, v in row.items() if k != "seconds"} for row in first["history"]]
    assert times == [{k: v for k, v in row.items() if k != "seconds"} for row in second["history"]]


@pytest.mark.slow
@needs_distributed
@pytest.mark.parametrize("recipe", ["", RECIPE])
def test_two_processes_resume_in_the_middle_of_an_epoch(tmp_path: Path, recipe: str) -> None:
    stopped = str(ROOT / "tests" / "support" / "stopped_process.py")
    more = f"{DIGITS} --epochs 2 --batch-size 178 {recipe}".split()
    whole, parts = (("--out", str(tmp_path / name), *more) for name in ("whole", "parts"))
    done = torchrun("-m", "ela_kernels", "train", *whole)
    assert done.returncode == 0, done.stderr
    # Of four steps an epoch; layers have been skipped since the 4th.
    done = torchrun(stopped, "6", *parts)
    assert "Stopped in epoch 2 after step 6" in done.stderr
    state = load_checkpoint(tmp_path / "parts")
    assert (state["processes"], state["epoch"], state["batch"]) == (2, 1, 2)
    assert any(state["ebqm"]["skipped"])
    done = torchrun("-m", "ela_kernels", "train", *parts, "--resume")
    assert done.returncode == 0, done.stderr

    expected, got = (without_times(load_checkpoint(tmp_path / name)) for name in ("whole", "parts"))
    histories = zip(expected.pop("history"), got.pop("history"), strict=True)
    assert_same(expected, got)
    for row, other in histories:
        # The totals so far are added up over the processes in another order, in float64.
        assert row == pytest.approx(other, rel=1e-12)


def test_history_dtype_is_a_setting_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It changes the numbers, goes on as it was, and is in no checkpoint of a run without it."""
    more = f"{DIGITS} --epochs 1"
    assert run_program(tmp_path / "plain", more) == 0
    assert run_program(tmp_path / "held", f"{more} --history-dtype bfloat16") == 0
    plain, held = (load_checkpoint(tmp_path / name) for name in ("plain", "held"))
    assert "history_dtype" not in plain["options"]["task"]
    assert held["options"]["task"]["history_dtype"] == "bfloat16"
    losses = [read_log(tmp_path / name)[0]["train_loss"] for name in ("plain", "held")]
    assert losses[0] != losses[1]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=0.1)
    capsys.readouterr()
    assert run_program(tmp_path / "held", f"{more} --resume") == 2
    assert "history-dtype='bfloat16' (now missing)" in capsys.readouterr().err
