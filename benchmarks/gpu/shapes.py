"""The stages that are measured on a GPU, most important first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.shapes import StageShape

PLANAR, INTERLEAVED = "channels_first", "channels_last"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """One stage, in one dtype and memory format."""

    shape: StageShape
    dtype_name: str = "float32"
    layout: str = PLANAR

    @property
    def dtype(self) -> torch.dtype:
        """The values' dtype."""
        return DTYPES[self.dtype_name]

    @property
    def map_bytes(self) -> int:
        """Bytes of one feature map."""
        return self.shape.map_elements * self.dtype.itemsize

    @property
    def name(self) -> str:
        """As it stands in the results."""
        return f"{self.shape.name} {self.dtype_name} {self.layout}"

    def new_map(self, device: torch.device, generator: torch.Generator) -> Tensor:
        """A map of normal numbers, in this case's dtype and memory format."""
        shape = self.shape
        size = (shape.batch, shape.channels, shape.size, shape.size)
        if self.layout == INTERLEAVED:
            size = (shape.batch, shape.size, shape.size, shape.channels)
        x = torch.randn(size, generator=generator, device=device, dtype=self.dtype)
        return x.permute(0, 3, 1, 2) if self.layout == INTERLEAVED else x

    def new_row(self, device: torch.device, generator: torch.Generator) -> Tensor:
        """A query or key `[B, C]`."""
        shape = self.shape
        return torch.randn(
            (shape.batch, shape.channels), generator=generator, device=device, dtype=self.dtype
        )


def _variants(shapes: list[StageShape], *variants: tuple[str, str]) -> list[Case]:
    return [Case(shape, *variant) for variant in variants for shape in shapes]


_ALL = (
    ("float32", PLANAR),
    ("bfloat16", PLANAR),
    ("bfloat16", INTERLEAVED),
    ("float32", INTERLEAVED),
)

SMOKE_CASES = _variants([StageShape(3, 2, 16, 6, 8)], *_ALL[:3])

# Together the maps of these exceed any GPU's cache many times over.
LARGE = [
    StageShape(12, 64, 1024, 14, 16),
    StageShape(23, 64, 1024, 14, 16),
    StageShape(12, 32, 256, 56, 16),
    StageShape(6, 64, 512, 28, 16),
    StageShape(3, 32, 256, 56, 16),
    StageShape(12, 128, 64, 32, 16),
    StageShape(3, 64, 2048, 7, 16),
]
# For a first look: the two shapes with the most bytes in a stage, as images and networks of both kinds have them.
FEW_CASES = _variants([LARGE[2], LARGE[1]], _ALL[0], _ALL[2])
# The stages of a network for CIFAR, batch 128, and one that a cache holds.
SMALL = [
    StageShape(12, 128, 64, 32, 16),
    StageShape(12, 128, 128, 16, 16),
    StageShape(12, 128, 256, 8, 16),
]
TINY = [StageShape(12, 16, 64, 8, 16), StageShape(3, 128, 64, 8, 16)]

FLOOR_CASES = [
    *_variants(LARGE[:2], *_ALL[:2]),
    *_variants([SMALL[1], TINY[0]], _ALL[0]),
    *_variants(LARGE[:1], *_ALL[2:]),
    *_variants(LARGE[2:], *_ALL[:2]),
    *_variants([SMALL[2], TINY[1]], _ALL[0]),
    *_variants([*SMALL[1:], *TINY], _ALL[1]),
    *_variants(LARGE[2:3], *_ALL[2:]),
]

# Attention part of a stage: deep stages of ImageNet networks, CIFAR stages, then the shallow ones.
STAGE_CASES = [
    *_variants([LARGE[0], LARGE[1], *SMALL], _ALL[0]),
    *_variants([LARGE[0], LARGE[1], SMALL[0]], *_ALL[1:3]),
    *_variants(
        [StageShape(6, 64, 512, 28, 16), StageShape(3, 32, 256, 56, 16), LARGE[-1]], *_ALL[:2]
    ),
    *_variants([StageShape(23, 128, 64, 32, 16)], *_ALL[:2]),
    *_variants(SMALL[1:], *_ALL[1:]),
    *_variants([LARGE[0], LARGE[1]], _ALL[3]),
]
COMPILED_CASES = [
    *_variants([LARGE[0], LARGE[1], SMALL[1]], _ALL[0]),
    *_variants([LARGE[0]], _ALL[1]),
]
MEMORY_CASES = [
    *_variants([StageShape(12, 32, 256, 14, 16), StageShape(23, 32, 256, 14, 16)], *_ALL[:3])
]
DIVERGENCE_CASES = [
    *_variants([LARGE[0], SMALL[0]], *_ALL[:2]),
    *_variants([SMALL[1], SMALL[2], TINY[0]], _ALL[0]),
]

# Whole layers, and blocks with norm and activation, each case both.
LAYER_CASES = [
    *_variants([LARGE[0]], _ALL[0]),
    *_variants([SMALL[0]], _ALL[0]),
    *_variants([LARGE[0]], _ALL[2]),
    *_variants([SMALL[1]], _ALL[0]),
    *_variants([StageShape(3, 32, 256, 56, 16), LARGE[1]], _ALL[0]),
    *_variants([SMALL[1]], _ALL[2]),
    *_variants([LARGE[0]], _ALL[1]),
    *_variants([SMALL[2], LARGE[-1]], _ALL[0]),
]
COMPILED_LAYER_CASES = _variants([LARGE[0], SMALL[1]], _ALL[0])
# The pieces of a layer alone: its depth does not matter.
PIECE_CASES = [
    *_variants([LARGE[2], LARGE[0]], _ALL[0], _ALL[2]),
    *_variants([LARGE[2]], _ALL[1], _ALL[3]),
    *_variants([LARGE[-1]], _ALL[0], _ALL[2]),
]

# Attention at every position: tokens of a language model, as a map whose channels lie together, and maps.
_TOKENS = StageShape(8, 16, 1024, 32, 1024)
POSITION_CASES = [
    *_variants([_TOKENS], _ALL[2]),
    *_variants([LARGE[2]], _ALL[0]),
    *_variants([LARGE[0]], _ALL[1]),  # whose rows of positions do not lie on 16 bytes
    *_variants([LARGE[2]], *_ALL[1:3]),
    *_variants([StageShape(24, 8, 2048, 32, 2048)], _ALL[2]),
    *_variants([_TOKENS], _ALL[3]),
    *_variants([SMALL[1]], _ALL[0]),
]
FEW_POSITION_CASES = POSITION_CASES[:2]
