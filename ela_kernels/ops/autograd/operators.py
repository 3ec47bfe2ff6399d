"""What the operations share that are registered with PyTorch as operators, for torch.compile and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.torch_internals import constant_in_graphs, is_exporting_to_onnx

library = torch.library.Library("ela_kernels", "FRAGMENT")
"""What all operators of this package are registered with."""


def given_or_zero(found: Tensor | None, out: Tensor) -> Tensor:
    """An op may not return None or another layout than it promised."""
    if found is None:
        return out.zero_()
    return found if found.stride() == out.stride() else out.copy_(found)


@constant_in_graphs
def runs_elsewhere() -> bool:
    """Whether a graph is made for a runtime that knows no operators of this package."""
    return is_exporting_to_onnx()
