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
from ela_kernels.training.loop import Trainer

# Two steps an epoch.
SMALL = "--side 8 --batch-size 700 --model resnet20 --attention none --threads 1"


def train(out: Path, more: str, *paths: str | Path) -> int:
    return main(["train", "--out", str(out), *map(str, paths), *f"{SMALL} {more}".split()])


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
