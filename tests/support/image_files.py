"""Image files in the layouts that the training program reads, made up for tests."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_cifar10(folder: Path, each: int) -> tuple[np.ndarray, list[int]]:
    """Six batches of random images; all of them and their labels are returned, the test batch last."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6 * each, 3072), dtype=np.uint8)
    labels = [i % 10 for i in range(6 * each)]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        part = slice(i * each, (i + 1) * each)
        _write(folder / name, {b"data": images[part], b"labels": labels[part]})
    _write(folder / "batches.meta", {b"label_names": [b"class %d" % i for i in range(10)]})
    return images, labels


def write_cifar100(folder: Path) -> None:
    images = np.zeros((4, 3072), np.uint8)
    for name in ("train", "test"):
        batch = {b"data": images, b"fine_labels": [99, 0, 1, 2], b"coarse_labels": [5] * 4}
        _write(folder / name, batch)
    _write(folder / "meta", {b"fine_label_names": [b"fine %d" % i for i in range(100)]})


def _write(path: Path, content: dict[bytes, Any]) -> None:
    # Protocol and module of the published files.
    path.write_bytes(pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core"))


def write_folder(folder: Path, train: int, val: int) -> None:
    """Plain images, 40 x 30 pixels, of a dark and a light class."""
    for part, count in (("train", train), ("val", val)):
        for name, value in (("dark", 40), ("light", 200)):
            here = folder / part / name
            here.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (value, value, value)).save(here / f"{i}.png")
