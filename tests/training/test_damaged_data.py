"""Damaged or mislabelled files are refused by name, and never trained on."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_files import write_cifar10, write_folder

from ela_kernels.training.data import UnreadableImageError, load_task

pytest.importorskip("PIL.Image")


def _batch(path: Path, **changes: object) -> None:
    content: dict[bytes, object] = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    content |= {name.encode(): value for name, value in changes.items()}
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0, 10]}, "has the label 10; allowed are ints from 0 to 9"),
        ({"labels": [0]}, "has 1 of the labels"),
        ({"data": np.zeros((2, 100), np.uint8)}, r"of shape \(2, 100\), uint8; allowed is"),
        ({"data": np.zeros((2, 3072), np.float32)}, "float32; allowed is"),
    ],
)
def test_a_wrong_batch_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, each=2)
    _batch(folder / "data_batch_3", **changes)
    with pytest.raises(ValueError, match=message):
        load_task("cifar10", tmp_path)


def test_a_truncated_pickle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, each=2)
    whole = (folder / "data_batch_1").read_bytes()
    (folder / "data_batch_1").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data_batch_1 is no batch of CIFAR's python version"):
        load_task("cifar10", tmp_path)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=1)
    damaged = next((tmp_path / "train" / "dark").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:40])
    task = load_task("folder", tmp_path, side=16)
    with pytest.raises(UnreadableImageError, match=damaged.name):
        task.train.read(torch.tensor([0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "Ran out of input"), (pickle.dumps([1], protocol=2), "holds a list; allowed is a dict")],
)
def test_a_file_that_is_no_batch_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, each=2)
    (folder / "data_batch_4").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_4.*{message}"):
        load_task("cifar10", tmp_path)


def test_missing_class_names_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, each=2)
    (folder / "batches.meta").write_bytes(pickle.dumps({b"other": 1}, protocol=2))
    with pytest.raises(ValueError, match=r"batches\.meta has no list of class names"):
        load_task("cifar10", tmp_path)


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=1)
    (tmp_path / "train" / ".notebook").mkdir()
    (tmp_path / "train" / "dark" / "._0.png").write_bytes(b"metadata of a desktop")
    task = load_task("folder", tmp_path, side=8)
    assert (task.classes, len(task.train)) == (["dark", "light"], 4)
