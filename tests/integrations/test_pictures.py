"""CIFAR's files and folders of images, read by torchvision: what is read, what is refused by name, what is varied."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.image_files import publish, write_cifar10, write_cifar100, write_folder

from benchmarks.study.data import load
from ela_kernels.training.data import MissingDataError, UnreadableImageError, load_task
from ela_kernels.training.reading import Part, batches
from ela_kernels.training.recipe import AUTO_AUGMENT, Recipe, mixed

Image = pytest.importorskip("PIL.Image")
datasets = pytest.importorskip("torchvision.datasets")

pytestmark = pytest.mark.integration

CIFAR10 = "cifar-10-batches-py"
NATURAL = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


def cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch, each: int = 4) -> tuple[Any, list[int]]:
    found = write_cifar10(folder / CIFAR10, each)
    publish(folder / CIFAR10, monkeypatch)
    return found


def noise(folder: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (40, 30)) -> None:
    """A folder whose images differ in every pixel, so that each crop shows which one it is."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in ("a", "b"):
            here = folder / part / name
            here.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(here / f"{i}.png")


class TestCifar:
    def test_images_and_labels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        images, labels = cifar10(tmp_path, monkeypatch)
        task = load_task("cifar10", tmp_path)
        assert (len(task.train), len(task.test), task.channels) == (20, 4, 3)
        assert task.classes[3] == "class 3"
        assert task.train.labels.tolist() == labels[:20]
        pixels = torch.from_numpy(images).view(-1, 3, 32, 32).float()
        mean, deviation = (f((0, 2, 3)).view(3, 1, 1) for f in (pixels[:20].mean, pixels[:20].std))
        for part, expected in (
            (Part(torch.tensor([7])), pixels[7]),
            (Part(torch.tensor([1]), testing=True), pixels[21]),
        ):
            got, label = task.read(part)
            torch.testing.assert_close(got[0], (expected - mean) / deviation)
            assert label.tolist() == [labels[7 if not part.testing else 21]]

    def test_files_in_the_folder_itself_and_fine_labels(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_cifar100(tmp_path)
        publish(tmp_path, monkeypatch)
        task = load_task("cifar100", tmp_path)
        assert len(task.classes) == 100
        assert task.train.labels.tolist() == [99, 0, 1, 2]
        # All of them are black: a channel of one value is no NaN.
        assert torch.equal(task.train.read(torch.tensor([0])), torch.zeros(1, 3, 32, 32))

    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        write_cifar10(tmp_path / CIFAR10, each=1)
        (tmp_path / CIFAR10 / "data_batch_3").unlink()
        with pytest.raises(MissingDataError, match=rf"data_batch_3 not found in .*{CIFAR10}"):
            load_task("cifar10", tmp_path)
        with pytest.raises(MissingDataError, match="train, test, meta not found"):
            load_task("cifar100", tmp_path)

    @pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
    def test_no_pickle_is_read_but_the_published_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        cifar10(tmp_path, monkeypatch)
        path, made = tmp_path / CIFAR10 / name, tmp_path / "made"
        path.write_bytes(pickle.dumps(_Command(made)))
        with pytest.raises(ValueError, match=rf"data-dir: {path} is damaged, or another file than"):
            load_task("cifar10", tmp_path)
        assert not made.exists()
        path.write_bytes(path.read_bytes()[:10])
        with pytest.raises(ValueError, match=r"its MD5 is [0-9a-f]{32}; allowed is [0-9a-f]{32}\."):
            load_task("cifar10", tmp_path)

    def test_the_checksums_are_those_of_torchvision(self, tmp_path: Path) -> None:
        write_cifar10(tmp_path / CIFAR10, each=1)
        with pytest.raises(ValueError, match=r"data_batch_1 .* c99cafc152244af753f735de768cd75f"):
            load_task("cifar10", tmp_path)

    def test_variation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each is a crop of the padded image, mirrored or not."""
        cifar10(tmp_path, monkeypatch)
        task = load_task("cifar10", tmp_path)
        numbers = torch.arange(20)
        plain, (varied, _) = task.train.read(numbers), task.read(Part(numbers, seed=1))
        places = set()
        for image, other in zip(plain, varied, strict=True):
            # Where images end, torchvision pads with black, which is another number in each channel.
            inside = other[:, 8:24, 8:24]
            found = [
                (i, j, mirrored)
                for mirrored in (False, True)
                for i in range(9)
                for j in range(9)
                if torch.allclose(
                    _flipped(image, mirrored)[:, 4 + i : 20 + i, 4 + j : 20 + j], inside
                )
            ]
            assert len(found) == 1
            places.add(found[0])
        # 20 draws of 162 places: that they are fewer than 10 different ones has a probability below 1e-9.
        assert len(places) >= 10
        assert {mirrored for *_, mirrored in places} == {False, True}


def test_the_study_reads_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in memory; what is wrong is told by the name of its own option."""
    images, labels = cifar10(tmp_path, monkeypatch)
    task = load("cifar10", tmp_path)
    assert task.train.labels.tolist() == labels[:20]
    pixels = torch.from_numpy(images[:20]).view(-1, 3, 32, 32).float()
    mean, deviation = (f((0, 2, 3)).view(3, 1, 1) for f in (pixels.mean, pixels.std))
    got = task.train.read(torch.tensor([5]))[0]
    torch.testing.assert_close(got, (pixels[5] - mean) / deviation)
    with pytest.raises(MissingDataError, match=r"^root: train, test, meta not found in"):
        load("cifar100", tmp_path)
    (tmp_path / CIFAR10 / "data_batch_2").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"^root: .*data_batch_2 is damaged, or another file"):
        load("cifar10", tmp_path)
    write_cifar100(tmp_path)
    publish(tmp_path, monkeypatch)
    assert len(load("cifar100", tmp_path).classes) == 100


def _flipped(image: torch.Tensor, mirrored: bool) -> torch.Tensor:
    return image.flip(-1) if mirrored else image


class _Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


class TestFolder:
    def test_images_and_labels(self, tmp_path: Path) -> None:
        write_folder(tmp_path, train=3, val=2)
        task = load_task("folder", tmp_path, side=24)
        assert task.classes == ["dark", "light"]
        assert task.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert task.test.labels.tolist() == [0, 0, 1, 1]
        images = task.train.read(torch.tensor([0, 5]))
        assert images.shape == (2, 3, 24, 24)
        # Values 40 and 200 of 255 in red, by ImageNet's mean and deviation.
        for image, value in zip(images, (40, 200), strict=True):
            red = torch.full((24, 24), (value / 255 - 0.485) / 0.229)
            torch.testing.assert_close(image[0], red)

    def test_testing_takes_the_middle_of_eight_sevenths(self, tmp_path: Path) -> None:
        """The shorter side is resized to 8/7 of the crop: of 48 pixels at side 42 nothing is resized."""
        noise(tmp_path, train=1, val=1, size=(96, 48))
        task = load_task("folder", tmp_path, side=42)
        got, _ = task.read(Part(torch.tensor([0]), testing=True))
        pixels = np.array(Image.open(tmp_path / "val" / "a" / "0.png"))[3:45, 27:69]
        expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        torch.testing.assert_close(got[0], (expected - NATURAL[0]) / NATURAL[1])

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MissingDataError, match=r"train not found. Expected are .*/train/CLASS"):
            load_task("folder", tmp_path)
        for part in ("train", "val"):
            (tmp_path / part).mkdir()
        with pytest.raises(MissingDataError, match=r"no image found under .*train"):
            load_task("folder", tmp_path)
        for part in ("train", "val"):
            (tmp_path / part).rmdir()
        write_folder(tmp_path, train=1, val=1)
        for path in (tmp_path / "val").rglob("*.png"):
            path.unlink()
        with pytest.raises(MissingDataError, match=r"no image found under .*val"):
            load_task("folder", tmp_path)
        (tmp_path / "val" / "other").mkdir()
        with pytest.raises(ValueError, match="the classes other are in"):
            load_task("folder", tmp_path)

    def test_labels_of_tests_are_those_of_training(self, tmp_path: Path) -> None:
        """Also where classes have no image, in one part or in both."""
        write_folder(tmp_path, train=2, val=1)
        (tmp_path / "train" / "between").mkdir()
        (tmp_path / "val" / "dark" / "0.png").unlink()
        (tmp_path / "val" / "dark").rmdir()
        task = load_task("folder", tmp_path, side=8)
        assert task.classes == ["between", "dark", "light"]
        assert (task.train.labels.tolist(), task.test.labels.tolist()) == ([1, 1, 2, 2], [2])

    def test_hidden_files_and_folders_are_no_images(self, tmp_path: Path) -> None:
        write_folder(tmp_path, train=2, val=1)
        (tmp_path / "train" / ".notebook").mkdir()
        (tmp_path / "train" / "dark" / "._0.png").write_bytes(b"metadata of a desktop")
        (tmp_path / "train" / "dark" / "notes.txt").write_text("no image")
        task = load_task("folder", tmp_path, side=8)
        assert (task.classes, len(task.train)) == (["dark", "light"], 4)

    @pytest.mark.parametrize("place", ["train", "train/dark"])
    def test_a_folder_that_is_not_listed_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        write_folder(tmp_path, train=1, val=1)
        scandir, listdir = os.scandir, os.listdir

        def denied(path: Any, do: Any) -> Any:
            if Path(path) == tmp_path / place:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return do(path)

        monkeypatch.setattr(os, "scandir", lambda path=".": denied(path, scandir))
        monkeypatch.setattr(os, "listdir", lambda path=".": denied(path, listdir))
        said = f"data-dir: {tmp_path / place} cannot be read: Permission denied; allowed"
        with pytest.raises(MissingDataError, match=said):
            load_task("folder", tmp_path)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_damaged_image_is_named(self, tmp_path: Path, workers: int) -> None:
        write_folder(tmp_path, train=1, val=1)
        damaged = next((tmp_path / "train" / "dark").iterdir())
        damaged.write_bytes(damaged.read_bytes()[:40])
        task = load_task("folder", tmp_path, side=16)
        for seed in (None, 3):
            with pytest.raises(UnreadableImageError, match=f"^data-dir: {damaged} cannot be read"):
                list(batches(task.read, [Part(torch.tensor([0]), seed)], workers))

    def test_images_are_decoded_as_anywhere_in_the_program(self, tmp_path: Path) -> None:
        """Of torchvision's own loader, greys of 16 bits would be white."""
        write_folder(tmp_path, train=1, val=1)
        grey = np.full((30, 40), 128 * 257, np.uint16)
        Image.fromarray(grey).save(tmp_path / "train" / "dark" / "0.png")
        image = load_task("folder", tmp_path, side=8).train.read(torch.tensor([0]))[0]
        torch.testing.assert_close(
            image * NATURAL[1] + NATURAL[0], torch.full((3, 8, 8), 128 / 255)
        )


class TestVariation:
    ALL = Recipe(auto_augment="ra", random_erase=0.5, mixup_alpha=0.4, cutmix_alpha=1.0)

    @pytest.mark.parametrize(
        "recipe",
        [*(Recipe(auto_augment=name) for name in AUTO_AUGMENT), Recipe(random_erase=1.0), ALL],
        ids=lambda recipe: recipe.auto_augment or "erase",
    )
    @pytest.mark.parametrize("data", ["folder", "cifar10"])
    def test_it_depends_on_the_part_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, recipe: Recipe
    ) -> None:
        """Not on the number of workers, on what was read before, or on the generator of the model, which stays."""
        if data == "folder":
            noise(tmp_path)
        else:
            cifar10(tmp_path, monkeypatch)
        side = 32 if data == "cifar10" else 20
        task = load_task(data, tmp_path, side, recipe)
        read = mixed(task.read, recipe, len(task.classes))
        parts = [Part(torch.arange(4 * i % 8, 4 * i % 8 + 4), seed=i) for i in range(4)]
        torch.manual_seed(1)
        before = torch.get_rng_state()
        alone = list(batches(read, parts, workers=0))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        ahead = list(batches(read, parts[1:], workers=2))
        assert torch.equal(torch.get_rng_state(), before)
        for (images, labels), (others, theirs) in zip(alone[1:], ahead, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, theirs)
            assert images.dtype == torch.float32
            assert images.isfinite().all()
        # Parts 0 and 2 have the same images, with other seeds.
        assert not torch.equal(alone[0][0], alone[2][0])

    @pytest.mark.parametrize(
        "recipe",
        [*(Recipe(auto_augment=name) for name in AUTO_AUGMENT), Recipe(random_erase=1.0)],
        ids=lambda recipe: recipe.auto_augment or "erase",
    )
    def test_each_option_changes_images(self, tmp_path: Path, recipe: Recipe) -> None:
        noise(tmp_path, train=8)
        part = Part(torch.arange(16), seed=0)
        plain, varied = (
            load_task("folder", tmp_path, 20, r).read(part)[0] for r in (Recipe(), recipe)
        )
        changed = (plain != varied).flatten(1).any(1)
        assert changed.sum() >= 8

    def test_magnitude(self, tmp_path: Path) -> None:
        noise(tmp_path, train=8)
        part = Part(torch.arange(16), seed=0)
        images = [
            load_task("folder", tmp_path, 20, Recipe(auto_augment="ra", ra_magnitude=n)).read(part)[
                0
            ]
            for n in (9, 9, 20)
        ]
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])

    def test_images_of_a_batch_have_draws_of_their_own(self, tmp_path: Path) -> None:
        noise(tmp_path)
        task = load_task("folder", tmp_path, 20)
        images, _ = task.read(Part(torch.zeros(6, dtype=torch.int64), seed=0))
        assert len(images.flatten(1).unique(dim=0)) == 6

    @pytest.mark.parametrize("kind", ["mixup", "cutmix"])
    def test_mixed_images_have_shares_of_two_classes(self, kind: str) -> None:
        """By the definition of either: the image is a mean, or has a rectangle of the one before it in the batch."""
        images = torch.arange(1.0, 5.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
        labels = torch.tensor([3, 1, 4, 0])
        recipe = Recipe(mixup_alpha=1.0) if kind == "mixup" else Recipe(cutmix_alpha=1.0)
        read = mixed(lambda part: (images, labels), recipe, 5)
        got, shares = read(Part(torch.arange(4), seed=5))
        assert shares.shape == (4, 5)
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        share = float(shares[0, 3])
        assert 0 < share < 1
        for i in range(4):
            first, second = float(i + 1), float((i - 1) % 4 + 1)
            torch.testing.assert_close(float(shares[i, labels[i - 1]]), 1 - share)
            mean = share * first + (1 - share) * second
            torch.testing.assert_close(float(got[i].mean()), mean)
            values = {round(v, 4) for v in got[i].unique().tolist()}
            assert values == ({round(mean, 4)} if kind == "mixup" else {first, second})

    def test_one_of_both_is_taken_by_chance(self) -> None:
        images = torch.arange(1.0, 5.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
        recipe = Recipe(mixup_alpha=1.0, cutmix_alpha=1.0)
        read = mixed(lambda part: (images, torch.arange(4)), recipe, 4)
        found = [read(Part(torch.arange(4), seed=i))[0] for i in range(40)]
        # Of a batch mixed by cutmix every pixel is one of its images'; 40 fair draws are 5 to 35 but for 1e-6.
        cut = sum(bool((images == images.round()).all()) for images in found)
        assert 5 <= cut <= 35

    def test_tests_are_not_mixed(self) -> None:
        read = mixed(lambda part: (torch.zeros(2, 1, 4, 4), torch.arange(2)), self.ALL, 3)
        assert read(Part(torch.arange(2), testing=True))[1].tolist() == [0, 1]

    def test_what_reads_can_be_sent_to_another_process(self, tmp_path: Path) -> None:
        """As systems do that do not fork."""
        noise(tmp_path)
        task = load_task("folder", tmp_path, 20, self.ALL)
        read = mixed(task.read, self.ALL, len(task.classes))
        part = Part(torch.arange(4), seed=2)
        for one, other in zip(read(part), pickle.loads(pickle.dumps(read))(part), strict=True):
            assert torch.equal(one, other)
