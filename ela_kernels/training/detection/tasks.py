"""What there is to detect: digits on canvases, or a folder of COCO's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ela_kernels.training.data import naming
from ela_kernels.training.detection.coco import load_coco
from ela_kernels.training.detection.scenes import Sample, Scenes
from ela_kernels.training.reading import Part

DATA = ("digits", "coco")
# Of the digits: scenes for training and for testing.
TRAIN_SCENES, TEST_SCENES = 2000, 300
# The shorter side of what networks resize images to; of a smaller one the last maps are a position or two.
LEAST_SIDE, LARGEST_SIDE = 32, 4096


class Samples(Protocol):
    """Images with boxes, by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample: ...


@dataclass(frozen=True)
class DetectionTask:
    """Images for training and testing, names of the classes from label 1 on, and how images are varied."""

    train: Samples
    test: Samples
    classes: list[str]
    augment: Callable[[Sample, torch.Generator], Sample]
    channels: int = 3

    def read(self, part: Part) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Images of a part, and their boxes and labels."""
        source = self.test if part.testing else self.train
        samples = [source[number] for number in part.numbers.tolist()]
        if part.seed is not None:
            generator = torch.Generator().manual_seed(part.seed)
            samples = [self.augment(sample, generator) for sample in samples]
        targets = [{"boxes": s.boxes, "labels": s.labels} for s in samples]
        return [sample.image for sample in samples], targets


def load_task(name: str, folder: Path | None = None, side: int | None = None) -> DetectionTask:
    """Load one of :data:`DATA`.

    Args:
        name: `"digits"` (bundled with scikit-learn, on canvases that are made) or `"coco"`.
        folder: where the data are; not needed for digits.
        side: not for the data: networks resize images so that the shorter side has it; 32 to 4096.

    Raises:
        ValueError: unknown name, a side that does not fit, or a folder that was not given or does not fit.
        MissingDataError: expected files are not there, or cannot be read.
    """
    if name not in DATA:
        raise ValueError(
            f"data: got {name!r} for --task detection; allowed are {', '.join(map(repr, DATA))}"
        )
    if side is not None and not LEAST_SIDE <= side <= LARGEST_SIDE:
        raise ValueError(
            f"side: got {side} for --task detection; allowed is an int from {LEAST_SIDE} to {LARGEST_SIDE}, to which "
            "the shorter side of images is resized. Leave it out for the size that the detector has"
        )
    if name == "digits":
        train, test = Scenes(TRAIN_SCENES), Scenes(TEST_SCENES, train=False)
        return DetectionTask(train, test, list(train.classes), as_it_is)
    if folder is None:
        raise ValueError(f"data-dir: got none for {name!r}; allowed is the folder with the data")
    with naming(folder):
        found = load_coco(folder)
    return DetectionTask(found.train, found.test, found.classes, flip)


def as_it_is(sample: Sample, generator: torch.Generator) -> Sample:
    """Without variation, as scenes are varied enough."""
    return sample


def flip(sample: Sample, generator: torch.Generator) -> Sample:
    """Mirrored left to right with probability one half."""
    if float(torch.rand((), generator=generator, device="cpu")) < 0.5:
        return sample
    left, top, right, bottom = sample.boxes.unbind(1)
    width = sample.image.shape[-1]
    boxes = torch.stack((width - right, top, width - left, bottom), 1)
    return sample._replace(image=sample.image.flip(-1), boxes=boxes)
