"""What the study says about skipping one layer: as measured by hand, and its table."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ela_kernels as ek
from benchmarks.study import loss
from benchmarks.study.__main__ import main
from benchmarks.study.data import load
from benchmarks.study.settings import Settings
from ela_kernels.modules.skipping import SKIP_MODES


def settings() -> Settings:
    return Settings("mrla", 20, "digits", 3, epochs=1, batch=32, train_images=96, test_images=64)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return loss.measure_loss([settings()], load("digits", None), 64)


def test_each_layer_but_the_first_is_left_out_by_itself(measured: dict[str, Any]) -> None:
    (run,) = measured["runs"]
    assert [(row["stage"], row["place"]) for row in run["layers"]] == [
        (stage, place) for stage in range(3) for place in (1, 2)
    ]
    for row in run["layers"]:
        assert set(row["change"]) == set(SKIP_MODES)
        # Each does something else; the pair of a stage's last layer is read by nobody.
        assert len(set(row["change"].values())) == (3 if row["place"] == 1 else 2)
        assert (row["change"]["retrieval"] == row["change"]["layer"]) == (row["place"] == 2)
        assert 0 <= row["divergence"] <= 1


def test_it_is_the_loss_with_that_layer_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the batch's statistics, and the network is afterwards what it was."""
    seen: list[Any] = []
    real = loss._loss

    def spied(network: Any, batch: Any) -> float:
        before = copy.deepcopy(network.state_dict())
        found = real(network, batch)
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        skipped = [m.skip for m in network.modules() if isinstance(m, ek.ELA) and m.skipped]
        assert network.training
        with torch.no_grad():
            twin = copy.deepcopy(network)
            losses = [float(F.cross_entropy(twin(images), y)) * len(y) for images, y in batch]
        assert found == pytest.approx(sum(losses) / sum(len(y) for _, y in batch), rel=1e-5)
        seen.append(skipped)
        return found

    monkeypatch.setattr(loss, "_loss", spied)
    loss.measure_loss([settings()], load("digits", None), 64)
    assert seen == [[], *([mode] for _ in range(6) for mode in SKIP_MODES)]


def test_the_table_by_hand() -> None:
    def layer(divergence: float, score: float, changes: tuple[float, float, float]) -> Any:
        change = dict(zip(SKIP_MODES, changes, strict=True))
        return {
            "stage": 0,
            "place": 1,
            "divergence": divergence,
            "score": score,
            "change": change,
        }

    layers = [
        layer(0.1, 0.1, (0.4, 0.1, 0.0)),
        layer(0.2, 0.19, (0.2, 0.1, 0.1)),
        layer(0.5, 0.9, (0.1, 0.3, 0.3)),
    ]
    run = {"settings": settings().as_dict(), "test_accuracy": 0.5, "loss": 0.25, "layers": layers}
    machine = {"cpu": "a", "torch": "b", "date": "c"}
    text = loss.loss_table({"machine": machine, "images": 7, "runs": [run]})
    rows = {
        cells[1].strip(" `"): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in text.splitlines() if line.startswith("| `"))
    }
    assert rows["retrieval"] == ["-1.00", "+0.3000 [+0.2500, +0.3500]", "+0.1000"]
    assert rows["layer"][0] == "+0.87"
    assert rows["reuse"] == ["+1.00", "+0.0500 [+0.0250, +0.0750]", "+0.3000"]
    assert "with nothing skipped: 0.2500" in text
    assert "below 0.2: 2 of 3" in text


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: dict[str, Any]
) -> None:
    file = tmp_path / "loss.json"
    file.write_text(json.dumps(measured))
    assert main(["loss", str(file)]) == 0
    assert capsys.readouterr().out == loss.loss_table(measured)
    file.write_text("{}")
    assert main(["loss", str(file)]) == 2
    assert "has no 'machine' and 'runs'; allowed is a file that `loss --measure` wrote" in (
        capsys.readouterr().err
    )
    assert main(["loss", str(file), "--measure", "--images", "1"]) == 2
    assert "images: got 1; allowed is an int of at least 2" in capsys.readouterr().err
