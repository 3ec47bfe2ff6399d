"""Whether PyTorch has to see a call: a kernel reads the memory of its tensors, and leaves out what is beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.torch_internals import dispatch_modes, is_transformed

__all__ = [
    "DECIDED",
    "EMPTY",
    "OTHER_SHAPE",
    "TRACED",
    "UNLINKED",
    "is_transformed",
    "needs_dispatcher",
]

# Why no kernel serves a call, where that is expected, or told in another place.
TRACED = "PyTorch has to see every operation here (torch.compile, a fake tensor, a subclass or a dispatch mode)"
EMPTY = "the input is empty"
DECIDED = "which layers retrieve is data here, in a graph that is being compiled"
UNLINKED = "a layer before it in the history ran without kernels, and gathers no gradients"
OTHER_SHAPE = "prev_out has another shape than x"


def needs_dispatcher(q: Tensor) -> bool:
    """True where a call has to be seen by PyTorch: tracing, fake tensors, subclasses, dispatch modes."""
    return torch.compiler.is_compiling() or type(q) not in PLAIN_TENSORS or dispatch_modes() > 0
