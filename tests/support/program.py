"""Short runs of the training program in this process, for tests of how they end."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ela_kernels.__main__ import main
from ela_kernels.models import CifarResNet
from ela_kernels.training.data import Task
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options

# Two steps an epoch.
SMALL = "--side 8 --batch-size 700 --model resnet20 --attention none --threads 1"
# EBQM decides at the 4th step and at every second after it, and skips as much as it may.
EBQM = "--ebqm warmup=4 interval=2 probe_interval=3 low=0.98 high=0.99 smoothing=0.5"
DIGITS = f"--side 8 --batch-size 240 --model resnet20 --threads 1 --drop-path 0.1 {EBQM}"
RECIPE = (
    "--label-smoothing 0.1 --model-ema --model-ema-steps 2 --schedule cosine --lr-warmup-epochs 1"
)


def run_program(out: Path, options: str, *paths: str | Path) -> int:
    """Its exit status; `options` are split at blanks, which `paths` may have."""
    return main(["train", "--out", str(out), *map(str, paths), *options.split()])


def train(out: Path, more: str, *paths: str | Path) -> int:
    return run_program(out, f"{SMALL} {more}", *paths)


def trainer(task: Task, options: Options) -> Trainer:
    torch.manual_seed(0)
    model = CifarResNet((3,), (8,), in_chans=1, attention="ela", head_dim=8)
    return Trainer(model, task, options)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on the terminal, after whatever the bar of progress drew."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and "step" not in line.partition("error: ")[0]]
    assert len(lines) == 1, lines
    return lines[0]


def after_step(
    step: int, act: Callable[[Trainer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have something done to a run at the end of its step of that number."""
    plain = Trainer._step

    def changed(self: Trainer, *arguments: Any) -> None:
        plain(self, *arguments)
        if self.steps + 1 == step:
            act(self)

    monkeypatch.setattr(Trainer, "_step", changed)


def read_log(out: Path, name: str = "log.csv") -> list[dict[str, str]]:
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, in whatever containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (first, second) in enumerate(zip(a, b, strict=True)):
            assert_same(first, second, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == b or (math.isnan(a) and math.isnan(b)), where
    else:
        assert a == b, where


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    state = {k: v for k, v in state.items() if k != "seconds"}
    state["history"] = [
        {k: v for k, v in row.items() if k != "seconds"} for row in state["history"]
    ]
    return state
