"""The glue to the compiled CPU kernels: layouts, allocation and calls. Arguments are checked already."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.cpp.addresses import maps, row, rows
from ela_kernels.backends.extension import extension
from ela_kernels.backends.layout import (
    MapView,
    accumulate_dtype,
    dense,
    empty_map,
    in_form,
    is_interleaved,
    kernel_sizes,
    new_row,
    readable_view,
    resolved,
)
from ela_kernels.backends.memory import address
from ela_kernels.backends.types import Gradients, Saved
from ela_kernels.torch_internals import version_of

Sizes = tuple[int, int, int, int, int]

# Waking a second thread takes longer than the work on fewer elements than these.
_ONE_THREAD_ELEMENTS = 16 * 1024

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
# Of layers in float32 and the values that a history holds, where their dtypes differ.
_HELD_CODES = {torch.bfloat16: 4, torch.float16: 5}
NO_MAP: MapView = (0, 0, 0)


def value_type(dtype: torch.dtype, held: torch.dtype) -> int:
    """As the extension takes the dtypes of layers and of the values that they read."""
    if held is dtype:
        return DTYPE_CODES[dtype]
    if dtype is not torch.float32 or held not in _HELD_CODES:
        raise TypeError(
            f"values: got {held} for layers in {dtype}; allowed is their dtype, or half precision for float32"
        )
    return _HELD_CODES[held]


def kernels() -> Any:
    module = extension()
    if module is None:
        raise RuntimeError(
            "the compiled kernels are not available: see `python -m ela_kernels info`"
        )
    return module


@functools.lru_cache(maxsize=1024)
def aggregate_workspace(sizes: Sizes, sources: int) -> int:
    return int(kernels().aggregate_workspace(sizes=sizes, sources=sources))


@functools.lru_cache(maxsize=1024)
def backward_workspace(sizes: Sizes, depth: int) -> int:
    return int(kernels().backward_workspace(sizes=sizes, depth=depth))


def new_workspace(elements: int, dtype: torch.dtype) -> Tensor | None:
    return torch.empty(elements, dtype=dtype, device="cpu") if elements else None


_has_woken_threads = _threads_are_lost = False


def thread_count(elements: int) -> int:
    global _has_woken_threads
    if elements <= _ONE_THREAD_ELEMENTS or _threads_are_lost:
        return 1
    count = torch.get_num_threads()
    if count > 1:
        _has_woken_threads = True
    return count


def _forked() -> None:
    """A fork copies what OpenMP knows of its threads, but not the threads: the child would wait for them for ever."""
    global _threads_are_lost
    _threads_are_lost = _has_woken_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def new_map(
    like: Tensor, sizes: Sizes, channels_last: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, MapView]:
    _, channels, _, positions, interleaved = sizes
    new = empty_map(like, channels_last, bool(interleaved), dtype)
    inner = channels if interleaved else positions
    return new, (address(new), channels * positions, inner)


def _new(dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="cpu")


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
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
    out, out_view = new_map(last, sizes, channels_last, q.dtype)
    weights = _new(accumulate, sizes[0], heads, depth)
    prev_weights = dense(prev_weights)
    kl = None if prev_weights is None else _new(accumulate, sizes[0], heads)
    workspace = new_workspace(aggregate_workspace(sizes, depth), accumulate)
    extension = kernels()
    attention = extension.attention(
        scale=scale,
        query=query,
        query_stride=query_stride,
        keys=key_addresses,
        key_strides=key_strides,
        values=value_addresses,
        value_strides=value_strides,
        prev=address(prev_weights, "prev_weights"),
        prev_depth=0 if prev_weights is None else prev_weights.shape[2],
        weights=address(weights),
        tolerance=tolerance,
    )
    extension.forward(
        value_type(q.dtype, last.dtype),
        sizes=sizes,
        attention=attention,
        kl=address(kl),
        out=out_view,
        workspace=address(workspace),
        threads=thread_count(last.numel() * depth),
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
    weights = _new(accumulate, q.shape[0], heads, len(keys))
    prev_weights = dense(prev_weights)
    kl = None if prev_weights is None else _new(accumulate, q.shape[0], heads)
    extension = kernels()
    attention = extension.attention(
        scale=scale,
        query=query,
        query_stride=query_stride,
        keys=key_addresses,
        key_strides=key_strides,
        values=[],
        value_strides=[],
        prev=address(prev_weights, "prev_weights"),
        prev_depth=0 if prev_weights is None else prev_weights.shape[2],
        weights=address(weights),
        tolerance=0.0,
    )
    extension.weights(
        DTYPE_CODES[q.dtype],
        sizes=(*q.shape, heads, 1, 0),
        attention=attention,
        kl=address(kl),
        threads=thread_count(q.numel() * len(keys)),
    )
    del query_copy, key_copies
    return weights, kl


def attend_backward(
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
    q, keys, values, heads, scale, prev_weights, weights, channels_last, tolerance = saved
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
            pairs = [
                new_map(last, sizes, channels_last, q.dtype) if n else None for n in need_values
            ]
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
    workspace = new_workspace(backward_workspace(sizes, depth), weights.dtype)
    extension = kernels()
    attention = extension.attention(
        scale=scale,
        query=query,
        query_stride=query_stride,
        keys=key_addresses,
        key_strides=key_strides,
        values=value_addresses,
        value_strides=value_strides,
        prev=address(prev_weights, "prev_weights"),
        prev_depth=0 if prev_weights is None else prev_weights.shape[2],
        weights=address(weights, "weights"),
        tolerance=tolerance,
    )
    extension.backward(
        value_type(q.dtype, last.dtype),
        sizes=sizes,
        attention=attention,
        dout=dout_view,
        dweights=address(dweights, "gradient of the weights"),
        dkl=address(dkl, "gradient of kl"),
        dscores=address(dscores),
        dquery=address(dq),
        dkeys=[address(d) for d in dkeys] if any(need_keys) else [],
        dprev=address(dprev),
        dvalues=dvalue_addresses,
        dvalue_strides=dvalue_strides,
        workspace=address(workspace),
        threads=thread_count(last.numel() * depth),
    )
    del query_copy, key_copies, copies
    return Gradients(dscores, dq, dprev, dkeys, dvalues)


class CppContribution:
    """What one layer's backward leaves for the layers that it retrieved from, and the addresses that they will need.

    The tensors live as long as this does, so addresses stay true.
    """

    __slots__ = (
        "dout",
        "dout_version",
        "dscores",
        "interleaved",
        "packed",
        "q",
        "tolerance",
        "weights",
    )

    def __init__(
        self,
        q: Tensor,
        weights: Tensor,
        dscores: Tensor,
        dout: Tensor | None,
        channels_last: bool,
        tolerance: float = 0.0,
    ) -> None:
        self.weights, self.dscores, self.dout = weights, dscores, dout
        self.tolerance = tolerance
        self.dout_version, self.interleaved = 0, None
        where, stride, self.q = row(q)
        view = None
        if dout is not None:
            self.dout_version = version_of(dout)
            self.interleaved = is_interleaved(dout, channels_last)
            view = readable_view(dout, channels_last, self.interleaved, "gradient of the output")
            # Without an address it would count as a gradient that did not arrive. An empty one is of every form.
            assert view is not None or not dout.numel()
        self.packed: bytes = kernels().source(
            query=where,
            query_stride=stride,
            scores=address(dscores),
            depth=weights.shape[2],
            dout=view or NO_MAP,
            weights=address(weights),
            tolerance=tolerance,
        )


def packed_sources(
    contributions: Sequence[CppContribution], channels_last: bool, interleaved: bool | None
) -> tuple[bytes, list[CppContribution]]:
    """`contributions` as the extension takes it, output gradients in the given form; and what must live until then.

    None: in any, where they are not read.
    """
    if interleaved is None:
        return b"".join([r.packed for r in contributions]), []
    alike = [r.packed for r in contributions if r.interleaved is interleaved or r.dout is None]
    if len(alike) == len(contributions):
        return b"".join(alike), []
    copies = []
    for r in contributions:
        dout = None if r.dout is None else in_form(r.dout, channels_last, interleaved)
        copies.append(CppContribution(r.q, r.weights, r.dscores, dout, channels_last, r.tolerance))
    return b"".join([c.packed for c in copies]), copies


def gather(
    contributions: Sequence[CppContribution],
    index: int,
    heads: int,
    channels_last: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer at `index`, each a sum over the layers that retrieved it.

    `dk = sum_m dscores_m[..., index] * q_m` and `dv = sum_m weights_m[..., index] * dout_m`.
    """
    q = contributions[0].q
    like = next((r.dout for r in contributions if r.dout is not None), None)
    need_value = need_value and like is not None
    if not need_key and not need_value:
        return None, None
    dkey = new_row(q) if need_key else None
    sizes: Sizes = (*q.shape, heads, 1, 0)
    dvalue, dvalue_view, workspace, elements, interleaved = None, NO_MAP, None, q.numel(), None
    if need_value:
        assert like is not None
        interleaved = is_interleaved(like, channels_last)
        sizes = kernel_sizes(like, heads, channels_last, interleaved)
        dvalue, dvalue_view = new_map(like, sizes, channels_last, q.dtype)
        accumulate = contributions[0].weights.dtype
        workspace = new_workspace(aggregate_workspace(sizes, len(contributions)), accumulate)
        elements = dvalue.numel()
    sources, keeps = packed_sources(contributions, channels_last, interleaved)
    kernels().gather(
        DTYPE_CODES[q.dtype],
        sizes=sizes,
        sources=sources,
        index=index,
        dkey=address(dkey),
        dvalue=dvalue_view,
        workspace=address(workspace),
        threads=thread_count(elements * len(contributions)),
    )
    del keeps
    return dkey, dvalue
