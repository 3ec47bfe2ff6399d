"""What is saved for a backward, where hooks may pack it: a kernel reads memory, and must find there what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.layout import in_form, is_interleaved, resolved, with_one_more
from ela_kernels.ops.layer_attention.snapshot import Pairs
from ela_kernels.torch_internals import keeps_graph as _keeps_graph
from ela_kernels.torch_internals import top_saved_tensors_hooks as _top_hooks

if TYPE_CHECKING:
    from ela_kernels.ops.layer_attention.record import Link


class _AsSaved(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    interleaved: bool


def _may_have_hooks() -> bool:
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
    if _may_have_hooks():
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


def save_with_pairs(
    ctx: Any, link: Link, key: Tensor, value: Tensor, *tensors: Tensor | None
) -> None:
    """Save a whole layer's `tensors`, and the keys and values up to its own, for :func:`unpacked_with_pairs`.

    Those before it are kept as the history holds them, and autograd's work is done for them: looking at their versions,
    and letting go of them once they have served. It would take them one by one, 2T at every layer. But hooks on saved
    tensors, as checkpoints and offloading set them, have to see them.
    """
    before = link.before
    ctx.count = len(tensors)
    ctx.holds = before is not None and _keeps_graph is not None and not _may_have_hooks()
    if ctx.holds:
        # In a list, to let go of them also where another object stands in for ctx, as in compiled autograd.
        ctx.before = [before]
        save(ctx, *tensors, key, value)
    else:
        save(ctx, *tensors, *link.keys, key, *link.values, value)


def unpacked_with_pairs(
    ctx: Any,
) -> tuple[Sequence[Any], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What :func:`save_with_pairs` was given: the tensors, all keys, all values.

    Raises:
        RuntimeError: as :func:`unpacked`, and what autograd raises for tensors that it saved itself: one of them was
            changed in place, or is freed.
    """
    found = unpacked(ctx)
    tensors, maps = found[: ctx.count], found[ctx.count :]
    if not ctx.holds:
        depth = len(maps) // 2
        return tensors, maps[:depth], maps[depth:]
    if not ctx.before:
        raise RuntimeError(
            "LayerHistory: a second backward through a layer whose keys and values are freed; allowed is "
            "retain_graph=True in the first"
        )
    before: Pairs = ctx.before[0]
    changed = before.changed()
    if changed is not None:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: the key "
            f"or value of layer {changed} of a LayerHistory"
        )
    return tensors, with_one_more(before.keys, maps[0]), with_one_more(before.values, maps[1])


def release_pairs(ctx: Any) -> None:
    """Let go of the keys and values before the layer, unless the graph is retained."""
    if ctx.holds and _keeps_graph is not None and not _keeps_graph():
        ctx.before.clear()
