"""What a whole layer saves for its backward of the pairs before it: as its history holds them, without hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ela_kernels.backends.layout import with_one_more
from ela_kernels.ops.autograd.saved_tensors import may_have_hooks, save, unpacked
from ela_kernels.ops.layer_attention.link import Link
from ela_kernels.ops.layer_attention.snapshot import Pairs
from ela_kernels.torch_internals import keeps_graph as _keeps_graph


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
    ctx.holds = before is not None and _keeps_graph is not None and not may_have_hooks()
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
