"""Training a detector on torchvision's Faster R-CNN: exact when interrupted, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ela_kernels import ELA, explain
from ela_kernels.__main__ import main
from ela_kernels.training.arguments import check_numbers, make_options
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.detection.networks import fasterrcnn_small, make_model
from ela_kernels.training.detection.scenes import Sample, Scenes
from ela_kernels.training.detection.tasks import DetectionTask, load_task
from ela_kernels.training.detection.trainer import DetectionTrainer
from ela_kernels.training.loop import Interrupted
from ela_kernels.training.options import Options
from ela_kernels.training.parser import make_parser
from ela_kernels.training.reading import Part, batches

for library in ("sklearn", "torchvision", "torchmetrics", "pycocotools", "PIL"):
    pytest.importorskip(library)

pytestmark = pytest.mark.integration

EBQM = {"warmup": 1, "interval": 1, "probe_interval": 1, "low": 0.98, "high": 0.99}


def small_task(train: int = 12, test: int = 4) -> DetectionTask:
    scenes = Scenes(train), Scenes(test, train=False)
    return DetectionTask(*scenes, list(Scenes.classes), lambda sample, _: sample)


def trainer(attention: str = "ela", **options: Any) -> DetectionTrainer:
    torch.manual_seed(0)
    model = fasterrcnn_small(11, min_size=48, max_size=64, attention=attention)
    settings = {"epochs": 2, "batch_size": 4, "lr": 0.005, "optimizer": "adamw", "ebqm": EBQM}
    return DetectionTrainer(model, small_task(), Options(**{**settings, **options}))


@pytest.mark.parametrize("attention", ["none", "mrla", "mrla_light", "ela"])
def test_an_epoch(attention: str) -> None:
    """Every parameter learns; what is measured is between 0 and 1."""
    run = trainer(attention)
    before = copy.deepcopy(run.model.state_dict())
    row = run.run_epoch()
    assert list(row) == list(run.columns)
    assert row["train_loss"] > 0
    assert 0 <= row["test_precision"] <= row["test_precision_50"] <= 1
    changed = {n for n, t in run.model.named_parameters() if not torch.equal(t, before[n])}
    skipped = {n for n, m in run.model.named_modules() if isinstance(m, ELA) and m.skipped}
    still = {n for n, _ in run.model.named_parameters()} - changed
    assert all(any(name.startswith(layer) for layer in skipped) for name in still)
    assert (run.ebqm is not None) == (attention == "ela")


def test_kernels_serve_it() -> None:
    """All sizes of canvases come in one batch, padded; the layers see maps of any size."""
    model = fasterrcnn_small(11, attention="ela").eval()
    images = [Scenes(2)[i].image for i in range(2)]
    with torch.no_grad():
        said = str(explain(model, images))
    assert "eager" not in said
    assert said.count("cpp") == sum(isinstance(m, ELA) for m in model.modules()) == 14


def test_a_run_that_is_interrupted_goes_on_to_the_same_bits() -> None:
    straight = trainer()
    rows = [straight.run_epoch() for _ in range(2)]
    first = trainer()
    first.stopping = lambda: int(first.steps == 4)
    first.run_epoch()
    with pytest.raises(Interrupted):
        first.run_epoch()
    state = copy.deepcopy(first.state_dict())
    second = trainer()
    second.load_state_dict(state)
    second.run_epoch()
    for name in rows[1]:
        if name != "seconds":
            assert second.history[1][name] == rows[1][name], name
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize("data", ["digits", "coco"])
def test_images_read_ahead_are_the_same(tmp_path: Path, data: str) -> None:
    """In processes that got what reads them as bytes too, as on systems that do not fork."""
    folder = coco_folder(tmp_path) if data == "coco" else None
    task = load_task(data, folder)
    parts = [Part(torch.arange(3), seed=i) for i in range(2)]
    for found in (
        list(batches(task.read, parts, workers=2)),
        [pickle.loads(pickle.dumps(task.read))(part) for part in parts],
    ):
        for part, (images, targets) in zip(parts, found, strict=True):
            expected, boxes = task.read(part)
            assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
            for target, other in zip(targets, boxes, strict=True):
                assert all(torch.equal(target[name], other[name]) for name in other)


def test_perfect_boxes_have_a_precision_of_one() -> None:
    """And none found, or the wrong labels, one of zero."""
    run = trainer("none")

    def answer(change: Any) -> Any:
        def detect(samples: list[Sample]) -> list[dict[str, torch.Tensor]]:
            return [
                change({"boxes": s.boxes, "labels": s.labels, "scores": torch.ones(len(s.labels))})
                for s in samples
            ]

        return detect

    run.detect = answer(lambda found: found)  # type: ignore[method-assign]
    assert run.evaluate() == (1.0, 1.0)
    run.detect = answer(lambda found: {**found, "labels": found["labels"] % 10 + 1})  # type: ignore[method-assign]
    assert run.evaluate() == (0.0, 0.0)
    run.detect = answer(lambda found: {k: v[:0] for k, v in found.items()})  # type: ignore[method-assign]
    assert run.evaluate() == (0.0, 0.0)
    # Moved by a fifth of its size, a box overlaps by two thirds: right at 0.5, wrong at 0.75.
    run.detect = answer(lambda found: {**found, "boxes": found["boxes"] + _fifth(found["boxes"])})  # type: ignore[method-assign]
    precision, precision_50 = run.evaluate()
    assert precision_50 == 1.0
    assert 0.2 < precision < 0.5


def _fifth(boxes: torch.Tensor) -> torch.Tensor:
    moved = torch.zeros_like(boxes)
    moved[:, [0, 2]] = (boxes[:, 2:3] - boxes[:, 0:1]) / 5
    return moved


def coco_folder(folder: Path, count: int = 6) -> Path:
    """Scenes as files of COCO's format; the last image has no box."""
    pillow = pytest.importorskip("PIL.Image")
    (folder / "annotations").mkdir(parents=True)
    for part, train in (("train", True), ("val", False)):
        scenes, content = Scenes(count, train), []
        (folder / part).mkdir()
        for i in range(count):
            pixels = (scenes[i].image * 255).byte().permute(1, 2, 0).numpy()
            pillow.fromarray(pixels).save(folder / part / f"{i}.png")
            if i < count - 1:
                for (x0, y0, x1, y1), label in zip(
                    scenes[i].boxes.tolist(), scenes[i].labels.tolist(), strict=True
                ):
                    box = [x0, y0, x1 - x0, y1 - y0]
                    content.append({"image_id": i, "category_id": label, "bbox": box})
        found = {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in range(count)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(Scenes.classes)],
            "annotations": content,
        }
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(found))
    return folder


def test_the_program_on_a_folder_of_cocos_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains, tests, and goes on from its checkpoint."""
    folder, out = coco_folder(tmp_path / "data"), tmp_path / "run"
    command = ["train", "--task", "detection", "--data", "coco", "--data-dir", str(folder)]
    command += ["--epochs", "2", "--batch-size", "3", "--side", "48", "--lr", "0.002"]
    command += ["--out", str(out), "--attention", "ela", "--log-every", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "mean average precision, last epoch" in said
    assert "fasterrcnn_small, attention ela, on coco" in said
    log = (out / "log.csv").read_text().splitlines()
    assert log[0].split(",")[3:6] == ["train_loss", "test_precision", "test_precision_50"]
    assert len(log) == 3
    assert len((out / "steps.csv").read_text().splitlines()) == 5
    assert main([*command, "--resume"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.iterdir()}
    for more in ([], ["--inference"]):
        assert main(["explain", str(out), *more]) == 0
        assert capsys.readouterr().out.count("backbone.body.attentions.") == 14
        assert main(["analyze", str(out), "--json", *more]) == 0
        assert len(json.loads(capsys.readouterr().out)["layers"]) == 14
    dry = [*command, "--out", str(tmp_path / "dry"), "--dry-run"]
    assert main(dry) == 0
    said = capsys.readouterr().out
    assert "x LayerAttention: " in said
    assert "in a batch (the first one's)" in said
    assert not (tmp_path / "dry").exists()
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main([*command, "--evaluate", "--workers", "1"]) == 0
    row = load_checkpoint(out)["history"][-1]
    shown = capsys.readouterr().out
    assert "mean average precision" in shown
    assert f"{row['test_precision']:.3f}" in shown
    assert f"{row['test_precision_50']:.3f}" in shown
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert main([*command[:-1], "2", "--resume", "--seed", "1"]) == 2
    assert "resume" in capsys.readouterr().err


@pytest.mark.parametrize("attention", ["none", "mrla", "mrla_light", "ela"])
@pytest.mark.parametrize("model", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_detectors_of_torchvision(tmp_path: Path, model: str, attention: str) -> None:
    """Made as the program makes them; one step of each changes what is to be trained."""
    command = ["--task", "detection", "--model", model, "--attention", attention]
    command += ["--side", "48", "--batch-size", "2", "--epochs", "1", "--out", str(tmp_path)]
    arguments = make_parser().parse_args(command)
    check_numbers(arguments)
    task = small_task(2, 1)
    run = DetectionTrainer(make_model(arguments, task), task, make_options(arguments, task))
    has_layers = any("ela" in name for name, _ in run.model.named_parameters())
    assert has_layers == (attention != "none")
    row = run.run_epoch()
    assert row["train_loss"] > 0
    assert all(p.grad is not None for n, p in run.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--model", "resnet56"],
            "model: got 'resnet56' for --task detection; allowed are fasterrcnn",
        ),
        (
            ["--data", "cifar10"],
            "data: got 'cifar10' for --task detection; allowed are 'digits', 'coco'",
        ),
        (["--side", "0"], "side: got 0 for --task detection; allowed is an int from 32 to 4096"),
        (["--side", "31"], "side: got 31 for --task detection; allowed"),
        (["--side", "4097"], "side: got 4097 for --task detection; allowed"),
        (["--data", "coco"], "data-dir: got none for 'coco'"),
        (["--block", "basic"], "block: got 'basic' for --task detection"),
        (["--head-dim", "24"], "head_dim: got 24"),
        (["--patch-size", "4"], "patch-size: got 4 for --task detection"),
        (["--attention", "none", "--tolerance", "0.001"], "tolerance: got 0.001"),
        (
            ["--model", "fasterrcnn_resnet50_fpn", "--attention", "none", "--tolerance", "0.001"],
            "tolerance: got",
        ),
        (["--pretrained"], "pretrained: got it with fasterrcnn_small"),
        (["--model", "retinanet_resnet50_fpn", "--unfused"], "unfused: got it with retinanet"),
        (["--model", "retinanet_resnet50_fpn", "--head-dim", "24"], "head_dim: got 24"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command = ["train", "--task", "detection", "--out", str(tmp_path / "run"), *arguments]
    assert main(command) == 2
    assert said in capsys.readouterr().err


def test_detection_data_are_not_for_classifiers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", "coco", "--out", str(tmp_path / "run")]) == 2
    assert "data: got 'coco'; allowed are 'digits'" in capsys.readouterr().err
    command = ["train", "--model", "fasterrcnn_small", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "for --task classification; allowed are resnet56" in capsys.readouterr().err


def test_the_digits_are_there_without_a_folder() -> None:
    task = load_task("digits")
    assert task.classes == [str(i) for i in range(10)]
    assert (len(task.train), len(task.test)) == (2000, 300)
