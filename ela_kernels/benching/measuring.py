"""The measurement: each workload checked first, then in turns, within the time that there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ela_kernels.benching.timing import interleave, ratio, summarize
from ela_kernels.benching.workloads import COMPILED, EAGER, FORWARD, OURS, TRAINING, Pair, Workload
from ela_kernels.explaining import explain

# Relative L2 distance between eager PyTorch and ours, both in float32. Outputs are measured at 1e-6 and less. A ReLU
# whose input is within rounding of zero passes a whole gradient or none: gradients of all parameters together, and of
# the input, are measured at up to 2e-3. A wrong weight, layer or head is off by 1e-1 and more.
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 3e-2
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 60


class WrongResultError(RuntimeError):
    """The kernels give other numbers than eager PyTorch; their time would mean nothing."""


def measure(
    workloads: Sequence[Workload],
    device: torch.device,
    seconds: float,
    compiled: bool = False,
    tell: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Times of all workloads, as values that JSON can carry.

    Args:
        workloads: what to measure.
        device: where.
        seconds: how long to measure, about; what does not fit in is left out, by name.
        compiled: also what `torch.compile` makes of the eager form. Its compilation is not counted as time.
        tell: is told what is measured next.

    Returns:
        `rows`, one for each workload and mode, with `ms` by contender and `times_ours`, how much longer than ours each
        takes; `serves`, what serves the layers of each workload; `left_out`, names.

    Raises:
        WrongResultError: ours and eager PyTorch differ.
    """
    found: dict[str, Any] = {"rows": [], "serves": {}, "left_out": []}
    end, left = time.monotonic() + seconds, 2 * len(workloads)
    for workload in workloads:
        if time.monotonic() >= end:
            found["left_out"].append(workload.name)
            continue
        tell(workload.name)
        start = time.monotonic()
        pair = Pair(workload, device, compiled)
        difference = check(workload.name, pair)
        found["serves"][workload.name] = explain(pair.modules[OURS], pair.x).summary().splitlines()
        if compiled:
            for mode in (TRAINING, FORWARD):
                pair.in_mode(mode)(COMPILED)
            end += time.monotonic() - start
        for mode in (FORWARD, TRAINING):
            call = pair.in_mode(mode)
            share = max(0.0, end - time.monotonic()) / max(1, left)
            row = {"workload": workload.name, "mode": mode, "difference": difference}
            found["rows"].append(row | _timed(pair, call, share, device))
            left -= 1
    return found


def check(name: str, pair: Pair) -> float:
    """The largest distance between ours and eager PyTorch, in a training step.

    Raises:
        WrongResultError: it is beyond what rounding makes.
    """
    expected, found = pair.step(EAGER), pair.step(OURS)
    worst = 0.0
    for what, part, allowed in (
        ("the output", slice(0, 1), TOLERANCE),
        ("the gradient of the input", slice(1, 2), GRADIENT_TOLERANCE),
        ("the gradients of the parameters", slice(2, None), GRADIENT_TOLERANCE),
    ):
        distance = _distance(found[part], expected[part])
        # Not the other way round: NaN is in no order.
        if not distance <= allowed:
            raise WrongResultError(
                f"{name}: {what} by the kernels is {distance:.2e} away from eager PyTorch, relative to its length; "
                f"allowed is {allowed:.0e}. That is a fault of the kernels, and nothing is measured"
            )
        worst = max(worst, distance)
    return worst


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    got, want = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (found, expected))
    return float((got - want).norm() / want.norm())


def _timed(
    pair: Pair, call: Callable[[str], object], seconds: float, device: torch.device
) -> dict[str, Any]:
    def run(name: str) -> object:
        result = call(name)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    contenders = {name: partial(run, name) for name in pair.forms}
    start = time.monotonic()
    for contender in contenders.values():
        contender()
    once = max(1e-6, time.monotonic() - start)
    rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds / once) - 2))
    times = interleave(contenders, rounds, warmup=1)
    return {
        "ms": {name: summarize(samples)._asdict() for name, samples in times.items()},
        "times_ours": {
            name: ratio(samples, times[OURS]) for name, samples in times.items() if name != OURS
        },
    }
