"""Digits on canvases, and folders of COCO's format: what is on them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ela_kernels.training.data import MissingDataError
from ela_kernels.training.detection.coco import load_coco
from ela_kernels.training.detection.scenes import (
    LARGEST,
    LARGEST_SIDE,
    LEAST_SIDE,
    MOST_DIGITS,
    Scenes,
)
from ela_kernels.training.detection.tasks import flip, load_task
from ela_kernels.training.images import UnreadableImageError

pytest.importorskip("sklearn")
image_files = pytest.importorskip("PIL.Image")


def test_scenes_are_what_they_say() -> None:
    scenes, seen = Scenes(60), set()
    for scene in (scenes[i] for i in range(60)):
        channels, height, width = scene.image.shape
        assert channels == 3
        assert LEAST_SIDE <= min(height, width) <= max(height, width) <= LARGEST_SIDE
        assert 0 <= scene.image.min() <= scene.image.max() <= 1
        left, top, right, bottom = scene.boxes.unbind(1)
        assert len(scene.boxes) == len(scene.labels) <= MOST_DIGITS
        assert bool(((left >= 0) & (left < right) & (right <= width)).all())
        assert bool(((top >= 0) & (top < bottom) & (bottom <= height)).all())
        assert bool((right - left <= LARGEST).all())
        for i, box in enumerate(scene.boxes):
            x0, y0, x1, y1 = box.long().tolist()
            inside = scene.image[0, y0:y1, x0:x1]
            assert inside.max() > scene.image[0].mean() + 0.1  # a digit is lighter than the canvas
            for other in scene.boxes[:i]:
                overlaps = torch.minimum(box[2:], other[2:]) > torch.maximum(box[:2], other[:2])
                assert not overlaps.all()
        seen |= set(scene.labels.tolist())
    assert seen == set(range(1, 11))


def test_scenes_are_the_same_again_and_others_of_another_seed() -> None:
    one, again, other = Scenes(3), Scenes(3), Scenes(3, seed=1)
    test = Scenes(3, train=False)
    for i in (2, 0):
        for a, b in zip(one[i], again[i], strict=True):
            assert a == b if isinstance(a, int) else torch.equal(a, b)
        for different in (other, test):
            assert different[i].image.shape != one[i].image.shape or not torch.equal(
                different[i].image, one[i].image
            )
    with pytest.raises(IndexError, match="got 3; allowed is an int from 0 to 2"):
        one[3]


def test_digits_for_testing_are_no_others() -> None:
    """No digit that is trained on is tested on."""
    train, test = (Scenes(1, part).digits.flatten(1) for part in (True, False))
    assert len(train) + len(test) == 1797
    assert not (train.unsqueeze(1) == test).all(-1).any(1).all()


def test_a_mirrored_image_has_its_boxes_mirrored() -> None:
    scene = Scenes(1)[0]
    generator = torch.Generator().manual_seed(0)
    mirrored = next(s for _ in range(20) if (s := flip(scene, generator)) is not scene)
    assert torch.equal(mirrored.image.flip(-1), scene.image)
    for box, other in zip(scene.boxes.long(), mirrored.boxes.long(), strict=True):
        x0, y0, x1, y1 = box.tolist()
        u0, v0, u1, v1 = other.tolist()
        part, again = scene.image[:, y0:y1, x0:x1], mirrored.image[:, v0:v1, u0:u1]
        assert torch.equal(part, again.flip(-1))


# COCO's format.


def annotations(**changes: Any) -> dict[str, Any]:
    """Three images: one with two boxes, one of which ends outside, one with a crowd, one with none."""
    found: dict[str, Any] = {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (11, 5, 8)],
        "annotations": [
            {"image_id": 5, "category_id": 7, "bbox": [2, 3, 10, 5], "iscrowd": 0},
            {"image_id": 5, "category_id": 3, "bbox": [30.5, 1, 20, 4]},
            {"image_id": 8, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    return {**found, **changes}


def write(folder: Path, train: Any = None, val: Any = None) -> Path:
    (folder / "annotations").mkdir(parents=True)
    for part, content in (("train2017", train), ("val2017", val)):
        (folder / part).mkdir()
        for number in (11, 5, 8):
            image_files.new("RGB", (40, 24), (number * 20, 0, 0)).save(
                folder / part / f"{number}.png"
            )
        text = content if isinstance(content, str) else json.dumps(content or annotations())
        (folder / "annotations" / f"instances_{part}.json").write_text(text)
    return folder


def test_a_folder_is_read(tmp_path: Path) -> None:
    task = load_task("coco", write(tmp_path))
    assert task.classes == ["dog", "cat"]
    assert len(task.train) == len(task.test) == 3
    five, eight, eleven = (task.train[i] for i in range(3))
    assert (five.number, eight.number, eleven.number) == (5, 8, 11)
    assert five.image.shape == (3, 24, 40)
    assert five.image[0].unique().tolist() == [pytest.approx(100 / 255)]
    # cut at the edge of the image
    assert five.boxes.tolist() == [[2, 3, 12, 8], [30.5, 1, 40, 5]]
    assert five.labels.tolist() == [2, 1]
    for without in (eight, eleven):
        assert without.boxes.shape == (0, 4)
        assert without.labels.shape == (0,)


@pytest.mark.parametrize(
    "box",
    [[1, 1, 0, 5], [1, 1, 5, -2], [1, 1, 5], None, "box", [1, 1, float("nan"), 5], [1, 1, 5, True]],
)
def test_broken_boxes_are_named_by_their_image(tmp_path: Path, box: Any) -> None:
    broken = [{"image_id": 8, "category_id": 3, "bbox": box}] * 7
    write(tmp_path, annotations(annotations=broken))
    with pytest.raises(
        ValueError, match=r"train2017.*broken annotations: image 8: bbox.*and 2 more"
    ):
        load_coco(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "is no JSON file"),
        ("[]", "no annotation file of COCO's format"),
        ('{"images": []}', "KeyError: 'categories'"),
        (annotations(annotations=[]), "has no box at all"),
        (
            annotations(annotations=[{"image_id": 4, "category_id": 3, "bbox": [0, 0, 1, 1]}]),
            "image 4: it is not among the images",
        ),
        (
            annotations(annotations=[{"image_id": 5, "category_id": 4, "bbox": [0, 0, 1, 1]}]),
            "image 5: category 4 is not among the categories",
        ),
        (annotations(images=[{"id": "5", "file_name": "5.png"}]), "got the id '5'"),
    ],
)
def test_annotation_files_that_are_none(tmp_path: Path, content: Any, said: str) -> None:
    write(tmp_path, val=content)
    with pytest.raises(ValueError, match=rf"data-dir: .*instances_val2017\.json.*{said}"):
        load_coco(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data-dir: got none for 'coco'"):
        load_task("coco")
    for side in (-1, 0, 31, 4097):
        with pytest.raises(
            ValueError, match=rf"^side: got {side} .*allowed is an int from 32 to 4"
        ):
            load_task("digits", side=side)
    with pytest.raises(
        MissingDataError, match=r"nowhere is not there, or no folder\. Expected are"
    ):
        load_coco(tmp_path / "nowhere")
    with pytest.raises(MissingDataError, match=r"instances_train\*\.json not found in"):
        load_coco(tmp_path)
    write(tmp_path / "data")
    (tmp_path / "data" / "val2017").rename(tmp_path / "data" / "other")
    with pytest.raises(
        MissingDataError, match=r"val2017, the images of instances_val2017\.json, not found"
    ):
        load_coco(tmp_path / "data")
    (tmp_path / "data" / "other").rename(tmp_path / "data" / "val2017")
    (tmp_path / "data" / "annotations" / "instances_val2014.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got instances_val2014\.json, instances_val2017\.json"):
        load_coco(tmp_path / "data")


def test_other_categories_for_testing_are_refused(tmp_path: Path) -> None:
    write(
        tmp_path, val=annotations(categories=[{"id": 7, "name": "cat"}, {"id": 3, "name": "cow"}])
    )
    with pytest.raises(ValueError, match="have other categories"):
        load_coco(tmp_path)


def test_images_that_cannot_be_used_are_named_when_they_are_read(tmp_path: Path) -> None:
    outside = [{"image_id": 5, "category_id": 3, "bbox": [50, 1, 20, 4]}]
    found = load_coco(write(tmp_path, annotations(annotations=outside)))
    with pytest.raises(ValueError, match=r"the image 5 \(5\.png, 40x24\) has a box outside of it"):
        found.train[0]
    (tmp_path / "train2017" / "8.png").unlink()
    (tmp_path / "train2017" / "11.png").write_bytes(b"\x89PNG nothing")
    for number in (1, 2):
        with pytest.raises(
            UnreadableImageError, match=r"data-dir: .*\.png cannot be read as an image"
        ):
            found.train[number]
