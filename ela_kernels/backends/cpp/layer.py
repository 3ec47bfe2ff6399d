"""The glue to the compiled CPU kernels that make query, key and value from a feature map, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.checks import check_epilogue, check_reused, check_shape, refuse_sizes
from ela_kernels.backends.cpp.addresses import Table, maps, one_map, rows
from ela_kernels.backends.cpp.attention import (
    NO_MAP,
    CppContribution,
    packed_sources,
    thread_count,
    value_type,
)
from ela_kernels.backends.cpp.attention import kernels as compiled
from ela_kernels.backends.cpp.norm import ImageSizes, moments, norm_backward_call, norm_call
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
    Retrieved,
    Saved,
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

    def __init__(self, x: Tensor, heads: int, filter_size: int, value_dtype: torch.dtype) -> None:
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
            value_type(x.dtype, value_dtype),
            sizes=self.norm_sizes,
            heads=heads,
            filter_size=filter_size,
            x=view[1:],
            made=self.made,
        )
        dtype = accumulate_dtype(x.dtype)
        self.row = torch.empty((batch, channels), dtype=x.dtype, device="cpu")
        self.divergence = torch.empty((batch, heads), dtype=dtype, device="cpu")
        self.statistics = torch.empty((2, channels), dtype=dtype, device="cpu")
        self._weights: dict[int, Tensor] = {}

    def new_map(self, x: Tensor) -> Tensor:
        return torch.empty_like(x) if self.keeps_strides else empty_map(x, False, self.interleaved)

    def new_value(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype is x.dtype:  # without the keyword, which takes as long again
            return self.new_map(x)
        if self.keeps_strides:
            return torch.empty_like(x, dtype=dtype)
        return empty_map(x, False, self.interleaved, dtype)

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
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    heads: int,
    filter_size: int,
    value_dtype: torch.dtype,
) -> Plan:
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return Plan(x, heads, filter_size, value_dtype)


def _plan(x: Tensor, heads: int, filter_size: int, value_dtype: torch.dtype) -> Plan:
    return _plan_of(x.shape, x.stride(), x.dtype, heads, filter_size, value_dtype)


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
    epilogue: Epilogue | None = None,
    keeps_retrieved: bool = True,
    reused: Retrieved | None = None,
    value_dtype: torch.dtype | None = None,
    tolerance: float = 0.0,
) -> LayerForward:
    """Query, key and value from `x` (which :func:`readable` gave), what the query retrieves and what follows: one call.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved. `value_dtype` is that
    of the values, where it is not that of `x`.
    """
    check_epilogue(epilogue)
    check_reused(x, filters, epilogue, reused)
    held = value_dtype or x.dtype
    if values and values[-1].dtype is not held:
        raise TypeError(
            f"values: got {values[-1].dtype} for a history that holds {held}; allowed is one dtype"
        )
    plan = _plan(x, heads, filters.wk.numel() or refuse_sizes(x.shape[1], filters), held)
    wq, wk, wv = _readable(plan, filters)
    x_address = address(x, "x")
    retrieves = wq is not None
    depth = len(keys) + 1
    v, mean, k = plan.new_value(x, held), torch.empty_like(plan.row), torch.empty_like(plan.row)
    q = out = weights = kl = statistics = block = norm = measured = kept_o = None
    o_view = NO_MAP
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
            o_view = (out.data_ptr(), *plan.made)
    elif reused is not None:
        out, block = reused.o, plan.new_map(x)
        statistics = reused.statistics
        o_view, kept_o = plan.map_view(out)
    if block is not None:
        assert type(epilogue) is NormAct
        assert statistics is not None
        norm = norm_call(
            plan.norm_sizes,
            statistics,
            epilogue,
            x.dtype,
            o=o_view,
            x=plan.map_view(x)[0],
            out=(block.data_ptr(), *plan.made),
            tracks=measured is not None,
        )
    key_table, value_table = plan.tables(with_one_more(keys, k), with_one_more(values, v))
    extension = compiled()
    attention = extension.attention(
        scale=scale,
        query=address(q),
        query_stride=plan.norm_sizes[1],
        keys=key_table[0],
        key_strides=key_table[1],
        values=value_table[0],
        value_strides=value_table[1],
        prev=address(prev_weights, "prev_weights"),
        prev_depth=0 if prev_weights is None else prev_weights.shape[2],
        weights=address(weights),
        tolerance=tolerance,
    )
    mean_out, variance_out = moments(measured)
    extension.layer(
        plan.call,
        x=x_address,
        wq=address(wq, "Wq"),
        wk=address(wk, "Wk"),
        wv=address(wv, "Wv"),
        mean=mean.data_ptr(),
        attention=attention,
        kl=address(kl),
        out=address(out if retrieves else None),
        has_residual=type(epilogue) is Residual,
        mean_out=mean_out,
        variance_out=variance_out,
        norm=None if norm is None else norm.arguments,
        threads=thread_count(plan.elements * depth),
    )
    tracked = norm is not None and norm.tracks
    del key_table, value_table, norm, kept_o
    if block is None:
        return LayerForward(mean, q, k, v, out, weights, kl)
    retrieved = out if keeps_retrieved else None
    return LayerForward(mean, q, k, v, block, weights, kl, retrieved, statistics, tracked)


def _own_gradients(
    plan: Plan,
    attention: Saved,
    own: CppContribution,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    need_prev: bool,
) -> tuple[Any, Tensor | None, Any]:
    """What a layer's own attention takes and gives, the previous weights' gradient, and what must live until then."""
    extension = compiled()
    key_table, value_table = plan.tables(attention.keys, attention.values)
    dweights, dkl, prev = dense(dweights), dense(dkl), dense(attention.prev_weights)
    dprev = None
    if need_prev and dkl is not None and prev is not None:
        dprev = torch.empty_like(prev)
    dout_view = NO_MAP
    if dout is not None:
        dout_view, dout = plan.map_view(dout)
    group = extension.own(
        attention=extension.attention(
            scale=attention.scale,
            query=address(attention.q, "q"),
            query_stride=plan.norm_sizes[1],
            keys=key_table[0],
            key_strides=key_table[1],
            values=value_table[0],
            value_strides=value_table[1],
            prev=address(prev),
            prev_depth=0 if prev is None else prev.shape[2],
            weights=address(attention.weights, "weights"),
            tolerance=attention.tolerance,
        ),
        dout=dout_view,
        dweights=address(dweights, "gradient of the weights"),
        dkl=address(dkl, "gradient of kl"),
        dscores=address(own.dscores),
        dprev=address(dprev),
    )
    return group, dprev, (key_table, value_table, dweights, dkl, prev, dout)


def layer_backward(
    saved: SavedLayer,
    arrived: Arrived,
    contributions: Sequence[CppContribution],
    index: int,
    needs: LayerNeeds,
) -> tuple[LayerGradients, CppContribution | None]:
    """All gradients of the layer at `index` in one call; its value's is gathered and convolved, never stored."""
    x, filters, mean, heads, attention, epilogue, retrieved, statistics = saved
    dout, dweights, dkl, dk, dv, dretrieved = arrived
    residual = norm = dgamma = dbeta = dreused = None
    if epilogue is not None and dout is not None:
        residual = dout
        if type(epilogue) is NormAct:
            assert retrieved is not None
            assert statistics is not None
            dout, dgamma, dbeta, norm = norm_backward_call(
                retrieved, dout, statistics, epilogue, dretrieved
            )
    elif dretrieved is not None:
        dout = dretrieved
    own = None
    if attention is None:
        dreused = dout
    elif dout is not None or dweights is not None or dkl is not None:
        written = torch.empty_like(attention.weights)
        own = CppContribution(
            attention.q, attention.weights, written, dout, False, attention.tolerance
        )
        contributions = [own, *contributions]
    if own is None and residual is None and not contributions and dk is None and dv is None:
        return NO_GRADIENTS, None
    need_x, need_wq, need_wk, need_wv, need_prev = needs
    check_shape(x, mean, None if own is None else attention)
    held = x.dtype if own is None or attention is None else attention.values[-1].dtype
    plan = _plan(x, heads, filters.wk.numel() or refuse_sizes(x.shape[1], filters), held)
    wq, wk, wv = _readable(plan, filters)
    sources, copies = packed_sources(contributions, False, plan.interleaved)
    wants_key = (need_x or need_wk) and (bool(contributions) or dk is not None)
    dk, dv_view = dense(dk), NO_MAP
    if dv is not None:
        dv_view, dv = plan.map_view(resolved(dv))

    extension = compiled()
    own_group = dprev = kept = None
    depth, wants_query = 0, False
    if own is not None:
        assert attention is not None
        depth, wants_query = len(attention.keys), need_x or need_wq
        own_group, dprev, kept = _own_gradients(
            plan, attention, own, dout, dweights, dkl, need_prev
        )

    residual_view = NO_MAP
    if residual is not None:
        residual_view, residual = plan.map_view(residual)
    dx = plan.new_map(x) if need_x else None
    dwq = torch.empty_like(wq) if need_wq and wq is not None else None
    dwk = torch.empty_like(wk) if need_wk else None
    dwv = torch.empty_like(wv) if need_wv else None
    has_rows = wants_query or wants_key
    arrived = extension.arrived(
        sources=sources,
        index=index,
        dk=address(dk, "gradient of the key"),
        dv=dv_view,
        residual=residual_view,
    )
    gradients = extension.gradients(
        dx=address(dx),
        dwq=address(dwq) if has_rows else 0,
        dwk=address(dwk) if has_rows else 0,
        dwv=address(dwv),
    )
    extension.layer_backward(
        plan.call,
        own=own_group,
        arrived=arrived,
        x=address(x, "x"),
        wq=address(wq, "Wq"),
        wk=address(wk, "Wk"),
        wv=address(wv, "Wv"),
        mean=mean.data_ptr(),
        wants_query=wants_query,
        wants_key=wants_key,
        gradients=gradients,
        norm=None if norm is None else norm.arguments,
        batch_statistics=norm is not None and norm.batch_statistics,
        threads=thread_count(plan.elements * (depth + len(contributions) + 1)),
    )
    del copies, kept, dv, dk, residual, norm
    if not has_rows:
        dwq, dwk = (None if d is None else d.zero_() for d in (dwq, dwk))
    return LayerGradients(dx, dwq, dwk, dwv, dprev, dgamma, dbeta, dreused), own
