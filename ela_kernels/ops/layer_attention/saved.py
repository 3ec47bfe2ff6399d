"""What is saved for a backward, where hooks may pack it: a kernel reads memory, and must find there what was saved."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.kernels import resolved
from ela_kernels.ops.layer_attention.layout import in_form, is_interleaved


class _AsSaved(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    interleaved: bool


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """As `ctx.save_for_backward`; where hooks are set, with what :func:`unpacked` needs to check them."""
    ctx.save_for_backward(*tensors)
    ctx.as_saved = None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
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
