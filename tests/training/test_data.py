"""Where images come from: the bundled digits; and what is said of others when they, or libraries, are not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ela_kernels import optional
from ela_kernels.training import data
from ela_kernels.training.data import crop, crop_only, flip, load_task
from ela_kernels.training.recipe import Recipe

pytest.importorskip("sklearn")


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
def test_without_torchvision_its_data_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.delitem(sys.modules, "ela_kernels.training.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(
        optional.MissingLibraryError,
        match=r"^reading CIFAR and folders of images needs torchvision, .*'ela-kernels\[vision\]'",
    ):
        load_task(name, tmp_path)


@pytest.mark.parametrize(
    "recipe", [Recipe(auto_augment="ra"), Recipe(auto_augment="augmix"), Recipe(random_erase=0.1)]
)
def test_digits_are_varied_in_no_other_way(recipe: Recipe) -> None:
    (name,) = recipe.of_pictures
    said = f"^{name.replace('_', '-')}: got .* with --data digits, .*; allowed with cifar10, cifar1"
    with pytest.raises(ValueError, match=said):
        load_task("digits", recipe=recipe)
