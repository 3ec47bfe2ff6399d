"""`explain` and `analyze`: on the run's own images, with its own settings; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.program import train

from ela_kernels import optional
from ela_kernels.__main__ import main
from ela_kernels.training import inspecting

pytest.importorskip("sklearn")

ELA = "--attention ela --epochs 1 --ebqm warmup=1 interval=1 low=0.31 high=0.44"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a [run]"
    assert train(out, ELA) == 0
    return out


def run(command: str, path: Path, more: str = "") -> int:
    return main([command, str(path), *more.split()])


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_explain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert run("explain", folder) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{folder / 'checkpoint.pt'}, in training, cpu\n")
    assert "attentions.0.0.attn  LayerAttention" in shown
    assert run("explain", folder / "checkpoint.pt", "--inference --batch-size 3") == 0
    assert "checkpoint.pt, in inference, cpu\n" in capsys.readouterr().out
    assert files(folder) == before


def test_explain_looks_at_the_mode_and_batch_that_are_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def explain(model: torch.nn.Module, *inputs: Any) -> str:
        seen.append((model.training, torch.is_grad_enabled(), len(inputs[0])))
        return ""

    monkeypatch.setattr(inspecting, "explain", explain)
    assert run("explain", folder, "--batch-size 5") == 0
    assert run("explain", folder, "--batch-size 6 --inference") == 0
    assert seen == [(True, True, 5), (False, False, 6)]


def test_analyze(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    assert run("analyze", folder, "--batch-size 90 --batches 3") == 0
    shown = capsys.readouterr().out
    assert "9 layers on 3 batches: EBQM would skip" in shown
    assert run("analyze", folder, "--batch-size 90 --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batches"] == 4  # all 360 test images
    # The run's own.
    assert (found["settings"]["low"], found["settings"]["high"]) == (0.31, 0.44)
    assert [layer["place"] for layer in found["layers"]] == [0, 1, 2] * 3
    assert files(folder) == before


def test_analyze_in_the_mode_that_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = []
    for more in ("", "--inference"):
        assert run("analyze", folder, f"--json --batches 1 {more}") == 0
        layers = json.loads(capsys.readouterr().out)["layers"]
        weights.append([layer["weights"] for layer in layers])
    assert weights[0] != weights[1]


def test_a_picture(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, begin in (("layers.png", b"\x89PNG"), ("layers.svg", b"<?xml")):
        path = tmp_path / name
        assert run("analyze", folder, f"--batches 1 --plot {path}") == 0
        assert path.read_bytes().startswith(begin)


def test_a_picture_that_cannot_be_made(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "nowhere" / "layers.png"
    assert run("analyze", folder, f"--batches 1 --plot {path}") == 1
    assert capsys.readouterr().err == (
        f"error: {path} could not be written: No such file or directory\n"
    )

    path = tmp_path / "layers.xyz"
    assert run("analyze", folder, f"--batches 1 --plot {path}") == 2
    assert capsys.readouterr().err.startswith(f"error: plot: got {str(path)!r}, of no kind that")
    assert not path.exists()

    def absent(module: str, purpose: str, extra: str = "train") -> Any:
        raise optional.MissingLibraryError(f"{purpose} needs {module}")

    monkeypatch.setattr("ela_kernels.drawing.optional", absent)
    assert run("analyze", folder, f"--batches 1 --plot {tmp_path / 'a.png'}") == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", ["explain", "analyze"])
def test_what_is_no_run_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def refused(path: Path, sentence: str, more: str = "") -> None:
        assert run(command, path, more) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {sentence}"), error
        assert error.count("\n") == 1

    refused(tmp_path, f"run: {tmp_path / 'checkpoint.pt'} not found. Train first, or give")
    refused(folder, "batch-size: got 0; allowed", "--batch-size 0")
    refused(folder, "data-dir: got x with --data digits", "--data-dir x")

    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = bytearray((damaged / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "checkpoint.pt").write_bytes(content)
    refused(damaged, f"run: {damaged / 'checkpoint.pt'} is no checkpoint of this program or a dam")
    (damaged / "checkpoint.pt").write_text("text")
    refused(damaged / "checkpoint.pt", f"run: {damaged / 'checkpoint.pt'} is no checkpoint")

    alone = tmp_path / "alone.pt"
    shutil.copy(folder / "checkpoint.pt", alone)
    refused(alone, f"run: {alone} has no config.json beside it")

    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    options = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**options, "model": "resnet32"}))
    refused(foreign, f"run: {foreign / 'checkpoint.pt'} was made with other settings: model='resn")
    (foreign / "config.json").write_text("{")
    refused(foreign, f"config: {foreign / 'config.json'} is no JSON")


def test_a_network_without_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "none", "--epochs 1") == 0
    capsys.readouterr()
    assert run("explain", tmp_path / "none") == 0
    assert "no call of a layer of ela_kernels was seen" in capsys.readouterr().out
    assert run("analyze", tmp_path / "none") == 2
    assert capsys.readouterr().err.startswith("error: model: got ResNet, in which no layer")
