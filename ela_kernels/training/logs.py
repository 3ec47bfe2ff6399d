"""What a run leaves for people to read: a CSV file, TensorBoard's if wanted, a table at the end."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ela_kernels.training.optional import MissingLibraryError, optional

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "layers_skipped",
)
STEP_COLUMNS = ("step", "epoch", "lr", "loss", "accuracy", "seconds", "layers_skipped")


class Logs:
    """Writes `log.csv` and `steps.csv` in `folder`, and TensorBoard's files under `folder/tensorboard`.

    Args:
        folder: where.
        tensorboard: write its files too.
        done: steps that the run has done already; what an earlier run logged beyond them is dropped.
    """

    def __init__(self, folder: Path, tensorboard: bool = False, done: int = 0) -> None:
        self.folder = folder
        self._keep_steps(done)
        self._writer: Any = None
        if tensorboard:
            optional("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(self, history: Sequence[dict[str, float]]) -> None:
        """Write all epochs so far; whole each time, so that a resumed run never leaves one twice."""
        _write_whole(self.folder / "log.csv", COLUMNS, history)
        if self._writer is not None and history:
            row = history[-1]
            for name in COLUMNS[2:]:
                self._writer.add_scalar(name, row[name], row["step"])
            self._writer.flush()

    def write_step(self, row: Mapping[str, float]) -> None:
        """Add one row of :data:`STEP_COLUMNS` to `steps.csv`."""
        path = self.folder / "steps.csv"
        if not path.exists():
            _write_whole(path, STEP_COLUMNS, [])
        with path.open("a", newline="") as file:
            csv.DictWriter(file, STEP_COLUMNS).writerow(row)
        if self._writer is not None:
            for name in ("loss", "accuracy"):
                self._writer.add_scalar(f"steps/{name}", row[name], row["step"])

    def _keep_steps(self, done: int) -> None:
        path = self.folder / "steps.csv"
        if path.exists():
            with path.open(newline="") as file:
                # A full disk may have cut the last row short.
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
            rows = [row for row in whole if int(row["step"]) <= done]
            _write_whole(path, STEP_COLUMNS, rows)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _write_whole(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, float | str]]
) -> None:
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


class Progress:
    """A bar of steps, by tqdm; a line an epoch where that is not installed. Silent when `shown` is false."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._bar: Any = None
        self._shown = shown
        with contextlib.suppress(MissingLibraryError):
            tqdm = optional("tqdm", "the progress bar").tqdm
            self._bar = tqdm(total=total, initial=done, unit="step", disable=not shown)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def epoch(self, row: Mapping[str, float]) -> None:
        """Show how an epoch went."""
        text = (
            f"epoch {row['epoch']}, test accuracy {row['test_accuracy']:.2%}, "
            f"{row['layers_skipped']} layers skipped"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal, by rich or plain; the first column to the left, the others to the right."""
    try:
        console = optional("rich.console", "the table of results").Console()
        table = optional("rich.table", "the table of results").Table(title=title)
    except MissingLibraryError:
        _print_plain(title, columns, rows)
        return
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for first, *rest in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join((f"{first:<{widths[0]}}", *cells)))
