"""Labelled images in the IDX format, as MNIST and its successors are published: four files, compressed or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ela_kernels.training.data import MissingDataError

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UNSIGNED_BYTES = 8
# Of a header that is damaged: no published set of this format has nearly as many bytes.
_MOST_BYTES = 2**31


def read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 `[N, 1, H, W]` and labels int64 `[N]` of `"train"` or `"test"`.

    Raises:
        MissingDataError: a file is not there or cannot be read.
        ValueError: a file is no IDX file of bytes, is damaged, or the two do not belong together.
    """
    names = FILES[part]
    paths = [_find(folder, name) for name in names]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise ValueError(
            f"root: {paths[0]} has {len(images)} images and {paths[1]} {len(labels)} labels; allowed are as many. Load "
            "both files again"
        )
    return images.unsqueeze(1), labels.long()


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of one file as a uint8 tensor of so many dimensions.

    Raises:
        MissingDataError: the file cannot be read.
        ValueError: it is damaged, or holds something else.
    """
    head = 4 + 4 * dimensions
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(head)
            shape = _shape(path, header, dimensions)
            size = math.prod(shape)
            # One more than there should be, so that a file that is too long shows, however long it is.
            content = file.read(size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"root: {path} is damaged ({error}); allowed is a whole gzip file. Load it again"
        ) from error
    except OSError as error:
        raise MissingDataError(f"root: {path} cannot be read: {error.strerror or error}") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content)}"
        raise ValueError(
            f"root: {path} has {more} bytes after its header; allowed are the {size} of {list(shape)}. Load it again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def _shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    want = bytes((0, 0, _UNSIGNED_BYTES, dimensions))
    if len(header) < 4 + 4 * dimensions or header[:4] != want:
        raise ValueError(
            f"root: {path} begins with {header.hex() or 'nothing'}; allowed is {want.hex()} for an IDX file of bytes "
            f"with {dimensions} dimensions, then their {4 * dimensions} bytes"
        )
    shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", header[4:])
    if not 0 < math.prod(shape) <= _MOST_BYTES:
        raise ValueError(
            f"root: {path} says that it holds {list(shape)} bytes; allowed are from 1 to {_MOST_BYTES}"
        )
    return shape


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    wanted = ", ".join(file for files in FILES.values() for file in files)
    raise MissingDataError(
        f"root: {name} not found in {folder}. Expected are {wanted}, each with or without .gz (Debian's package "
        "dataset-fashion-mnist has them)"
    )
