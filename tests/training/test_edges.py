"""Whatever ends a run early is one sentence and the right exit status."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.program import said, train

from ela_kernels.training import cli, making, processes
from ela_kernels.training.data import Task, load_task
from ela_kernels.training.failures import is_out_of_memory, sentence
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options
from ela_kernels.training.processes import choose_device, join_processes
from ela_kernels.training.reading import Part

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--side 7", "side: got 7; allowed is an int from 8 to 4096"),
        ("--side -3", "side: got -3; allowed"),
        ("--side 1000000000", "side: got 1000000000; allowed"),
        (
            "--head-dim 7 --attention ela",
            "head_dim: got 7, for stages of 16, 32, 64 channels; allowed",
        ),
        # The first stage would take 16 of it.
        ("--head-dim 24 --attention ela", "head_dim: got 24, for stages of 16, 32, 64 channels"),
        ("--head-dim 0 --attention ela", "head_dim: got 0; allowed"),
        ("--head-dim -3", "head_dim: got -3; allowed"),
        # The last of nine layers would have 2, the others less.
        ("--drop-path 2 --attention ela", "drop_path: got 2.0; allowed is a float in [0, 1]"),
        ("--drop-path 1.01 --attention mrla", "drop_path: got 1.01; allowed"),
        ("--drop-path 2", "drop_path: got 2.0; allowed"),
        ("--drop-path nan --attention ela", "drop_path: got nan; allowed"),
        ("--data-dir some/where", "data-dir: got some/where with --data digits, which are bundled"),
        (
            "--data-dir a --task detection --model fasterrcnn_small",
            "data-dir: got a with --data dig",
        ),
        ("--threads 100000000", "threads: got 100000000; allowed is an int from 1 to"),
        ("--workers 100000000", "workers: got 100000000; allowed is an int from 0 to"),
        (
            "--batch-size 1438",
            "batch-size: got 1438 in 1 process for 1437 training images; allowed",
        ),
        ("--batch-size 99999999999999999999", "batch-size: got 99999999999999999999; allowed"),
        ("--epochs 99999999999999999999", "epochs: got 99999999999999999999; allowed"),
        ("--lr inf", "lr: got inf; allowed"),
        ("--lr 1e300", "lr: got 1e+300; allowed"),
        ("--weight-decay 1e300", "weight-decay: got 1e+300 with lr=0.03; allowed"),
        ("--weight-decay 1e10 --lr 1e30", "weight-decay: got 10000000000.0 with lr=1e+30; allowed"),
        ("--momentum nan", "momentum: got nan; allowed"),
        ("--seed 9223372036854775808", "seed: got 9223372036854775808; allowed"),
        ("--attention ela --ebqm low=nan", "low: got nan; allowed"),
        ("--attention ela --ebqm low=0.1 low=0.2", "ebqm: got low more than once"),
        ("--attention ela --ebqm warmup=1.5", "ebqm: got 'warmup=1.5'; allowed"),
        ("--attention ela --ebqm quantile=1", "quantile: got 1.0; allowed"),
        (
            "--attention ela --ebqm ceiling=0.2",
            "ebqm: got 'ceiling=0.2', but ceiling is not there any more, since low and high are absolute",
        ),
        (
            "--attention ela --ebqm prior_count=4",
            "ebqm: got 'prior_count=4', but prior_count is not there any more",
        ),
        (
            "--attention ela --ebqm reference=2",
            "ebqm: got 'reference=2', but reference is not there any more",
        ),
    ],
)
def test_refused_numbers_are_those_that_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert train(tmp_path / "out", more) == 2
    assert said(capsys).startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_no_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    for out, reason in (
        (tmp_path / "file", "which is a file; allowed is a folder"),
        (tmp_path / "file" / "in", "where no file can be made (Not a directory); allowed"),
        (tmp_path / ("x" * 300), "where no file can be made (File name too long); allowed"),
    ):
        assert train(out, "") == 2
        assert said(capsys).startswith(f"error: out: got {out}, {reason}")

    def denied(**arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", denied)
    assert train(tmp_path / "denied", "") == 2
    assert "denied, where no file can be made (Permission denied); allowed" in said(capsys)


def test_a_log_of_another_kind_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (
        b"a,b\n1,2\n",
        b"step,epoch,lr,loss,accuracy,seconds,layers_skipped\nx,1,1,1,1,1,1\n",
        b"\xff\n\xff",
    ):
        (tmp_path / "steps.csv").write_bytes(content)
        assert train(tmp_path, "") == 2
        assert "steps.csv is no log of the steps of a run" in said(capsys)


def test_a_look_at_the_norms_changes_nothing() -> None:
    task = load_task("digits", side=8)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(144, 10),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    Trainer(model, task, Options(batch_size=1))
    assert model.training
    assert not model[1]._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def _ask_for_too_much(*_: object) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _overflow(*_: object) -> None:
    torch.empty(2**62, 2**62)


def _too_many_threads(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def _gpu(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it.")


@pytest.mark.parametrize("fail", [_ask_for_too_much, _overflow, _too_many_threads, _gpu])
@pytest.mark.parametrize("place", ["load_task", "_step"])
def test_memory_that_does_not_suffice(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[..., None],
    place: str,
) -> None:
    monkeypatch.setattr(making if place == "load_task" else Trainer, place, fail)
    assert train(tmp_path, "--epochs 1") == 1
    message = said(capsys)
    assert message.startswith("error: out of memory: ")
    assert "try a smaller --batch-size" in message


def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("shapes do not match"), KeyError("x"), ValueError("x"), TypeError()):
        assert sentence(error) is None
        assert not is_out_of_memory(error)

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Trainer, "_step", fail)
        with pytest.raises(type(error)):
            train(tmp_path, "--epochs 1")


def test_a_process_that_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:2")

    monkeypatch.setattr(Trainer, "_step", gone)
    assert train(tmp_path, "--epochs 1") == 1
    assert said(capsys).startswith("error: the processes of the run lost each other: [gloo")


def test_a_process_that_reads_images_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Task.read

    def gone(task: Task, part: Part) -> Any:
        if part.seed is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(task, part)

    monkeypatch.setattr(Task, "read", gone)
    assert train(tmp_path, "--epochs 1 --workers 1") == 1
    sentence = said(capsys)
    assert sentence.startswith("error: a process that reads images ended: DataLoader worker (pid")
    assert "; try fewer --workers" in sentence


def test_a_bug_in_what_reads_images_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(task: Task, part: Part) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Task, "read", wrong)
    # What a worker's error is told as.
    for workers in (0, 1):
        monkeypatch.setattr(Trainer, "dead_norms", lambda trainer: {})
        with pytest.raises(RuntimeError, match="shapes do not match"):
            train(tmp_path / str(workers), f"--epochs 1 --workers {workers}")


def test_python_ends_while_batches_are_read_ahead() -> None:
    """Workers ignore the signal by which Python ends processes, and would be waited for."""
    program = """
import torch
from ela_kernels.training.reading import Part, batches
held = batches(lambda part: (part.numbers, 0), [Part(torch.tensor([i])) for i in range(20)], 1)
next(held)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert done.returncode == 0


def test_a_network_that_cannot_be_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile

    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=broken))
    assert train(tmp_path, "--epochs 1 --compile") == 1
    sentence = said(capsys)
    assert sentence.startswith("error: the network could not be compiled: ")
    assert "no compiler here" in sentence
    assert "; leave out --compile" in sentence


def test_what_torchrun_sets_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "two")
        with pytest.raises(ValueError, match="WORLD_SIZE: got 'two'; allowed is an int"):
            join_processes(torch.device("cpu"))
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(processes.distributed, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"WORLD_SIZE: got 2, .* has no torch\.distributed"):
            join_processes(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="LOCAL_RANK: got 2, and there are 2 GPUs; allowed"):
        choose_device("auto")


def test_counters_on_the_host_are_copied_where_the_host_can_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The group of the GPUs moves nothing of the host's, where an average counts its updates."""
    groups = []

    def broadcast(tensor: torch.Tensor, source: int, group: Any = None) -> None:
        groups.append((tensor.device.type, source, group))

    monkeypatch.setattr(processes.distributed, "broadcast", broadcast)
    both = [torch.zeros(2), torch.zeros(2, device="meta")]
    processes.Processes(1, 2, hosts="of hosts").copy_first(both)
    assert groups == [("cpu", 0, "of hosts"), ("meta", 0, None)]
