"""Pictures that torchvision reads and varies: CIFAR's files, and folders with a subfolder for each class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ela_kernels.optional import optional
from ela_kernels.training.data import MissingDataError
from ela_kernels.training.images import IMAGE_SUFFIXES, Decoder
from ela_kernels.training.reading import Part, seed_of, seeded
from ela_kernels.training.recipe import Recipe

# What torchvision is needed for, and the extra that brings it.
_NEEDED = ("reading CIFAR and folders of images", "vision")

_datasets = optional("torchvision.datasets", *_NEEDED)
_CIFAR10: Any = _datasets.CIFAR10
_CIFAR100: Any = _datasets.CIFAR100
_IMAGE_FOLDER: Any = _datasets.ImageFolder
_v2 = optional("torchvision.transforms.v2", *_NEEDED)
_md5: Callable[[str], str] = optional("torchvision.datasets.utils", *_NEEDED).calculate_md5

# Channel means and deviations that networks for natural images are usually trained with (ImageNet's).
_NATURAL = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BILINEAR = _v2.InterpolationMode.BILINEAR
# Of pictures for testing: the shorter side before the middle is cut out, for each pixel of the latter.
_RESIZED = 256 / 224
_CIFAR_PADDING = 4


class Pictures:
    """One part of a data set of torchvision.

    Args:
        dataset: gives a picture of Pillow and a label by number, and has all labels as `targets`.
        plain: makes a normalised tensor of a picture, the same each time.
    """

    def __init__(self, dataset: Any, plain: Callable[[Any], Tensor]) -> None:
        self.dataset, self._plain = dataset, plain
        self.labels = torch.tensor(dataset.targets, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, numbers: Tensor) -> Tensor:
        """Normalised images `[len(numbers), 3, H, W]`, float32, as for testing."""
        return torch.stack([self._plain(self.dataset[i][0]) for i in numbers.tolist()])

    def varied(self, numbers: Tensor, seed: int, vary: Callable[[Any], Tensor]) -> Tensor:
        """The same, each image varied with a seed of its own: the same ones in whatever process they are read."""
        images = []
        for place, number in enumerate(numbers.tolist()):
            picture = self.dataset[number][0]
            with seeded(seed_of(seed, place, 0)):
                images.append(vary(picture))
        return torch.stack(images)


@dataclass(frozen=True)
class PictureTask:
    """Pictures for training and for testing, the classes' names, and how one for training is varied."""

    train: Pictures
    test: Pictures
    classes: list[str]
    vary: Callable[[Any], Tensor]
    channels: int = 3

    def read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Images and labels of a part."""
        source = self.test if part.testing else self.train
        if part.seed is None:
            return source.read(part.numbers), source.labels[part.numbers]
        return source.varied(part.numbers, part.seed, self.vary), source.labels[part.numbers]


def cifar_task(folder: Path, name: str, recipe: Recipe) -> PictureTask:
    """CIFAR-10 or CIFAR-100, normalised by the training images' own means and deviations."""
    train, test = load_cifar(folder, name)
    normal = _moments(train.data)
    first = [_v2.RandomCrop(32, padding=_CIFAR_PADDING)]
    policy = _v2.AutoAugmentPolicy.CIFAR10
    plain = _v2.Compose(_to_tensor(normal))
    vary = _variation(first, recipe, policy, normal)
    return PictureTask(Pictures(train, plain), Pictures(test, plain), list(train.classes), vary)


def folder_task(folder: Path, side: int, recipe: Recipe) -> PictureTask:
    """A folder with `train/` and `val/`, and a subfolder for each class in both."""
    train, test = load_folder(folder)
    middle = [_v2.Resize(round(side * _RESIZED), _BILINEAR), _v2.CenterCrop(side)]
    first = [_v2.RandomResizedCrop(side, interpolation=_BILINEAR)]
    policy = _v2.AutoAugmentPolicy.IMAGENET
    plain = _v2.Compose([*middle, *_to_tensor(_NATURAL)])
    vary = _variation(first, recipe, policy, _NATURAL)
    return PictureTask(Pictures(train, plain), Pictures(test, plain), list(train.classes), vary)


def _variation(
    first: Sequence[Any], recipe: Recipe, policy: Any, normal: tuple[Sequence[float], ...]
) -> Callable[[Any], Tensor]:
    """A crop and a flip, and what the recipe adds."""
    steps = [*first, _v2.RandomHorizontalFlip()]
    if recipe.auto_augment == "ra":
        steps.append(_v2.RandAugment(magnitude=recipe.ra_magnitude, interpolation=_BILINEAR))
    elif recipe.auto_augment == "ta_wide":
        steps.append(_v2.TrivialAugmentWide(interpolation=_BILINEAR))
    elif recipe.auto_augment == "augmix":
        steps.append(_v2.AugMix(interpolation=_BILINEAR))
    elif recipe.auto_augment == "autoaugment":
        steps.append(_v2.AutoAugment(policy, interpolation=_BILINEAR))
    steps += _to_tensor(normal)
    if recipe.random_erase > 0:
        steps.append(_v2.RandomErasing(p=recipe.random_erase))
    varied: Callable[[Any], Tensor] = _v2.Compose(steps)
    return varied


def _to_tensor(normal: tuple[Sequence[float], ...]) -> list[Any]:
    return [_v2.PILToTensor(), _v2.ToDtype(torch.float32, scale=True), _v2.Normalize(*normal)]


def _moments(images: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of `[N, H, W, C]`, uint8, from 0 to 1."""
    values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    means, deviations = [], []
    for channel in torch.from_numpy(images).unbind(-1):
        # By how often each value comes up: exact, and no copy in floating point of all images.
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        mean = float((counts * values).sum() / counts.sum())
        squares = float((counts * (values - mean).square()).sum())
        deviation = (squares / max(1.0, float(counts.sum()) - 1)) ** 0.5
        means.append(mean)
        # A channel of one value everywhere is 0 then, rather than NaN.
        deviations.append(deviation if deviation > 0 else 1.0)
    return means, deviations


class _FlatCIFAR10(_CIFAR10):
    """Its files are in the folder that is given, and not in one of their own there."""

    base_folder = ""


class _FlatCIFAR100(_CIFAR100):
    base_folder = ""


_CIFAR: dict[str, tuple[Any, Any]] = {
    "cifar10": (_CIFAR10, _FlatCIFAR10),
    "cifar100": (_CIFAR100, _FlatCIFAR100),
}


def load_cifar(folder: Path, name: str) -> tuple[Any, Any]:
    """torchvision's data sets for training and for testing of `"cifar10"` or `"cifar100"`.

    The files are pickles, which can run anything: one is read if it is the published one, by its MD5, and refused
    otherwise.

    Raises:
        MissingDataError: files are not there.
        ValueError: one is another than the published one.
    """
    usual, flat = _CIFAR[name]
    in_its_own = (folder / usual.base_folder).is_dir()
    kind, root = (usual, folder / usual.base_folder) if in_its_own else (flat, folder)
    published = {
        **dict(kind.train_list),
        **dict(kind.test_list),
        kind.meta["filename"]: kind.meta["md5"],
    }
    missing = [file for file in published if not (root / file).is_file()]
    if missing:
        raise MissingDataError(
            f"data-dir: {', '.join(missing)} not found in {root}. Expected are the files of the python version of "
            f"{name}, {', '.join(published)}, in {folder / usual.base_folder} or in {folder}"
        )
    for file, checksum in published.items():
        found = _md5(str(root / file))
        if found != checksum:
            raise ValueError(
                f"data-dir: {root / file} is damaged, or another file than the published one: its MD5 is {found}; "
                f"allowed is {checksum}. Unpack the python version of {name} again"
            )
    return kind(folder, train=True), kind(folder, train=False)


class _ClassFolders(_IMAGE_FOLDER):
    """As torchvision's, with hidden files and folders left out, and with classes that may have no image."""

    def __init__(self, folder: Path, classes: list[str]) -> None:
        self._names = classes
        super().__init__(folder, loader=Decoder().open, is_valid_file=_is_image, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return self._names, {name: number for number, name in enumerate(self._names)}


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Data sets of torchvision of `folder/train` and `folder/val`; the classes are the subfolders of the first.

    Raises:
        MissingDataError: one of the two is not there, or has no image.
        ValueError: a class for testing is none for training, or there is one class alone.
    """
    layout = f"{folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg"
    kinds = f"(files: {', '.join(IMAGE_SUFFIXES)})"
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise MissingDataError(
                f"data-dir: {folder / part} not found. Expected are {layout}, one subfolder a class {kinds}"
            )
    classes = _subfolders(folder / "train")
    unknown = sorted(set(_subfolders(folder / "val")) - set(classes))
    if unknown:
        raise ValueError(
            f"data-dir: the classes {', '.join(unknown)} are in {folder / 'val'} and not in {folder / 'train'}; "
            "allowed are the same subfolders"
        )
    if len(classes) == 1:
        raise ValueError(
            f"data-dir: got one class, {classes[0]}, in {folder / 'train'}, of which there is nothing to learn; "
            "allowed are two or more subfolders there"
        )
    parts = []
    for part in ("train", "val"):
        # torchvision takes no class at all for an error of its own kind.
        found = _ClassFolders(folder / part, classes) if classes else ()
        if len(found) == 0:
            raise MissingDataError(
                f"data-dir: no image found under {folder / part}. Expected are {layout} {kinds}"
            )
        parts.append(found)
    return parts[0], parts[1]


def _subfolders(folder: Path) -> list[str]:
    # Hidden ones are left behind by desktops and notebooks, and are no classes.
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in found:
        # torchvision passes by what the system will not list, as if there were no images.
        with os.scandir(folder / name) as entries:
            next(entries, None)
    return found


def _is_image(path: str) -> bool:
    name = Path(path)
    return name.suffix.lower() in IMAGE_SUFFIXES and not name.name.startswith(".")
