"""Small ELA networks with planted redundancy, and the training of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ela_kernels as ek

CHANNELS = 16


class Network(nn.Module):
    """Stages of ELA layers, nothing else. `wrap` runs a layer: for checkpointing."""

    def __init__(self, depths: Sequence[int] = (9, 5), **options: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(ek.ELA(CHANNELS, head_dim=8, **options) for _ in range(depth))
            for depth in depths
        )
        self.wrap: Callable[..., Tensor] = _call

    @property
    def layers(self) -> list[ek.ELA]:
        return [layer for stage in self.stages for layer in stage]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            history = ek.LayerHistory()
            for layer in stage:
                x = self.wrap(layer, x, history)
        return x


def _call(layer: nn.Module, x: Tensor, history: ek.LayerHistory) -> Tensor:
    return layer(x, history)


def batch(size: int = 2) -> Tensor:
    """Positive maps, so that the means that make queries and keys are positive too."""
    return torch.rand(size, CHANNELS, 5, 5) + 0.5


def plant(network: Network, redundant: Collection[int], others: float = 2.0) -> None:
    """Set the filters so that the layers numbered in `redundant` retrieve what the layer before does, and no other.

    Every query is the pooled map. The key of layer t is a growing multiple of it, so that each layer attends to itself;
    a redundant layer's is a large negative one, so that it finds only what was there before.
    """
    number = 0
    with torch.no_grad():
        for stage in network.stages:
            for place, layer in enumerate(stage):
                middle = layer.attn.Wq.weight.shape[-1] // 2
                for conv, value in (
                    (layer.attn.Wq, 1.0),
                    (layer.attn.Wk, -40.0 if number in redundant else others * (place + 1)),
                ):
                    conv.weight.zero_()
                    conv.weight[..., middle] = value
                number += 1


def train(network: Network, ebqm: ek.EBQM, steps: int) -> None:
    """Forward and backward passes without an optimizer: what was planted stays."""
    network.train()
    for _ in range(steps):
        network.zero_grad()
        network(batch()).sum().backward()
        ebqm.step()


def skipped(network: Network) -> set[int]:
    return {i for i, layer in enumerate(network.layers) if layer.skipped}


class Operations(TorchDispatchMode):
    """The names of all tensor operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
