"""Exported programs that hold nothing but PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.reference import layer_attention_reference


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What the operators of an exported program are made of, for `ExportedProgram.run_decompositions`.

    `torch.export.export` keeps layer attention as one operator, `ela_kernels::layer_attention`: kernels serve it where
    there are some, and who loads the program has to `import ela_kernels` first. A program for a runtime without this
    package, or without Python, is decomposed. `torch.onnx.export(model, ..., dynamo=True)` of a model needs none of
    this: there the operator does not come up.

    Returns:
        A new table, operator to function. The function is :func:`ela_kernels.layer_attention` in eager PyTorch.

    Example:
        >>> import torch, ela_kernels as ek
        >>> from ela_kernels.integrations.export import decompositions
        >>> class Stage(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList(ek.ELA(32) for _ in range(2))
        ...     def forward(self, x):
        ...         history = ek.LayerHistory()
        ...         for layer in self.layers:
        ...             x = layer(x, history)
        ...         return x
        >>> program = torch.export.export(Stage().eval(), (torch.randn(2, 32, 8, 8),))
        >>> alone = program.run_decompositions(decompositions())
    """
    return {torch.ops.ela_kernels.layer_attention.default: _layer_attention}


def _layer_attention(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, weights, kl = layer_attention_reference(*args)
    return out, weights, weights.new_empty(0) if kl is None else kl
