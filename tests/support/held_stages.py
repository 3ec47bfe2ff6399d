"""Stages whose history holds values in half precision, and what they find."""

from __future__ import annotations

from typing import Any

import torch
from support.held_values import HALVES
from support.history_stages import make_layers
from support.layer_stages import gradients, make_blocks, make_stage
from torch import Tensor

import ela_kernels as ek

SHAPE = (2, 6, 4, 5)
BF16, F16 = HALVES


def held_dtypes(history: ek.LayerHistory) -> set[torch.dtype]:
    return {v.dtype for v in history._now.pairs.values}


def run(modules: Any, x: Tensor, history: ek.LayerHistory, through: Any = None) -> list[Tensor]:
    y = x
    for module in modules:
        y = module(y, history) if through is None else through(module, y, history)
    loss = y.square().sum()
    if history.kl is not None:
        loss = loss + history.kl.sum()
    return [y.detach(), *gradients(loss, [x, *modules.parameters()])]


def stage(kind: str, depth: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    if kind == "op":
        return make_layers(depth, dtype=dtype)
    make = make_stage if kind == "layer" else make_blocks
    return make(SHAPE, depth, 3, dtype)


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """By norm: rounding in float32 alone, through a few layers."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype, i
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6, i
