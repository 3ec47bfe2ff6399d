"""The sizes and depths of maps and tokens that every backend is tested with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.layouts import batch_slice, channel_slice, channels_last, contiguous
from torch import Tensor

Size = tuple[tuple[int, ...], int]  # of a map or of tokens, and the number of heads

SIZES: list[Size] = [
    ((1, 1, 1, 1), 1),
    ((2, 1, 3, 5), 1),
    ((1, 37, 7, 7), 1),
    ((2, 37, 7, 7), 37),  # channel-wise heads
    ((3, 8, 1, 1), 8),
    ((2, 16, 4, 4), 16),
    ((2, 24, 9, 33), 3),
    ((2, 24, 4, 4), 4),  # six channels to a head: vectors that span heads
    ((2, 40, 4, 4), 8),
    ((2, 10, 1), 5),
    ((2, 4, 123), 2),
    ((2, 6, 2, 3, 5), 3),
    ((1, 66, 1, 3), 2),
    ((1, 192, 2, 4), 3),  # more vectors than a strip is wide
    ((1, 272, 3, 3), 2),
    ((1, 1030, 2, 4), 5),
    ((7, 32, 2, 2), 2),
    ((3, 8), 2),  # no position at all
    ((0, 6, 3, 5), 2),
    ((2, 6, 0, 5), 2),
]
TOKEN_SIZES: list[Size] = [
    ((2, 1, 6), 1),
    ((2, 123, 1), 1),
    ((1, 1, 1), 1),
    ((2, 3, 5, 8), 1),
    ((2, 2, 3, 2, 8), 1),
    ((2, 50, 64), 1),
]
# Of whole layers: one channel, one position, few of both, channel-wise heads, more channels than a strip. A head's
# number of channels stands in place of the number of heads.
LAYER_SIZES: list[Size] = [
    ((1, 1, 1, 1), 1),
    ((2, 1, 3, 5), 1),
    ((2, 6, 1, 1), 2),
    ((2, 6, 3, 5), 2),
    ((3, 6, 3, 5), 6),
    ((2, 37, 7, 7), 1),
    ((3, 37, 7, 7), 37),
    ((1, 6, 9, 33), 3),
    ((2, 12, 9, 33), 1),
    ((5, 70, 17, 4), 14),
    ((2, 6, 16, 16), 6),
    ((2, 130, 2, 1), 26),
    ((2, 136, 2, 3), 8),
    ((2, 4, 1, 40), 2),
    ((1, 3, 56, 56), 3),
]
DEPTHS = [1, 2, 3, 4, 5, 8, 31, 32, 33, 65, 255, 256]


def _gaps(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Channels with some elements between them."""
    wide = contiguous((shape[0], shape[1], shape[2] * shape[3] + 5), dtype)
    return wide[..., :-5].unflatten(-1, tuple(shape[2:]))


# Shape, heads and layout that end in the middle of what the CPU kernels work on at a time: planar maps in chunks of
# 2048 elements, eight chunks to a partial sum; interleaved ones in blocks of 32 768 elements, 1024 channels to a
# running sum.
BEYOND_CHUNKS = [
    ((1, 2, 149, 131), 1, contiguous),  # one head of 39 038 elements without gaps
    ((1, 18, 33, 67), 2, channel_slice),
    ((1, 18, 33, 67), 2, _gaps),
    ((2, 37, 33, 31), 37, channels_last),
    ((1, 1030, 6, 7), 5, channels_last),  # heads of 206 channels: the fifth straddles 1024
    ((1, 2100, 3, 3), 3, channels_last),
    ((1, 33000, 1, 2), 2, channels_last),  # a position larger than a block
]
# Several blocks to a head, a last one that is not full, heads of many channels, and more samples and heads than a
# grid's second and third dimension hold (65 535).
BEYOND_GRIDS = [
    ((1, 2, 149, 131), 1, contiguous),
    ((2, 64, 56, 56), 4, contiguous),
    ((2, 64, 56, 56), 4, channels_last),
    ((1, 18, 33, 67), 2, channel_slice),
    ((3, 18, 33, 67), 2, batch_slice),
    ((2, 37, 33, 31), 37, channels_last),
    ((1, 1030, 6, 7), 5, channels_last),
    ((1, 2100, 3, 3), 3, channels_last),
    ((1, 33000, 1, 2), 2, channels_last),
    ((66000, 2, 1, 3), 1, contiguous),
    ((700, 100, 1, 2), 100, contiguous),
    ((700, 100, 1, 2), 100, channels_last),
]
