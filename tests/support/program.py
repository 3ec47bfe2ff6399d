"""Short runs of the training program in this process, for tests of how they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
