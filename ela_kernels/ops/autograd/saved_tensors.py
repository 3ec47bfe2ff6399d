"""What is saved for a backward, where hooks may pack it: a kernel reads memory, and must find there what was saved."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.layout import in_form, is_interleaved, resolved
from ela_kernels.torch_internals import top_saved_tensors_hooks as _top_hooks


class _AsSaved(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    interleaved: bool


def may_have_hooks() -> bool:
    """Whether what is saved here may be packed by somebody."""
    return _top_hooks is None or _top_hooks(True) is not None


def _same(tensor: Tensor) -> Tensor:
    return tensor


def past_hooks() -> AbstractContextManager[object]:
    """Where saved tensors are kept as they are, also in a checkpoint: for small ones that no backward may ask for.

    A checkpoint's hooks know what it was called with, a history as a rule. Where they stay in a node that no backward
    reaches, and whose output the history holds, both would stay for ever.
    """
    if torch.compiler.is_compiling() or _top_hooks is None or _top_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """As `ctx.save_for_backward`; where hooks are set, with what :func:`unpacked` needs to check them."""
    ctx.save_for_backward(*tensors)
    ctx.as_saved = None
    if may_have_hooks():
        ctx.as_saved = [
            None
            if t is None
            else _AsSaved(t.shape, t.dtype, t.device, t.dim() == 4 and is_interleaved(t, False))
            for t in tensors
        ]


def unpacked(ctx: Any) -> tuple[Any, ...]:
    """What :func:`save` saved.

    Raises:
        RuntimeError: a hook gave back a tensor of another shape, dtype or device.
    """
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if ctx.as_saved is None:
        return tensors
    return tuple(
        None if t is None else _checked(t, a) for t, a in zip(tensors, ctx.as_saved, strict=True)
    )


def _checked(tensor: Tensor, a: _AsSaved) -> Tensor:
    if tensor.shape != a.shape or tensor.dtype != a.dtype or tensor.device != a.device:
        raise RuntimeError(
            f"saved_tensors_hooks: got {list(tensor.shape)}, {tensor.dtype} on {tensor.device} from an unpack hook; "
            f"allowed is what was saved, {list(a.shape)}, {a.dtype} on {a.device}. Convert it back in the hook"
        )
    tensor = resolved(tensor)
    # In the memory format that it had, as the others have it beside which it is read.
    return in_form(tensor, False, a.interleaved) if tensor.dim() == 4 else tensor.contiguous()
