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
    "UNGATHERED",
    "is_plain",
    "is_transformed",
    "needs_dispatcher",
    "waits_for_device",
]

# Why no kernel serves a call, where that is expected, or told in another place.
TRACED = "PyTorch has to see every operation here (torch.compile, a fake tensor, a subclass or a dispatch mode)"
EMPTY = "the input is empty"
DECIDED = "which layers retrieve is data here, in a graph that is being compiled"
UNGATHERED = (
    "nothing gathers the gradients of a pair in the history: its layer ran without kernels, or it asked for a gradient "
    "only afterwards"
)
OTHER_SHAPE = "prev_out has another shape than x"


def needs_dispatcher(q: Tensor) -> bool:
    """True where a call has to be seen by PyTorch: tracing, fake tensors, subclasses, dispatch modes."""
    return torch.compiler.is_compiling() or type(q) not in PLAIN_TENSORS or dispatch_modes() > 0


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no class of its own, and no mode looks on; asked of a fake one, what it stands for."""
    if type(tensor) not in PLAIN_TENSORS:
        return False
    return torch.compiler.is_compiling() or dispatch_modes() == 0


def waits_for_device(tensor: Tensor) -> bool:
    """Whether to read a number of `tensor` is to wait for a device, instead of looking into memory."""
    return not tensor.is_cpu
