"""Calls of the Triton kernels with a tolerance, and what they have to give."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from support.layouts import channel_slice, channels_last, contiguous
from torch import Tensor

from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.types import Saved

TOLERANCE = 2.0**-8
DEPTH = 6  # more than one group of values, and not all of the last
SPECIAL = (math.inf, -math.inf, math.nan)

# Shape, heads, layout, dtype.
MAPS = [
    ((2, 12, 5, 3), 3, contiguous, torch.float32),  # several heads to a tile, off 16 bytes
    ((2, 16, 4, 8), 16, contiguous, torch.bfloat16),
    ((1, 4, 40, 40), 2, contiguous, torch.float32),  # several segments to a head
    ((2, 6, 4, 5), 2, channel_slice, torch.float32),  # gaps between channels
    ((1, 160, 3, 3), 2, contiguous, torch.float32),  # scores in a launch of their own
    ((2, 32, 4, 4), 2, channels_last, torch.float32),  # what is read at once is of one head
    ((2, 32, 4, 4), 2, channels_last, torch.bfloat16),
    ((2, 24, 4, 4), 4, channels_last, torch.float32),  # of two heads: 6 channels each, 4 at once
    ((2, 48, 3, 3), 4, channels_last, torch.bfloat16),  # 12 channels each, 8 at once
    ((2, 16, 4, 4), 16, channels_last, torch.bfloat16),  # of eight heads
    ((1, 37, 3, 3), 37, channels_last, torch.float32),  # element by element
    ((1, 8, 40, 40), 2, channels_last, torch.float32),  # several tiles
    ((1, 288, 3, 4), 3, channels_last, torch.float32),
]
SOME_MAPS = [MAPS[0], MAPS[1], MAPS[6], MAPS[7]]


def names(maps: Any) -> str:
    shape, heads, maker, dtype = maps
    return f"{'x'.join(map(str, shape))}-{heads}-{maker.__name__}-{str(dtype)[6:]}"


class Call(NamedTuple):
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    heads: int
    scale: float
    weights: Tensor

    def attend(self, tolerance: float) -> tuple[Tensor, Tensor, Tensor | None]:
        return KERNELS["triton"].attend(
            self.q, self.keys, self.values, self.heads, self.scale, None, False, tolerance
        )

    def saved(self, tolerance: float) -> Saved:
        return Saved(
            self.q,
            self.keys,
            self.values,
            self.heads,
            self.scale,
            None,
            self.weights,
            False,
            tolerance,
        )

    def backward(
        self, tolerance: float, dout: Tensor | None, push: bool = False, **given: Any
    ) -> Any:
        wanted = [push] * len(self.keys)
        dweights = given.get("dweights")
        return KERNELS["triton"].attend_backward(
            self.saved(tolerance), dout, dweights, None, True, False, wanted, wanted
        )


def make_call(maps: Any, spread: float = 4.0) -> Call:
    """Scores so far apart that some weights are below the tolerance, and none is near it."""
    shape, heads, maker, dtype = maps
    q = torch.randn(shape[:2]).to(dtype)
    keys = [torch.randn(shape[:2]).to(dtype) for _ in range(DEPTH)]
    values = [maker(shape, dtype) for _ in range(DEPTH)]
    scale = spread * (shape[1] // heads) ** -0.5
    weights, _ = KERNELS["triton"].weights(q, keys, heads, scale, None)
    return Call(q, keys, values, heads, scale, weights)


def left_out(call: Call, tolerance: float = TOLERANCE) -> Tensor:
    """`[B, G, T]`; of both kinds, and nothing that rounding could make of the other kind."""
    below = call.weights < tolerance
    assert below.any()
    assert not below.all()
    assert ((call.weights / tolerance - 1).abs() > 1e-4).all()
    return below


def by_channel(per_head: Tensor, like: Tensor) -> Tensor:
    """`[B, G]` spread over a map."""
    wide = per_head.repeat_interleave(like.shape[1] // per_head.shape[1], 1)
    return wide.reshape(*wide.shape, *[1] * (like.dim() - 2)).expand_as(like)


def spoil(maps: Tensor, below: Tensor) -> None:
    """Every element of the heads that are left out becomes an infinity or a NaN, in turn."""
    where = by_channel(below, maps)
    special = torch.tensor(SPECIAL, dtype=maps.dtype)
    maps[where] = special[torch.arange(int(where.sum())) % len(SPECIAL)]


def product(weights: Tensor, below: Tensor, maps: Tensor) -> Tensor:
    """`weights * maps` in float64, zero where it is left out."""
    return (by_channel(weights, maps).double() * maps.double()).masked_fill(
        by_channel(below, maps), 0.0
    )


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert not expected.isnan().any()
    # The interpreter cuts float32 to bfloat16 where a GPU rounds: an ulp.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-5)
