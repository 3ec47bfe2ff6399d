"""Attention over depth at every position, as in attention residuals."""

from ela_kernels.ops.position_attention.history import PositionHistory
from ela_kernels.ops.position_attention.interface import (
    PositionAttentionOutput,
    position_attention,
)

__all__ = ["PositionAttentionOutput", "PositionHistory", "position_attention"]
