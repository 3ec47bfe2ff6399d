"""`--plots`: pictures in a run's folder, and in TensorBoard's files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.program import said, train

pytest.importorskip("matplotlib")

from ela_kernels.training.plots import draw_curves, scalars

ELA = "--side 8 --batch-size 300 --model resnet20 --attention ela --ebqm warmup=2 interval=1"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {"epoch": 1, "train_loss": 2.0, "test_loss": 2.5, "test_accuracy": 0.25, "seconds": 1.0},
    {"epoch": 2, "train_loss": 1.0, "test_loss": 1.5, "test_accuracy": 0.5, "seconds": 2.0},
]


def test_curves_are_the_rows_of_the_log() -> None:
    losses, shares = draw_curves(HISTORY).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert drawn == {"train loss": [[1, 2.0], [2, 1.0]], "test loss": [[1, 2.5], [2, 1.5]]}
    drawn = {line.get_label(): line.get_xydata().tolist() for line in shares.lines}
    assert drawn == {"test accuracy": [[1, 25.0], [2, 50.0]]}
    assert losses.get_xlabel() == shares.get_xlabel() == "epoch"
    assert (losses.get_ylabel(), "%" in shares.get_ylabel()) == ("loss", True)


def test_numbers_in_names_are_said_in_words() -> None:
    row = {"epoch": 1, "ema_accuracy_5": 0.5, "test_precision_50": 0.5, "test_precision": 0.5}
    (_, shares) = draw_curves([row]).axes
    assert [line.get_label() for line in shares.lines] == [
        "ema accuracy, among the 5 likeliest",
        "test precision, overlap of 0.5",
        "test precision",
    ]


def test_more_columns_than_colours_are_all_drawn() -> None:
    names = [f"a{i}_loss" for i in range(9)]
    (axes, _) = draw_curves([{"epoch": 1, **dict.fromkeys(names, 1.0)}]).axes
    assert [line.get_label() for line in axes.lines] == [name.replace("_", " ") for name in names]


def test_a_run_leaves_pictures_and_tensorboard_gets_them(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("sklearn")
    assert train(tmp_path, f"{ELA} --epochs 2 --plots --tensorboard") == 0
    for name in ("curves.png", "ebqm.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG_MAGIC)
    found: Any = accumulators.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    found.Reload()
    assert set(found.Tags()["images"]) == {"curves", "ebqm"}
    last = found.Images("ebqm")[-1]
    assert last.encoded_image_string == (tmp_path / "ebqm.png").read_bytes()
    assert last.width > 500 < last.height
    tags = found.Tags()["scalars"]
    assert "ebqm/retrievals_left_out" in tags
    assert sum(tag.startswith("ebqm/score/attentions.") for tag in tags) == 6
    assert [e.step for e in found.Scalars("test_accuracy")] == [
        e.step for e in found.Images("ebqm")
    ]


def test_without_ebqm_there_are_curves_alone(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert train(tmp_path, "--epochs 1 --plots") == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png"}


def test_scalars_of_what_was_seen() -> None:
    from support.ela_models import Network
    from support.ela_models import train as steps

    import ela_kernels as ek

    network = Network((3,))
    ebqm = ek.EBQM(network, warmup=50, interval=1)
    assert scalars(ebqm.report()) == {}
    steps(network, ebqm, 2)
    report = ebqm.report()
    assert scalars(report) == {
        "ebqm/score/stages.0.1": report.layers[1].score,
        "ebqm/score/stages.0.2": report.layers[2].score,
        "ebqm/retrievals_left_out": 0.0,
    }


def test_without_matplotlib_no_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(tmp_path / "run", "--epochs 1 --plots") == 2
    assert "--plots needs matplotlib" in said(capsys)
    assert not list((tmp_path / "run").glob("*.pt"))
