"""Small networks whose layers are analyzed, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.models import CifarResNet

C = 8


class Stage(nn.Module):
    """Layers on one history, whose weights and divergences it can keep."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, kept: list[Any] | None = None) -> Tensor:
        history = ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history) if isinstance(layer, ek.ELA) else x + layer(x, history)
            if kept is not None:
                kept.append((history.weights, history.kl))
        return x


def stage(kind: Callable[..., nn.Module] = ek.LayerAttention, count: int = 4) -> Stage:
    torch.manual_seed(3)
    return Stage(*(kind(C, 4) for _ in range(count))).double()


def maps(count: int = 3, sizes: tuple[int, ...] = (2, 3, 2)) -> list[Tensor]:
    torch.manual_seed(4)
    return [3 * torch.randn(n, C, 4, 4, dtype=torch.float64) for n in sizes[:count]]


def network(attention: str = "ela") -> CifarResNet:
    torch.manual_seed(5)
    return CifarResNet((3, 2), (8, 16), attention=attention, head_dim=4)


def images(count: int = 3) -> list[Tensor]:
    torch.manual_seed(6)
    return [torch.randn(3, 3, 12, 12) for _ in range(count)]
