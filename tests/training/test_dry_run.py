"""`train --dry-run`: what a run would be, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.program import SMALL, said, train

import ela_kernels as ek
from ela_kernels.models import build_model
from ela_kernels.training import dry_run
from ela_kernels.training.data import load_task
from ela_kernels.training.dry_run import step_seconds
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options

pytest.importorskip("sklearn")

ROOT = Path(ek.__file__).resolve().parents[1]
# Of an epoch of five steps.
FIVE = "--dry-run --batch-size 240 --attention ela --epochs 3"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that are taken."""
    taken, plain = [], Trainer._step

    def step(self: Trainer, *arguments: Any) -> None:
        taken.append(self.steps)
        plain(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)
    return taken


def test_it_says_what_a_run_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[int]
) -> None:
    assert train(tmp_path / "out", FIVE) == 0
    assert not list(tmp_path.iterdir())
    assert steps == [0, 1, 2, 3]  # the first is not timed
    shown = capsys.readouterr().out
    assert "model     resnet20, attention ela: 275,936 parameters\n" in shown
    assert "digits: 1,437 images to train with, 360 to test\n" in shown
    assert "classes   10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; 139 to 146 images each\n" in shown
    assert "images    1 x 8 x 8, 240 in a batch\n" in shown
    assert "device    cpu, 1 thread; mixed precision off\n" in shown
    assert "5 steps, about " in shown
    assert "; 3 epochs about " in shown
    assert " MiB of the process at its peak, " in shown
    assert "9 x LayerAttention: " in shown


def test_the_estimate_is_of_the_median_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "step_seconds", lambda trainer: [0.5, 0.1, 30.0])
    assert train(tmp_path / "out", FIVE) == 0
    shown = capsys.readouterr().out
    assert "steps     500.0 ms each, the median of 500, 100, 30000\n" in shown
    assert "5 steps, about 2.5 s; 3 epochs about 7.5 s; without testing\n" in shown


def test_one_epoch_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "out", f"{FIVE} --epochs 1") == 0
    assert "5 steps, about " in (shown := capsys.readouterr().out)
    assert "; 1 epoch about " in shown


def test_why_layers_are_slower_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ek.use_backend("eager")
    assert train(tmp_path / "out", FIVE) == 0
    shown = capsys.readouterr().out
    assert " x LayerAttention: eager, " in shown
    assert "    not the residual block in one call: use_backend('eager') is in force\n" in shown


def test_a_short_epoch_is_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda self: pytest.fail("it was tested"))
    task, model = load_task("digits", side=8), build_model("resnet20", attention="none", in_chans=1)
    run = Trainer(model, task, Options(epochs=1, batch_size=700))
    assert len(step_seconds(run)) == 1  # of two steps the second
    assert steps == [0, 1]
    run = Trainer(model, task, Options(epochs=1, batch_size=1400))
    assert len(step_seconds(run)) == 1  # there is no other


def test_of_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[int]
) -> None:
    assert train(tmp_path, "--epochs 1") == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert train(tmp_path, "--epochs 1 --resume --dry-run") == 0
    assert "none is left: the run has done all its epochs" in capsys.readouterr().out
    assert steps == [0, 1]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    # A run that would be refused is.
    assert train(tmp_path, "--epochs 1 --dry-run") == 2
    assert "checkpoint.pt is there already" in said(capsys)
    assert train(tmp_path, "--epochs 1 --dry-run --resume --lr 0.5") == 2
    assert "lr=0.03 (now 0.5)" in said(capsys)
    assert train(tmp_path, "--dry-run --evaluate") == 2
    assert said(capsys).startswith("error: evaluate: got both --evaluate and --dry-run")


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    assert train(tmp_path / "file" / "in" / "it", FIVE) == 2
    assert f"in/it, where no file can be made ({tmp_path / 'file'} cannot be" in said(capsys)
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    assert train(tmp_path / "new" / "out", FIVE) == 2
    assert "new/out, where no file can be made" in said(capsys)


def test_images_that_are_read_ahead(tmp_path: Path, steps: list[int]) -> None:
    assert train(tmp_path / "out", f"{FIVE} --workers 1") == 0
    assert steps == [0, 1, 2, 3]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
def test_several_processes_say_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "ela_kernels", "train", "--out", str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(
        [*command, *f"{SMALL} {FIVE} --batch-size 120".split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Nothing was written.") == 1
    assert "1 thread, 2 processes" in done.stdout
    assert not list(tmp_path.iterdir())


def test_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", interrupted)
    assert train(tmp_path / "out", FIVE) == 130
    assert said(capsys) == "Stopped at once; nothing was written."


def test_durations_are_readable() -> None:
    assert [dry_run._duration(s) for s in (1.26, 119, 150, 9000, 400000)] == [
        "1.3 s",
        "119.0 s",
        "2.5 minutes",
        "2.5 hours",
        "4.6 days",
    ]


def test_sizes_of_images_that_differ() -> None:
    images = [torch.zeros(3, 80, 120), torch.zeros(3, 96, 100)]
    said = dry_run._sizes(images)
    assert said.startswith("80 to 96 pixels high and 100 to 120 wide, 2 in a batch")
