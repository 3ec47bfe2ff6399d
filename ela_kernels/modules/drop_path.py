"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for whole samples in training, and scale the others so that the mean stays.

    Equivalent PyTorch: `x * torch.bernoulli(torch.full((B, 1, 1, 1), 1 - p)) / (1 - p)`.

    Args:
        p: probability of dropping, in [0, 1].

    Source:
        Stochastic depth (arXiv 1603.09382).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, (int, float)):
            raise TypeError(f"drop_path: got {type(p).__name__}; allowed is a float in [0, 1]")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"drop_path: got {p}; allowed is a float in [0, 1]")
        self.p = float(p)

    def mask(self, x: Tensor) -> Tensor | None:
        """What each sample of `x` is multiplied with, `[B, 1, ...]`, newly drawn; None where nothing is dropped."""
        if not self.training or self.p == 0.0:
            return None
        keep = 1.0 - self.p
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return mask if keep == 0.0 else mask.div_(keep)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        return x if mask is None else x * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"
