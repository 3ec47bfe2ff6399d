"""Sizes that a kernel relies on, looked at again in each call: a parameter's `.data` is set behind autograd's back."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ela_kernels.backends.types import EPILOGUES, Filters, LightFilters, NormAct, Retrieved, Saved


def check_epilogue(epilogue: object) -> None:
    """Refuse a kind that this backend would leave out without a word."""
    if type(epilogue) not in EPILOGUES:
        raise TypeError(
            f"epilogue: got {type(epilogue).__name__}; allowed is one of {', '.join(k.__name__ for k in EPILOGUES)}"
        )


def check_value_dtype(value_dtype: torch.dtype | None) -> None:
    """Refuse values of another dtype than the layer's, for a backend that would read them as the layer's."""
    if value_dtype is not None:
        raise TypeError(
            f"value_dtype: got {value_dtype}; allowed is None, which is the layer's. `value_dtypes` has no other"
        )


def check_reused(x: Tensor, filters: Filters, epilogue: object, reused: Retrieved | None) -> None:
    """An earlier layer's retrieval is what a norm is given, in place of one of its own, and in the form of `x`."""
    if reused is None:
        return
    if filters.wq is not None or type(epilogue) is not NormAct:
        raise TypeError(
            f"reused: got one for an epilogue {type(epilogue).__name__} and filters "
            f"{'with' if filters.wq is not None else 'without'} a query; allowed is a NormAct, without a query"
        )
    if reused.o.shape != x.shape or reused.o.dtype != x.dtype:
        raise ValueError(
            f"reused: got {list(reused.o.shape)} in {reused.o.dtype}; allowed is {list(x.shape)} in {x.dtype}, as of x"
        )


def check_sizes(channels: int, filters: Filters) -> None:
    """Refuse filters of other sizes than the forward had: a parameter's `.data` is set behind autograd's back."""
    wq, wk, wv = filters
    if wv.numel() != 9 * channels or (wq is not None and wq.numel() != wk.numel()):
        refuse_sizes(channels, filters)


def check_shape(x: Tensor, mean: Tensor, attention: Saved | None) -> None:
    """The same of a layer's input, in its backward."""
    shape = x.shape
    if (
        len(shape) != 4
        or mean.shape != shape[:2]
        or (attention and attention.values[-1].shape != shape)
    ):
        raise ValueError(
            f"x: got shape {list(shape)} in the backward; allowed is that of the forward. A tensor must keep its data "
            "until the backward is done"
        )


def refuse_sizes(channels: int, filters: Filters) -> NoReturn:
    wq, wk, wv = filters
    raise ValueError(
        f"Wq, Wk, Wv: got shapes {None if wq is None else list(wq.shape)}, {list(wk.shape)}, {list(wv.shape)}; "
        f"allowed is [1, 1, size], the same for both, and [{channels}, 1, 3, 3]. A parameter must keep its data until "
        "the backward is done"
    )


def check_norm_sizes(channels: int, norm: NormAct) -> None:
    """As :func:`check_sizes`, of a norm's parameters."""
    for name, t in (("weight", norm.gamma), ("bias", norm.beta)):
        if t is not None and t.numel() != channels:
            raise ValueError(
                f"norm.{name}: got shape {list(t.shape)}; allowed is [{channels}]. A parameter must keep its data "
                "until the backward is done"
            )


def check_light_sizes(channels: int, filters: LightFilters) -> None:
    """As :func:`~ela_kernels.backends.checks.check_sizes`, with the decay."""
    wq, wk, wv, decay = filters
    check_sizes(channels, Filters(wq, wk, wv))
    if decay.numel() != channels:
        raise ValueError(
            f"lambda_t: got shape {list(decay.shape)}; allowed is [{channels}, 1, 1]. A parameter must keep its data "
            "until the backward is done"
        )


def check_light_shape(x: Tensor, v: Tensor) -> None:
    """As :func:`~ela_kernels.backends.checks.check_shape`."""
    if x.shape != v.shape:
        raise ValueError(
            f"x: got shape {list(x.shape)} in the backward; allowed is that of the forward, {list(v.shape)}. A "
            "tensor must keep its data until the backward is done"
        )
