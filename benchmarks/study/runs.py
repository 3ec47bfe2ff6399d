"""Runs that are not done yet, one after the other, with a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.study.data import Batches
from benchmarks.study.records import Records
from benchmarks.study.settings import Settings
from benchmarks.study.training import Run
from ela_kernels.training.data import Task
from ela_kernels.training.optional import optional


def run_all(
    runs: Sequence[Settings],
    task: Task,
    out: Path,
    device: torch.device | None = None,
    minutes: float | None = None,
) -> int:
    """Make the runs that `out` does not have; each is written to it when it is finished.

    Args:
        runs: in this order.
        task: their images.
        out: the file.
        device: where networks are trained; the CPU if None.
        minutes: no run is begun after so many.

    Returns:
        How many of the runs are still to be made.

    Raises:
        ValueError: settings that do not fit the data, or runs without those that they are paired with; nothing was
            run then.
    """
    began = time.perf_counter()
    tqdm = optional("tqdm", "the study's progress bar").tqdm
    records = Records(out)
    try:
        todo = [run for run in runs if records.find(run.key) is None]
        _check_pairs(todo, records)
        steps = {run.key: run.epochs * Batches(task, run).steps for run in todo}
        with tqdm(total=sum(steps.values()), unit="step", smoothing=0.02) as bar:
            bar.write(
                f"{len(runs) - len(todo)} of {len(runs)} runs are done; results in {out}",
                sys.stderr,
            )
            while todo:
                if minutes is not None and time.perf_counter() - began > 60 * minutes:
                    break
                settings = todo.pop(0)
                bar.set_description(
                    f"seed {settings.seed}, depth {settings.depth}, {settings.variant}"
                )
                partner = settings.paired()
                paired = None if partner is None else records.find(partner.key)
                record = Run(settings, task, device, paired).train(bar.update)
                records.add(record)
                bar.set_postfix_str(f"last accuracy {record['test_accuracy'][-1][1]:.2%}")
        return len(todo)
    finally:
        records.close()


def _check_pairs(todo: Sequence[Settings], records: Records) -> None:
    """Refuse, before anything is run, what is to be paired with a run that will not be there."""
    there: set[str] = set()
    for run in todo:
        partner = run.paired()
        if partner is not None and partner.key not in there and records.find(partner.key) is None:
            raise ValueError(
                f"variants: got {run.variant!r} without {partner.variant!r}, as many of whose layers it skips; allowed "
                "are both, or a file that has the other with the same settings"
            )
        there.add(run.key)
