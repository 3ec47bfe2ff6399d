"""Optimizer and schedule of a run, as its options say."""

from __future__ import annotations

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
    optimizer: torch.optim.Optimizer, options: Options, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    if options.schedule == "one-cycle":
        # One more than there are steps: it is asked for a rate after the last one too.
        return schedulers.OneCycleLR(
            optimizer, options.lr, total_steps=steps + 1, cycle_momentum=False
        )
    if options.schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, steps)
    return schedulers.LambdaLR(optimizer, lambda _: 1.0)
