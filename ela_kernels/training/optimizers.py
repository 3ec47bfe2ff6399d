"""Optimizer and schedule of a run, as its options say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ela_kernels.training.options import Options


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    # Norms and biases have one dimension; residual networks are usually trained without decay of them.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr)
    return torch.optim.SGD(
        groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, options: Options, steps: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate of each step: as the schedule says, with the recipe's warm-up before it."""
    schedulers = torch.optim.lr_scheduler
    warmup = options.recipe.lr_warmup_epochs * steps_per_epoch
    if options.schedule == "one-cycle":
        # One more than there are steps: it is asked for a rate after the last one too.
        return schedulers.OneCycleLR(
            optimizer, options.lr, total_steps=steps + 1, cycle_momentum=False
        )
    if warmup:
        # One function of the step: a chain of PyTorch's schedules has the states of all of them to be looked through.
        return schedulers.LambdaLR(optimizer, _after_warmup(options, warmup, steps))
    if options.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    return schedulers.LambdaLR(optimizer, lambda _: 1.0)


def _after_warmup(options: Options, warmup: int, steps: int) -> Callable[[int], float]:
    """What the rate is multiplied by in a step: as of `SequentialLR` with `LinearLR` first."""
    least = options.recipe.lr_warmup_decay

    def factor(step: int) -> float:
        if step < warmup:
            return least + (1 - least) * step / warmup
        if options.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return factor
