"""The glue to the compiled CPU kernels that make query, key and value from a feature map, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.checks import check_shape, refuse_sizes
from ela_kernels.backends.cpp.addresses import NO_TABLE, Table, maps, one_map, rows
from ela_kernels.backends.cpp.attention import (
    DTYPE_CODES,
    NO_MAP,
    CppContribution,
    packed_sources,
    thread_count,
)
from ela_kernels.backends.cpp.attention import kernels as compiled
from ela_kernels.backends.cpp.norm import ImageSizes, norm_backward, norm_call
from ela_kernels.backends.layout import (
    MapView,
    SameStrides,
    accumulate_dtype,
    contiguous,
    dense,
    empty_map,
    is_interleaved,
    resolved,
    view_in_form,
    with_one_more,
)
from ela_kernels.backends.memory import address, addresses
from ela_kernels.backends.types import (
    NO_GRADIENTS,
    Arrived,
    Epilogue,
    Filters,
    LayerForward,
    LayerGradients,
    LayerNeeds,
    NormAct,
    Residual,
    SavedLayer,
)


class Plan:
    """What all layers over maps of one shape and layout have in common, worked out once.

    Some of it are templates, never written: `torch.empty_like` takes half the time of `torch.empty`. All threads share
    a plan, and making a tensor lets other threads run: what is made later than the plan is right whoever makes it.
    """

    __slots__ = (
        "_weights",
        "call",
        "divergence",
        "elements",
        "interleaved",
        "keeps_strides",
        "made",
        "norm_sizes",
        "row",
        "statistics",
    )

    def __init__(self, x: Tensor, heads: int, filter_size: int) -> None:
        """`x` on the meta device: nothing but its shape, strides and dtype is asked for."""
        self.interleaved = is_interleaved(x, False)
        view = view_in_form(x, False, self.interleaved)
        assert view is not None  # readable() made it so
        batch, channels, height, width = x.shape
        self.norm_sizes: ImageSizes = (batch, channels, height, width, int(self.interleaved))
        self.elements = x.numel()
        self.keeps_strides = torch.empty_like(x).stride() == x.stride()
        positions = height * width
        compact = (channels * positions, channels if self.interleaved else positions)
        self.made = view[1:] if self.keeps_strides else compact
        self.call = compiled().LayerPlan(
            DTYPE_CODES[x.dtype], self.norm_sizes, heads, filter_size, view[1:], self.made
        )
        dtype = accumulate_dtype(x.dtype)
        self.row = torch.empty((batch, channels), dtype=x.dtype, device="cpu")
        self.divergence = torch.empty((batch, heads), dtype=dtype, device="cpu")
        self.statistics = torch.empty((2, channels), dtype=dtype, device="cpu")
        self._weights: dict[int, Tensor] = {}

    def new_map(self, x: Tensor) -> Tensor:
        return torch.empty_like(x) if self.keeps_strides else empty_map(x, False, self.interleaved)

    def new_weights(self, depth: int) -> Tensor:
        """`[B, G, depth]`, unwritten."""
        template = self._weights.get(depth)
        if template is None:
            sizes = (*self.divergence.shape, depth)
            template = torch.empty(sizes, dtype=self.divergence.dtype, device="cpu")
            self._weights[depth] = template
        return torch.empty_like(template)

    def tables(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Table, Table]:
        """Of keys and values of a history, the last of which were made for this plan."""
        if type(keys) is SameStrides and type(values) is SameStrides:
            return (
                (addresses(keys), [self.row.stride(0)], []),
                (addresses(values), [*self.made], []),
            )
        return rows(keys), maps(values, False, self.interleaved)

    def map_view(self, tensor: Tensor) -> tuple[MapView, Tensor]:
        """As the extension takes it, and what must live until the kernel has run."""
        return one_map(tensor, False, self.interleaved)


@functools.lru_cache(maxsize=256)
def _plan_of(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, heads: int, filter_size: int
) -> Plan:
    return Plan(torch.empty_strided(shape, strides, dtype=dtype, device="meta"), heads, filter_size)


def _plan(x: Tensor, heads: int, filter_size: int) -> Plan:
    return _plan_of(x.shape, x.stride(), x.dtype, heads, filter_size)


def _readable(plan: Plan, filters: Filters) -> Filters:
    """The filters as the kernels read them."""
    wq, wk, wv = filters
    channels = plan.norm_sizes[1]  # check_sizes(), without a call
    if wv.numel() != 9 * channels or (wq is not None and wq.numel() != wk.numel()):
        refuse_sizes(channels, filters)
    return Filters(dense(wq), contiguous(wk), contiguous(wv))


def layer(
    x: Tensor,
    filters: Filters,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    epilogue: Epilogue | None,
    keeps_retrieved: bool,
) -> LayerForward:
    """Query, key and value from `x` (which :func:`readable` gave), what the query retrieves and what follows: one call.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    plan = _plan(x, heads, filters.wk.numel() or refuse_sizes(x.shape[1], filters))
    wq, wk, wv = _readable(plan, filters)
    x_address = address(x, "x")
    retrieves = wq is not None
    depth = len(keys) + 1
    v, mean, k = plan.new_map(x), torch.empty_like(plan.row), torch.empty_like(plan.row)
    q = out = weights = kl = statistics = block = norm = measured = None
    if retrieves:
        q, out, weights = torch.empty_like(plan.row), plan.new_map(x), plan.new_weights(depth)
        prev_weights = dense(prev_weights)
        if prev_weights is not None:
            kl = torch.empty_like(plan.divergence)
        if type(epilogue) is NormAct:
            statistics = epilogue.statistics
            if statistics is None:
                statistics = measured = torch.empty_like(plan.statistics)
            block = plan.new_map(x) if keeps_retrieved else out
            x_view, out_view = plan.map_view(x)[0], (out.data_ptr(), *plan.made)
            views = (out_view, x_view, (block.data_ptr(), *plan.made), NO_MAP)
            norm = norm_call(views, plan.norm_sizes, statistics, epilogue)
    key_table, value_table = plan.tables(with_one_more(keys, k), with_one_more(values, v))
    compiled().layer(
        plan.call,
        scale,
        x_address,
        address(wq, "Wq"),
        address(wk, "Wk"),
        address(wv, "Wv"),
        mean.data_ptr(),
        address(q),
        key_table[0],
        key_table[1],
        value_table[0],
        value_table[1],
        address(prev_weights, "prev_weights"),
        0 if prev_weights is None else prev_weights.shape[2],
        address(weights),
        address(kl),
        address(out),
        type(epilogue) is Residual,
        address(measured),
        0 if measured is None else measured[1].data_ptr(),
        None if norm is None else norm.arguments,
        thread_count(plan.elements * depth),
    )
    del key_table, value_table, norm
    if block is None:
        return LayerForward(mean, q, k, v, out, weights, kl)
    return LayerForward(
        mean, q, k, v, block, weights, kl, out if keeps_retrieved else None, statistics
    )


def layer_backward(
    saved: SavedLayer,
    arrived: Arrived,
    contributions: Sequence[CppContribution],
    index: int,
    needs: LayerNeeds,
) -> tuple[LayerGradients, CppContribution | None]:
    """All gradients of the layer at `index` in one call; its value's is gathered and convolved, never stored."""
    x, filters, mean, heads, attention, epilogue, retrieved, statistics = saved
    dout, dweights, dkl, dk, dv = arrived
    residual = norm = dgamma = dbeta = None
    if epilogue is not None and dout is not None:
        residual = dout
        if type(epilogue) is NormAct:
            assert retrieved is not None
            assert statistics is not None
            dout, dgamma, dbeta, norm = norm_backward(retrieved, dout, statistics, epilogue)
    own = None
    if attention is not None and (dout is not None or dweights is not None or dkl is not None):
        written = torch.empty_like(attention.weights)
        own = CppContribution(attention.q, attention.weights, written, dout, False)
        contributions = [own, *contributions]
    elif not contributions and dk is None and dv is None:
        return NO_GRADIENTS, None
    need_x, need_wq, need_wk, need_wv, need_prev = needs
    check_shape(x, mean, None if own is None else attention)
    plan = _plan(x, heads, filters.wk.numel() or refuse_sizes(x.shape[1], filters))
    wq, wk, wv = _readable(plan, filters)
    sources, copies = packed_sources(contributions, False, plan.interleaved)
    wants_key = (need_x or need_wk) and (bool(contributions) or dk is not None)
    dk, dv_view = dense(dk), NO_MAP
    if dv is not None:
        dv_view, dv = plan.map_view(resolved(dv))

    key_table = value_table = NO_TABLE
    dout_view = NO_MAP
    query = weights = dscores = prev = dprev = None
    scale, depth, wants_query = 1.0, 0, False
    if own is not None:
        assert attention is not None
        query, weights, scale, dscores = (
            attention.q,
            attention.weights,
            attention.scale,
            own.dscores,
        )
        depth = len(attention.keys)
        key_table, value_table = plan.tables(attention.keys, attention.values)
        dweights, dkl, prev = dense(dweights), dense(dkl), dense(attention.prev_weights)
        if need_prev and dkl is not None and prev is not None:
            dprev = torch.empty_like(prev)
        wants_query = need_x or need_wq
        if dout is not None:
            dout_view, dout = plan.map_view(dout)
    residual_view = NO_MAP
    if residual is not None:
        residual_view, residual = plan.map_view(residual)
    dx = plan.new_map(x) if need_x else None
    dwq = torch.empty_like(wq) if need_wq and wq is not None else None
    dwk = torch.empty_like(wk) if need_wk else None
    dwv = torch.empty_like(wv) if need_wv else None
    has_rows = wants_query or wants_key
    compiled().layer_backward(
        plan.call,
        scale,
        index,
        own is not None,
        address(query, "q"),
        key_table[0],
        key_table[1],
        value_table[0],
        value_table[1],
        address(prev),
        0 if prev is None else prev.shape[2],
        address(weights, "weights"),
        dout_view,
        address(dweights, "gradient of the weights"),
        address(dkl, "gradient of kl"),
        address(dscores),
        address(dprev),
        address(x, "x"),
        address(wq, "Wq"),
        address(wk, "Wk"),
        address(wv, "Wv"),
        mean.data_ptr(),
        sources,
        address(dk, "gradient of the key"),
        dv_view,
        residual_view,
        wants_query,
        wants_key,
        address(dx),
        address(dwq) if has_rows else 0,
        address(dwk) if has_rows else 0,
        address(dwv),
        None if norm is None else norm.arguments,
        norm is not None and norm.batch_statistics,
        thread_count(plan.elements * (depth + len(contributions) + 1)),
    )
    del copies, key_table, value_table, dout, norm
    if not has_rows:
        dwq, dwk = (None if d is None else d.zero_() for d in (dwq, dwk))
    return LayerGradients(dx, dwq, dwk, dwv, dprev, dgamma, dbeta), own
