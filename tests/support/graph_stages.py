"""Stages of layers to be compiled, and what of the package's operators is found in their graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import ela_kernels as ek
from ela_kernels.models.blocks import MRLA

CHANNELS = 32


class Stage(nn.Module):
    """Convolutions, each with a layer after it; `between` is called after each."""

    def __init__(
        self,
        layers: list[nn.Module],
        between: Callable[[int, Tensor, ek.LayerHistory], Tensor] | None = None,
        reads: bool = False,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.between, self.reads = between, reads

    def forward(self, x: Tensor) -> Tensor:
        history, extra = ek.LayerHistory(), torch.zeros((), dtype=x.dtype)
        for i, (conv, layer) in enumerate(zip(self.convs, self.layers, strict=True)):
            x = conv(x).relu()
            if isinstance(layer, ek.LayerAttention):
                x = layer(x, history, residual=i % 2 == 0)
            else:
                x = layer(x, history)
            if self.between is not None:
                x = self.between(i, x, history)
            if self.reads and history.kl is not None:
                extra = extra + history.kl.sum() + history.weights[..., 0].square().sum()
        return x.square().mean() + extra


def block(drop_path: float = 0.0, relu: bool = True) -> MRLA:
    made = MRLA(ek.LayerAttention(CHANNELS), drop_path, relu)
    nn.init.normal_(made.norm.weight)
    nn.init.normal_(made.norm.bias)
    return made


def stage(*layers: nn.Module, **options: Any) -> Stage:
    return Stage(list(layers), **options).double()


def maps(batch: int = 3, size: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, CHANNELS, size, size, dtype=dtype)


def operators(found: list[str], only_forward: bool = False) -> Any:
    """A compiler that lists the package's operators of the graphs it is given, and runs them as they are."""

    def note(graph: torch.fx.GraphModule, _: Any) -> Any:
        names = (str(n.target).removesuffix(".default") for n in graph.graph.nodes)
        found.extend(n.removeprefix("ela_kernels.") for n in names if "ela_kernels" in n)
        return graph.forward

    return note if only_forward else aot_autograd(fw_compiler=note, bw_compiler=note)


def assert_trains_alike(
    module: nn.Module, compiled: Any, *, steps: int = 2, batch: int = 3, **tolerance: float
) -> None:
    """Outputs, all gradients and buffers, of steps that change the running statistics."""
    twin = copy.deepcopy(module)
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-11}  # float64: sums in another order at most
    for step in range(steps):
        x = maps(batch + step)
        first, second = (x.clone().requires_grad_() for _ in range(2))
        results = []
        for model, call, given in ((module, compiled, first), (twin, twin, second)):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(step)  # of drop path
            results.append(call(given))
            results[-1].backward()
        torch.testing.assert_close(*results, **tolerance)
        torch.testing.assert_close(first.grad, second.grad, **tolerance)
        for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
            grads = (torch.zeros_like(t) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(*grads, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        for p, q in zip(module.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)
