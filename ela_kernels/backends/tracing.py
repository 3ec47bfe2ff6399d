"""Whether PyTorch has to see a call: a kernel reads the memory of its tensors, and leaves out what is beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.torch_internals import dispatch_modes, is_transformed

__all__ = ["EMPTY", "TRACED", "is_transformed", "needs_dispatcher"]

# Why no kernel serves a call that PyTorch has to see, and one that there is nothing to do for.
TRACED = "PyTorch has to see every operation here (torch.compile, a fake tensor, a subclass or a dispatch mode)"
EMPTY = "the input is empty"


def needs_dispatcher(q: Tensor) -> bool:
    """True where a call has to be seen by PyTorch: tracing, fake tensors, subclasses, dispatch modes."""
    return torch.compiler.is_compiling() or type(q) not in PLAIN_TENSORS or dispatch_modes() > 0
