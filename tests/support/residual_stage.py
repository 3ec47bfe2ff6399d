"""Layers on one history, each as a residual, and which form of a call served each."""

from __future__ import annotations

import torch
from torch import nn

import ela_kernels as ek
from ela_kernels.explaining import Explanation


class Stage(nn.Module):
    """Layers on one history, each as a residual."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        history = ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history) if isinstance(layer, ek.ELA) else x + layer(x, history)
        return x


def x_like(dim: int = 12, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, dim, 5, 6, dtype=dtype)


def forms(found: Explanation) -> list[str]:
    return [f"{e.backend} {e.form}" for e in found]
