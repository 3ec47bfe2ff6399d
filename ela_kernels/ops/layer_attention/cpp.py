"""The glue to the compiled CPU kernels: layouts, allocation and addresses. Arguments are checked already."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.extension import extension
from ela_kernels.ops.layer_attention.layout import (
    empty_map,
    in_form,
    is_interleaved,
    kernel_sizes,
    view_in_form,
)
from ela_kernels.ops.layer_attention.reference import accumulate_dtype

Sizes = tuple[int, int, int, int, int]

_ONE_THREAD_ELEMENTS = 16 * 1024

_DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def _kernels() -> Any:
    module = extension()
    if module is None:
        raise RuntimeError(
            "the compiled kernels are not available: see `python -m ela_kernels info`"
        )
    return module


@functools.lru_cache(maxsize=1024)
def _aggregate_workspace(sizes: Sizes, sources: int) -> int:
    return int(_kernels().aggregate_workspace(sizes, sources))


@functools.lru_cache(maxsize=1024)
def _backward_workspace(sizes: Sizes, depth: int) -> int:
    return int(_kernels().backward_workspace(sizes, depth))


def _workspace(elements: int, dtype: torch.dtype) -> Tensor | None:
    return torch.empty(elements, dtype=dtype) if elements else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(elements: int) -> int:
    """As many as PyTorch uses; one where waking a second would take longer than the work itself."""
    return torch.get_num_threads() if elements > _ONE_THREAD_ELEMENTS else 1


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous, and with the signs in memory: PyTorch may hold a negation back as a flag."""
    return tensor.resolve_neg().contiguous()


def _readable(tensor: Tensor) -> Tensor:
    """A tensor whose memory says what it is worth."""
    if tensor.data_ptr() == 0 and tensor.numel():
        raise ValueError(
            "got a tensor without memory of its own (fake, wrapped by torch.func, or a symbolic zero); the compiled "
            "kernels read memory. Use ela_kernels.use_backend('eager') there"
        )
    return tensor.resolve_neg()


def _rows(tensors: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """The kernels' table of queries or keys `[B, C]`, and the copies that must live until the kernel has run."""
    table: list[int] = []
    copies = []
    for row in tensors:
        batch, channel = row.stride()
        if row.is_neg() or (channel != 1 and row.shape[1] != 1):
            row = _dense(row)
            copies.append(row)
            batch = row.stride(0)
        table += (row.data_ptr() or _readable(row).data_ptr(), batch)
    return table, copies


def _maps(
    maps: Sequence[Tensor], channels_last: bool, interleaved: bool
) -> tuple[list[int], list[Tensor]]:
    """The kernels' table of feature maps of one shape, and the copies that must live until the kernel has run."""
    table: list[int] = []
    copies = []
    known: tuple[int, ...] = ()
    inner = batch = 0
    for tensor in maps:
        strides = tensor.stride()
        if (
            strides != known or tensor.is_neg()
        ):  # usually all lie alike, and only the first is analysed
            given = tensor
            tensor = in_form(_readable(tensor), channels_last, interleaved)
            if tensor is not given:
                copies.append(tensor)
            view = view_in_form(tensor, channels_last, interleaved)
            assert view is not None  # in_form made it so
            _, batch, inner = view
            known = tensor.stride()
        table += (tensor.data_ptr() or _readable(tensor).data_ptr(), batch, inner)
    return table, copies


def layer_attention_forward_cpp(
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
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    accumulate = accumulate_dtype(q.dtype)
    depth = len(values)
    row_table, row_copies = _rows((q, *keys))
    table, copies = _maps(values, channels_last, interleaved)
    out = empty_map(last, channels_last, interleaved)
    weights = torch.empty((sizes[0], heads, depth), dtype=accumulate)
    kl = None
    prev_depth = 0
    if prev_weights is not None:
        prev_weights = _dense(prev_weights)
        prev_depth = prev_weights.shape[2]
        kl = torch.empty((sizes[0], heads), dtype=accumulate)
    workspace = _workspace(_aggregate_workspace(sizes, depth), accumulate)
    _kernels().forward(
        _DTYPE_CODES[q.dtype],
        sizes,
        scale,
        row_table[:2],
        row_table[2:],
        table,
        _address(prev_weights),
        prev_depth,
        weights.data_ptr(),
        _address(kl),
        view_in_form(out, channels_last, interleaved),
        _address(workspace),
        _threads(last.numel() * depth),
    )
    del copies, row_copies
    return out, weights, kl


def layer_attention_weights_cpp(
    q: Tensor, keys: Sequence[Tensor], heads: int, scale: float, prev_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(weights, kl)`; no value is read."""
    accumulate = accumulate_dtype(q.dtype)
    row_table, row_copies = _rows((q, *keys))
    weights = torch.empty((q.shape[0], heads, len(keys)), dtype=accumulate)
    kl = None
    if prev_weights is not None:
        prev_weights = _dense(prev_weights)
        kl = torch.empty((q.shape[0], heads), dtype=accumulate)
    _kernels().weights(
        _DTYPE_CODES[q.dtype],
        (*q.shape, heads, 1, 0),
        scale,
        row_table[:2],
        row_table[2:],
        _address(prev_weights),
        0 if prev_weights is None else prev_weights.shape[2],
        weights.data_ptr(),
        _address(kl),
        _threads(q.numel() * len(keys)),
    )
    del row_copies
    return weights, kl


class Saved(NamedTuple):
    """What the forward of one layer leaves to its backward."""

    q: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: int
    scale: float
    prev_weights: Tensor | None
    weights: Tensor
    channels_last: bool


class Gradients(NamedTuple):
    """Gradients of one layer; None where none was asked for. `dkeys` and `dvalues` only in the push form.

    `dscores` is that of the dot products before the scale, so that a key's gradient is a plain sum over layers.
    """

    dscores: Tensor
    dq: Tensor | None
    dprev: Tensor | None
    dkeys: list[Tensor | None]
    dvalues: list[Tensor | None]


def layer_attention_backward_cpp(
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
    depth = len(values)
    accumulate = weights.dtype
    interleaved = is_interleaved(values[-1], channels_last)
    sizes = kernel_sizes(values[-1], heads, channels_last, interleaved)
    row_table, row_copies = _rows((q, *keys))
    dout_table: list[int] = []
    value_table: list[int] = []
    dvalues: list[Tensor | None] = [None] * depth
    copies: list[Tensor] = []
    if dout is not None:
        dout_table, copies = _maps((dout,), channels_last, interleaved)
        value_table, value_copies = _maps(values, channels_last, interleaved)
        copies += value_copies
        dvalues = [
            empty_map(values[-1], channels_last, interleaved) if needed else None
            for needed in need_values
        ] or dvalues
    dvalue_table: list[int] = []
    if any(d is not None for d in dvalues):
        for d in dvalues:
            view = (0, 0, 0) if d is None else view_in_form(d, channels_last, interleaved)
            assert view is not None  # it was allocated in form
            dvalue_table += view
    dkeys = [
        torch.empty_like(q, memory_format=torch.contiguous_format) if n else None for n in need_keys
    ]
    dkey_table = []
    if any(need_keys):
        dkey_table = [
            x for d in dkeys for x in ((0, 0) if d is None else (d.data_ptr(), d.stride(0)))
        ]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else None
    dscores = torch.empty_like(weights)
    dweights = None if dweights is None else _dense(dweights)
    dkl = None if dkl is None else _dense(dkl)
    dprev = None
    prev_depth = 0
    if prev_weights is not None:
        prev_weights = _dense(prev_weights)
        prev_depth = prev_weights.shape[2]
        if need_prev and dkl is not None:
            dprev = torch.empty_like(prev_weights)
    workspace = _workspace(_backward_workspace(sizes, depth), accumulate)
    _kernels().backward(
        _DTYPE_CODES[q.dtype],
        sizes,
        scale,
        row_table[:2],
        row_table[2:],
        value_table,
        _address(prev_weights),
        prev_depth,
        weights.data_ptr(),
        dout_table,
        _address(dweights),
        _address(dkl),
        dscores.data_ptr(),
        [] if dq is None else [dq.data_ptr(), dq.stride(0)],
        dkey_table,
        _address(dprev),
        dvalue_table,
        _address(workspace),
        _threads(values[-1].numel() * depth),
    )
    del copies, row_copies
    return Gradients(dscores, dq, dprev, dkeys, dvalues)


def gather_value_gradient_cpp(
    douts: Sequence[Tensor], columns: Sequence[tuple[Tensor, int]], heads: int, channels_last: bool
) -> Tensor:
    """`sum_m weights_m[..., j_m] * dout_m`: the gradient of one value, from the layers that retrieved it."""
    first = douts[0]
    interleaved = is_interleaved(first, channels_last)
    sizes = kernel_sizes(first, heads, channels_last, interleaved)
    table, copies = _maps(douts, channels_last, interleaved)
    dvalue = empty_map(first, channels_last, interleaved)
    accumulate = accumulate_dtype(first.dtype)
    workspace = _workspace(_aggregate_workspace(sizes, len(douts)), accumulate)
    _kernels().aggregate(
        _DTYPE_CODES[first.dtype],
        sizes,
        table,
        _column_table(columns),
        view_in_form(dvalue, channels_last, interleaved),
        _address(workspace),
        _threads(first.numel() * len(douts)),
    )
    del copies
    return dvalue


def gather_key_gradient_cpp(
    queries: Sequence[Tensor], columns: Sequence[tuple[Tensor, int]], heads: int
) -> Tensor:
    """`sum_m dscores_m[..., j_m] * q_m`: the gradient of one key."""
    table, copies = _rows(queries)
    dkey = torch.empty_like(queries[0], memory_format=torch.contiguous_format)
    _kernels().gather_key(
        _DTYPE_CODES[dkey.dtype],
        (*dkey.shape, heads, 1, 0),
        table,
        _column_table(columns),
        [dkey.data_ptr(), dkey.stride(0)],
        _threads(dkey.numel() * len(queries)),
    )
    del copies
    return dkey


def _column_table(columns: Sequence[tuple[Tensor, int]]) -> list[int]:
    """Column j of a contiguous `[B, G, t]` tensor: where it starts, and the step from one (b, g) to the next."""
    return [
        x
        for tensor, j in columns
        for x in (tensor.data_ptr() + j * tensor.element_size(), tensor.shape[2])
    ]
