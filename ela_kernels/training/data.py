"""Labelled images: the bundled digits, CIFAR's, and folders of images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.optional import optional
from ela_kernels.training.images import UnreadableImageError
from ela_kernels.training.reading import Part
from ela_kernels.training.recipe import Recipe

DATA = ("digits", "cifar10", "cifar100", "folder")
SIDES = {"digits": 16, "cifar10": 32, "cifar100": 32, "folder": 224}
LEAST_SIDE, LARGEST_SIDE = 8, 4096


class MissingDataError(FileNotFoundError):
    """Files that are not where they are expected; the message says which and where."""


class Images(Protocol):
    """Labelled images that are read by their numbers."""

    labels: Tensor

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """Normalised images `[len(indices), C, H, W]`, float32."""
        ...


class TensorImages:
    """Images held in memory: uint8 or float32 `[N, C, H, W]`, normalised when they are read."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, deviation: Tensor) -> None:
        self.images, self.labels = images, labels
        self.mean, self.deviation = mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor) -> Tensor:
        return (self.images[indices].float() - self.mean) / self.deviation


class ClassTask(Protocol):
    """What a classifier learns: :class:`Task`, or one of pictures that are varied one by one."""

    @property
    def train(self) -> Sized: ...

    @property
    def test(self) -> Sized: ...

    @property
    def classes(self) -> list[str]: ...

    @property
    def channels(self) -> int: ...

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Images `[N, C, H, W]` and their labels `[N]`."""
        ...


@dataclass(frozen=True)
class Task:
    """What there is to learn: images for training and for testing, the classes' names, and how images are varied."""

    train: Images
    test: Images
    classes: list[str]
    channels: int
    augment: Callable[[Tensor, torch.Generator], Tensor]

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Images and labels of a part."""
        source = self.test if part.testing else self.train
        images = source.read(part.numbers)
        if part.seed is not None:
            images = self.augment(images, torch.Generator().manual_seed(part.seed))
        return images, source.labels[part.numbers]


def load_task(
    name: str,
    folder: Path | None = None,
    side: int | None = None,
    recipe: Recipe | None = None,
) -> Any:
    """Load one of :data:`DATA`; a :class:`ClassTask`, of the digits a :class:`Task`.

    Args:
        name: `"digits"` (bundled with scikit-learn), or `"cifar10"`, `"cifar100"` and `"folder"`, which torchvision
            reads.
        folder: where the data are; not needed for digits.
        side: height and width of the images; for CIFAR 32 only. 16, 32 and 224 by default.
        recipe: how training images are varied beside the usual; not for digits.

    Raises:
        ValueError: unknown name, a folder that was not given, or a side or recipe that does not fit.
        MissingDataError: expected files are not there, or cannot be read.
        MissingLibraryError: torchvision, or for the digits scikit-learn, is not installed.
    """
    with naming(folder):
        return _task(name, folder, side, Recipe() if recipe is None else recipe)


@contextlib.contextmanager
def naming(folder: Path | None) -> Iterator[None]:
    """Say which file of the data, or which folder, the system would not read.

    Raises:
        MissingDataError: one could not be read.
    """
    try:
        yield
    except (MissingDataError, UnreadableImageError):
        raise
    except OSError as error:
        raise MissingDataError(
            f"data-dir: {error.filename or folder} cannot be read: {error.strerror or error}; allowed is a folder that "
            "this user can read"
        ) from error


def _task(name: str, folder: Path | None, side: int | None, recipe: Recipe) -> Any:
    if name not in DATA:
        raise ValueError(f"data: got {name!r}; allowed are {', '.join(map(repr, DATA))}")
    side = SIDES[name] if side is None else side
    if not LEAST_SIDE <= side <= LARGEST_SIDE:
        raise ValueError(f"side: got {side}; allowed is an int from {LEAST_SIDE} to {LARGEST_SIDE}")
    if name == "digits":
        _check_digits(recipe)
        return _digits(side)
    if folder is None:
        raise ValueError(f"data-dir: got none for {name!r}; allowed is the folder with the data")
    if name != "folder" and side != 32:
        raise ValueError(f"side: got {side} for {name!r}; allowed is 32, the size of its images")
    # It needs torchvision, which takes seconds to import.
    from ela_kernels.training import pictures

    if name == "folder":
        return pictures.folder_task(folder, side, recipe)
    return pictures.cifar_task(folder, name, recipe)


def crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `padding` pixels either way, filled up with zeros."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    device = images.device
    shape = (2, batch, 1, 1)
    top, left = torch.randint(2 * padding + 1, shape, generator=generator, device=device)
    rows = (top + torch.arange(height, device=device).view(1, -1, 1)).expand(batch, height, width)
    columns = (left + torch.arange(width, device=device)).expand(batch, height, width)
    number = torch.arange(batch, device=device).view(-1, 1, 1)
    return padded[number, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    mirrored = torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The standard variation of small natural images: a pad of an eighth, a crop, a flip."""
    return flip(crop(images, images.shape[-1] // 8, generator), generator)


def crop_only(images: Tensor, generator: torch.Generator) -> Tensor:
    """As :func:`crop_and_flip` without the flip, since a mirrored digit is none."""
    return crop(images, images.shape[-1] // 8, generator)


def _check_digits(recipe: Recipe) -> None:
    for name in recipe.of_pictures:
        raise ValueError(
            f"{name.replace('_', '-')}: got {getattr(recipe, name)!r} with --data digits, whose variation is their "
            "own; allowed with cifar10, cifar100 and folder"
        )


def _digits(side: int) -> Task:
    bundled = optional("sklearn.datasets", "the digits").load_digits()
    split = optional("sklearn.model_selection", "the digits").train_test_split
    images = torch.from_numpy(bundled.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=side, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bundled.target).long()
    # The same split always, whatever the run's seed: accuracies of different runs are of the same test images.
    train, test = split(range(len(labels)), test_size=0.2, stratify=bundled.target, random_state=0)
    deviation, mean = torch.std_mean(images[train])
    first, second = (TensorImages(images[i], labels[i], mean, deviation) for i in (train, test))
    return Task(first, second, [str(i) for i in range(10)], 1, crop_only)
