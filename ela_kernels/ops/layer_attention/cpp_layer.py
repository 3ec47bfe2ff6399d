"""The glue to the compiled CPU kernels that make query, key and value from a feature map, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.addresses import maps, rows
from ela_kernels.ops.layer_attention.cpp import (
    DTYPE_CODES,
    NO_MAP,
    Retrieved,
    new_map,
    thread_count,
)
from ela_kernels.ops.layer_attention.cpp import kernels as compiled
from ela_kernels.ops.layer_attention.cpp_norm import ImageSizes, NormCall, norm_backward, norm_call
from ela_kernels.ops.layer_attention.kernels import address, dense, new_row, resolved
from ela_kernels.ops.layer_attention.layer_kernels import (
    Attended,
    Epilogue,
    Filters,
    LayerForward,
    LayerGradients,
)
from ela_kernels.ops.layer_attention.layout import (
    MapView,
    in_form,
    is_interleaved,
    kernel_sizes,
    view_in_form,
)
from ela_kernels.ops.layer_attention.reference import accumulate_dtype

# No norm_forward: layer_forward() does all of a block.
__all__ = ["layer_backward", "layer_forward", "norm_backward", "readable"]


def readable(x: Tensor) -> Tensor:
    """`x` itself where the kernels can read it, else a compact copy."""
    return in_form(x, False, is_interleaved(x, False))


def _image(x: Tensor) -> tuple[ImageSizes, MapView]:
    interleaved = is_interleaved(x, False)
    view = view_in_form(x, False, interleaved)
    assert view is not None  # readable() made it so
    batch, channels, height, width = x.shape
    return (batch, channels, height, width, int(interleaved)), view


@functools.lru_cache(maxsize=4096)
def _workspace_elements(
    sizes: ImageSizes, heads: int, filter_size: int, depth: int, sources: int, threads: int
) -> int:
    return int(compiled().layer_workspace(sizes, heads, filter_size, depth, sources, threads))


def _contiguous(filters: Filters) -> Filters:
    wq, wk, wv = filters
    return Filters(dense(wq), resolved(wk).contiguous(), resolved(wv).contiguous())


def layer_forward(
    x: Tensor,
    filters: Filters,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    has_residual: bool,
    epilogue: Epilogue | None = None,
    keeps_out: bool = True,
) -> LayerForward:
    """Query, key and value from `x` (which :func:`readable` gave), and what the query retrieves, in one call.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    sizes, view = _image(x)
    interleaved = bool(sizes[4])
    flat = kernel_sizes(x, heads, False, interleaved)
    accumulate = accumulate_dtype(x.dtype)
    wq, wk, wv = _contiguous(filters)
    retrieves = wq is not None
    depth = len(keys) + 1
    v, _ = new_map(x, flat, False)
    mean, k = x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    q = out = weights = kl = statistics = block = norm = None
    out_view = NO_MAP
    if retrieves:
        q = x.new_empty(x.shape[:2])
        out, out_view = new_map(x, flat, False)
        weights = torch.empty((flat[0], heads, depth), dtype=accumulate)
        prev_weights = dense(prev_weights)
        if prev_weights is not None:
            kl = torch.empty((flat[0], heads), dtype=accumulate)
        if epilogue is not None:
            block, block_view = out, out_view
            given = epilogue.statistics
            if given is None:
                statistics = given = torch.empty((2, x.shape[1]), dtype=accumulate)
            if keeps_out:
                block, block_view = new_map(x, flat, False)
            norm = norm_call((out_view, view, block_view, NO_MAP), sizes, given, epilogue)
    key_addresses, key_strides, key_copies = rows((*keys, k))
    value_addresses, value_strides, value_copies = maps((*values, v), False, interleaved)
    threads = thread_count(x.numel() * depth)
    size = wk.numel()
    elements = _workspace_elements(sizes, heads, size, depth, 0, threads)
    workspace = torch.empty(elements, dtype=accumulate)
    compiled().layer(
        DTYPE_CODES[x.dtype],
        sizes,
        heads,
        scale,
        view,
        address(wq),
        wk.data_ptr(),
        size,
        wv.data_ptr(),
        mean.data_ptr(),
        address(q),
        key_addresses,
        key_strides,
        value_addresses,
        value_strides,
        address(prev_weights),
        0 if prev_weights is None else prev_weights.shape[2],
        address(weights),
        address(kl),
        out_view,
        has_residual,
        address(statistics),
        0 if statistics is None else statistics[1].data_ptr(),
        None if norm is None else norm.arguments,
        workspace.data_ptr(),
        threads,
    )
    del key_copies, value_copies, norm
    return LayerForward(mean, q, k, v, out, weights, kl, statistics, block)


def layer_backward(
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
    pending: NormCall | None = None,
) -> LayerGradients:
    """All gradients of the layer at `index` in one call; its value's is gathered and convolved, never stored.

    Args:
        own: its attention, where a gradient arrived through it.
        retrieved: what the layers that retrieved this one left, this one included if it did.
        dk, dv: gradients of key and value from elsewhere, if there are any.
        residual: what arrives past the retrieval, added to the gradient of `x`.
        needs: of x, wq, wk, wv.
    """
    need_x, need_wq, need_wk, need_wv = needs
    sizes, view = _image(x)
    interleaved = bool(sizes[4])
    accumulate = accumulate_dtype(x.dtype)
    size = 8 if accumulate == torch.float64 else 4
    one = torch.ones(1, dtype=accumulate) if dk is not None or dv is not None else None
    wq, wk, wv = _contiguous(filters)

    queries = [r.query[0] for r in retrieved]
    query_strides = [r.query[1] for r in retrieved]
    score_columns = [r.dscores[1] + index * size for r in retrieved]
    score_strides = [r.depth for r in retrieved]
    if dk is not None:  # one more source, with a weight of one
        dk = dense(dk)
        queries.append(address(dk))
        query_strides.append(mean.shape[1])
        score_columns.append(address(one))
        score_strides.append(0)
    dkey = new_row(mean) if queries and (need_x or need_wk) else None

    with_dout = [r for r in retrieved if r.dout is not None]
    given = [r.dout for r in with_dout if r.dout is not None]
    weight_columns = [r.weights[1] + index * size for r in with_dout]
    weight_strides = [r.depth for r in with_dout]
    if dv is not None:
        given.append(resolved(dv))
        weight_columns.append(address(one))
        weight_strides.append(0)
    douts, dout_strides, copies = maps(given, False, interleaved) if given else ([], [], [])

    keys: list[int] = []
    key_strides: list[int] = []
    values: list[int] = []
    value_strides: list[int] = []
    dout_view = NO_MAP
    query = weights = dscores = dweights = dkl = prev = dprev = dq = None
    scale, depth = 1.0, 0
    if own is not None:
        saved = own.saved
        query, weights, dscores, scale = saved.q, saved.weights, own.dscores, saved.scale
        depth = len(saved.keys)
        keys, key_strides, key_copies = rows(saved.keys)
        copies += key_copies
        dweights, dkl, prev = dense(own.dweights), dense(own.dkl), dense(saved.prev_weights)
        if own.need_prev and dkl is not None and prev is not None:
            dprev = torch.empty_like(prev)
        dq = new_row(mean) if need_x or need_wq else None
        if own.dout is not None:
            values, value_strides, value_copies = maps(saved.values, False, interleaved)
            (dout_address,), dout_own_strides, dout_copies = maps((own.dout,), False, interleaved)
            dout_view = (dout_address, dout_own_strides[0], dout_own_strides[1])
            copies += value_copies + dout_copies

    residual_view = NO_MAP
    if residual is not None:
        (residual_address,), residual_strides, residual_copies = maps(
            (residual,), False, interleaved
        )
        residual_view = (residual_address, residual_strides[0], residual_strides[1])
        copies += residual_copies
    dx, dx_view = None, NO_MAP
    if need_x:
        dx, dx_view = new_map(x, kernel_sizes(x, heads, False, interleaved), False)
    dwq = torch.empty_like(wq) if need_wq and wq is not None else None
    dwk = torch.empty_like(wk) if need_wk else None
    dwv = torch.empty_like(wv) if need_wv else None
    has_rows = dq is not None or dkey is not None
    dmean = torch.empty(mean.shape, dtype=accumulate) if has_rows else None
    threads = thread_count(x.numel() * (depth + len(douts) + 1))
    elements = _workspace_elements(sizes, heads, wk.numel(), depth, len(douts), threads)
    workspace = torch.empty(elements, dtype=accumulate)
    compiled().layer_backward(
        DTYPE_CODES[x.dtype],
        sizes,
        heads,
        scale,
        own is not None,
        address(query),
        keys,
        key_strides,
        values,
        value_strides,
        address(prev),
        0 if prev is None else prev.shape[2],
        address(weights),
        dout_view,
        address(dweights),
        address(dkl),
        address(dscores),
        address(dprev),
        view,
        address(wq),
        wk.data_ptr(),
        wk.numel(),
        wv.data_ptr(),
        mean.data_ptr(),
        queries,
        query_strides,
        score_columns,
        score_strides,
        douts,
        dout_strides,
        weight_columns,
        weight_strides,
        residual_view,
        address(dq),
        address(dkey),
        address(dmean),
        dx_view,
        address(dwq) if has_rows else 0,
        address(dwk) if has_rows else 0,
        address(dwv),
        None if pending is None else pending.arguments,
        pending is not None and pending.batch_statistics,
        workspace.data_ptr(),
        threads,
    )
    del copies
    if not has_rows:
        dwq, dwk = (None if d is None else d.zero_() for d in (dwq, dwk))
    return LayerGradients(dx, dwq, dwk, dwv, dprev)
