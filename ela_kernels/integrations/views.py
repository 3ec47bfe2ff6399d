"""What a block gives, as the feature map `[B, C, H, W]` that layer attention works on, and back."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.fx
from torch import Tensor

from ela_kernels.modules.tokens import as_map, joined

Grid = tuple[int, int] | Literal["square"]


class Maps:
    """Blocks that give feature maps `[B, C, H, W]`."""

    what = "[B, C, H, W]"

    def map_of(self, out: object, name: str) -> Tensor:
        """The map `[B, C, H, W]` in the output of the block `name`."""
        if not isinstance(out, Tensor) or out.dim() != 4:
            raise _refused(out, name, self.what)
        return out

    def back(self, result: Tensor, out: Tensor) -> Tensor:
        """`result` `[B, C, H, W]` in the form of `out`."""
        return result


class ChannelsLast(Maps):
    """Blocks that give `[B, H, W, C]`."""

    what = "[B, H, W, C]"

    def map_of(self, out: object, name: str) -> Tensor:
        return super().map_of(out, name).permute(0, 3, 1, 2)

    def back(self, result: Tensor, out: Tensor) -> Tensor:
        return result.permute(0, 2, 3, 1)


class Tokens(Maps):
    """Blocks that give tokens `[B, prefix + H * W, C]`, row by row; the first `prefix` pass by.

    Args:
        grid: `(H, W)`, or `"square"` for whatever number of tokens has a whole root.
        prefix: number of tokens before those of the map.
    """

    what = "[B, N, C]"

    def __init__(self, grid: Grid, prefix: int = 0) -> None:
        if grid != "square" and not (
            isinstance(grid, tuple) and len(grid) == 2 and all(_is_count(n) for n in grid)
        ):
            raise ValueError(
                f"grid: got {grid!r}; allowed are 'square' and (H, W), two positive ints"
            )
        if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
            raise ValueError(f"prefix: got {prefix!r}; allowed is an int of at least 0")
        self.grid, self.prefix = grid, prefix

    def map_of(self, out: object, name: str) -> Tensor:
        if not isinstance(out, Tensor) or out.dim() != 3:
            raise _refused(out, name, self.what)
        height, width = self._grid(out.shape[1] - self.prefix, name)
        return as_map(out[:, self.prefix :] if self.prefix else out, (height, width))

    def back(self, result: Tensor, out: Tensor) -> Tensor:
        return joined(out[:, : self.prefix] if self.prefix else None, result)

    def _grid(self, count: int, name: str) -> tuple[int, int]:
        if not isinstance(self.grid, str):
            height, width = self.grid
            if height * width == count:
                return height, width
            raise ValueError(
                f"{name}: got {count} tokens of a map, beside {self.prefix} others; allowed are {height * width}, for "
                f"the grid {height} x {width} that the layers were added with. Give images of one size, or "
                "grid='square'"
            )
        side = math.isqrt(max(count, 0))
        if count > 0 and side * side == count:
            return side, side
        raise ValueError(
            f"{name}: got {count} tokens of a map, beside {self.prefix} others, which are no square; allowed with "
            "grid='square' are squares. Name the grid: grid=(H, W)"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refused(out: object, name: str, what: str) -> TypeError | ValueError:
    if isinstance(out, Tensor):
        return ValueError(f"{name}: got an output of shape {list(out.shape)}; allowed is {what}")
    if isinstance(out, torch.fx.Proxy):
        return TypeError(
            f"{name}: got an output that is a torch.fx.Proxy; allowed is a torch.Tensor {what}. torch.fx cannot trace "
            "into blocks with attached layers, whose history travels with the tensors: use torch.export.export(model, "
            "...), or ela_kernels.integrations.detach(model) first"
        )
    return TypeError(
        f"{name}: got an output that is a {type(out).__name__}; allowed is a torch.Tensor {what}"
    )
