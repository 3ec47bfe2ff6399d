"""A run that diverges stops, and leaves the checkpoint that it saved before."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.program import SMALL, after_step, said, train

from ela_kernels.training.checkpoint import NAME, load_checkpoint
from ela_kernels.training.failures import NotFiniteError
from ela_kernels.training.finite import Watch, first_not_finite
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options
from ela_kernels.training.processes import Processes

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("amp", ["off", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_run_that_diverges_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], amp: str
) -> None:
    assert train(tmp_path, f"--lr 1e30 --epochs 2 --amp {amp}") == 1
    message = said(capsys)
    assert message.startswith("error: the loss of step 2 is not finite: the run diverged; try a")
    assert "lr (it is 1e+30)" in message
    assert ("bf16 in the place of fp16" in message) == (amp == "fp16")
    assert message.endswith("; no checkpoint was saved before")
    assert not (tmp_path / NAME).exists()


def test_a_run_that_diverges_stops_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one CPU, not at the end of an epoch of ten steps only; in the log there is no row of it."""
    last: list[int] = []
    after_step(3, lambda trainer: last.append(trainer.steps), monkeypatch)
    assert train(tmp_path, "--lr 1e30 --epochs 2 --batch-size 140 --log-every 1") == 1
    assert said(capsys).startswith("error: the loss of step 2 is not finite")
    assert not last
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 2


def _weights(trainer: Trainer) -> None:
    next(trainer.model.parameters()).data[0] = math.nan


def _statistics(trainer: Trainer) -> None:
    # With these the training goes on as before, since only the test images are normalised by them.
    norm = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.running_var.fill_(math.inf)


def _average(trainer: Trainer) -> None:
    state = next(iter(trainer.optimizer.state.values()))
    state["momentum_buffer"][0] = math.inf


def _weights_and_signal(trainer: Trainer) -> None:
    _weights(trainer)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("step", "harm", "message"),
    [
        (4, _weights, "the loss on the test images after step 4 is not finite"),
        (3, _weights, "the loss of step 4 is not finite"),
        (4, _statistics, "the state after step 4 (stem.1.running_var) is not finite"),
        (4, _average, "the state after step 4 (momentum_buffer of parameter 0) is not finite"),
        (3, _weights_and_signal, "the state after step 3 (stem.0.weight) is not finite"),
    ],
)
def test_a_checkpoint_is_not_overwritten_with_what_is_not_finite(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    harm: Callable[[Trainer], None],
    message: str,
) -> None:
    after_step(step, harm, monkeypatch)
    assert train(tmp_path, "--epochs 2") == 1
    sentence = said(capsys)
    assert sentence.startswith(f"error: {message}: the run diverged")
    assert sentence.endswith(f"; the checkpoint that was saved before, {tmp_path / NAME}, is whole")
    state = load_checkpoint(tmp_path)
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert first_not_finite(state["model"], state["optimizer"]) is None
    monkeypatch.undo()
    assert train(tmp_path, "--epochs 2 --resume") == 0


def test_losses_on_a_device_are_read_now_and_then() -> None:
    watch = Watch(Options(), Processes(), torch.device("cuda"))
    looks = [step for step in range(1, 121) if watch.is_due(step)]
    assert looks == [50, 100]
    for step in range(1, 51):
        watch.add(torch.tensor(math.inf if step in (31, 40) else 1.0))
    with pytest.raises(NotFiniteError, match="the loss of step 31 is not finite"):
        watch.look(50)
    watch.add(torch.tensor(1.0))
    watch.look(51)
    assert all(
        Watch(Options(), Processes(), torch.device("cpu")).is_due(step) for step in (1, 2, 3)
    )


def test_all_processes_stop_for_what_one_of_them_saw() -> None:
    class Other(Processes):
        """Another process has seen it two steps earlier than this one."""

        def any(self, flag: int) -> int:
            return max(flag, 7)

    watch = Watch(Options(), Other(count=2), torch.device("cpu"))
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0, 1.0, 1.0, 1.0):
        watch.add(torch.tensor(loss))
    with pytest.raises(NotFiniteError, match="the loss of step 44 is not finite"):
        watch.look(50)
    with pytest.raises(NotFiniteError, match=r"the state after step 50 \(in another process\)"):
        watch.check_weights(None, 50)


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
def test_two_processes_that_diverge_stop_alike(tmp_path: Path) -> None:
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    more = f"{SMALL} --batch-size 178 --epochs 2 --lr 1e30".split()
    done = subprocess.run(
        [*run, "-m", "ela_kernels", "train", "--out", str(tmp_path), *more],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: the loss of step 2 is not finite") == 1
    assert not (tmp_path / NAME).exists()
