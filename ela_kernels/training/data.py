"""Labelled images: bundled digits, CIFAR's pickles, and folders of images."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.training.images import IMAGE_SUFFIXES, FolderImages, UnreadableImageError
from ela_kernels.training.optional import MissingLibraryError, optional

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


@dataclass(frozen=True)
class Task:
    """What there is to learn: images for training and for testing, the classes' names, and how images are varied."""

    train: Images
    test: Images
    classes: list[str]
    channels: int
    augment: Callable[[Tensor, torch.Generator], Tensor]


def load_task(name: str, folder: Path | None = None, side: int | None = None) -> Task:
    """Load one of :data:`DATA`.

    Args:
        name: `"digits"` (bundled with scikit-learn), `"cifar10"`, `"cifar100"` or `"folder"`.
        folder: where the data are; not needed for digits.
        side: height and width of the images; for CIFAR 32 only. 16, 32 and 224 by default.

    Raises:
        ValueError: unknown name, a folder that was not given, or a side that does not fit.
        MissingDataError: expected files are not there, or cannot be read.
    """
    with naming(folder):
        return _task(name, folder, side)


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


def _task(name: str, folder: Path | None, side: int | None) -> Task:
    if name not in DATA:
        raise ValueError(f"data: got {name!r}; allowed are {', '.join(map(repr, DATA))}")
    side = SIDES[name] if side is None else side
    if not LEAST_SIDE <= side <= LARGEST_SIDE:
        raise ValueError(f"side: got {side}; allowed is an int from {LEAST_SIDE} to {LARGEST_SIDE}")
    if name == "digits":
        return _digits(side)
    if folder is None:
        raise ValueError(f"data-dir: got none for {name!r}; allowed is the folder with the data")
    if name == "folder":
        return _folder(folder, side)
    if side != 32:
        raise ValueError(f"side: got {side} for {name!r}; allowed is 32, the size of its images")
    return _cifar(folder, name)


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


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR's files hold, arrays in plain containers, and refuses to call anything else."""

    _ALLOWED = frozenset({("_codecs", "encode"), ("numpy", "dtype"), ("numpy", "ndarray")})
    _MAKES_ARRAYS = frozenset(
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) in self._MAKES_ARRAYS:
            # The files spell the module as numpy did then; its newer releases do not like to be asked for that.
            return optional("numpy", "CIFAR").empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(
            f"got {module}.{name} in the file; allowed are numpy arrays, bytes, lists and dicts"
        )


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except MissingLibraryError:
        raise
    except Exception as error:
        # Damaged pickles raise nearly anything: IndexError, KeyError, UnicodeDecodeError, MemoryError ...
        raise ValueError(
            f"data-dir: {path} is no batch of CIFAR's python version: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"data-dir: {path} holds a {type(content).__name__}; allowed is a dict")
    return content


def _cifar(folder: Path, name: str) -> Task:
    if name == "cifar10":
        inner, label = "cifar-10-batches-py", b"labels"
        training, test, meta = (
            [f"data_batch_{i}" for i in range(1, 6)],
            "test_batch",
            "batches.meta",
        )
        names_key = b"label_names"
    else:
        inner, label = "cifar-100-python", b"fine_labels"
        training, test, meta = ["train"], "test", "meta"
        names_key = b"fine_label_names"
    root = folder / inner if (folder / inner).is_dir() else folder
    missing = [f for f in (*training, test, meta) if not (root / f).is_file()]
    if missing:
        raise MissingDataError(
            f"data-dir: {', '.join(missing)} not found in {root}. Expected are the files of the python version of "
            f"{name}, {', '.join((*training, test, meta))}, in {folder / inner} or in {folder}"
        )
    classes = _cifar_classes(root / meta, names_key)
    images, labels = _cifar_images([root / f for f in training], label, len(classes))
    deviation, mean = torch.std_mean(images.float(), (0, 2, 3))
    # A channel of one value everywhere is 0 then, rather than NaN.
    deviation = torch.where(deviation > 0, deviation, 1.0)
    train = TensorImages(images, labels, mean, deviation)
    images, labels = _cifar_images([root / test], label, len(classes))
    return Task(train, TensorImages(images, labels, mean, deviation), classes, 3, crop_and_flip)


def _cifar_classes(path: Path, key: bytes) -> list[str]:
    names = _unpickle(path).get(key)
    if not isinstance(names, list) or not all(isinstance(n, bytes) for n in names) or not names:
        raise ValueError(f"data-dir: {path} has no list of class names as its entry {key!r}")
    return [n.decode(errors="replace") for n in names]


def _cifar_images(files: list[Path], label: bytes, classes: int) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in files:
        batch = _unpickle(path)
        pixels, numbers = batch.get(b"data"), batch.get(label)
        shape, dtype = getattr(pixels, "shape", None), getattr(pixels, "dtype", None)
        if pixels is None or shape is None or shape[1:] != (3072,) or str(dtype) != "uint8":
            raise ValueError(
                f"data-dir: {path} has the entry {b'data'!r} of shape {shape}, {dtype}; allowed is [N, 3072], uint8"
            )
        if shape[0] == 0:
            raise ValueError(f"data-dir: {path} has no images; allowed is at least one")
        if not isinstance(numbers, list) or len(numbers) != shape[0]:
            got = len(numbers) if isinstance(numbers, list) else type(numbers).__name__
            raise ValueError(
                f"data-dir: {path} has {got} of the labels {label!r}; allowed is a list of {shape[0]}, one an image"
            )
        wrong = [n for n in numbers if not isinstance(n, int) or not 0 <= n < classes]
        if wrong:
            raise ValueError(
                f"data-dir: {path} has the label {wrong[0]!r}; allowed are ints from 0 to {classes - 1}"
            )
        images.append(torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32))
        labels.append(torch.tensor(numbers, device="cpu"))
    return torch.cat(images), torch.cat(labels)


def _folder(folder: Path, side: int) -> Task:
    layout = f"{folder}/train/CLASS/*.jpg and {folder}/val/CLASS/*.jpg"
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise MissingDataError(
                f"data-dir: {folder / part} not found. Expected are {layout}, one subfolder a class "
                f"(files: {', '.join(IMAGE_SUFFIXES)})"
            )
    classes = _class_folders(folder / "train")
    unknown = sorted(set(_class_folders(folder / "val")) - set(classes))
    if unknown:
        raise ValueError(
            f"data-dir: the classes {', '.join(unknown)} are in {folder / 'val'} and not in {folder / 'train'}; "
            "allowed are the same subfolders"
        )
    parts = []
    for part in ("train", "val"):
        paths, labels = [], []
        for number, name in enumerate(classes):
            here = folder / part / name
            found = sorted(
                p
                for p in here.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            )
            paths += found
            labels += [number] * len(found)
        if not paths:
            raise MissingDataError(
                f"data-dir: no image found under {folder / part}. Expected are {layout} "
                f"(files: {', '.join(IMAGE_SUFFIXES)})"
            )
        parts.append(FolderImages(paths, torch.tensor(labels, device="cpu"), side))
    return Task(parts[0], parts[1], classes, 3, crop_and_flip)


def _class_folders(folder: Path) -> list[str]:
    # Hidden ones are left behind by desktops and notebooks, and are no classes.
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
