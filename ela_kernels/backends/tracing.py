"""Whether PyTorch has to see a call: a kernel reads the memory of its tensors, and leaves out what is beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ela_kernels.backends.memory import PLAIN_TENSORS

# Why no kernel serves a call that PyTorch has to see.
TRACED = "PyTorch has to see every operation here (torch.compile, a fake tensor, a subclass or a dispatch mode)"


def is_transformed() -> bool:
    """Whether PyTorch has to see every operation: `torch.func`, forward-mode derivatives, `torch.jit.trace`.

    A kernel reads the memory of its tensors, and would leave out what belongs to them beside it.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def needs_dispatcher(q: Tensor) -> bool:
    """True where a call has to be seen by PyTorch: tracing, fake tensors, subclasses, dispatch modes."""
    return (
        torch.compiler.is_compiling()
        or type(q) not in PLAIN_TENSORS
        or torch._C._len_torch_dispatch_stack() > 0
    )
