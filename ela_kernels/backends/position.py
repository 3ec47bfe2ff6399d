"""What goes into kernels of attention over depth at every position, and comes out; beside `types.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ela_kernels.backends.memory import check_list_readable, check_readable


class PositionCall(NamedTuple):
    """One retrieval at every position: score_t is the sum over channels of `row * query * key_t`, over its RMS.

    Attributes:
        row: a factor for each channel `[C]`, in the accumulation dtype: scale and norm weight, and the query where that
            is a vector.
        query: a map or tokens, like a value; None where it is part of `row`.
        values: T maps `[B, C, *spatial]`, or `[B, *spatial, C]` with `channels_last`.
        keys: T maps like them; None where each value is its own key.
        normed: whether a key is divided by its root mean square over the channels, `sqrt(mean(key^2) + eps)`.
        prev_weights: `[B, t, *positions]` with t <= T, in the accumulation dtype.
    """

    row: Tensor
    query: Tensor | None
    values: Sequence[Tensor]
    keys: Sequence[Tensor] | None
    normed: bool
    eps: float
    prev_weights: Tensor | None
    channels_last: bool

    @property
    def places(self) -> list[int]:
        """`[B, *positions]`: a value's shape without its channels."""
        shape = list(self.values[-1].shape)
        del shape[-1 if self.channels_last else 1]
        return shape

    def check_readable(self, *others: tuple[str, Tensor | None]) -> None:
        """Refuse tensors of the call, and others by their names, that kernels on the values' device cannot read.

        Raises:
            ValueError: one has no memory, or is on another device.
        """
        device = self.values[-1].get_device()
        check_list_readable(device, "values", self.values)
        check_list_readable(device, "keys", self.keys or ())
        named = [("query", self.row), ("query", self.query), ("prev_weights", self.prev_weights)]
        named += others
        check_readable(device, [name for name, _ in named], [tensor for _, tensor in named])


class PositionNeeds(NamedTuple):
    """Which gradients are wanted."""

    row: bool
    query: bool
    prev: bool
    values: Sequence[bool]
    keys: Sequence[bool]


class PositionGradients(NamedTuple):
    """Gradients of one retrieval; None where none was asked for.

    Attributes:
        coefficients: planes `[3, B, T, *positions]`, of which the first two say what a score passes on to its key: its
            gradient is `alpha * row * query - beta * key`.
        values, keys: in the push form; where each value is its own key, that of the value holds both parts.
    """

    coefficients: Tensor
    row: Tensor | None
    query: Tensor | None
    prev: Tensor | None
    values: list[Tensor | None]
    keys: list[Tensor | None]


class PositionLeft(NamedTuple):
    """What one layer's backward leaves for the values that it read: `w * dout + alpha * row * query - beta * v`."""

    row: Tensor
    query: Tensor | None
    weights: Tensor
    coefficients: Tensor
    dout: Tensor | None
    dout_version: int
