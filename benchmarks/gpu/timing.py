"""Interleaved timing on a device: in turns, by CUDA events, within a budget of seconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.measure import Contender

LEAST_ROUNDS = 5


class Budget:
    """The seconds that a part of the benchmarks may take, and what is left of them."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative when they are used up."""
        return self._end - time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contenders: Mapping[str, Contender],
    device: torch.device,
    rounds: int,
    seconds: float,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, in the order A, B, C, then B, C, A, then C, A, B.

    Ends after `rounds`, or after `seconds` once there are :data:`LEAST_ROUNDS`. The device is idle when a contender
    starts, so that none hides its launches behind the work of the one before: a step whose launches take longer than
    its kernels is timed at what it takes on its own. On a GPU the time is between two events on the stream.
    """
    for run in contenders.values():
        for _ in range(warmup):
            run()
    synchronize(device)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    clock = _clock(device)
    turns = list(contenders.items())
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    budget = Budget(seconds)
    try:
        for i in range(rounds):
            if i >= min(LEAST_ROUNDS, rounds) and budget.left < 0:
                break
            first = i % len(turns)
            for name, run in turns[first:] + turns[:first]:
                taken[name].append(clock(run))
    finally:
        if was_enabled:
            gc.enable()
    return taken


def _clock(device: torch.device) -> Callable[[Contender], float]:
    if device.type != "cuda":

        def by_clock(run: Contender) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return by_clock

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events(run: Contender) -> float:
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return by_events


def graphed(run: Contender, device: torch.device) -> Contender:
    """`run` captured into a CUDA graph, as something that replays it; `run` itself on a CPU.

    What `run` returns lives as long as the replay does: every replay writes it anew.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, loads and allocates what may not happen during a capture
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> object:
        graph.replay()
        return results

    return replay
