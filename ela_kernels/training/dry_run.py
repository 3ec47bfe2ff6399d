"""What a run would be: `train --dry-run` looks at its data and its network, takes a few steps, and writes nothing."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ela_kernels.command_line import counted
from ela_kernels.training.inspecting import batch_of, explained
from ela_kernels.training.loop import Interrupted, Trainer

# Steps that are timed, after one that is not: it plans, allocates, and perhaps compiles.
STEPS = 3
_NAMES = 10  # of classes, that are listed


def dry_run(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Print what the run would be. The trainer is of no use afterwards: it has been trained."""
    before = _peak_memory(trainer.device)
    lines = [*_model(trainer, arguments), *_data(trainer, arguments), *_device(trainer)]
    explanation = explained(trainer).summary().splitlines()
    if not trainer.done:
        lines += [*_times(trainer, step_seconds(trainer)), _memory(trainer.device, before)]
    else:
        lines += ["steps     none is left: the run has done all its epochs"]
    if trainer.processes.first:
        print("\n".join([*lines, "", "what serves the layers, in training:"]))
        print("\n".join(f"  {line}" for line in explanation))
        print("\nNothing was written.")
    trainer.processes.wait()


def step_seconds(trainer: Trainer) -> list[float]:
    """Times of `STEPS` steps of the epoch under way, without its first; of that alone where there is no other."""
    last = min(trainer.batch + 1 + STEPS, trainer.steps_per_epoch)
    marks = [time.perf_counter()]

    def after_step() -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        marks.append(time.perf_counter())

    trainer.stopping = lambda: int(trainer.batch >= last)
    try:
        trainer.run_epoch(after_step)
    except Interrupted:
        pass
    finally:
        trainer.stopping = lambda: 0
    seconds = [end - start for start, end in pairwise(marks)]
    return seconds[1:] or seconds


def _model(trainer: Trainer, arguments: argparse.Namespace) -> list[str]:
    counts = [p.numel() for p in trainer.model.parameters()]
    return [
        f"model     {arguments.model}, attention {arguments.attention}: {sum(counts):,} parameters",
    ]


def _data(trainer: Trainer, arguments: argparse.Namespace) -> list[str]:
    task = trainer.task
    where = "" if arguments.data_dir is None else f" in {arguments.data_dir}"
    names = ", ".join(task.classes[:_NAMES])
    more = f" and {len(task.classes) - _NAMES} more" if len(task.classes) > _NAMES else ""
    return [
        f"data      {arguments.data}{where}: {len(task.train):,} images to train with, {len(task.test):,} to test",
        f"classes   {len(task.classes)}: {names}{more}{_spread(task)}",
        f"images    {_sizes(batch_of(trainer)[0])}",
    ]


def _spread(task: Any) -> str:
    """How many images the classes have, where every image is of one."""
    labels = getattr(task.train, "labels", None)
    if not isinstance(labels, Tensor) or len(labels) != len(task.train):
        return ""
    counts = labels.bincount()
    return f"; {int(counts.min()):,} to {int(counts.max()):,} images each"


def _sizes(images: Tensor | Sequence[Tensor]) -> str:
    if isinstance(images, Tensor):
        channels, height, width = images.shape[1:]
        return f"{channels} x {height} x {width}, {len(images)} in a batch"
    heights, widths = ([image.shape[i] for image in images] for i in (-2, -1))
    return (
        f"{min(heights)} to {max(heights)} pixels high and {min(widths)} to {max(widths)} wide, {len(images)} in a "
        "batch (the first one's)"
    )


def _device(trainer: Trainer) -> list[str]:
    device, processes = trainer.device, trainer.processes.count
    threads = torch.get_num_threads()
    name = counted(threads, "thread")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    several = f", {processes} processes" if processes > 1 else ""
    return [f"device    {device}, {name}{several}; mixed precision {trainer.options.amp}"]


def _times(trainer: Trainer, seconds: Sequence[float]) -> list[str]:
    step = statistics.median(seconds)
    epoch = step * trainer.steps_per_epoch
    shown = ", ".join(f"{1e3 * s:.0f}" for s in seconds)
    left = trainer.options.epochs - trainer.epoch
    return [
        f"steps     {1e3 * step:.1f} ms each, the median of {shown}",
        f"epoch     {counted(trainer.steps_per_epoch, 'step')}, about {_duration(epoch)}; "
        f"{counted(left, 'epoch')} about {_duration(left * epoch)}; without testing",
    ]


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _peak_memory(device: torch.device) -> float | None:
    """In MiB: of a GPU what PyTorch has allocated, on the CPU what the process had resident; None if it is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # there is none on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _memory(device: torch.device, before: float | None) -> str:
    peak = _peak_memory(device)
    if peak is None or before is None:
        return "memory    not told by this system"
    of = "allocated on the GPU" if device.type == "cuda" else "of the process"
    return f"memory    {peak:,.0f} MiB {of} at its peak, {before:,.0f} MiB before the first image"
