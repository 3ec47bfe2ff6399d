"""What goes into kernels and comes out of them: values that every backend and every operation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

LEAST_TOLERANCE = 2.0**-149
"""The least number that float32 has: below it a tolerance would be zero to some kernels, and not to others."""


class Saved(NamedTuple):
    """What the attention of one layer leaves to its backward.

    `tolerance`: retrievals of a smaller weight were left out, and have no part in the backward either.
    """

    q: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: int
    scale: float
    prev_weights: Tensor | None
    weights: Tensor
    channels_last: bool
    tolerance: float = 0.0


class Gradients(NamedTuple):
    """Gradients of one attention; None where none was asked for. `dkeys` and `dvalues` only in the push form.

    `dscores` is that of the dot products before the scale, so that a key's gradient is a plain sum over layers.
    """

    dscores: Tensor
    dq: Tensor | None
    dprev: Tensor | None
    dkeys: list[Tensor | None]
    dvalues: list[Tensor | None]


class MixGradients(NamedTuple):
    """Of a sum of values by given weights; None where none was asked for."""

    weights: Tensor | None
    values: list[Tensor | None]


class Contribution(Protocol):
    """What one layer's backward leaves for the layers that it retrieved from; each backend has its own kind.

    `dscores` is that of :class:`Gradients`, `tolerance` that of :class:`Saved`.
    """

    dscores: Tensor
    dout: Tensor | None
    dout_version: int


class Filters(NamedTuple):
    """The parameters of a layer: `wq` (None where no query is wanted) and `wk` `[1, 1, size]`, `wv` `[C, 1, 3, 3]`."""

    wq: Tensor | None
    wk: Tensor
    wv: Tensor


class Residual(NamedTuple):
    """What follows the retrieval `o` of a layer: `x + o`."""


class Running(NamedTuple):
    """What a norm keeps of the statistics that it takes, changed in place.

    `mean <- (1 - factor) * mean + factor * found`, and so the variance with the unbiased one; `batches` is counted up.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor | None
    factor: float


class Track(Protocol):
    """Takes the statistics `[2, C]` of a batch into those that a norm keeps.

    Attributes:
        running: what a kernel may change instead of a call; None where it may not.
    """

    @property
    def running(self) -> Running | None: ...

    def __call__(self, statistics: Tensor, applies: Tensor | None = None) -> None: ...


class NormAct(NamedTuple):
    """What follows the retrieval `o` in a residual block: `x + mask * act(norm(o))`.

    Attributes:
        gamma, beta: `[C]` of the norm, None where it has none.
        statistics: mean and variance `[2, C]` to norm with, None where those of the batch are to be taken.
        mask: a factor for each sample `[B]`, or None.
        eps: of the norm.
        relu: whether the activation is a ReLU, or nothing.
        track: is given the statistics that were taken, unless a kernel has done its work: inside the node, since a
            checkpoint that recomputes it may stop right there.
    """

    gamma: Tensor | None
    beta: Tensor | None
    statistics: Tensor | None
    mask: Tensor | None
    eps: float
    relu: bool
    track: Track | None = None


class Retrieved(NamedTuple):
    """An earlier layer's retrieval, and the mean and variance `[2, C]` to norm it with: its own, or given ones."""

    o: Tensor
    statistics: Tensor


class NormGradients(NamedTuple):
    """Of the retrieval, and of `gamma` and `beta` in any dtype, None where the norm has no such parameter."""

    o: Tensor
    gamma: Tensor | None
    beta: Tensor | None


Epilogue = Residual | NormAct
RESIDUAL = Residual()
EPILOGUES = (type(None), Residual, NormAct)
"""What a backend has to know, or refuse: what it left out would be missing in the numbers."""


class LayerForward(NamedTuple):
    """What a layer makes of its input `x` `[B, C, H, W]`; without a query it retrieved nothing.

    Attributes:
        mean, q, k, v: of `x`; q is None without its filter. `v` is in the dtype that the history holds values in.
        out: what the layer gives, its epilogue included.
        weights, kl: of its attention.
        retrieved: with a norm, what was normed, if it was to be kept; None otherwise.
        statistics: with a norm, mean and biased variance `[2, C]` that it normed with.
        tracked: whether the norm's running statistics are moved on already.
    """

    mean: Tensor
    q: Tensor | None
    k: Tensor
    v: Tensor
    out: Tensor | None = None
    weights: Tensor | None = None
    kl: Tensor | None = None
    retrieved: Tensor | None = None
    statistics: Tensor | None = None
    tracked: bool = False


class SavedLayer(NamedTuple):
    """What a whole layer leaves to its backward.

    Attributes:
        x, filters: its input and parameters.
        mean: of `x` over space.
        heads: of the history.
        attention: None for a layer that only provides.
        epilogue: without its `track`; without `attention` that of an earlier layer's retrieval.
        retrieved, statistics: as of :class:`LayerForward`.
    """

    x: Tensor
    filters: Filters
    mean: Tensor
    heads: int
    attention: Saved | None
    epilogue: Epilogue | None
    retrieved: Tensor | None
    statistics: Tensor | None


class Arrived(NamedTuple):
    """The gradients that arrive at a whole layer: of its outputs, and of key and value from elsewhere than the record.

    `out` is in the form of the layer's maps; see `layout.in_form_of`. `retrieved`: of what a norm was given, from later
    blocks that took it too.
    """

    out: Tensor | None
    weights: Tensor | None
    kl: Tensor | None
    key: Tensor | None
    value: Tensor | None
    retrieved: Tensor | None = None


class LayerNeeds(NamedTuple):
    """Which gradients of a layer's inputs are wanted; those of a norm's parameters always are."""

    x: bool
    wq: bool
    wk: bool
    wv: bool
    prev: bool


class LayerGradients(NamedTuple):
    """Gradients of a layer's inputs, of previous weights and of a norm's parameters; None where none was asked for.

    Those of `gamma` and `beta` may be of another dtype than the parameters. `retrieved`: of an earlier layer's
    retrieval, which the epilogue was given.
    """

    x: Tensor | None = None
    wq: Tensor | None = None
    wk: Tensor | None = None
    wv: Tensor | None = None
    prev: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    retrieved: Tensor | None = None


NO_GRADIENTS = LayerGradients()


class LightFilters(NamedTuple):
    """The parameters of a light layer: `wq` and `wk` `[1, 1, size]`, `wv` `[C, 1, 3, 3]`, `decay` `[C, 1, 1]`.

    The decay may be in float32 beside maps in half precision.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    decay: Tensor


ValueAct = Literal["gelu", "gelu_tanh"]
"""What the value of a light layer passes before it is gated: GELU as it is, or in the form with a tanh."""
VALUE_ACT_CODES: dict[ValueAct | None, int] = {None: 0, "gelu": 1, "gelu_tanh": 2}
"""As the kernels know them, whichever backend's."""


class LightForward(NamedTuple):
    """What a light layer makes of its input; all but `out` and what follows the factors is kept for the backward.

    Attributes:
        out: the light output, which goes on to the next layer.
        mean, q, k, v: of the input; `v` before its activation, None where no backward follows and it was not kept.
        factors: the gates as the backend's backward reads them.
        statistics: with a norm, mean and biased variance `[2, C]` that it normed with.
        block: with a norm, `x + mask * act(norm(out))`.
        tracked: as of :class:`LayerForward`.
    """

    out: Tensor
    mean: Tensor
    q: Tensor
    k: Tensor
    v: Tensor | None
    factors: Tensor
    statistics: Tensor | None = None
    block: Tensor | None = None
    tracked: bool = False


class SavedLightLayer(NamedTuple):
    """What a light layer leaves to its backward: its inputs, and what the forward made of them.

    `value_act` is None where the value is gated as it is; `out` and `statistics` are there where a norm follows.
    """

    x: Tensor
    filters: LightFilters
    prev: Tensor
    heads: int
    scale: float
    value_act: ValueAct | None
    epilogue: NormAct | None
    mean: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    factors: Tensor
    out: Tensor | None
    statistics: Tensor | None


class LightNeeds(NamedTuple):
    """Which gradients of a light layer's inputs are wanted; those of a norm's parameters always are."""

    x: bool
    wq: bool
    wk: bool
    wv: bool
    decay: bool
    prev: bool


class LightGradients(NamedTuple):
    """Gradients of a light layer's inputs and of a norm's parameters; None where none was asked for."""

    x: Tensor | None = None
    wq: Tensor | None = None
    wk: Tensor | None = None
    wv: Tensor | None = None
    decay: Tensor | None = None
    prev: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
