"""The glue to the compiled CPU kernels of a whole light layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.backends.checks import check_light_shape, check_light_sizes
from ela_kernels.backends.cpp.attention import DTYPE_CODES, NO_MAP, new_map, thread_count
from ela_kernels.backends.cpp.attention import kernels as compiled
from ela_kernels.backends.cpp.norm import ImageSizes, moments, norm_backward_call, norm_call
from ela_kernels.backends.layout import (
    MapView,
    accumulate_dtype,
    as_read_beside,
    contiguous,
    is_interleaved,
    kernel_sizes,
    readable_view,
)
from ela_kernels.backends.memory import address, cast
from ela_kernels.backends.types import (
    VALUE_ACT_CODES,
    LightFilters,
    LightForward,
    LightGradients,
    LightNeeds,
    NormAct,
    SavedLightLayer,
    ValueAct,
)


def _sizes(x: Tensor) -> ImageSizes:
    batch, channels, height, width = x.shape
    return batch, channels, height, width, int(is_interleaved(x, False))


def _view(tensor: Tensor, interleaved: int, name: str = "a map") -> MapView:
    view = readable_view(tensor, False, bool(interleaved), name)
    assert view is not None  # as_read_beside() made it so
    return view


def _readable(x: Tensor, filters: LightFilters) -> LightFilters:
    """The filters as the kernels read them.

    All of the maps' dtype: a decay in float32 beside half precision is rounded, as autocast rounds the filters.
    """
    check_light_sizes(x.shape[1], filters)
    dtype = x.dtype
    return LightFilters(*(contiguous(cast(w, dtype, "a filter")) for w in filters))


def _workspace(sizes: ImageSizes, size: int, threads: int, dtype: torch.dtype) -> Tensor:
    elements = compiled().light_workspace(sizes=sizes, filter_size=size, threads=threads)
    return torch.empty(elements, dtype=dtype, device="cpu")


def _value_scratch(x: Tensor, sizes: ImageSizes, threads: int) -> tuple[Tensor, MapView]:
    """For a value that nobody reads later: few samples of it, so that they stay in cache."""
    _, channels, height, width, interleaved = sizes
    samples = compiled().light_values(sizes=sizes, threads=threads)
    positions = height * width
    scratch = torch.empty(samples * channels * positions, dtype=x.dtype, device="cpu")
    return scratch, (address(scratch), channels * positions, channels if interleaved else positions)


def light_layer(
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    heads: int,
    scale: float,
    epilogue: NormAct | None = None,
    value_act: ValueAct | None = None,
    keeps: bool = True,
) -> LightForward:
    """`gate * act(v) + decay * prev` in one call, and all of a block.

    `x` and `prev` are in one form that the kernels can read.

    The factors `[2, B, C]` are what each channel takes of its value and of the previous output: gate and decay.
    """
    sizes = _sizes(x)
    flat = kernel_sizes(x, heads, False, bool(sizes[4]))
    accumulate = accumulate_dtype(x.dtype)
    wq, wk, wv, decay = _readable(x, filters)
    threads = thread_count(4 * x.numel())
    v, v_view = new_map(x, flat, False) if keeps else _value_scratch(x, sizes, threads)
    out, out_view = new_map(x, flat, False)
    mean, q, k = (x.new_empty(x.shape[:2]) for _ in range(3))
    factors = torch.empty((2, *x.shape[:2]), dtype=accumulate, device="cpu")
    statistics = block = norm = measured = None
    if epilogue is not None:
        statistics = epilogue.statistics
        if statistics is None:
            statistics = measured = torch.empty((2, x.shape[1]), dtype=accumulate, device="cpu")
        block, block_view = new_map(x, flat, False)
        x_view = _view(x, sizes[4], "x")
        norm = norm_call(
            sizes,
            statistics,
            epilogue,
            x.dtype,
            o=out_view,
            x=x_view,
            out=block_view,
            tracks=measured is not None,
        )
    workspace = _workspace(sizes, wk.numel(), threads, accumulate)
    extension = compiled()
    layer = extension.light(
        sizes=sizes,
        heads=heads,
        scale=scale,
        act=VALUE_ACT_CODES[value_act],
        x=_view(x, sizes[4], "x"),
        wq=address(wq, "Wq"),
        wk=address(wk, "Wk"),
        filter_size=wk.numel(),
        wv=address(wv, "Wv"),
        decay=address(decay, "lambda_t"),
        prev=_view(prev, sizes[4], "prev_out"),
        mean=address(mean),
        query=address(q),
        key=address(k),
        v=v_view,
        factors=address(factors),
    )
    mean_out, variance_out = moments(measured)
    extension.light_layer(
        DTYPE_CODES[x.dtype],
        layer=layer,
        keeps_v=keeps,
        out=out_view,
        mean_out=mean_out,
        variance_out=variance_out,
        norm=None if norm is None else norm.arguments,
        workspace=address(workspace),
        threads=threads,
    )
    tracked = norm is not None and norm.tracks
    kept_v = v if keeps else None
    return LightForward(out, mean, q, k, kept_v, factors, statistics, block, tracked)


def light_layer_backward(
    saved: SavedLightLayer, dout: Tensor | None, dnext: Tensor | None, needs: LightNeeds
) -> LightGradients:
    """All gradients of a layer in one call, and of its block's norm."""
    x, filters, prev, heads, scale, value_act, epilogue, mean, q, k, v, factors, out, statistics = (
        saved
    )
    residual = norm = dgamma = dbeta = None
    if dout is not None and epilogue is not None:
        assert out is not None
        assert statistics is not None
        residual = dout
        dout, dgamma, dbeta, norm = norm_backward_call(out, dout, statistics, epilogue, dnext)
    else:
        dout = dnext
    if dout is None:
        return LightGradients()
    check_light_shape(x, v)
    sizes = _sizes(x)
    interleaved = bool(sizes[4])
    flat = kernel_sizes(x, heads, False, interleaved)
    dout = as_read_beside(x, dout)
    residual = None if residual is None else as_read_beside(x, residual)
    wq, wk, wv, decay = _readable(x, filters)
    dx, dx_view = new_map(x, flat, False) if needs[0] else (None, NO_MAP)
    dprev, dprev_view = new_map(x, flat, False) if needs[5] else (None, NO_MAP)
    # A gated value's gradient is a multiple of dout, and one behind an activation is not.
    takes_dv = value_act is not None and (needs.x or needs.wv)
    _dv, dv_view = new_map(x, flat, False) if takes_dv else (None, NO_MAP)
    dfilters = [
        torch.empty_like(w) if need else None
        for w, need in zip((wq, wk, wv, decay), needs[1:5], strict=True)
    ]
    dwq, dwk, dwv, ddecay = dfilters
    threads = thread_count(6 * x.numel())
    workspace = _workspace(sizes, wk.numel(), threads, factors.dtype)
    extension = compiled()
    layer = extension.light(
        sizes=sizes,
        heads=heads,
        scale=scale,
        act=VALUE_ACT_CODES[value_act],
        x=_view(x, sizes[4], "x"),
        wq=address(wq, "Wq"),
        wk=address(wk, "Wk"),
        filter_size=wk.numel(),
        wv=address(wv, "Wv"),
        decay=address(decay, "lambda_t"),
        prev=_view(prev, sizes[4], "prev_out"),
        mean=address(mean),
        query=address(q),
        key=address(k),
        v=_view(v, sizes[4]),
        factors=address(factors),
    )
    extension.light_layer_backward(
        DTYPE_CODES[x.dtype],
        layer=layer,
        dout=_view(dout, sizes[4], "gradient of the output"),
        dx_residual=NO_MAP if residual is None else _view(residual, sizes[4]),
        dx=dx_view,
        dwq=address(dwq),
        dwk=address(dwk),
        dwv=address(dwv),
        ddecay=address(ddecay),
        dprev=dprev_view,
        dv=dv_view,
        norm=None if norm is None else norm.arguments,
        batch_statistics=norm is not None and norm.batch_statistics,
        workspace=address(workspace),
        threads=threads,
    )
    if ddecay is not None:
        ddecay = ddecay.to(filters.decay.dtype)
    return LightGradients(dx, dwq, dwk, dwv, ddecay, dprev, dgamma, dbeta)
