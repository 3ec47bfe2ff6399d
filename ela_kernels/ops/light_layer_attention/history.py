"""What a stage of light layers keeps: the output of the layer before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ela_kernels.ops.autograd.record import graph_task, is_recomputing
from ela_kernels.ops.traced import Traced


class PreviousOutput(Traced):
    """What a light layer needs of the one before: its output, or the stage's input for the first."""

    def __init__(self) -> None:
        self._out: Tensor | None = None
        # None without gradients: what no backward asks for is not kept alive.
        self._found_by: dict[nn.Module, Tensor | None] = {}
        self._made_in = graph_task()

    def find(self, layer: nn.Module, x: Tensor) -> Tensor:
        """For `layer`: what it found in the forward pass, also when a checkpoint recomputes it later.

        Raises:
            RuntimeError: reentrant checkpointing.
        """
        if not self._recomputing():
            found = x if self._out is None else self._out
            self._found_by[layer] = found if torch.is_grad_enabled() else None
            return found
        kept = self._found_by.get(layer)
        if kept is None:
            raise RuntimeError(
                "PreviousOutput: got reentrant checkpointing, which would lose the gradients between layers; allowed "
                "is torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        return kept

    def leave(self, out: Tensor) -> None:
        if not self._recomputing():
            self._out = out

    def _recomputing(self) -> bool:
        return is_recomputing(self._made_in)
