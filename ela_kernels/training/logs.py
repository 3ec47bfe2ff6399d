"""What a run leaves for people to read: a CSV file, TensorBoard's if wanted, a table at the end."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ela_kernels.ebqm import Report
from ela_kernels.optional import MissingLibraryError, optional
from ela_kernels.training import plots
from ela_kernels.training.files import named, write_whole

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
# Rows of runs that an earlier release began have none.
ADDED_LATER = ("test_accuracy_5",)
LAST_COLUMNS = ("seconds", "layers_skipped")
STEP_COLUMNS = ("step", "epoch", "lr", "loss", "accuracy", "seconds", "layers_skipped")


def columns_of(has_top: bool, averaged: bool) -> tuple[str, ...]:
    """Of the log of a classifier's epochs.

    Args:
        has_top: whether there is a share of images whose class is among the five likeliest.
        averaged: whether there is an average of the weights.
    """
    average = ("ema_loss", "ema_accuracy", "ema_accuracy_5")
    return (
        *COLUMNS,
        *(ADDED_LATER if has_top else ()),
        *((average if has_top else average[:2]) if averaged else ()),
        *LAST_COLUMNS,
    )


class Logs:
    """Writes `log.csv`, `steps.csv` and pictures in `folder`, and TensorBoard's files under `folder/tensorboard`.

    Args:
        folder: where.
        tensorboard: write its files too.
        done: steps that the run has done already; what an earlier run logged beyond them is dropped.
        columns: of `log.csv`.
        step_columns: of `steps.csv`.
        pictures: draw them, for TensorBoard too where its files are written.

    Raises:
        MissingLibraryError: a library that is needed for it is not there.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool = False,
        done: int = 0,
        columns: Sequence[str] = (*COLUMNS, *LAST_COLUMNS),
        step_columns: Sequence[str] = STEP_COLUMNS,
        pictures: bool = False,
    ) -> None:
        self.folder, self._pictures = folder, pictures
        if pictures:
            plots.check_drawable()
        self._columns, self._step_columns = tuple(columns), tuple(step_columns)
        self._keep_steps(done)
        self._events = EventFile(folder / "tensorboard", done + 1) if tensorboard else None

    def write(self, history: Sequence[dict[str, float]], report: Report | None = None) -> None:
        """Write all epochs so far; whole each time, so that a resumed run never leaves one twice.

        Args:
            history: a row for each epoch.
            report: EBQM's, of which TensorBoard gets the scores and the share of retrievals left out.
        """
        _write_whole(self.folder / "log.csv", self._columns, history)
        if self._events is not None and history:
            row = history[-1]
            values = {name: row[name] for name in self._columns[2:] if name in row}
            values |= {} if report is None else plots.scalars(report)
            self._events.write(int(row["step"]), values)

    def plot(self, history: Sequence[dict[str, float]], report: Report | None) -> None:
        """Draw the run so far, if pictures are wanted; `report` is EBQM's, where it watches."""
        if not self._pictures:
            return
        drawn = plots.write_plots(self.folder, history, report)
        if self._events is not None and history:
            self._events.write_pictures(int(history[-1]["step"]), drawn)

    def write_step(self, row: Mapping[str, float]) -> None:
        """Add one row to `steps.csv`."""
        path = self.folder / "steps.csv"
        if not path.exists():
            _write_whole(path, self._step_columns, [])
        with named(path), path.open("a", newline="") as file:
            csv.DictWriter(file, self._step_columns).writerow(row)
        if self._events is not None:
            values = {f"steps/{name}": row[name] for name in ("loss", "accuracy") if name in row}
            self._events.write(int(row["step"]), values)

    def _keep_steps(self, done: int) -> None:
        path = self.folder / "steps.csv"
        if not path.exists():
            return
        try:
            with path.open(newline="") as file:
                # A full disk may have cut the last row short.
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
            rows = [{name: row[name] for name in self._step_columns} for row in whole]
            kept = [row for row in rows if int(row["step"]) <= done]
        except (KeyError, ValueError, csv.Error) as error:
            raise ValueError(
                f"out: {path} is no log of the steps of a run ({type(error).__name__}: {error}); remove it, or give "
                "another folder"
            ) from error
        _write_whole(path, self._step_columns, kept)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class EventFile:
    """A file of scalars for TensorBoard, one new file a run.

    PyTorch's SummaryWriter writes from a thread, which on a full disk prints a traceback of its own and leaves the
    error for later. Here a value is in the file, or an error names the file, when a call returns.

    Args:
        folder: where; it is made.
        start: the first step to come. What an earlier run wrote of it and later ones is not shown any more.
    """

    def __init__(self, folder: Path, start: int) -> None:
        purpose = "--tensorboard"
        self._events = optional("tensorboard.compat.proto.event_pb2", purpose)
        self._summaries = optional("tensorboard.compat.proto.summary_pb2", purpose)
        records = optional("tensorboard.summary.writer.record_writer", purpose)
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        with named(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._records = records.RecordWriter(self.path.open("wb"))
        event = self._events.Event
        self._write(event(file_version="brain.Event:2"))
        log = self._events.SessionLog
        self._write(event(step=start, session_log=log(status=log.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars, by their names, of a step."""
        self._add(step, {name: {"simple_value": value} for name, value in values.items()})

    def write_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Add pictures in PNG, by their names, of a step."""
        image, values = self._summaries.Summary.Image, {}
        for name, content in pictures.items():
            # Where every PNG says so.
            width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
            size = {"width": width, "height": height, "colorspace": 4}
            values[name] = {"image": image(encoded_image_string=content, **size)}
        self._add(step, values)

    def _add(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        value = self._summaries.Summary.Value
        summary = self._summaries.Summary(value=[value(tag=n, **v) for n, v in values.items()])
        self._write(self._events.Event(step=step, summary=summary))

    def close(self) -> None:
        with named(self.path):
            self._records.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with named(self.path):
            self._records.write(event.SerializeToString())
            self._records.flush()


def _write_whole(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, float | str]]
) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


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

    def epoch(self, row: Mapping[str, float], text: str) -> None:
        """Show how an epoch went: its row of the history, and what was reached."""
        text = f"epoch {row['epoch']}, {text}, {row['layers_skipped']} layers skipped"
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
        plain = optional("rich.text", "the table of results").Text
        # As texts: what stands in brackets in a path is not for rich, which would leave it out.
        table = optional("rich.table", "the table of results").Table(title=plain(title))
    except MissingLibraryError:
        _print_plain(title, columns, rows)
        return
    for number, column in enumerate(columns):
        table.add_column(plain(column), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(plain, row))
    console.print(table)


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for first, *rest in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join((f"{first:<{widths[0]}}", *cells)))
