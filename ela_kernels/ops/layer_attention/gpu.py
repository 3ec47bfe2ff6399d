"""What the two GPU backends share: tables of tensors that lie alike, and the order of a layer's backward launches.

A GPU kernel takes its tensors' addresses by value, and one set of strides for all of a list. Nearly always the maps of
a history lie alike; those that do not are copied into compact ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.kernels import Gradients, Saved, dense, new_row, resolved
from ela_kernels.ops.layer_attention.layer_kernels import Attended, Filters, LayerGradients
from ela_kernels.ops.layer_attention.layout import (
    MapView,
    empty_map,
    is_interleaved,
    view_in_form,
)

Sizes = tuple[int, int, int, int, int]
"""B, C, G, N, interleaved."""

Strides = tuple[int, int]
"""Batch stride, and channel stride (planar) or position stride (interleaved), in elements."""


def alike_rows(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    """Queries or keys `[B, C]` with contiguous channels and one batch stride; copies where they have not."""
    batch, channel = tensors[0].stride()
    if (channel == 1 or tensors[0].shape[1] == 1) and _same_strides(tensors):
        return with_memory(tensors), batch
    return with_memory([t.contiguous() for t in tensors]), tensors[0].shape[1]


def alike_maps(
    tensors: Sequence[Tensor], channels_last: bool, interleaved: bool
) -> tuple[Sequence[Tensor], Strides]:
    """Feature maps of one shape in the given form with one set of strides; compact copies where they have not."""
    first = view_in_form(tensors[0], channels_last, interleaved)
    if first is not None and _same_strides(tensors):
        return with_memory(tensors), first[1:]
    value = tensors[0]
    channels = value.shape[-1 if channels_last else 1]
    per_sample = value.numel() // value.shape[0] if value.shape[0] else 0
    compact = (per_sample, channels if interleaved else per_sample // max(channels, 1))
    copies = [_compact(t, channels_last, interleaved, compact) for t in tensors]
    return with_memory(copies), compact


def _compact(tensor: Tensor, channels_last: bool, interleaved: bool, strides: Strides) -> Tensor:
    view = view_in_form(tensor, channels_last, interleaved)
    if view is not None and view[1:] == strides:
        return tensor
    return empty_map(tensor, channels_last, interleaved).copy_(tensor)


def map_view(tensor: Tensor, channels_last: bool, interleaved: bool) -> tuple[Tensor, MapView]:
    """One map with its address and strides, copied if it is not in the given form."""
    (tensor,), strides = alike_maps((tensor,), channels_last, interleaved)
    return tensor, (tensor.data_ptr(), *strides)


def compact_strides(sizes: Sizes) -> Strides:
    """Those of a new map of `(B, C, G, N, interleaved)`."""
    _, channels, _, positions, interleaved = sizes
    return channels * positions, channels if interleaved else positions


def new_weights(q: Tensor, heads: int, depth: int) -> Tensor:
    """`[B, G, depth]`, unwritten."""
    return torch.empty((q.shape[0], heads, depth), dtype=torch.float32, device=q.device)


def new_divergence(q: Tensor, heads: int, prev_weights: Tensor | None) -> Tensor | None:
    """`[B, G]`, unwritten; None without previous weights."""
    if prev_weights is None:
        return None
    return torch.empty((q.shape[0], heads), dtype=torch.float32, device=q.device)


def new_gradients(
    saved: Saved,
    has_dout: bool,
    has_dkl: bool,
    need_q: bool,
    need_prev: bool,
    need_keys: Sequence[bool],
    need_values: Sequence[bool],
) -> Gradients:
    """Everything that a backward writes, unwritten."""
    q, last, prev = saved.q, saved.values[-1], saved.prev_weights
    interleaved = is_interleaved(last, saved.channels_last)
    dprev = None
    if need_prev and has_dkl and prev is not None:
        dprev = torch.empty_like(prev, memory_format=torch.contiguous_format)
    dvalues: list[Tensor | None] = [None] * len(saved.values)
    if has_dout and need_values:
        dvalues = [
            empty_map(last, saved.channels_last, interleaved) if need else None
            for need in need_values
        ]
    return Gradients(
        torch.empty_like(saved.weights),
        new_row(q) if need_q else None,
        dprev,
        [new_row(q) if need else None for need in need_keys],
        dvalues,
    )


def _same_strides(tensors: Sequence[Tensor]) -> bool:
    strides = tensors[0].stride()
    for tensor in tensors:  # noqa: SIM110 - all() over a generator takes twice as long
        if tensor.stride() != strides:
            return False
    return True


def with_memory(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`tensors`, after a look for those that have no memory to read."""
    for tensor in tensors:
        if tensor.data_ptr() == 0 and tensor.numel():
            raise ValueError(
                "got a tensor without memory of its own (fake, wrapped by torch.func, or a symbolic zero); the kernels "
                "read memory. Use ela_kernels.use_backend('eager') there"
            )
    return tensors


class Retrieved:
    """What one layer's backward leaves for the layers that it retrieved from.

    `weights` and `dscores` are `[B, G, t]`; of a layer at `index` their column `[..., index]` is wanted.
    """

    __slots__ = ("dout", "dout_version", "dscores", "q", "weights")

    def __init__(
        self, q: Tensor, weights: Tensor, dscores: Tensor, dout: Tensor | None, channels_last: bool
    ) -> None:
        self.q, self.weights, self.dscores, self.dout = q, weights, dscores, dout
        self.dout_version = 0 if dout is None else dout._version


class ProducerGradients(NamedTuple):
    """Of a layer's input and filters; None where none was asked for."""

    x: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    wv: Tensor | None


def layer_backward(
    backward: Callable[..., Gradients],
    gather: Callable[..., tuple[Tensor | None, Tensor | None]],
    produce_backward: Callable[..., ProducerGradients],
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    heads: int,
    index: int,
    own: Attended | None,
    retrieved: Sequence[Retrieved],
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: Sequence[bool],
    pending: None = None,
) -> LayerGradients:
    """All gradients of the layer at `index`: its attention's, the gathered ones of key and value, and those before.

    Args:
        backward, gather, produce_backward: a backend's own launches: the attention's backward, the gradients that the
            layers retrieving this one left, and what query, key and value send back.
        own: its attention, where a gradient arrived through it.
        retrieved: what the layers that retrieved this one left, this one included if it did.
        dk, dv: gradients of key and value from elsewhere, if there are any.
        residual: what arrives past the retrieval, added to the gradient of `x`.
        needs: of x, wq, wk, wv.
    """
    need_x, need_wq, need_wk, need_wv = needs
    dq = dprev = None
    if own is not None:
        found = backward(
            own.saved,
            own.dout,
            own.dweights,
            own.dkl,
            need_x or need_wq,
            own.need_prev,
            into=own.dscores,
        )
        dq, dprev = found.dq, found.dprev
    need_key, need_value = need_x or need_wk, need_x or need_wv
    if retrieved:
        more_dk, more_dv = gather(retrieved, index, heads, False, need_key, need_value)
        dk, dv = _sum(dk, more_dk), _sum(dv, more_dv)
    dk = dense(dk) if need_key else None
    dv = resolved(dv) if need_value and dv is not None else None
    produced = produce_backward(x, filters, mean, dq, dk, dv, residual, needs)
    return LayerGradients(*produced, dprev)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
