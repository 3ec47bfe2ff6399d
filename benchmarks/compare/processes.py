"""The worker processes of a comparison, one for each checkout, as the program that asks them sees them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare.checkouts import ROOT, Checkout
from benchmarks.environment import MALLOC_SETTINGS, process_environment

BASE, NEW = "BASE", "NEW"

# The package comes from the checkout, which is first on Python's path; the rows come from here for both.
_START = (
    "import sys, ela_kernels; sys.path.insert(0, {root!r});"
    "from benchmarks.compare.worker import main; main({compiled!r}, {threads!r})"
)
# Lines of its log that are shown of a process that ended.
_LINES = 15


class RowError(RuntimeError):
    """A row that a checkout cannot run."""


class ProcessError(RuntimeError):
    """A process that ended, or that has imported something else than it should."""


class Options(NamedTuple):
    """What the processes of both checkouts are started with."""

    threads: int | None = None
    malloc: str = "kept"
    compiled: bool = False


class Process:
    """A checkout's worker, which waits until it is asked; ends with the `with` block.

    Args:
        side: :data:`BASE` or :data:`NEW`.
        checkout: whose package it imports.
        folder: for its log and torch.compile's cache.

    Raises:
        ProcessError: it ends, has imported another package, or its compiled kernels are not to be had.
    """

    def __init__(self, side: str, checkout: Checkout, folder: Path, options: Options) -> None:
        self.side, self.folder = side, folder
        # What is there already leads on from this program's folder, not from that of the process.
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = [str(checkout.path), *map(os.path.abspath, given)]
        environment = process_environment(MALLOC_SETTINGS[options.malloc], folder / f"{side}-cache")
        environment["PYTHONPATH"] = os.pathsep.join(path)
        self._log = folder / f"{side}.log"
        start = _START.format(root=str(ROOT), compiled=options.compiled, threads=options.threads)
        with self._log.open("w") as log:
            # Its own session: Ctrl-C is for the program that asks, which then ends this one.
            self._process = subprocess.Popen(
                [sys.executable, "-c", start],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        try:
            self.facts = self.ask("hello")
            package = Path(self.facts["package"])
            if package != checkout.path / "ela_kernels":
                raise ProcessError(
                    f"{side}: got the package in {package}; allowed is that of {checkout.path}. Another one comes "
                    "first on Python's path there"
                )
            if self.facts["cpp"] != "available":
                raise ProcessError(
                    f"{side}: got a checkout whose compiled kernels cannot run: {self.facts['cpp']}; allowed is one "
                    "whose extension is built for this Python and this machine"
                )
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to a request of :class:`benchmarks.compare.worker.Worker`.

        Raises:
            RowError: it could not be done.
            ProcessError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-_LINES:])
            what = " ".join(map(str, (do, *arguments.values())))
            raise ProcessError(f"{self.side}: ended with {status}, asked to {what}:\n{end}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RowError(f"{self.side}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


Processes = dict[str, Process]


@contextlib.contextmanager
def processes(base: Checkout, new: Checkout, folder: Path, options: Options) -> Iterator[Processes]:
    """A process of each checkout."""
    with contextlib.ExitStack() as stack:
        found = {}
        for side, checkout in ((BASE, base), (NEW, new)):
            found[side] = Process(side, checkout, folder, options)
            stack.callback(found[side].close)
        yield found
