"""What the kernels of a whole layer and of a whole residual block offer, and which backends have them.

A module with the names of :class:`LayerKernels`: `cpp_layer.py`, `cuda_layer.py` or `triton_kernels/layer.py`.
`layer.py` and `block.py` call it from their autograd nodes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor

from ela_kernels.backends.base import Request
from ela_kernels.backends.dispatch import choose_backend, current_setting
from ela_kernels.ops.layer_attention.kernels import Saved


class Filters(NamedTuple):
    """The parameters of a layer: `wq` (None where no query is wanted) and `wk` `[1, 1, size]`, `wv` `[C, 1, 3, 3]`."""

    wq: Tensor | None
    wk: Tensor
    wv: Tensor


def check_sizes(channels: int, filters: Filters) -> None:
    """Refuse filters of other sizes than the forward had: a parameter's `.data` is set behind autograd's back."""
    wq, wk, wv = filters
    if wv.numel() != 9 * channels or (wq is not None and wq.numel() != wk.numel()):
        refuse_sizes(channels, filters)


def check_shape(x: Tensor, mean: Tensor, own: Attended | None) -> None:
    """The same of a layer's input, in its backward."""
    shape = x.shape
    if len(shape) != 4 or mean.shape != shape[:2] or (own and own.saved.values[-1].shape != shape):
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


class LayerForward(NamedTuple):
    """What a layer makes of its input `x` `[B, C, H, W]`; without a query it retrieved nothing.

    `statistics` are mean and biased variance of `out` for each channel, `[2, C]`, where they were asked for. `block` is
    what a residual block makes of it, where the kernels did that in the same call; `out` may then be None.
    """

    mean: Tensor
    q: Tensor | None
    k: Tensor
    v: Tensor
    out: Tensor | None
    weights: Tensor | None
    kl: Tensor | None
    statistics: Tensor | None
    block: Tensor | None = None


class Attended(NamedTuple):
    """A layer's own attention for its backward: what it saved, and the gradients that arrived.

    `dscores` is written in the backward, and is part of what the layer leaves to those before it.
    """

    saved: Saved
    dout: Tensor | None
    dweights: Tensor | None
    dkl: Tensor | None
    dscores: Tensor
    need_prev: bool


class LayerGradients(NamedTuple):
    """Gradients of a layer's input, filters and previous weights; None where none was asked for."""

    x: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    wv: Tensor | None
    prev: Tensor | None


class Epilogue(NamedTuple):
    """What follows the retrieval in a residual block.

    `gamma` and `beta` `[C]` of the norm, None where it has none. `statistics`: mean and variance `[2, C]` to norm
    with, None where those of the batch are to be taken. `mask`: a factor for each sample `[B]`, or None. `track` is
    given the statistics that were taken: inside the node, since a checkpoint that recomputes it may stop right there.
    """

    gamma: Tensor | None
    beta: Tensor | None
    statistics: Tensor | None
    mask: Tensor | None
    eps: float
    relu: bool
    track: Callable[[Tensor], None] | None = None


def check_norm_sizes(channels: int, epilogue: Epilogue) -> None:
    """As :func:`check_sizes`, of a norm's parameters."""
    for name, t in (("weight", epilogue.gamma), ("bias", epilogue.beta)):
        if t is not None and t.numel() != channels:
            raise ValueError(
                f"norm.{name}: got shape {list(t.shape)}; allowed is [{channels}]. A parameter must keep its data "
                "until the backward is done"
            )


class NormGradients(NamedTuple):
    """Gradients of the retrieval, and of `gamma` and `beta` in any dtype, None where the norm has no such parameter.

    Where something is `pending`, it is for :meth:`LayerKernels.layer_backward`, which fills them in the same call.
    """

    o: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    pending: Any = None


class LayerKernels(Protocol):
    """The four names that a backend's module has."""

    def layer_forward(
        self,
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
        """Query, key and value from `x` (as `layout.readable` gave it), and what the query retrieves.

        Args:
            keys, values: those of the layers before; without `filters.wq` nothing is retrieved.
            epilogue: what follows in a residual block. Statistics of the batch are taken where it wants them; the rest
                of it may be done here, or is left to :meth:`norm_forward`.
            keeps_out: whether `out` will be needed after that.
        """

    def layer_backward(
        self,
        x: Tensor,
        filters: Filters,
        mean: Tensor,
        heads: int,
        index: int,
        own: Attended | None,
        retrieved: Sequence[Any],
        dk: Tensor | None,
        dv: Tensor | None,
        residual: Tensor | None,
        needs: Sequence[bool],
        pending: Any = None,
    ) -> LayerGradients:
        """All gradients of the layer at `index`.

        Args:
            own: its attention, where a gradient arrived through it.
            retrieved: what the layers that retrieved this one left, this one included if it did.
            dk, dv: gradients of key and value from elsewhere, if there are any.
            residual: what arrives past the retrieval, added to the gradient of `x`.
            needs: of x, wq, wk, wv.
            pending: what :meth:`norm_backward` left to do first.
        """

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
        """`x + mask * act(norm(o))`; asked for where :meth:`layer_forward` did not do it."""

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        epilogue: Epilogue,
        also: Tensor | None = None,
    ) -> NormGradients:
        """The gradients of what :meth:`norm_forward` does, from that of its output; `also` is added to that of `o`."""


_MODULES = {"cpp": "cpp_layer", "cuda": "cuda_layer", "triton": "triton_kernels.layer"}


@functools.cache
def layer_kernels_of(backend: str) -> LayerKernels | None:
    """The kernels of a whole layer that a backend has; None for one that has none."""
    if backend not in _MODULES:
        return None
    return cast(
        LayerKernels,
        importlib.import_module(f"ela_kernels.ops.layer_attention.{_MODULES[backend]}"),
    )


def choose_layer_kernels(
    x: Tensor, depth: int, dtype: torch.dtype | None = None, setting: str | None = None
) -> tuple[str, LayerKernels] | None:
    """The backend that serves a layer attention over `depth` maps like `x`, with its kernels of a whole layer.

    In `dtype`, where `x` is to be cast to one; under the present setting, or under one asked for before.

    None where it has none.

    Raises:
        ValueError: the forced backend cannot serve it; the message holds its reasons.
    """
    dtype = x.dtype if dtype is None else dtype
    request = Request("layer_attention", x.device, dtype, depth, False)
    backend = choose_backend(request, setting).name
    kernels = layer_kernels_of(backend)
    return None if kernels is None else (backend, kernels)


class LayerChoice:
    """:func:`choose_layer_kernels` with its last answer kept, since every layer asks twice."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        # Question and answer in one, so that no thread finds one without the other.
        self._last: tuple[Any, tuple[str, LayerKernels] | None] = (None, None)

    def __call__(
        self, x: Tensor, depth: int, dtype: torch.dtype | None = None
    ) -> tuple[str, LayerKernels] | None:
        dtype = x.dtype if dtype is None else dtype
        setting = current_setting()
        request = (dtype, x.device, depth, setting)
        last, found = self._last
        if last != request:
            found = choose_layer_kernels(x, depth, dtype, setting)
            self._last = request, found
        return found

    def again(self, x: Tensor, depth: int) -> tuple[str, LayerKernels] | None:
        """The last answer, where there was one and the question is the same; else a new one.

        Between the two another thread may have set another backend: the layer goes on as it began.
        """
        last, found = self._last
        if found is not None and last[:3] == (x.dtype, x.device, depth):
            return found
        return self(x, depth)
