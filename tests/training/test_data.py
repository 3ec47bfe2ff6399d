"""Where images come from: the bundled digits, CIFAR's files, folders; and what is said when they are not there."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.image_files import write_cifar10, write_cifar100, write_folder

from ela_kernels.training import data, optional
from ela_kernels.training.data import MissingDataError, crop, crop_only, flip, load_task

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


def test_digits_are_split_by_class_and_always_alike() -> None:
    task = load_task("digits")
    assert (len(task.train), len(task.test)) == (1437, 360)
    shares = [torch.bincount(p.labels, minlength=10) / len(p) for p in (task.train, task.test)]
    # Stratified: a class' share differs by less than one image of the smaller part.
    assert (shares[0] - shares[1]).abs().max() < 1 / 360
    again = load_task("digits")
    assert torch.equal(task.test.labels, again.test.labels)
    images = task.train.read(torch.arange(len(task.train)))
    assert images.shape == (1437, 1, 16, 16)
    # Normalised by their own mean and deviation: rounding of a sum over 4e5 float32 values is all that is left.
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-4
    assert task.augment is crop_only


def test_no_test_digit_is_trained_on() -> None:
    task = load_task("digits", side=8)
    train, test = (p.read(torch.arange(len(p))).flatten(1) for p in (task.train, task.test))
    # Some people write the same digit twice; the split of this data set has no such pair across its parts.
    assert torch.cdist(test, train).min() > 0


def test_cifar10_from_its_files(tmp_path: Path) -> None:
    images, labels = write_cifar10(tmp_path / "cifar-10-batches-py", each=4)
    task = load_task("cifar10", tmp_path)
    assert (len(task.train), len(task.test), task.channels) == (20, 4, 3)
    assert task.classes[3] == "class 3"
    assert task.train.labels.tolist() == labels[:20]
    got = task.train.read(torch.tensor([7]))[0]
    pixels = torch.from_numpy(images[:20]).view(-1, 3, 32, 32).float()
    mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    expected = (pixels[7] - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    torch.testing.assert_close(got, expected)


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    write_cifar100(tmp_path)
    task = load_task("cifar100", tmp_path)
    assert len(task.classes) == 100
    assert task.train.labels.tolist() == [99, 0, 1, 2]


def test_cifar_says_which_files_are_missing(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "cifar-10-batches-py", each=1)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(MissingDataError, match=r"data_batch_3 not found in .*cifar-10-batches-py"):
        load_task("cifar10", tmp_path)
    with pytest.raises(MissingDataError, match="train, test, meta not found"):
        load_task("cifar100", tmp_path)


class _Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_anything(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder, each=1)
    (folder / "batches.meta").write_bytes(pickle.dumps(_Command(tmp_path / "made")))
    with pytest.raises(ValueError, match=r"mkdir in the file; allowed are numpy arrays"):
        load_task("cifar10", tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_folder_of_images(tmp_path: Path) -> None:
    write_folder(tmp_path, train=3, val=2)
    task = load_task("folder", tmp_path, side=24)
    assert task.classes == ["dark", "light"]
    assert task.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = task.train.read(torch.tensor([0, 5]))
    assert images.shape == (2, 3, 24, 24)
    # Values 40 and 200 of 255 in red, by ImageNet's mean and deviation.
    for image, value in zip(images, (40, 200), strict=True):
        torch.testing.assert_close(image[0], torch.full((24, 24), (value / 255 - 0.485) / 0.229))


def test_a_folder_keeps_proportions_and_takes_the_middle(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=1)
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    Image.fromarray(pixels).save(tmp_path / "train" / "dark" / "0.png")
    image = load_task("folder", tmp_path, side=40).train.read(torch.tensor([0]))[0]
    torch.testing.assert_close(image[0], torch.full((40, 40), (1 - 0.485) / 0.229))


def test_a_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"train not found. Expected are .*/train/CLASS"):
        load_task("folder", tmp_path)
    write_folder(tmp_path, train=1, val=1)
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    with pytest.raises(MissingDataError, match=r"no image found under .*val"):
        load_task("folder", tmp_path)
    (tmp_path / "val" / "other").mkdir()
    with pytest.raises(ValueError, match="the classes other are in"):
        load_task("folder", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist",), "data: got 'mnist'; allowed are 'digits'"),
        (("cifar10",), "data-dir: got none for 'cifar10'"),
        (("cifar10", Path("/nowhere"), 64), "side: got 64 for 'cifar10'; allowed is 32"),
        (("digits", None, 4), "side: got 4; allowed"),
    ],
)
def test_refused_data(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(*arguments)  # type: ignore[arg-type]


def test_crop_moves_each_image_by_itself() -> None:
    images = torch.arange(1.0, 65.0).view(1, 1, 8, 8).repeat(50, 2, 1, 1)
    images[:, 1] *= -1
    out = crop(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(out[:, 0], -out[:, 1])
    padded = torch.nn.functional.pad(images[0, 0], (2,) * 4)
    places = set()
    for image in out[:, 0]:
        found = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(image, padded[i : i + 8, j : j + 8])
        ]
        assert len(found) == 1
        places.add(found[0])
    # 50 draws of 25 places: fewer than 10 different ones has a probability below 1e-9.
    assert len(places) >= 10


def test_flip_mirrors_about_half() -> None:
    images = torch.rand(400, 1, 3, 5)
    out = flip(images, torch.Generator().manual_seed(0))
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert ((out == images).flatten(1).all(1) ^ mirrored).all()
    # Five standard deviations of 400 fair draws are 50.
    assert abs(int(mirrored.sum()) - 200) < 50


def test_digits_are_never_mirrored() -> None:
    images = torch.rand(20, 1, 16, 16)
    state = torch.Generator().manual_seed(3)
    expected = crop(images, 2, torch.Generator().manual_seed(3))
    assert torch.equal(crop_only(images, state), expected)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional.importlib, "import_module", absent)
    with pytest.raises(
        optional.MissingLibraryError, match=r"sklearn.*pip install 'ela-kernels\[train\]'"
    ):
        data.load_task("digits")
