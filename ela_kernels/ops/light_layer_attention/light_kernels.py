"""What the kernels of a whole light layer offer, and which backends have them.

A module with the names of :class:`LightKernels`: `cpp_layer.py` or `triton_layer.py`. `layer.py` calls it from its
autograd nodes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from ela_kernels.backends import dispatch
from ela_kernels.backends.base import Request, is_transformed
from ela_kernels.ops.layer_attention.autocast import fits_layer_dtype, layer_dtype
from ela_kernels.ops.layer_attention.autograd import needs_dispatcher
from ela_kernels.ops.layer_attention.kernels import resolved
from ela_kernels.ops.layer_attention.layer_kernels import (
    Epilogue,
    Filters,
    NormGradients,
    check_sizes,
)
from ela_kernels.ops.layer_attention.layout import in_form, is_interleaved


class LightFilters(NamedTuple):
    """The parameters of a layer: `wq` and `wk` `[1, 1, size]`, `wv` `[C, 1, 3, 3]`, `decay` `[C, 1, 1]`.

    The decay may be in float32 beside maps in half precision.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    decay: Tensor


def check_light_sizes(channels: int, filters: LightFilters) -> None:
    """As :func:`~ela_kernels.ops.layer_attention.layer_kernels.check_sizes`, with the decay."""
    wq, wk, wv, decay = filters
    check_sizes(channels, Filters(wq, wk, wv))
    if decay.numel() != channels:
        raise ValueError(
            f"lambda_t: got shape {list(decay.shape)}; allowed is [{channels}, 1, 1]. A parameter must keep its data "
            "until the backward is done"
        )


class LightForward(NamedTuple):
    """What a layer makes of its input; all but `out` and what follows the factors is kept for the backward.

    `factors` are the gates as the backend's backward reads them. `statistics` `[2, C]` are mean and biased variance of
    `out` for each channel, where an epilogue takes those of the batch. `block` is what a residual block makes of it,
    where the kernels did that in the same call.
    """

    out: Tensor
    mean: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    factors: Tensor
    statistics: Tensor | None
    block: Tensor | None = None


class LightGradients(NamedTuple):
    """Gradients of a layer's inputs; None where none was asked for."""

    x: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    wv: Tensor | None
    decay: Tensor | None
    prev: Tensor | None


def check_light_shape(x: Tensor, kept: LightForward) -> None:
    """As :func:`~ela_kernels.ops.layer_attention.layer_kernels.check_shape`."""
    if x.shape != kept.v.shape:
        raise ValueError(
            f"x: got shape {list(x.shape)} in the backward; allowed is that of the forward, {list(kept.v.shape)}. A "
            "tensor must keep its data until the backward is done"
        )


class LightKernels(Protocol):
    """The four names that a backend's module has. Maps are in one form: that of a readable `x`."""

    def light_layer_forward(
        self,
        x: Tensor,
        filters: LightFilters,
        prev: Tensor,
        heads: int,
        scale: float,
        epilogue: Epilogue | None = None,
    ) -> LightForward:
        """Query, key and value from `x`, and `gate * v + decay * prev`.

        Args:
            epilogue: what follows in a residual block. Statistics of the batch are taken where it wants them; the rest
                of it may be done here, or is left to :meth:`norm_forward`.
        """

    def light_layer_backward(
        self,
        x: Tensor,
        filters: LightFilters,
        prev: Tensor,
        heads: int,
        scale: float,
        kept: LightForward,
        dout: Tensor,
        residual: Tensor | None,
        needs: Sequence[bool],
        pending: Any = None,
    ) -> LightGradients:
        """All gradients of a layer.

        Args:
            residual: what arrives at `x` past the layer, added to its gradient.
            needs: of x, wq, wk, wv, decay, prev.
            pending: what :meth:`norm_backward` left to do first.
        """

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
        """As of :class:`~ela_kernels.ops.layer_attention.layer_kernels.LayerKernels`."""

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        epilogue: Epilogue,
        also: Tensor | None = None,
    ) -> NormGradients:
        """As of :class:`~ela_kernels.ops.layer_attention.layer_kernels.LayerKernels`."""


_MODULES = {"triton": "triton_layer", "cpp": "cpp_layer"}


@functools.cache
def light_kernels_of(backend: str) -> LightKernels:
    """The kernels of a whole light layer of a backend that can run here; imported at their first use."""
    module = importlib.import_module(f"ela_kernels.ops.light_layer_attention.{_MODULES[backend]}")
    return cast(LightKernels, module)


def choose_light_kernels(x: Tensor, filters: Sequence[Tensor], prev: Tensor) -> LightKernels | None:
    """The kernels that serve a whole light layer under the present setting; None where PyTorch and the op do.

    A forced backend that has no such kernels serves the layer still, in several calls.
    """
    dtype, device = layer_dtype(x), x.device
    for t in (x, prev, *filters):
        if needs_dispatcher(t) or t.device != device:
            return None
        if t.dtype is not dtype and not fits_layer_dtype(t, x):
            return None
    if is_transformed() or not x.numel() or prev.shape != x.shape:
        return None
    backend = dispatch.that_would_serve(
        tuple(_MODULES), Request("light_layer", device, dtype, 1, False)
    )
    return None if backend is None else light_kernels_of(backend)


def as_read_beside(x: Tensor, other: Tensor) -> Tensor:
    """`other` as the kernels read it beside `x`: itself, or a copy."""
    return in_form(resolved(other), False, is_interleaved(x, False))
