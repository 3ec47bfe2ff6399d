"""A layer's place in its history, as its autograd node keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.types import Contribution
from ela_kernels.ops.autograd.gradients import check_unchanged
from ela_kernels.ops.autograd.record import Record, refuse_other_kernels
from ela_kernels.ops.layer_attention.snapshot import Pairs


class Link(NamedTuple):
    """One layer's place in its history: its path, its own number last, and the pairs that it retrieves from.

    Attributes:
        keys, values: up to the layer's own; of a whole layer, which makes its own, those before it.
        before: the pairs before a whole layer, which stand for `keys` and `values`.
        held: the dtype that the history holds values in, where it is not that of the layer.
        tolerance: retrievals of a smaller weight are left out.
    """

    path: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: int
    scale: float
    channels_last: bool
    backend: KernelBackend
    record: Record
    before: Pairs | None = None
    held: torch.dtype | None = None
    tolerance: float = 0.0


def keep(ctx: Any, link: Link) -> None:
    # Not the link itself: ctx outlives the backward, and would keep all values alive with it.
    ctx.set_materialize_grads(False)
    ctx.path, ctx.heads, ctx.scale = link.path, link.heads, link.scale
    ctx.tolerance = link.tolerance
    ctx.channels_last, ctx.backend, ctx.record = link.channels_last, link.backend, link.record


def contributions(ctx: Any) -> list[Any]:
    """What those left so far that retrieved the layer that `ctx` belongs to, in order of depth."""
    found: list[Contribution] = ctx.record.contributions(ctx.path)
    for left in found:
        if type(left) is not ctx.backend.contributes:
            refuse_other_kernels()
        check_unchanged(left.dout, left.dout_version)
    return found
