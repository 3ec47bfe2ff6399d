"""Runs that are not done yet, one after the other or several at a time, with a bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.study.data import Batches
from benchmarks.study.records import Record, Records
from benchmarks.study.settings import Settings
from benchmarks.study.training import Run
from ela_kernels.optional import optional
from ela_kernels.training.data import Task


def run_all(
    runs: Sequence[Settings],
    task: Task,
    out: Path,
    device: torch.device | None = None,
    minutes: float | None = None,
    jobs: int = 1,
) -> int:
    """Make the runs that `out` does not have; each is written to it when it is finished.

    Args:
        runs: in this order.
        task: their images.
        out: the file.
        device: where networks are trained; the CPU if None.
        minutes: no run is begun after so many.
        jobs: how many runs are made at a time, each in a process of its own with its share of the threads. More than
            one is faster where networks are small, since threads of one run wait for one another.

    Returns:
        How many of the runs are still to be made.

    Raises:
        ValueError: settings that do not fit the data, or runs without those that they are paired with; nothing was
            run then.
    """
    began = time.perf_counter()

    def in_time() -> bool:
        return minutes is None or time.perf_counter() - began <= 60 * minutes

    tqdm = optional("tqdm", "the study's progress bar").tqdm
    records = Records(out)
    try:
        todo = [run for run in runs if records.find(run.key) is None]
        _check_pairs(todo, records)
        steps = {run.key: run.epochs * Batches(task, run).steps for run in todo}
        place = torch.device("cpu") if device is None else device
        with tqdm(total=sum(steps.values()), unit="step", smoothing=0.02) as bar:
            bar.write(
                f"{len(runs) - len(todo)} of {len(runs)} runs are done; results in {out}",
                sys.stderr,
            )
            if jobs == 1:
                finished = _one_by_one(todo, records, task, place, in_time, bar.update)
            else:
                finished = _side_by_side(todo, records, task, place, in_time, jobs)
            for settings, record in finished:
                record["machine"]["jobs"] = jobs
                records.add(record)
                if jobs > 1:
                    bar.update(steps[settings.key])
                bar.set_postfix_str(
                    f"seed {settings.seed}, depth {settings.depth}, {settings.variant}: "
                    f"{record['test_accuracy'][-1][1]:.2%}"
                )
        return len(todo)
    finally:
        records.close()


Finished = Iterator[tuple[Settings, Record]]


def _one_by_one(
    todo: list[Settings],
    records: Records,
    task: Task,
    device: torch.device,
    in_time: Callable[[], bool],
    after_step: Callable[[], None],
) -> Finished:
    """Make the runs of `todo`, which are taken off it, in this process."""
    while todo and in_time():
        settings = todo.pop(0)
        yield settings, Run(settings, task, device, _paired(settings, records)).train(after_step)


def _side_by_side(
    todo: list[Settings],
    records: Records,
    task: Task,
    device: torch.device,
    in_time: Callable[[], bool],
    jobs: int,
) -> Finished:
    """Make the runs of `todo`, which are taken off it, in so many processes; who waits for a pair lets others by."""
    threads = max(1, torch.get_num_threads() // jobs)
    under_way: dict[Future[Record], Settings] = {}
    # Spawned: threads of OpenMP do not outlive a fork.
    with ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=_begin, initargs=(task, device, threads)
    ) as pool:
        try:
            while True:
                while len(under_way) < jobs and in_time():
                    ready = (run for run in todo if _is_ready(run, records))
                    settings = next(ready, None)
                    if settings is None:
                        break
                    todo.remove(settings)
                    under_way[pool.submit(_work, settings, _paired(settings, records))] = settings
                if not under_way:
                    return
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    yield under_way.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _is_ready(run: Settings, records: Records) -> bool:
    partner = run.paired()
    return partner is None or records.find(partner.key) is not None


def _paired(run: Settings, records: Records) -> Record | None:
    partner = run.paired()
    return None if partner is None else records.find(partner.key)


# What a process of several works with, set when it begins.
_given: tuple[Task, torch.device]


def _begin(task: Task, device: torch.device, threads: int) -> None:
    global _given
    torch.set_num_threads(threads)
    _given = task, device


def _work(settings: Settings, paired: Record | None) -> Record:
    task, device = _given
    return Run(settings, task, device, paired).train()


def _check_pairs(todo: Sequence[Settings], records: Records) -> None:
    """Refuse, before anything is run, what is to be paired with a run that will not be there."""
    there: set[str] = set()
    for run in todo:
        partner = run.paired()
        if partner is not None and partner.key not in there and not _is_ready(run, records):
            raise ValueError(
                f"variants: got {run.variant!r} without {partner.variant!r}, as many of whose layers it skips; allowed "
                "are both, or a file that has the other with the same settings"
            )
        there.add(run.key)
