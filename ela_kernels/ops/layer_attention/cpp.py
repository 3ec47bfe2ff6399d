"""The glue to the compiled CPU kernels: layouts, allocation and calls. Arguments are checked already."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.extension import extension
from ela_kernels.ops.layer_attention.addresses import maps, row, rows
from ela_kernels.ops.layer_attention.kernels import (
    Gradients,
    Saved,
    address,
    dense,
    new_row,
    resolved,
)
from ela_kernels.ops.layer_attention.layout import (
    MapView,
    empty_map,
    is_interleaved,
    kernel_sizes,
    view_in_form,
)
from ela_kernels.ops.layer_attention.reference import accumulate_dtype

Sizes = tuple[int, int, int, int, int]

# Waking a second thread takes longer than the work on fewer elements than these.
_ONE_THREAD_ELEMENTS = 16 * 1024

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
NO_MAP: MapView = (0, 0, 0)


def kernels() -> Any:
    module = extension()
    if module is None:
        raise RuntimeError(
            "the compiled kernels are not available: see `python -m ela_kernels info`"
        )
    return module


@functools.lru_cache(maxsize=1024)
def _aggregate_workspace(sizes: Sizes, sources: int) -> int:
    return int(kernels().aggregate_workspace(sizes, sources))


@functools.lru_cache(maxsize=1024)
def _backward_workspace(sizes: Sizes, depth: int) -> int:
    return int(kernels().backward_workspace(sizes, depth))


def _workspace(elements: int, dtype: torch.dtype) -> Tensor | None:
    return torch.empty(elements, dtype=dtype) if elements else None


def thread_count(elements: int) -> int:
    return torch.get_num_threads() if elements > _ONE_THREAD_ELEMENTS else 1


def new_map(like: Tensor, sizes: Sizes, channels_last: bool) -> tuple[Tensor, MapView]:
    _, channels, _, positions, interleaved = sizes
    new = empty_map(like, channels_last, bool(interleaved))
    inner = channels if interleaved else positions
    return new, (new.data_ptr(), channels * positions, inner)


def forward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` in one call of the extension."""
    last = values[-1]
    depth = len(values)
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    accumulate = accumulate_dtype(q.dtype)
    query, query_stride, query_copy = row(q)
    key_addresses, key_strides, key_copies = rows(keys)
    value_addresses, value_strides, value_copies = maps(values, channels_last, interleaved)
    out, out_view = new_map(last, sizes, channels_last)
    weights = torch.empty((sizes[0], heads, depth), dtype=accumulate)
    prev_weights = dense(prev_weights)
    kl = None if prev_weights is None else torch.empty((sizes[0], heads), dtype=accumulate)
    workspace = _workspace(_aggregate_workspace(sizes, depth), accumulate)
    kernels().forward(
        DTYPE_CODES[q.dtype],
        sizes,
        scale,
        query,
        query_stride,
        key_addresses,
        key_strides,
        value_addresses,
        value_strides,
        address(prev_weights),
        0 if prev_weights is None else prev_weights.shape[2],
        weights.data_ptr(),
        address(kl),
        out_view,
        address(workspace),
        thread_count(last.numel() * depth),
    )
    del query_copy, key_copies, value_copies
    return out, weights, kl


def weights(
    q: Tensor, keys: Sequence[Tensor], heads: int, scale: float, prev_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(weights, kl)`; no value is read."""
    accumulate = accumulate_dtype(q.dtype)
    q, keys = resolved(q), [resolved(k) for k in keys]
    query, query_stride, query_copy = row(q)
    key_addresses, key_strides, key_copies = rows(keys)
    weights = torch.empty((q.shape[0], heads, len(keys)), dtype=accumulate)
    prev_weights = dense(prev_weights)
    kl = None if prev_weights is None else torch.empty((q.shape[0], heads), dtype=accumulate)
    kernels().weights(
        DTYPE_CODES[q.dtype],
        (*q.shape, heads, 1, 0),
        scale,
        query,
        query_stride,
        key_addresses,
        key_strides,
        address(prev_weights),
        0 if prev_weights is None else prev_weights.shape[2],
        weights.data_ptr(),
        address(kl),
        thread_count(q.numel() * len(keys)),
    )
    del query_copy, key_copies
    return weights, kl


def backward(
    saved: Saved,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    need_q: bool,
    need_prev: bool,
    need_keys: Sequence[bool] = (),
    need_values: Sequence[bool] = (),
) -> Gradients:
    """Gradients of scores, query and previous weights, and in the push form of every key and value."""
    q, keys, values, heads, scale, prev_weights, weights, channels_last = saved
    last = values[-1]
    depth = len(values)
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    query, query_stride, query_copy = row(q)
    key_addresses, key_strides, key_copies = rows(keys)
    value_addresses: list[int] = []
    value_strides: list[int] = []
    copies: list[Tensor] = []
    dout_view = NO_MAP
    dvalues: list[Tensor | None] = [None] * depth
    dvalue_addresses: list[int] = []
    dvalue_strides: list[int] = []
    if dout is not None:
        dout = resolved(dout)
        (dout_address,), (dout_batch, dout_inner), copies = maps(
            (dout,), channels_last, interleaved
        )
        dout_view = dout_address, dout_batch, dout_inner
        value_addresses, value_strides, value_copies = maps(values, channels_last, interleaved)
        copies += value_copies
        if any(need_values):
            pairs = [new_map(last, sizes, channels_last) if n else None for n in need_values]
            dvalues = [None if p is None else p[0] for p in pairs]
            if last.numel():  # an empty map has no address, and needs no kernel
                dvalue_addresses = [0 if p is None else p[1][0] for p in pairs]
                dvalue_strides = [*next(p[1][1:] for p in pairs if p is not None)]
    dkeys = [new_row(q) if n else None for n in need_keys]
    dq = new_row(q) if need_q else None
    dscores = torch.empty_like(weights)
    dweights, dkl, prev_weights = dense(dweights), dense(dkl), dense(prev_weights)
    dprev = None
    if need_prev and dkl is not None and prev_weights is not None:
        dprev = torch.empty_like(prev_weights)
    workspace = _workspace(_backward_workspace(sizes, depth), weights.dtype)
    kernels().backward(
        DTYPE_CODES[q.dtype],
        sizes,
        scale,
        query,
        query_stride,
        key_addresses,
        key_strides,
        value_addresses,
        value_strides,
        address(prev_weights),
        0 if prev_weights is None else prev_weights.shape[2],
        weights.data_ptr(),
        dout_view,
        address(dweights),
        address(dkl),
        dscores.data_ptr(),
        address(dq),
        [address(d) for d in dkeys] if any(need_keys) else [],
        address(dprev),
        dvalue_addresses,
        dvalue_strides,
        address(workspace),
        thread_count(last.numel() * depth),
    )
    del query_copy, key_copies, copies
    return Gradients(dscores, dq, dprev, dkeys, dvalues)


class Retrieved:
    """What one layer's backward leaves for the layers that it retrieved from, with the addresses that they will need.

    `dout` must be in the form of the values already. The tensors live as long as this does, so addresses stay true.
    """

    __slots__ = (
        "depth",
        "dout",
        "dout_version",
        "dout_view",
        "dscores",
        "interleaved",
        "q",
        "query",
        "weights",
    )

    def __init__(
        self, q: Tensor, weights: Tensor, dscores: Tensor, dout: Tensor | None, channels_last: bool
    ) -> None:
        self.q, self.dout = q, dout
        self.depth = weights.shape[2]
        self.weights, self.dscores = (weights, weights.data_ptr()), (dscores, dscores.data_ptr())
        self.query = row(q)
        self.dout_view, self.dout_version, self.interleaved = NO_MAP, 0, False
        if dout is not None:
            self.interleaved = is_interleaved(dout, channels_last)
            self.dout_view = view_in_form(dout, channels_last, self.interleaved) or NO_MAP
            self.dout_version = dout._version


def gather(
    retrieved: Sequence[Retrieved],
    index: int,
    heads: int,
    channels_last: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer at `index`, each a sum over the layers that retrieved it.

    `dk = sum_m dscores_m[..., index] * q_m` and `dv = sum_m weights_m[..., index] * dout_m`.
    """
    q = retrieved[0].q
    with_dout = [r for r in retrieved if r.dout is not None]
    need_value = need_value and bool(with_dout)
    if not need_key and not need_value:
        return None, None
    size = retrieved[0].weights[0].element_size()
    dkey = new_row(q) if need_key else None
    sizes: Sizes = (*q.shape, heads, 1, 0)
    douts: list[int] = []
    dout_strides: list[int] = []
    copies: list[Tensor] = []
    dvalue, dvalue_view, workspace, elements = None, NO_MAP, None, q.numel()
    if need_value:
        like = with_dout[0].dout
        assert like is not None
        interleaved = with_dout[0].interleaved
        sizes = kernel_sizes(like, heads, channels_last, interleaved)
        strides = with_dout[0].dout_view[1:]
        # The strides alone do not tell the form: with as many positions as channels they look alike.
        if all(r.dout_view[1:] == strides and r.interleaved == interleaved for r in with_dout):
            douts, dout_strides = [r.dout_view[0] for r in with_dout], [*strides]
        else:
            maps_given = [r.dout for r in with_dout if r.dout is not None]
            douts, dout_strides, copies = maps(maps_given, channels_last, interleaved)
        dvalue, dvalue_view = new_map(like, sizes, channels_last)
        accumulate = retrieved[0].weights[0].dtype
        workspace = _workspace(_aggregate_workspace(sizes, len(douts)), accumulate)
        elements = dvalue.numel()
    kernels().gather(
        DTYPE_CODES[q.dtype],
        sizes,
        [r.query[0] for r in retrieved],
        [r.query[1] for r in retrieved],
        [r.dscores[1] + index * size for r in retrieved],
        [r.depth for r in retrieved],
        address(dkey),
        douts,
        dout_strides,
        [r.weights[1] + index * size for r in with_dout],
        [r.depth for r in with_dout],
        dvalue_view,
        address(workspace),
        thread_count(elements * len(retrieved)),
    )
    del copies
    return dkey, dvalue
