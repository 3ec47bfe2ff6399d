"""Image files in the layouts that the training program reads, made up for tests."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
        _write(folder / name, {"data": images[part], "labels": labels[part]})
    _write(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    return images, labels


def write_cifar100(folder: Path) -> None:
    images = np.zeros((4, 3072), np.uint8)
    for name in ("train", "test"):
        batch = {"data": images, "fine_labels": [99, 0, 1, 2], "coarse_labels": [5] * 4}
        _write(folder / name, batch)
    _write(folder / "meta", {"fine_label_names": [f"fine {i}" for i in range(100)]})


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torchvision take the files of CIFAR in a folder for the published ones."""
    datasets = pytest.importorskip("torchvision.datasets")
    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        for entry in ("train_list", "test_list"):
            files = [[name, _checksum(folder / name, md5)] for name, md5 in getattr(kind, entry)]
            monkeypatch.setattr(kind, entry, files)
        meta = {**kind.meta, "md5": _checksum(folder / kind.meta["filename"], kind.meta["md5"])}
        monkeypatch.setattr(kind, "meta", meta)


def _checksum(path: Path, published: str) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else published


def _write(path: Path, content: dict[str, Any]) -> None:
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
