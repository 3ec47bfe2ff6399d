"""The images of a run, and its batches: the same ones for all variants of a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.idx import read_part
from benchmarks.study.settings import Settings
from ela_kernels.training.data import (
    LEAST_SIDE,
    Images,
    MissingDataError,
    Task,
    TensorImages,
    crop_and_flip,
    load_task,
    naming,
)

# Where Debian's package dataset-fashion-mnist has it.
FASHION = Path("/usr/share/datasets/fashion-mnist")
_CLASSES = [
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
]


def load(name: str, root: Path | None = None) -> Task:
    """The labelled images by a name of :data:`benchmarks.study.settings.DATA`.

    Args:
        name: what.
        root: folder with the files; Debian's of Fashion-MNIST if None, and not needed for the digits.

    Raises:
        MissingDataError: files are not there, or cannot be read.
        ValueError: files that hold something else.
    """
    if name == "fashion-mnist":
        return _fashion(FASHION if root is None else root)
    if name == "digits":
        return load_task(name)
    if root is None:
        raise ValueError(f"root: got none for {name!r}; allowed is the folder with the data")
    try:
        with naming(root):
            return _cifar(name, root)
    except MissingDataError as error:
        raise MissingDataError(_by_our_name(error)) from error
    except ValueError as error:
        raise ValueError(_by_our_name(error)) from error


def _by_our_name(error: Exception) -> str:
    return str(error).replace("data-dir:", "root:")


def _cifar(name: str, folder: Path) -> Task:
    """All in memory, and varied a batch at a time, as the other data are."""
    # It needs torchvision, which takes seconds to import.
    from ela_kernels.training.pictures import load_cifar

    parts = load_cifar(folder, name)
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    moments = _moments(images[0])
    train, test = (TensorImages(i, n, *moments) for i, n in zip(images, labels, strict=True))
    return Task(train, test, list(parts[0].classes), 3, crop_and_flip)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel."""
    deviation, mean = torch.std_mean(images.float(), (0, 2, 3))
    # A channel of one value everywhere is 0 then, rather than NaN.
    return mean, torch.where(deviation > 0, deviation, 1.0)


def _fashion(folder: Path) -> Task:
    images, labels = read_part(folder, "train")
    deviation, mean = torch.std_mean(images.float())
    # Images of one value everywhere are 0 then, rather than NaN.
    deviation = torch.where(deviation > 0, deviation, 1.0)
    train = TensorImages(images, labels, mean, deviation)
    test = TensorImages(*read_part(folder, "test"), mean, deviation)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"root: {folder} has training images of {list(train.images.shape[2:])} and test images of "
            f"{list(test.images.shape[2:])}; allowed are equal ones"
        )
    wrong = [int(n) for part in (train, test) for n in part.labels if n >= len(_CLASSES)]
    if wrong:
        raise ValueError(
            f"root: {folder} has the label {wrong[0]}; allowed are ints from 0 to {len(_CLASSES) - 1}"
        )
    return Task(train, test, _CLASSES, 1, crop_and_flip)


class Batches:
    """The images that one run trains on and is tested with.

    Everything is drawn from the seed alone, by generators of their own, on the CPU: variants of a seed see the same
    images in the same order, moved and mirrored alike.
    """

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings = task, settings
        self._check("train_images", len(task.train))
        self._check("test_images", len(task.test))
        least = min(task.train.read(torch.arange(1)).shape[2:])
        if settings.side is not None and not LEAST_SIDE <= settings.side <= least:
            raise ValueError(
                f"side: got {settings.side}; allowed is an int from {LEAST_SIDE} to {least}, the size of the images"
            )
        order = torch.randperm(len(task.train), generator=self._generator("subset"))
        self.chosen = order[: settings.train_images]
        self.steps = len(self.chosen) // settings.batch
        if self.steps == 0:
            raise ValueError(
                f"batch: got {settings.batch}; allowed is at most the number of training images, {len(self.chosen)}"
            )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of the epoch's steps; what does not fill a batch is left out."""
        size = self.settings.batch
        order = torch.randperm(len(self.chosen), generator=self._generator("order", number))
        for step, part in enumerate(self.chosen[order].split(size)[: self.steps]):
            images = self._read(self.task.train, part)
            images = self.task.augment(images, self._generator("variation", number, step))
            yield images, self.task.train.labels[part]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images, in parts."""
        count = self.settings.test_images or len(self.task.test)
        for part in torch.arange(count).split(500):
            yield self._read(self.task.test, part), self.task.test.labels[part]

    def _read(self, images: Images, part: Tensor) -> Tensor:
        found, side = images.read(part), self.settings.side
        return found if side is None else F.interpolate(found, size=side, mode="area")

    def _check(self, name: str, most: int) -> None:
        asked = getattr(self.settings, name)
        if asked is not None and asked > most:
            raise ValueError(
                f"{name.replace('_', '-')}: got {asked}; allowed is at most {most}, as many as {self.settings.data} has"
            )

    def _generator(self, purpose: str, *numbers: int) -> torch.Generator:
        text = f"{self.settings.seed} {purpose} {numbers}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)
