"""What the two GPU backends share: tables of tensors that lie alike, what they make, and what they look at before.

A GPU kernel takes its tensors' addresses by value, and one set of strides for all of a list. Nearly always the maps of
a history lie alike; those that do not are copied into compact ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.checks import check_norm_sizes, check_sizes
from ela_kernels.backends.layout import MapView, empty_map, is_interleaved, new_row, view_in_form
from ela_kernels.backends.memory import address, check_list_readable, check_readable
from ela_kernels.backends.types import Filters, Gradients, MixGradients, NormAct, Saved
from ela_kernels.torch_internals import version_of

Sizes = tuple[int, int, int, int, int]
"""B, C, G, N, interleaved."""

Strides = tuple[int, int]
"""Batch stride, and channel stride (planar) or position stride (interleaved), in elements."""


def alike_rows(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], int]:
    """Queries or keys `[B, C]` with contiguous channels and one batch stride; copies where they have not."""
    check_list_readable(tensors[0].get_device(), "queries or keys", tensors)
    batch, channel = tensors[0].stride()
    if (channel == 1 or tensors[0].shape[1] == 1) and _same_strides(tensors):
        return tensors, batch
    return [t.contiguous() for t in tensors], tensors[0].shape[1]


def alike_maps(
    tensors: Sequence[Tensor], channels_last: bool, interleaved: bool
) -> tuple[Sequence[Tensor], Strides]:
    """Feature maps of one shape in the given form with one set of strides; compact copies where they have not."""
    check_list_readable(tensors[0].get_device(), "maps", tensors)
    first = view_in_form(tensors[0], channels_last, interleaved)
    if first is not None and _same_strides(tensors):
        return tensors, first[1:]
    value = tensors[0]
    channels = value.shape[-1 if channels_last else 1]
    per_sample = value.numel() // value.shape[0] if value.shape[0] else 0
    compact = (per_sample, channels if interleaved else per_sample // max(channels, 1))
    return [_compact(t, channels_last, interleaved, compact) for t in tensors], compact


def _compact(tensor: Tensor, channels_last: bool, interleaved: bool, strides: Strides) -> Tensor:
    view = view_in_form(tensor, channels_last, interleaved)
    if view is not None and view[1:] == strides:
        return tensor
    return empty_map(tensor, channels_last, interleaved).copy_(tensor)


def map_view(tensor: Tensor, channels_last: bool, interleaved: bool) -> tuple[Tensor, MapView]:
    """One map with its address and strides, copied if it is not in the given form."""
    (tensor,), strides = alike_maps((tensor,), channels_last, interleaved)
    return tensor, (address(tensor, "a map"), *strides)


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


def mix_gradients(
    weights: Tensor, like: Tensor, channels_last: bool, need_values: Sequence[bool]
) -> MixGradients:
    """What the backward of a mix by contiguous `weights` writes, unwritten."""
    interleaved = is_interleaved(like, channels_last)
    return MixGradients(
        torch.empty_like(weights),
        [empty_map(like, channels_last, interleaved) if need else None for need in need_values],
    )


def _same_strides(tensors: Sequence[Tensor]) -> bool:
    strides = tensors[0].stride()
    for tensor in tensors:  # noqa: SIM110 - all() over a generator takes twice as long
        if tensor.stride() != strides:
            return False
    return True


_SAVED_NAMES = (
    "q",
    "keys",
    "values",
    "weights",
    "prev_weights",
    "gradient of out",
    "gradient of the weights",
    "gradient of kl",
)


def check_inputs(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], prev_weights: Tensor | None
) -> None:
    """Refuse what kernels on the device of `q` cannot read; one of each list, whose others are compared with it."""
    given = (q, keys[0], values[0] if values else None, None, prev_weights)
    check_readable(q.get_device(), _SAVED_NAMES[:5], given)


def check_saved(
    saved: Saved, dout: Tensor | None, dweights: Tensor | None, dkl: Tensor | None
) -> None:
    """As :func:`check_inputs`, of what a backward is given."""
    q, keys, values, _, _, prev_weights, weights, *_ = saved
    given = (q, keys[0], values[0], weights, prev_weights, dout, dweights, dkl)
    check_readable(q.get_device(), _SAVED_NAMES, given)


_PRODUCER_NAMES = (
    "x",
    "Wq",
    "Wk",
    "Wv",
    "mean of x",
    "gradient of the query",
    "gradient of the key",
    "gradient of the value",
    "gradient of the output",
)


def check_produced(
    x: Tensor,
    filters: Filters,
    mean: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """As :func:`check_inputs`, of a layer's input and filters, and of what arrives for their backward."""
    given = (x, *filters, mean, dq, dk, dv, residual)
    check_readable(x.get_device(), _PRODUCER_NAMES, given)
    check_sizes(x.shape[1], filters)


_NORM_NAMES = (
    "o",
    "x or the gradient of the output",
    "statistics",
    "gamma of the norm",
    "beta of the norm",
    "mask",
    "gradient of o",
)


def check_norm(
    o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct, also: Tensor | None = None
) -> None:
    """As :func:`check_inputs`, of a block's end."""
    given = (o, x, statistics, norm.gamma, norm.beta, norm.mask, also)
    check_readable(o.get_device(), _NORM_NAMES, given)
    check_norm_sizes(o.shape[1], norm)


class GpuContribution:
    """What one layer's backward leaves for the layers that it retrieved from.

    `weights` and `dscores` are `[B, G, t]`; of a layer at `index` their column `[..., index]` is wanted.
    """

    __slots__ = ("dout", "dout_version", "dscores", "q", "tolerance", "weights")

    def __init__(
        self,
        q: Tensor,
        weights: Tensor,
        dscores: Tensor,
        dout: Tensor | None,
        channels_last: bool,
        tolerance: float = 0.0,
    ) -> None:
        self.tolerance = tolerance
        self.q, self.weights, self.dscores, self.dout = q, weights, dscores, dout
        self.dout_version = 0 if dout is None else version_of(dout)


class ProducerGradients(NamedTuple):
    """Of a layer's input and filters; None where none was asked for."""

    x: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    wv: Tensor | None
