"""Feature maps of one shape, laid out in memory in every way that a network or a user may hand over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = Sequence[int]


def contiguous(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape)).to(dtype)


def channels_last(shape: Shape, dtype: torch.dtype) -> Tensor:
    """`[B, C, *spatial]` with the channels of a position together."""
    return contiguous((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1)


def batch_slice(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((2 * shape[0], *shape[1:]), dtype)[1::2]


def channel_slice(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((shape[0], shape[1] + 5, *shape[2:]), dtype)[:, 3 : 3 + shape[1]]


def channel_step(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((shape[0], 2 * shape[1], *shape[2:]), dtype)[:, ::2]


def last_slice(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A slice of the last dimension: of the width of a map, of the channels of tokens."""
    return contiguous((*shape[:-1], shape[-1] + 4), dtype)[..., 2:-2]


def last_step(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]


def channels_last_slice(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Some of the channels of a channels_last map: gaps between positions."""
    wide = contiguous((shape[0], *shape[2:], shape[1] + 3), dtype)
    return wide[..., 1 : 1 + shape[1]].movedim(-1, 1)


def channels_last_batch_slice(shape: Shape, dtype: torch.dtype) -> Tensor:
    return channels_last((2 * shape[0], *shape[1:]), dtype)[::2]


def transposed(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Last dimension and the one before swapped: neither planar nor interleaved for a map."""
    return contiguous((*shape[:-2], shape[-1], shape[-2]), dtype).transpose(-1, -2)


def one_batch(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((1, *shape[1:]), dtype).expand(*shape)


def one_channel(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((shape[0], 1, *shape[2:]), dtype).expand(*shape)


def one_position(shape: Shape, dtype: torch.dtype) -> Tensor:
    return contiguous((*shape[:2], *[1] * (len(shape) - 2)), dtype).expand(*shape)


def one_number(shape: Shape, dtype: torch.dtype) -> Tensor:
    """All strides zero: what the backward of `.sum()` hands over."""
    return contiguous((), dtype).expand(*shape)


def second_slice(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Tokens after a class token: a slice of the second dimension."""
    return contiguous((shape[0], shape[1] + 1, *shape[2:]), dtype)[:, 1:]


MAP_LAYOUTS = (
    contiguous,
    channels_last,
    batch_slice,
    channel_slice,
    channel_step,
    last_slice,
    last_step,
    channels_last_slice,
    channels_last_batch_slice,
    transposed,
    one_batch,
    one_channel,
    one_position,
    one_number,
)
TOKEN_LAYOUTS = (
    contiguous,
    transposed,  # a planar map seen as tokens
    batch_slice,
    second_slice,
    channel_step,  # every other token
    last_slice,
    last_step,
    one_batch,
    one_number,
)
