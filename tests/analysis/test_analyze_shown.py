"""How an analysis is printed, handed on as plain numbers, and drawn."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from support.analyzed import images, maps, network, stage

import ela_kernels as ek

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def test_it_is_printed_and_plain() -> None:
    found = ek.analyze(network(), images(), low=0.4, high=0.5)
    lines = str(found).splitlines()
    assert lines[0] == f"5 layers on 3 batches: EBQM would skip {len(found.skipped)}"
    assert lines[1].split()[:3] == ["layer", "stage", "place"]
    percent = [f"{100 * w:.0f}" for w in found.layers[2].weights]
    assert lines[5].startswith("attentions.0.2 ")
    assert lines[5].split()[-3:] == percent
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["settings"]["low"] == 0.4
    assert plain["layers"][2]["weights"] == list(found.layers[2].weights)
    assert plain["layers"][0]["kl"] is None
    assert plain["layers"][0]["reason"] == "first layer of its stage"


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small, large = tmp_path / "small.png", tmp_path / "large.with.other.suffix"
    ek.analyze(stage(count=1), maps()).save_png(small)
    ek.analyze(network(), images()).save_png(str(large))
    for path in (small, large):
        assert path.read_bytes().startswith(PNG_MAGIC)
    height = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (small, large)]
    assert height[1] > 1.5 * height[0]


def test_the_picture_shows_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ela_kernels.analysis.picture import draw

    found = ek.analyze(network(), images(), low=0.4, high=0.5)
    figure = draw(found, "a test")
    maps = [axes for axes in figure.axes if axes.get_title().startswith("stage ")]
    bars = [axes for axes in figure.axes if axes.get_title().startswith("score ")]
    for number, (above, beside) in enumerate(zip(maps, bars, strict=True)):
        layers = [layer for layer in found.layers if layer.stage == number]
        cells = above.collections[0].get_array().filled(-1).reshape(len(layers), -1)
        for layer, row in zip(layers, cells.tolist(), strict=True):
            assert row[: layer.place + 1] == list(layer.weights)
        scores = [0.0 if math.isnan(layer.score) else layer.score for layer in layers]
        assert [patch.get_width() for patch in beside.patches] == scores
        assert beside.get_title().endswith("dotted: low, high)")
    found.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ek.analyze(stage(), maps())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ImportError, match=r"Analysis.save_png needs matplotlib.*ela-kernels\[train\]"
    ):
        found.save_png(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
