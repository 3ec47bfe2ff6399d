"""What a run leaves for people to read: a CSV file, TensorBoard's if wanted, a table at the end."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ela_kernels.training.optional import optional

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


class Logs:
    """Writes `log.csv` in `folder`, and TensorBoard's files under `folder/tensorboard`."""

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        self.folder = folder
        self._writer: Any = None
        if tensorboard:
            optional("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, history: Sequence[dict[str, float]]) -> None:
        """Write all epochs so far; whole each time, so that a resumed run never leaves one twice."""
        path = self.folder / "log.csv"
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(history)
        os.replace(unfinished, path)
        if self._writer is not None and history:
            row = history[-1]
            for name in COLUMNS[2:]:
                self._writer.add_scalar(name, row[name], row["step"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the terminal; the first column to the left, the others to the right."""
    console = optional("rich.console", "the table of results").Console()
    table = optional("rich.table", "the table of results").Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
