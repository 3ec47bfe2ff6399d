"""Real handwritten digits on canvases: a detection task that needs no download.

Every scene is made anew from its number, the same on every machine: some digits of different size and strength at
places where they hardly overlap, on a canvas of different size with noise, strokes, and pieces of digits that count as
nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.optional import optional

CLASSES = tuple(str(i) for i in range(10))
# Sides of canvases and of digits, in pixels.
LEAST_SIDE, LARGEST_SIDE = 80, 128
SMALLEST, LARGEST = 12, 32
MOST_DIGITS = 6
# Pixels weaker than this part of a digit's strength are no part of its box.
_EDGE = 0.25


class Sample(NamedTuple):
    """One image and what is on it, as torchvision's detectors take them.

    Attributes:
        image: `[3, H, W]`, float32, 0 to 1.
        boxes: `[N, 4]`, float32: left, top, right, bottom in pixels.
        labels: `[N]`, int64, from 1: 0 is the background.
        number: of the image in its data set.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    number: int


class Scenes:
    """Digits on canvases, by number.

    Args:
        count: how many scenes.
        train: made of the digits for training, or of those for testing: the same split as of the classification task.
        seed: another one gives other scenes.
    """

    classes = CLASSES

    def __init__(self, count: int, train: bool = True, seed: int = 0) -> None:
        bundled = optional("sklearn.datasets", "the digits").load_digits()
        split = optional("sklearn.model_selection", "the digits").train_test_split
        parts = split(
            range(len(bundled.target)), test_size=0.2, stratify=bundled.target, random_state=0
        )
        chosen = parts[0] if train else parts[1]
        self.digits = torch.from_numpy(bundled.images[chosen]).float() / 16
        self.labels = torch.from_numpy(bundled.target[chosen]).long()
        self.count, self.train, self.seed = count, train, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        """A scene, from 0 to `len - 1`."""
        if not 0 <= number < self.count:
            raise IndexError(f"number: got {number}; allowed is an int from 0 to {self.count - 1}")
        # PyTorch's generator for the CPU looks at 32 bits. The golden ratio's keep parts and seeds apart.
        part = 2 * self.seed + (not self.train)
        draw = _Draw((2654435769 * part + number) % 2**32)
        height, width = (
            draw.integer(LEAST_SIDE, LARGEST_SIDE),
            draw.integer(LEAST_SIDE, LARGEST_SIDE),
        )
        canvas = _background(height, width, draw)
        boxes: list[tuple[int, int, int, int]] = []
        labels = []
        for _ in range(draw.integer(1, MOST_DIGITS)):
            which = draw.integer(0, len(self.digits) - 1)
            side = draw.integer(SMALLEST, LARGEST)
            digit = _enlarged(self.digits[which], side) * draw.number(0.55, 1.0)
            place = _free_place(height, width, _box(digit), boxes, draw)
            if place is None:
                continue
            top, left = place
            _paint(canvas, digit, top, left)
            x0, y0, x1, y1 = _box(digit)
            boxes.append((x0 + left, y0 + top, x1 + left, y1 + top))
            labels.append(int(self.labels[which]) + 1)
        for _ in range(draw.integer(0, 3)):
            self._clutter(canvas, boxes, draw)
        canvas = (canvas + 0.06 * draw.normal(height, width)).clamp(0, 1)
        return Sample(
            canvas.expand(3, height, width).contiguous(),
            torch.tensor(boxes, dtype=torch.float32, device="cpu").view(-1, 4),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
            number,
        )

    def _clutter(self, canvas: Tensor, boxes: list[tuple[int, int, int, int]], draw: _Draw) -> None:
        """A piece of a digit that is too small to be told, where no digit is."""
        side = draw.integer(SMALLEST, LARGEST)
        digit = _enlarged(self.digits[draw.integer(0, len(self.digits) - 1)], side)
        cut = max(3, side // 3)
        top, left = draw.integer(0, side - cut), draw.integer(0, side - cut)
        piece = digit[top : top + cut, left : left + cut] * draw.number(0.3, 0.9)
        place = _free_place(canvas.shape[0], canvas.shape[1], (0, 0, cut, cut), boxes, draw)
        if place is not None:
            _paint(canvas, piece, *place)


class _Draw:
    """Random numbers of one scene."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def integer(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self._generator, device="cpu"))

    def number(self, least: float, most: float) -> float:
        return least + (most - least) * float(
            torch.rand((), generator=self._generator, device="cpu")
        )

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device="cpu")


def _background(height: int, width: int, draw: _Draw) -> Tensor:
    """Soft blotches, and strokes."""
    coarse = draw.normal(1, 1, 4, 4)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    canvas = (0.12 + 0.06 * smooth[0, 0]).clamp(0, 0.4)
    for _ in range(draw.integer(0, 3)):
        x0, x1 = draw.integer(0, width - 1), draw.integer(0, width - 1)
        y0, y1 = draw.integer(0, height - 1), draw.integer(0, height - 1)
        steps = max(abs(x1 - x0), abs(y1 - y0), 1) + 1
        xs = torch.linspace(x0, x1, steps, device="cpu").round().long()
        ys = torch.linspace(y0, y1, steps, device="cpu").round().long()
        canvas[ys, xs] = draw.number(0.3, 0.8)
    return canvas


def _enlarged(digit: Tensor, side: int) -> Tensor:
    """`[side, side]` of `[8, 8]`."""
    return F.interpolate(
        digit[None, None], size=(side, side), mode="bilinear", align_corners=False
    )[0, 0]


def _box(digit: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what can be seen of a digit."""
    seen = digit > _EDGE * digit.max()
    columns, rows = seen.any(0).nonzero(), seen.any(1).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _free_place(
    height: int,
    width: int,
    box: tuple[int, int, int, int],
    boxes: list[tuple[int, int, int, int]],
    draw: _Draw,
) -> tuple[int, int] | None:
    """Top and left such that the box is on the canvas and on no other; None where ten draws find none."""
    x0, y0, x1, y1 = box
    for _ in range(10):
        top, left = draw.integer(-y0, height - y1), draw.integer(-x0, width - x1)
        here = (x0 + left, y0 + top, x1 + left, y1 + top)
        if not any(_overlap(here, other) for other in boxes):
            return top, left
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _paint(canvas: Tensor, picture: Tensor, top: int, left: int) -> None:
    """The lighter of the two, where the picture is on the canvas."""
    height, width = canvas.shape
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + picture.shape[0], height), min(left + picture.shape[1], width)
    part = picture[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] = torch.maximum(canvas[y0:y1, x0:x1], part)
