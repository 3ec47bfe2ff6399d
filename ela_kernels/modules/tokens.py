"""Tokens `[B, N, C]`, as vision transformers have them: seen as the maps that layers work on, and back."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.ops import checks

Grid = tuple[int, int]

# Tokens beside a square that are likely no patches: a class token, another one to distil with, four registers.
_USUAL_PREFIXES = (1, 2, 5)


def as_map(tokens: Tensor, grid: Grid | None = None) -> Tensor:
    """`[B, N, C]` as a view `[B, C, H, W]`; a square of positions where no grid is given."""
    batch, positions, channels = tokens.shape
    if grid is None:
        side = _side(positions)
        grid = side, side
    return tokens.view(batch, *grid, channels).permute(0, 3, 1, 2)


def as_tokens(maps: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B, N, C]`, a view where positions lie one after the other."""
    return maps.flatten(2).transpose(1, 2)


def _side(positions: int) -> int:
    """Of the largest square that so many positions fill."""
    # An index is a number for the compiler too, where sizes are symbols.
    return math.isqrt(operator.index(positions))


def check_prefix_tokens(prefix_tokens: object) -> int:
    """A number of tokens, or an error that names the argument."""
    if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int):
        raise TypeError(
            f"prefix_tokens: got {type(prefix_tokens).__name__}; allowed is an int of at least 0, the number of class "
            "and register tokens before the patches"
        )
    if prefix_tokens < 0:
        raise ValueError(
            f"prefix_tokens: got {prefix_tokens}; allowed is an int of at least 0, the number of class and register "
            "tokens before the patches"
        )
    return prefix_tokens


def check_grid(grid: object) -> Grid | None:
    """Height and width in patches, or an error that names the argument."""
    if grid is None:
        return None
    allowed = "allowed is (height, width) of the patches, two positive ints, or None for a square"
    if not isinstance(grid, (tuple, list)):
        raise TypeError(f"grid: got {type(grid).__name__}; {allowed}")
    sizes = [n for n in grid if isinstance(n, int) and not isinstance(n, bool)]
    if not len(sizes) == len(grid) == 2:
        raise TypeError(f"grid: got {grid!r}; {allowed}")
    if min(sizes) < 1:
        raise ValueError(f"grid: got {grid!r}; {allowed}")
    return sizes[0], sizes[1]


class TakesTokens:
    """A layer on maps that takes tokens as well: what lies between the two is done here, at the entrance of forward.

    Attributes:
        prefix_tokens: number of tokens before the patches, which are no part of the map.
        grid: height and width of the map; None for a square.
    """

    # Of the class, for layers that were pickled before they took tokens, and for converted ones.
    prefix_tokens: int = 0
    grid: Grid | None = None

    def _take_tokens(self, prefix_tokens: int, grid: Grid | None) -> None:
        self.prefix_tokens = check_prefix_tokens(prefix_tokens)
        self.grid = check_grid(grid)

    def _split(self, x: Tensor, dim: int | None) -> tuple[Tensor | None, Tensor]:
        """The tokens before the patches (None where there are none), and the patches as a map `[B, C, H, W]`.

        Both are views.

        Args:
            dim: number of channels that the layer was made with; None where that is not known.

        Raises:
            TypeError, ValueError: `x` is no dense tensor, or its tokens do not fit.
        """
        if x.is_nested or x.layout != torch.strided:
            checks.check_tensor("x", x)
        prefix, grid = self.prefix_tokens, self.grid
        shape = x.shape
        positions = shape[1] - prefix
        if dim is not None and shape[2] != dim:
            raise ValueError(
                f"x: got shape {list(shape)}; allowed is [B, {dim}, H, W] or [B, N, {dim}] (tokens), as this layer was "
                f"made with dim={dim}"
            )
        if positions < 1:
            raise ValueError(
                f"x: got shape {list(shape)}, {shape[1]} tokens with prefix_tokens={prefix}; allowed is at least one "
                "patch after them. Give the layer all tokens, or make it with fewer prefix_tokens"
            )
        if grid is None:
            if _side(positions) ** 2 != positions:
                raise ValueError(_no_square(shape, prefix, positions))
        elif positions != grid[0] * grid[1]:
            raise ValueError(_no_grid(shape, prefix, positions, grid))
        if not prefix:
            return None, as_map(x, grid)
        # As one node, whose backward writes no zeros.
        first, patches = torch.split(x, [prefix, positions], 1)
        return first, as_map(patches, grid)

    def _tokens_repr(self) -> str:
        found = f", prefix_tokens={self.prefix_tokens}" if self.prefix_tokens else ""
        return found if self.grid is None else f"{found}, grid={self.grid}"


def joined(first: Tensor | None, maps: Tensor) -> Tensor:
    """Tokens of what came before the patches, as it is, and of a map; a view of the map where nothing came before."""
    tokens = as_tokens(maps)
    return tokens if first is None else torch.cat((first, tokens), 1)


def joined_with_zeros(prefix_tokens: int, maps: Tensor) -> Tensor:
    """Tokens of a map, with so many zeros before them."""
    tokens = as_tokens(maps)
    return F.pad(tokens, (0, 0, prefix_tokens, 0)) if prefix_tokens else tokens


def is_same_memory(out: Tensor, x: Tensor) -> bool:
    """Whether `out` is nothing but a view of `x`, and so its numbers; False where that cannot be looked at."""
    if needs_dispatcher(out) or is_transformed() or out.is_meta or not out.numel():
        return False
    return (
        out.data_ptr() == x.data_ptr()
        and out.dtype == x.dtype
        and out.shape == x.shape
        and out.stride() == x.stride()
    )


def _no_square(shape: torch.Size, prefix: int, positions: int) -> str:
    side = _side(positions)
    more = positions - side * side
    advice = f"Make the layer with grid=(height, width) of its {positions} patches"
    if more in _USUAL_PREFIXES and side > 1:
        kind = "a class token" if more == 1 else f"{more} class and register tokens"
        advice += (
            f"; or with prefix_tokens={prefix + more}: {positions} is {side} * {side} + {more}, as with {kind} "
            + ("before the patches" if not prefix else "more")
        )
    return (
        f"x: got shape {list(shape)}, {positions} tokens after prefix_tokens={prefix}, which make no square; allowed "
        f"without a grid is a square number of them. {advice}"
    )


def _no_grid(shape: torch.Size, prefix: int, positions: int, grid: Grid) -> str:
    wanted = grid[0] * grid[1]
    advice = "Give the grid that the patches have"
    if shape[1] > wanted:
        advice += f", or prefix_tokens={shape[1] - wanted} where the first {shape[1] - wanted} are no patches"
    return (
        f"x: got shape {list(shape)}, {positions} tokens after prefix_tokens={prefix}; allowed with grid={grid} are "
        f"{wanted}. {advice}"
    )
