"""A disk, or a terminal, that takes no more: the file is named, and the checkpoint before is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.disk import largest_file
from support.program import SMALL, after_step, said, train

from ela_kernels.__main__ import main
from ela_kernels.training import config
from ela_kernels.training.checkpoint import NAME, load_checkpoint
from ela_kernels.training.loop import Trainer

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("room", "more", "file"),
    [
        (40, "--tensorboard", "tensorboard/events"),
        (60, "--log-every 1", "steps.csv"),
        (150, "", "log.csv"),
        (300, "--tensorboard --log-every 1", "tensorboard/events"),
        (60_000, "", NAME),
        (60, "", "config.json"),
    ],
)
def test_a_file_for_which_there_is_no_room(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    more: str,
    file: str,
) -> None:
    if file != "config.json":
        # It is the first file, and larger than the first rows of the others.
        monkeypatch.setattr(config, "write_config", lambda arguments, out: None)
    if "--tensorboard" in more:
        pytest.importorskip("tensorboard")
    with largest_file(room):
        assert train(tmp_path, f"--epochs 1 {more}") == 1
    message = said(capsys)
    assert message.startswith(f"error: {tmp_path / file}")
    assert message.endswith(" could not be written: File too large; no checkpoint was saved before")
    assert not list(tmp_path.glob("*.unfinished"))
    assert not (tmp_path / NAME).exists()


def test_the_checkpoint_before_a_full_disk_is_named_and_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(trainer: Trainer) -> None:
        limits.__enter__()

    limits = largest_file(60_000)
    after_step(4, fill, monkeypatch)
    try:
        assert train(tmp_path, "--epochs 2") == 1
    finally:
        limits.__exit__(None, None, None)
    message = said(capsys)
    assert message.startswith(f"error: {tmp_path / NAME} could not be written: File too large; the")
    assert message.endswith(f"saved before, {tmp_path / NAME}, is whole")
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "config.json", "log.csv"]
    monkeypatch.undo()
    assert train(tmp_path, "--epochs 2 --resume") == 0


def test_events_are_what_tensorboard_reads(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(tmp_path, "--epochs 2 --tensorboard --log-every 1") == 0
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    state = load_checkpoint(tmp_path)
    losses = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert losses == [
        (row["step"], pytest.approx(row["train_loss"], rel=1e-6)) for row in state["history"]
    ]
    assert [event.step for event in events.Scalars("steps/loss")] == [1, 2, 3, 4]


def run_on_a_full_terminal(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "ela_kernels", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )


def test_a_terminal_that_takes_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_on_a_full_terminal("train", "--out", str(tmp_path), *SMALL.split(), "--epochs", "1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the results could not be printed: No space left on device; the")
    assert "Traceback" not in done.stderr
    assert load_checkpoint(tmp_path)["epoch"] == 1
    # Here, without a process of their own: how Python ends is seen above.
    config_file = str(tmp_path / "config.json")
    for command in (["explain", str(tmp_path)], ["train", "--config", config_file, "--evaluate"]):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(command) == 1
        assert "error: the results could not be printed: No space" in capsys.readouterr().err
