"""One checkout's process: prepares rows and runs one short measurement at a time, as it is asked.

It reads requests from its standard input and writes what it found to its standard output, a line of JSON each, until
the input ends: so it ends with the program that asks, however that does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

import ela_kernels as ek
from benchmarks.compare.rows import Prepared, Row, all_rows

Reply = dict[str, Any]


class Worker:
    """What a process keeps between requests: the rows that are prepared."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {row.name: row for row in rows}
        self.prepared: dict[str, Prepared] = {}

    def hello(self) -> Reply:
        """Whose package this process has imported, and what runs it."""
        return {
            "package": str(Path(ek.__file__).resolve().parent),
            "version": ek.__version__,
            "cpp": ek.backend_status()["cpp"],
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }

    def prepare(self, row: str) -> Reply:
        """Make a row and run it once, by which graphs are compiled."""
        start = time.perf_counter()
        prepared = self.rows[row].make()
        prepared.step()
        self.prepared[row] = prepared
        return {"seconds": time.perf_counter() - start}

    def numbers(self, row: str, file: str) -> Reply:
        """Write a row's output and gradients to a file."""
        torch.save(self.prepared[row].numbers(), file)
        return {}

    def time(self, row: str, steps: int) -> Reply:
        """Seconds of some steps, after one that is not counted: it finds the caches as the other process left them.

        What a step returns is given back inside the timed part. Python's collector runs before, on what was made since.
        """
        step = self.prepared[row].step
        gc.collect()
        step()
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def freeze(self) -> Reply:
        """Take what was made so far from the collector: a walk through all of it would empty the caches."""
        gc.collect()
        gc.freeze()
        return {}

    def answer(self, request: dict[str, Any]) -> Reply:
        """What a request asks for; an exception becomes an error that names it."""
        answers: dict[str, Callable[..., Reply]] = {
            "hello": self.hello,
            "prepare": self.prepare,
            "numbers": self.numbers,
            "time": self.time,
            "freeze": self.freeze,
        }
        arguments = dict(request)
        try:
            return answers[arguments.pop("do")](**arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def serve(worker: Worker, requests: Iterable[str], replies: TextIO) -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    for line in requests:
        print(json.dumps(worker.answer(json.loads(line))), file=replies, flush=True)


def main(compiled: bool, threads: int | None) -> None:
    """Serve the program that started this process."""
    # What anything else prints goes to the log, and not between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if threads is not None:
        torch.set_num_threads(threads)
    gc.disable()
    serve(Worker(all_rows(compiled)), sys.stdin, replies)
