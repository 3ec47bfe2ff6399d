"""Folders of COCO's format: an annotation file and a folder of images for each part."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ela_kernels.training.data import MissingDataError
from ela_kernels.training.detection.scenes import Sample
from ela_kernels.training.images import Decoder

_LAYOUT = (
    "Expected are annotations/instances_train2017.json with the images in train2017/, and instances_val2017.json with "
    "val2017/ (any year, or none)"
)
# How many faults a message names.
_SHOWN = 5


class CocoParts(NamedTuple):
    """A data set in COCO's format: its images for training and for testing, and the names of its classes."""

    train: CocoBoxes
    test: CocoBoxes
    classes: list[str]


def load_coco(folder: Path) -> CocoParts:
    """Read the annotations of both parts; images are read when they are needed.

    Raises:
        MissingDataError: a file or folder is not there; the message says which.
        ValueError: an annotation file that is none, has no box at all, or broken ones: named by the image's id.
    """
    (train_file, train_images), (test_file, test_images) = (
        _part(folder, name) for name in ("train", "val")
    )
    train, test = _read(train_file), _read(test_file)
    if train.classes != test.classes:
        raise ValueError(
            f"data-dir: {train_file.name} and {test_file.name} have other categories; allowed are the same ids and "
            "names in both"
        )
    ids = sorted(train.classes)
    labels = {category: number for number, category in enumerate(ids, start=1)}
    parts = (CocoBoxes(train, train_images, labels), CocoBoxes(test, test_images, labels))
    return CocoParts(*parts, [train.classes[category] for category in ids])


class _Annotations(NamedTuple):
    """What an annotation file says: names of categories and files of images by id, boxes by the id of their image."""

    classes: dict[int, str]
    files: dict[int, str]
    boxes: dict[int, list[tuple[list[float], int, bool]]]


class CocoBoxes:
    """The images of one part, with their boxes; groups that are one box (`iscrowd`) are left out.

    Args:
        annotations: of the part.
        folder: with its images.
        labels: of the categories, from 1.
    """

    def __init__(self, annotations: _Annotations, folder: Path, labels: Mapping[int, int]) -> None:
        self._annotations, self._folder, self._labels = annotations, folder, labels
        self._ids = sorted(annotations.files)
        self._decoder = Decoder()

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, number: int) -> Sample:
        """An image by its place in the order of ids, its boxes cut at its edges.

        Raises:
            UnreadableImageError: the file is not there, or no image.
        """
        image_id = self._ids[number]
        path = self._folder / self._annotations.files[image_id]
        image = self._decoder.as_tensor(self._decoder.open(path)).float() / 255
        height, width = image.shape[1:]
        boxes, labels = [], []
        for (x, y, w, h), category, is_crowd in self._annotations.boxes.get(image_id, []):
            if is_crowd:
                continue
            box = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
            if box[2] <= box[0] or box[3] <= box[1]:
                raise ValueError(
                    f"data-dir: the image {image_id} ({path.name}, {width}x{height}) has a box outside of it, "
                    f"{[x, y, w, h]}; allowed is [x, y, width, height] in its pixels. Mend the annotation file"
                )
            boxes.append(box)
            labels.append(self._labels[category])
        return Sample(
            image,
            torch.tensor(boxes, dtype=torch.float32, device="cpu").view(-1, 4),
            torch.tensor(labels, dtype=torch.int64, device="cpu"),
            image_id,
        )


def _part(folder: Path, name: str) -> tuple[Path, Path]:
    """The annotation file of a part, and the folder with its images."""
    if not folder.is_dir():
        raise MissingDataError(f"data-dir: {folder} is not there, or no folder. {_LAYOUT}")
    found = sorted((folder / "annotations").glob(f"instances_{name}*.json"))
    if not found:
        raise MissingDataError(
            f"data-dir: annotations/instances_{name}*.json not found in {folder}. {_LAYOUT}"
        )
    if len(found) > 1:
        raise ValueError(
            f"data-dir: got {', '.join(path.name for path in found)} in {folder / 'annotations'}; allowed is one "
            f"instances_{name}*.json"
        )
    images = folder / found[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise MissingDataError(
            f"data-dir: {images}, the images of {found[0].name}, not found. {_LAYOUT}"
        )
    return found[0], images


def _read(path: Path) -> _Annotations:
    try:
        content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data-dir: {path} is no JSON file: {error}") from error
    try:
        classes = {_id(c["id"]): str(c["name"]) for c in content["categories"]}
        files = {_id(i["id"]): str(i["file_name"]) for i in content["images"]}
        rows = [
            (_id(a["image_id"]), _id(a["category_id"]), a["bbox"], bool(a.get("iscrowd", 0)))
            for a in content["annotations"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data-dir: {path} is no annotation file of COCO's format ({type(error).__name__}: {error}); allowed is "
            "one with images (id, file_name), categories (id, name) and annotations (image_id, category_id, bbox)"
        ) from error
    faults = [
        f"image {image}: {fault}"
        for image, category, box, _ in rows
        if (fault := _fault(image, category, box, classes, files))
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(
            f"data-dir: {path} has broken annotations: {'; '.join(faults[:_SHOWN])}{more}. Allowed is bbox = "
            "[x, y, width, height] in pixels, with a width and height above 0, of an image and a category that are "
            "listed. Mend or remove them"
        )
    if all(is_crowd for *_, is_crowd in rows):
        raise ValueError(
            f"data-dir: {path} has no box at all; allowed is one with boxes. Images without any may be among the others"
        )
    boxes: dict[int, list[tuple[list[float], int, bool]]] = {}
    for image, category, box, is_crowd in rows:
        boxes.setdefault(image, []).append(([float(x) for x in box], category, is_crowd))
    return _Annotations(classes, files, boxes)


def _fault(
    image: int, category: int, box: Any, classes: Mapping[int, str], files: Mapping[int, str]
) -> str | None:
    """What is wrong with an annotation."""
    if image not in files:
        return "it is not among the images"
    if category not in classes:
        return f"category {category} is not among the categories"
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(type(x) in (int, float) and math.isfinite(x) for x in box)
        or box[2] <= 0
        or box[3] <= 0
    ):
        return f"bbox {box!r}"
    return None


def _id(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"got the id {value!r}; allowed is an int")
    return value
