"""What a build says while it runs: how long it will take, about, and a line for each object.

python -m build_tools.progress WHAT COMMAND ...    # the same of any command: that it runs, and that it still does
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from build_tools.ninja_file import Plan

# Seconds of one core of a server's processor, measured with GCC 12 and nvcc 13.
_KERNELS, _OTHER, _CUDA_ARCHITECTURE = 40, 7, 6
# What ninja prints before the name of a step that is done: steps done, steps in all, seconds since it began.
_STATUS = "[%f/%t] %e "
_DONE = re.compile(r"\[(\d+)/(\d+)\] ([\d.]+) (.*)")
# Seconds after which whoever watches wants to know that it has not stopped.
_SILENCE = 20.0


def forecast(plan: Plan, jobs: int, cores: int) -> str:
    """One sentence on how much there is to compile, if nothing is there yet."""
    sources = [source for source in plan.sources() if source not in plan.carried]
    seconds = [_seconds(source, plan) for source in sources]
    at_once = max(1, min(jobs, cores))
    longest = max(seconds, default=0)
    return (
        f"compiling {len(sources)} objects, {jobs} at once: {_about(max(longest, sum(seconds) / at_once))} if none is "
        "there yet"
    )


def _seconds(source: Path, plan: Plan) -> float:
    if source.suffix == ".cu":
        assert plan.cuda is not None
        return _CUDA_ARCHITECTURE * len(plan.cuda.architectures)
    return _KERNELS if source.stem.startswith("layer_attention_") else _OTHER


def _about(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes} minute{'s' if minutes > 1 else ''}"


def follow(
    command: Sequence[str],
    cwd: Path,
    tell: Callable[[str], object] | None = None,
    silence: float = _SILENCE,
) -> tuple[int, str]:
    """Run ninja, and print a line for each step that is done, or that none is for a while.

    Args:
        command: without `-v`.
        cwd: the folder of the build.
        tell: is given the lines; they are printed otherwise.
        silence: seconds without a line after which there is one all the same.

    Returns:
        Its exit status, and what it and the compilers printed besides.

    Raises:
        OSError: it cannot start.
    """
    say = tell or _print
    besides, steps = [], ""
    start = time.monotonic()
    with subprocess.Popen(
        list(command),
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", "NINJA_STATUS": _STATUS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in _lines(process.stdout, silence):
            if line is None:
                say(f"{steps}still compiling, after {time.monotonic() - start:.0f} s")
            elif done := _DONE.fullmatch(line.rstrip("\n")):
                number, total, seconds, what = done.groups()
                steps = f"[{number}/{total}] "
                say(f"{steps}{what}, after {float(seconds):.0f} s")
            else:
                besides.append(line)
    return process.returncode, "".join(besides)


def _lines(stream: Iterable[str], silence: float) -> Iterator[str | None]:
    """The lines of a stream, and None whenever it has had none for so many seconds."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            arrived.put(line)
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=silence)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def accompany(what: str, command: Sequence[str], silence: float = _SILENCE) -> int:
    """Run a command that prints for itself, and say what it is, and again after every so many seconds.

    Args:
        what: in the form of "installing PyTorch".
        command: what is run.
        silence: these seconds.

    Returns:
        Its exit status, 130 where it was interrupted.
    """
    _print(what)
    start = time.monotonic()
    with subprocess.Popen(list(command)) as process:
        try:
            while (status := _status(process, silence)) is None:
                _print(f"still {what}, after {time.monotonic() - start:.0f} s")
        except KeyboardInterrupt:  # the command is interrupted as well
            process.wait()
            return 130
    return status


def _status(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """A process's exit status, None if it has none in so many seconds."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(accompany(sys.argv[1], sys.argv[2:]))
