"""What a build says while it runs: how long it will take, about, and a line for each object."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from build_tools.ninja_file import Plan

# Seconds of one core of a server's processor, measured with GCC 12 and nvcc 13.
_KERNELS, _OTHER, _CUDA_ARCHITECTURE = 40, 7, 6
# What ninja prints before the name of a step that is done: steps done, steps in all, seconds since it began.
_STATUS = "[%f/%t] %e "
_DONE = re.compile(r"\[(\d+)/(\d+)\] ([\d.]+) (.*)")


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
    command: Sequence[str], cwd: Path, tell: Callable[[str], object] | None = None
) -> tuple[int, str]:
    """Run ninja, and print a line for each step that is done.

    Args:
        command: without `-v`.
        cwd: the folder of the build.
        tell: is given the lines; they are printed otherwise.

    Returns:
        Its exit status, and what it and the compilers printed besides.

    Raises:
        OSError: it cannot start.
    """
    besides = []
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
        for line in process.stdout:
            done = _DONE.fullmatch(line.rstrip("\n"))
            if done is None:
                besides.append(line)
                continue
            number, total, seconds, what = done.groups()
            text = f"[{number}/{total}] {what}, after {float(seconds):.0f} s"
            if tell is None:
                print(text, flush=True)
            else:
                tell(text)
    return process.returncode, "".join(besides)
