"""Noticing that a run diverged, before what it had learnt is overwritten."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ela_kernels.training.failures import NotFiniteError
from ela_kernels.training.options import Options
from ela_kernels.training.processes import Processes

# Reading a loss makes the host wait for a device, and processes wait for each other.
_STEPS_BETWEEN = 50


class Watch:
    """Looks at the losses of a run, and stops all of its processes alike at the first that is not finite.

    Losses are kept where they are and read every so many steps: on the CPU with one process at every step. In fp16
    gradients that are not finite belong to it, as their scale is found by trying; the scaler leaves out such steps. The
    loss is not scaled: if it is not finite, maps have overflowed in the forward pass, and with them the running
    statistics of batch norms, so that it ends a run in fp16 as in any other format.
    """

    def __init__(self, options: Options, processes: Processes, device: torch.device) -> None:
        self._options, self._processes = options, processes
        self._every = 1 if device.type == "cpu" and processes.count == 1 else _STEPS_BETWEEN
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Take in the loss of a step."""
        self._losses.append(loss.detach())

    def is_due(self, steps: int) -> bool:
        """Whether it is time to look after so many steps; the same in all processes."""
        return steps % self._every == 0

    def look(self, steps: int) -> None:
        """Look at the losses since the last time, the last of which is that of step number `steps`.

        Raises:
            NotFiniteError: one of them is not finite, in any process.
        """
        losses, self._losses = self._losses, []
        age = 0  # of the first that is not finite, 1 for the last step
        if losses:
            finite = torch.stack(losses).isfinite().tolist()
            age = 0 if all(finite) else len(finite) - finite.index(False)
        age = self._processes.any(age)
        if age:
            raise NotFiniteError(self._message(f"the loss of step {steps + 1 - age} is"))

    def check_test_loss(self, loss: float, steps: int) -> None:
        """The same for the mean loss on the test images, which is one number for all processes."""
        if not math.isfinite(loss):
            raise NotFiniteError(
                self._message(f"the loss on the test images after step {steps} is")
            )

    def check_weights(self, found: str | None, steps: int) -> None:
        """The same for what :func:`first_not_finite` found in this process."""
        if self._processes.any(int(found is not None)):
            where = "in another process" if found is None else found
            raise NotFiniteError(self._message(f"the state after step {steps} ({where}) is"))

    def _message(self, what: str) -> str:
        options = self._options
        more = ", or bf16 in the place of fp16" if options.amp == "fp16" else ""
        return (
            f"{what} not finite: the run diverged; try a smaller lr (it is {options.lr:g}) or weight-decay (it is "
            f"{options.weight_decay:g}){more}"
        )


def first_not_finite(model: Mapping[str, Any], optimizer: Mapping[str, Any]) -> str | None:
    """The name of the first tensor of a model's and its optimizer's state that has NaN or an infinite value."""
    tensors = {name: t for name, t in _tensors(model, optimizer) if t.is_floating_point()}
    if not tensors:
        return None
    # One number for each, and only these are read: the host waits for a device once.
    devices = {t.device for t in tensors.values()}
    for device in devices:
        here = {name: t for name, t in tensors.items() if t.device == device}
        finite = torch.stack([t.isfinite().all() for t in here.values()]).tolist()
        if not all(finite):
            return list(here)[finite.index(False)]
    return None


def _tensors(
    model: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.items():
        if isinstance(value, Tensor):
            yield name, value
    for number, state in optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield f"{name} of parameter {number}", value
