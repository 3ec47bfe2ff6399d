"""Launch configurations by shape: one small place to tune. Nothing here is autotuned at run time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ela_kernels.backends.types import LEAST_TOLERANCE

NUM_WARPS = 4

# Elements of a tile: 16 a thread, four 16-byte reads of float32 or two of half precision. Off 16 bytes, elements are
# read one by one and wait in registers of their own: four a thread.
_TILE = 2048
_TILE_UNALIGNED = 512
_MAX_COLS = 1024
_MIN_COLS = 16
_MIN_ROWS = 8
_MAX_STRIP_BYTES = 256  # interleaved: channels of a position that one program reads

# Enough programs to fill a large GPU a few times; smaller problems are cut finer, as long as every thread of a program
# has 16 bytes of each map to read.
_ENOUGH_PROGRAMS = 1024
_MIN_TILE_BYTES = 16 * 32 * NUM_WARPS

# Elements of a patch of a depthwise convolution: four a thread, nine sums and nine taps for each in registers.
_PATCH_ELEMENTS = 512
_MAX_PATCH_SIDE = 64

# Elements of the tile that scores are computed in, [heads, depth, head_dim].
_SCORE_ELEMENTS = 2048


class Plan(NamedTuple):
    """How one call is cut into programs. The names are those of the kernels' arguments."""

    interleaved: bool
    batch: int
    channels: int
    heads: int
    positions: int
    rows: int
    row_length: int
    chunks: int
    UNIT: int
    ROWS: int
    COLS: int
    programs: int

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def tile_heads(self) -> int:
        """Heads whose scores one program computes, a power of two."""
        if not self.interleaved:
            return self.ROWS
        d = self.head_dim
        if d % self.COLS == 0:
            return 1
        return power_of_two(
            (self.COLS - 1) // d + 1 if self.COLS % d == 0 else (self.COLS + d - 2) // d + 1
        )

    @property
    def scores_apart(self) -> bool:
        """Scores in a launch of their own: where each tile computing its own would read many more keys than values."""
        return self.head_dim > 64 and 8 * self.tile_heads * self.head_dim > self.ROWS * self.COLS

    @property
    def geometry(self) -> tuple[int, int, int, int, int, int, int]:
        return (
            self.batch,
            self.channels,
            self.heads,
            self.positions,
            self.rows,
            self.row_length // self.UNIT,
            self.chunks,
        )

    @property
    def tile(self) -> dict[str, Any]:
        """What kernels over tiles of this plan are compiled for."""
        return {
            "INTERLEAVED": self.interleaved,
            "UNIT": self.UNIT,
            "ROWS": self.ROWS,
            "COLS": self.COLS,
            "num_warps": NUM_WARPS,
        }

    @property
    def FOLD(self) -> int:  # noqa: N802 - named as the kernels' argument
        """Interleaved: neighbouring channels whose partial sums are added before they are written."""
        d = self.head_dim
        return min(d & -d, self.COLS) if self.interleaved else 1

    @property
    def parts(self) -> int:
        """Partial sums of each channel, of a plan by channel."""
        return self.batch * self.chunks

    @property
    def span(self) -> int:
        """Positions of one of those."""
        return self.ROWS if self.interleaved else self.COLS

    def partial_elements(self, depth: int) -> int:
        """Float32 numbers of the dot products' partial sums."""
        if self.interleaved:
            return self.batch * self.chunks * depth * self.channels // self.FOLD
        return self.batch * self.rows * self.chunks * depth


class PatchPlan(NamedTuple):
    """How a depthwise convolution is cut into programs. The names are those of the kernels' arguments."""

    interleaved: bool
    batch: int
    channels: int
    height: int
    width: int
    patches_w: int
    groups: int
    steps: int
    UNIT: int
    LINES: int
    PH: int
    PW: int
    programs: int

    @property
    def geometry(self) -> tuple[int, int, int, int, int, int, int]:
        return (
            self.batch,
            self.channels,
            self.height,
            self.width,
            self.patches_w,
            self.groups,
            self.steps,
        )

    @property
    def tile(self) -> dict[str, Any]:
        """What kernels over patches of this plan are compiled for."""
        return {
            "INTERLEAVED": self.interleaved,
            "UNIT": self.UNIT,
            "LINES": self.LINES,
            "PH": self.PH,
            "PW": self.PW,
            "num_warps": NUM_WARPS,
        }


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def bucket(depth: int) -> int:
    """The depth that a kernel is compiled for: a power of two, so that a stage compiles a few and not one a layer."""
    return power_of_two(depth)


def encoded(number: int) -> int:
    """`number` for a tuple of a kernel: Triton compiles anew for 1 and for multiples of 16, and this is neither."""
    return 32 * number + 3


def comparable(tolerance: float) -> float:
    """A tolerance that stays above zero in float32: kernels take zeros for weights that are not there."""
    return max(tolerance, LEAST_TOLERANCE) if tolerance > 0 else 0.0


def block_d(heads: int, depth_bucket: int, head_dim: int) -> int:
    """Elements of a head that scores read at once."""
    room = max(_SCORE_ELEMENTS // (heads * depth_bucket), 1)
    return min(power_of_two(head_dim), 1 << (room.bit_length() - 1), 1024)


def _fitting(length: int, smallest: int, largest: int) -> int:
    """The largest power of two whose blocks over `length` are at most a third larger; else the smallest.

    What a block has beyond the end costs instructions and no memory traffic, and larger blocks read fewer keys.
    """
    size = largest
    while size > smallest and 3 * (-(-length // size) * size) > 4 * length:
        size //= 2
    return size


def _too_few(programs: int) -> bool:
    return programs < _ENOUGH_PROGRAMS


@functools.lru_cache(maxsize=4096)
def make_plan(
    sizes: tuple[int, int, int, int, int],
    strides: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    depth_bucket: int,
    by_channel: bool = False,
) -> Plan:
    """The plan of a call on maps of `(B, C, G, N, interleaved)` with these batch and inner strides.

    `by_channel`: a planar row is one channel even where there is no gap between channels.
    """
    batch, channels, heads, positions, interleaved = sizes
    # Planar maps whose channels follow each other: a head is one run of elements.
    is_gapless = not by_channel and all(inner == positions for _, inner in strides)
    rows = heads if is_gapless else channels
    length = channels * positions // rows
    unit = 16 // dtype.itemsize
    steps = [stride for pair in strides for stride in pair]
    steps += [channels] if interleaved else [length]
    if is_gapless and not interleaved:  # the inner stride is never used
        steps = [batch_stride for batch_stride, _ in strides] + [length]
    if any(step % unit for step in steps):
        unit = 1
    tile = _TILE if unit > 1 else _TILE_UNALIGNED
    if interleaved:
        cols = _fitting(channels, _MIN_COLS, _MAX_STRIP_BYTES // dtype.itemsize)
        rows_at_once = _fitting(positions, _MIN_ROWS, tile // cols)
        strips = -(-channels // cols)
        fewest = max(_MIN_ROWS, _MIN_TILE_BYTES // dtype.itemsize // cols)
        while rows_at_once > fewest and _too_few(batch * strips * -(-positions // rows_at_once)):
            rows_at_once //= 2
        chunks = -(-positions // rows_at_once)
        programs = batch * chunks * strips
        return Plan(
            True,
            batch,
            channels,
            heads,
            positions,
            0,
            0,
            chunks,
            unit,
            rows_at_once,
            cols,
            programs,
        )
    cols = _fitting(length, _MIN_COLS, _MAX_COLS)
    chunks = -(-length // cols)
    segments = batch * rows * chunks
    # Weights of a tile's segments, [segments, depth], are held in registers too.
    rows_at_once = max(min(tile // cols, _SCORE_ELEMENTS // depth_bucket), 1)
    fewest = min(rows_at_once, max(1, _MIN_TILE_BYTES // dtype.itemsize // cols))
    while rows_at_once > fewest and _too_few(segments // rows_at_once):
        rows_at_once //= 2
    programs = -(-segments // rows_at_once)
    return Plan(
        False,
        batch,
        channels,
        heads,
        positions,
        rows,
        length,
        chunks,
        unit,
        rows_at_once,
        cols,
        programs,
    )


@functools.lru_cache(maxsize=4096)
def make_patch_plan(
    sizes: tuple[int, int, int, int, int], strides: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> PatchPlan:
    """The plan of a convolution of maps of `(B, C, H, W, interleaved)` with these batch and inner strides."""
    batch, channels, height, width, interleaved = sizes
    wide, high = power_of_two(width), power_of_two(height)
    # Planar, neighbours in space are neighbours in memory: of nine reads six are off 16 bytes, and reading by single
    # elements keeps those of a warp together.
    unit = 1
    if interleaved:
        unit = 16 // dtype.itemsize
        if any(
            step % unit for step in (channels, *(stride for pair in strides for stride in pair))
        ):
            unit = 1
        lines = _fitting(channels, min(_MIN_COLS, power_of_two(channels)), _MAX_PATCH_SIDE)
        positions = _PATCH_ELEMENTS // lines
        patch_w = min(wide, max(positions // high, 1 << positions.bit_length() // 2))
        patch_h = min(high, positions // patch_w)
        blocks = batch * -(-channels // lines)
    else:
        patch_w = _fitting(width, min(8, wide), _MAX_PATCH_SIDE)
        patch_h = _fitting(height, 1, _PATCH_ELEMENTS // patch_w)
        lines = min(_PATCH_ELEMENTS // (patch_h * patch_w), power_of_two(batch * channels))
        blocks = -(-batch * channels // lines)
    patches_w = -(-width // patch_w)
    patches = patches_w * -(-height // patch_h)
    steps = -(-patches // min(patches, max(1, -(-_ENOUGH_PROGRAMS // blocks))))
    groups = -(-patches // steps)
    return PatchPlan(
        bool(interleaved),
        batch,
        channels,
        height,
        width,
        patches_w,
        groups,
        steps,
        unit,
        lines,
        patch_h,
        patch_w,
        blocks * groups,
    )
