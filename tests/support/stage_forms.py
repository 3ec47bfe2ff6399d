"""One small stage in each form that has a backward of its own: what the layers share, and the maps that they make."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from support.history_stages import make_layers
from support.layer_stages import make_blocks, make_light_blocks, make_stage
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

SHAPE = (2, 6, 4, 5)


class Functional(nn.Module):
    """A layer that keeps its own lists, and calls the functional op."""

    def __init__(self) -> None:
        super().__init__()
        self.wk = nn.Parameter(torch.randn(SHAPE[1], dtype=torch.float64))

    def forward(self, x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        y = x.mean((2, 3))
        pairs.append((y * self.wk, x.tanh()))
        return x + ek.layer_attention(y, [k for k, _ in pairs], [v for _, v in pairs], 2).out


def _functional(depth: int) -> tuple[nn.ModuleList, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    return nn.ModuleList(Functional() for _ in range(depth)), x


STAGES: dict[str, tuple[Callable[[int], Any], Callable[[], Any]]] = {
    "op": (make_layers, ek.LayerHistory),
    "provider": (lambda depth: make_layers(depth, skip=(1,)), ek.LayerHistory),
    "layer": (lambda depth: make_stage(SHAPE, depth, 3), ek.LayerHistory),
    "block": (lambda depth: make_blocks(SHAPE, depth, 3), ek.LayerHistory),
    "light": (lambda depth: make_light_blocks(SHAPE, depth, 3), PreviousOutput),
    "function": (_functional, list),
}
"""By name: modules and input of a depth, and what is handed from layer to layer."""

Through = Callable[..., Tensor]


def make(form: str, depth: int = 4) -> tuple[nn.ModuleList, Tensor]:
    modules, x = STAGES[form][0](depth)
    return modules, x


def run(
    form: str, modules: nn.ModuleList, x: Tensor, through: Through = lambda f, *a: f(*a)
) -> tuple[list[Tensor], Any]:
    """The outputs of all layers, and what they share."""
    shared, outs = STAGES[form][1](), []
    for module in modules:
        x = through(module, x, shared)
        outs.append(x)
    return outs, shared


def maps(outs: list[Tensor], shared: Any) -> list[Tensor]:
    """Everything large that the stage made."""
    found = list(outs)
    if isinstance(shared, ek.LayerHistory):
        found += [*shared.keys, *shared.values]
        found += [t for t in (shared.weights, shared.kl) if t is not None]
    elif isinstance(shared, list):
        found += [t for pair in shared for t in pair]
    return found


def check_freed_after_a_failed_pass(form: str, device: torch.device | str = "cpu") -> None:
    """On whichever backend serves the stage. A cycle through a graph's nodes is past any collector."""
    modules, x = make(form, 3)
    modules, x = modules.float().to(device), x.detach().float().to(device).requires_grad_()
    outs, shared = run(form, modules, x)
    kept = [weakref.ref(t.untyped_storage()) for t in maps(outs, shared)]

    def fail(_: Tensor) -> None:
        raise KeyboardInterrupt

    outs[0].register_hook(fail)
    failed = False
    try:
        outs[-1].sum().backward()
    except KeyboardInterrupt:
        failed = True
    assert failed
    del outs, shared
    gc.collect()  # Triton's interpreter leaves cycles of its own
    assert not any(r() is not None for r in kept)
