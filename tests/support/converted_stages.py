"""A stage of the published form and its converted copy, and what comes out of one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from support.small_published import Layer
from torch import Tensor, nn

import ela_kernels as ek

State = tuple[Any, Any]
DIM = 8


def stages(count: int = 4) -> tuple[nn.ModuleList, nn.ModuleList]:
    """A stage of the published form in float64, and a converted copy."""
    torch.manual_seed(0)
    theirs = nn.ModuleList(Layer(DIM) for _ in range(count)).double()
    ours = copy.deepcopy(theirs)
    ek.convert(ours, strict=True)
    return theirs, ours


def run(
    stage: nn.ModuleList, between: Callable[[Any, Any], State], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The output and all gradients of a stage; `between` is what is done to keys and values after each layer."""
    stage.zero_grad()
    x = torch.linspace(-1, 1, 2 * DIM * 12).to(dtype).view(2, DIM, 4, 3).requires_grad_()
    y, k, v = x.sin(), None, None
    extra: Any = 0
    for layer in stage:
        out, k, v = layer(y, k, v)
        y = y + out
        k, v, *more = between(k, v)
        extra = extra + sum(m.square().sum() for m in more)
    if torch.is_grad_enabled():
        (y.square().sum() + extra).backward()
    grads = [x.grad, *(p.grad for p in stage.parameters())]
    return [y.detach(), *(g for g in grads if g is not None)]
