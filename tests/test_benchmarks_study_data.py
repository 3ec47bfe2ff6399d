"""What the study trains on: files that are read or refused, batches that are the same for all variants of a seed."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study.data import Batches, load
from benchmarks.study.idx import FILES, read_idx, read_part
from benchmarks.study.settings import Settings
from benchmarks.study.variants import VARIANTS
from ela_kernels.training.data import MissingDataError, Task, TensorImages, crop_and_flip


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, compress: bool = True) -> dict[str, np.ndarray]:
    """The four files with a few images; what they hold by name."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 12), ("test", 5)):
        images, labels = FILES[part]
        arrays[images] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[labels] = np.arange(count, dtype=np.uint8) % 10
    for name, array in arrays.items():
        content = idx(array)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


def few(count: int = 40) -> Task:
    images = torch.arange(count * 64).view(count, 1, 8, 8) % 251
    part = TensorImages(
        images.to(torch.uint8), torch.arange(count) % 10, torch.zeros(1), torch.ones(1)
    )
    return Task(part, part, [str(i) for i in range(10)], 1, crop_and_flip)


@pytest.mark.parametrize("compress", [True, False])
def test_the_four_files_are_read(tmp_path: Path, compress: bool) -> None:
    arrays = write_fashion(tmp_path, compress)
    task = load("fashion-mnist", tmp_path)
    assert (len(task.train), len(task.test), task.channels, len(task.classes)) == (12, 5, 1, 10)
    assert task.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    pixels = torch.from_numpy(arrays["train-images-idx3-ubyte"]).float()
    wanted = (pixels[[3, 7]].unsqueeze(1) - pixels.mean()) / pixels.std()
    torch.testing.assert_close(task.train.read(torch.tensor([3, 7])), wanted)
    # By the training images' mean and deviation, the test images too.
    tested = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).float()
    wanted = (tested[[4]].unsqueeze(1) - pixels.mean()) / pixels.std()
    torch.testing.assert_close(task.test.read(torch.tensor([4])), wanted)


WHOLE = idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing; allowed is 00000803"),
        (WHOLE[:10], "begins with 00000803000000020000; allowed is"),
        (WHOLE[:-1], "has 17 bytes after its header; allowed are the 18 of"),
        (WHOLE + b"x", "has more bytes after its header"),
        (idx(np.zeros(2, np.uint8)) + b"12345678", "begins with 00000801"),
        (WHOLE[:2] + b"\x0d" + WHOLE[3:], "begins with 00000d03"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "says that it holds"),
        (b"\0\0\x08\x03" + b"\0" * 12, "says that it holds"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"root: {path} {message}"):
        read_idx(path, 3)
    compressed = tmp_path / "images.gz"
    compressed.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"root: {compressed} {message}"):
        read_idx(compressed, 3)


@pytest.mark.parametrize("damage", ["cut", "changed", "not compressed"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "images.gz"
    content = bytearray(gzip.compress(idx(np.arange(180, dtype=np.uint8).reshape(5, 6, 6))))
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "changed":
        content[len(content) // 2] ^= 255
    else:
        content = bytearray(WHOLE)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"images\.gz is damaged"):
        read_idx(path, 3)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(np.zeros(11, np.uint8)))
    )
    with pytest.raises(ValueError, match=r"has 12 images and .* 11 labels"):
        read_part(tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(np.full(12, 10, np.uint8)))
    )
    with pytest.raises(ValueError, match="has the label 10; allowed are ints from 0 to 9"):
        load("fashion-mnist", tmp_path)


def test_missing_data_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="root: train-images-idx3-ubyte not found in"):
        load("fashion-mnist", tmp_path)
    for name in ("cifar10", "cifar100"):
        with pytest.raises(ValueError, match="root: got none for"):
            load(name)


def listed(settings: Settings, task: Task, epochs: int = 2) -> list[torch.Tensor]:
    batches = Batches(task, settings)
    return [t for e in range(1, epochs + 1) for pair in batches.epoch(e) for t in pair]


def test_all_variants_of_a_seed_see_the_same_batches() -> None:
    task = few()
    first = listed(Settings("plain", 20, "digits", 3, batch=8, train_images=33), task)
    assert len(first) == 2 * 4 * 2  # epochs, batches, images and labels
    for i, name in enumerate(VARIANTS):
        torch.manual_seed(i)  # nothing depends on the common generator
        again = listed(Settings(name, 20, "digits", 3, batch=8, train_images=33), task)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = listed(Settings("plain", 20, "digits", 4, batch=8, train_images=33), task)
    assert not torch.equal(first[0], other[0])
    # Other images, and the same ones varied anew, in the next epoch.
    assert not torch.equal(first[0], first[8])


def test_each_chosen_image_comes_once_an_epoch() -> None:
    task = few()
    settings = Settings("plain", 20, "digits", 0, batch=8, train_images=24)
    batches = Batches(task, settings)
    # Without variation, so that images are recognised.
    batches.task = Task(task.train, task.test, task.classes, 1, lambda images, _: images)
    seen = [[i for x, _ in batches.epoch(e) for i in x.flatten(1).tolist()] for e in (1, 2)]
    wanted = task.train.read(batches.chosen).flatten(1).tolist()
    assert len(wanted) == 24
    assert all(sorted(epoch) == sorted(wanted) for epoch in seen)
    assert seen[0] != seen[1]


def test_images_are_averaged_down() -> None:
    task = few()
    batches = Batches(task, Settings("plain", 20, "digits", 0, batch=8, side=8, test_images=3))
    ((images, labels),) = batches.test()
    assert images.shape == (3, 1, 8, 8)
    assert labels.tolist() == [0, 1, 2]
    large = torch.rand(6, 1, 16, 16)
    part = TensorImages(large, torch.zeros(6, dtype=torch.int64), torch.zeros(1), torch.ones(1))
    task = Task(part, part, ["one"], 1, lambda images, _: images)
    ((images, _),) = Batches(task, Settings("plain", 20, "digits", 0, batch=2, side=8)).test()
    torch.testing.assert_close(images, large.view(6, 1, 8, 2, 8, 2).mean((3, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": 41}, "train-images: got 41; allowed is at most 40"),
        ({"test_images": 41}, "test-images: got 41; allowed is at most 40"),
        ({"batch": 41}, "batch: got 41; allowed is at most the number of training images, 40"),
        ({"side": 9}, "side: got 9; allowed is an int from 8 to 8"),
        ({"side": 7}, "side: got 7; allowed is an int from 8 to 8"),
    ],
)
def test_settings_that_do_not_fit_the_data(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batches(few(), Settings("plain", 20, "digits", 0, **{"batch": 8, **options}))
