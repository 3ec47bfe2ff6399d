"""What goes into kernels and comes out of them: values that every backend and every operation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


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


class Retrieval(Protocol):
    """What one layer's backward leaves for the layers that it retrieved from; made by :meth:`Kernels.Retrieved`."""

    dout: Tensor | None
    dout_version: int


class Filters(NamedTuple):
    """The parameters of a layer: `wq` (None where no query is wanted) and `wk` `[1, 1, size]`, `wv` `[C, 1, 3, 3]`."""

    wq: Tensor | None
    wk: Tensor
    wv: Tensor


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


class NormGradients(NamedTuple):
    """Gradients of the retrieval, and of `gamma` and `beta` in any dtype, None where the norm has no such parameter.

    Where something is `pending`, it is for :meth:`LayerKernels.layer_backward`, which fills them in the same call.
    """

    o: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    pending: Any = None


class LightFilters(NamedTuple):
    """The parameters of a layer: `wq` and `wk` `[1, 1, size]`, `wv` `[C, 1, 3, 3]`, `decay` `[C, 1, 1]`.

    The decay may be in float32 beside maps in half precision.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    decay: Tensor


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
