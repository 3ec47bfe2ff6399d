"""The picture of a report shows its numbers."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ela_models import Network, plant, train

import ela_kernels as ek
from ela_kernels.drawing import GREEN, ORANGE
from ela_kernels.ebqm import DecisionRecord, LayerReport, Reason, Report

pytest.importorskip("matplotlib")

from ela_kernels.ebqm.picture import draw, left_out_shares

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
NAN = math.nan


def layer(place: int, skipped: bool, weights: tuple[float, ...], stage: int = 0) -> LayerReport:
    return LayerReport(
        name=f"stages.{stage}.{place}",
        stage=stage,
        place=place,
        divergence=NAN,
        deviation=NAN,
        score=NAN,
        entropy=NAN,
        importance=NAN,
        left_out=NAN,
        skipped=skipped,
        reason=Reason.UNDECIDED,
        since=0,
        over_time=[],
        weights=weights,
    )


def decision(step: int, skipped: list[bool], score: list[float], left: list[float]) -> Any:
    return DecisionRecord(step, score, score, skipped, [Reason.UNDECIDED] * len(skipped), left)


def report() -> Report:
    """Two stages of three layers and one; the second layer is dropped, comes back, and is dropped again."""
    off = [NAN, 0.0, 0.25, NAN]
    return Report(
        60,
        [
            layer(0, False, (1.0,)),
            layer(1, True, ()),
            layer(2, False, (0.1, 0.2, 0.7)),
            layer(0, False, (1.0,), stage=1),
        ],
        [
            decision(10, [False, False, False, False], [NAN, 0.9, 0.8, NAN], off),
            decision(20, [False, True, False, False], [NAN, 0.1, 0.7, NAN], off),
            decision(30, [False, True, False, False], [NAN, 0.25, 0.6, NAN], off),
            decision(40, [False, False, False, False], [NAN, 0.5, 0.5, NAN], off),
            decision(50, [False, True, False, False], [NAN, 0.15, 0.4, NAN], off),
        ],
        {"low": 0.2, "high": 0.3, "quantile": 0.9, "warmup": 15},
    )


def axes_of(figure: Any, ylabel: str) -> list[Any]:
    return [axes for axes in figure.axes if ylabel in axes.get_ylabel()]


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


class TestWhatIsDrawn:
    def test_what_is_empty_says_why(self) -> None:
        ebqm = ek.EBQM(torch.nn.ModuleList(ek.ELA(8, head_dim=8) for _ in range(2)))
        figure = draw(ebqm.report())
        (maps,), (scores,) = axes_of(figure, "layer (place)"), axes_of(figure, "score")
        (left,) = axes_of(figure, "left out, %")
        assert texts(maps) == ["no weights seen yet"]
        assert texts(scores) == texts(left) == ["no decision yet"]
        assert left.get_legend() is None
        assert not [text for axes in draw(report()).axes for text in axes.texts]

    def test_weights_and_skipped_layers(self) -> None:
        first, second = axes_of(draw(report()), "layer (place)")
        (cells,) = first.collections
        assert cells.get_array().filled(-1).reshape(3, 3).tolist() == [
            [1.0, -1, -1],
            [-1, -1, -1],
            [0.1, 0.2, 0.7],
        ]
        ((_, y), width) = (first.patches[0].get_xy(), first.patches[0].get_width())
        assert (round(y), width) == (1, 2)
        assert first.patches[0].get_hatch()
        assert not second.patches
        assert first.get_title() == "stage 0: 1 of 3 skipped"
        assert first.get_ylim() == (3, 0)  # the first layer above

    def test_scores_over_time_and_decisions(self) -> None:
        (axes,) = axes_of(draw(report()), "score")
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines["stages.0.1"] == [[10, 0.9], [20, 0.1], [30, 0.25], [40, 0.5], [50, 0.15]]
        # Until it came back at step 40; after step 50 nothing is drawn yet.
        assert [x for x, y in lines["gaps"] if y == y] == [20, 30, 40]
        marks = {
            line.get_marker(): (line.get_markerfacecolor(), line.get_xdata().tolist())
            for line in axes.lines
            if line.get_marker() in ("v", "^")
        }
        assert marks == {"v": (ORANGE, [20, 50]), "^": (GREEN, [40])}
        assert "0.9-quantile" in axes.get_ylabel()
        assert axes.get_xlabel() == "training step"
        levels = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert levels == [0.2, 0.3]

    def test_share_of_retrievals_left_out(self) -> None:
        (axes,) = axes_of(draw(report()), "left out, %")
        skipping, together = axes.lines
        # 1 + 2 + 3 + 1 pairs; the second layer has two of them, and a quarter of the third's weigh nothing.
        assert skipping.get_xdata().tolist() == [10, 20, 30, 40, 50, 60]
        two, three_quarters = 100 * 2 / 7, 100 * 0.75 / 7
        want = [0, two, two, 0, two, two]
        assert skipping.get_ydata().tolist() == pytest.approx(want)
        assert together.get_ydata().tolist() == pytest.approx([w + three_quarters for w in want])

    def test_shares_of_a_decision(self) -> None:
        found = report()
        assert left_out_shares(found, found.decisions[0]) == pytest.approx((0.0, 75 / 7))
        assert left_out_shares(found, found.decisions[1]) == pytest.approx((200 / 7, 75 / 7))

    def test_a_real_run(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        network = Network((5, 3))
        plant(network, {3})
        ebqm = ek.EBQM(network, warmup=6, interval=2, probe_interval=2, smoothing=0.5)
        train(network, ebqm, 12)
        found = ebqm.report()
        assert found.skipped == ["stages.0.3"]
        figure = draw(found)
        first, second = axes_of(figure, "layer (place)")
        assert [round(p.get_y()) for p in first.patches] == [3]
        cells = second.collections[0].get_array().filled(-1).reshape(3, 3)
        assert cells[2].tolist() == list(found.layers[7].weights)
        scores = [d.score[3] for d in found.decisions]
        (axes,) = axes_of(figure, "score")
        (line,) = (x for x in axes.lines if x.get_label() == "stages.0.3")
        assert line.get_ydata().tolist() == scores
        found.plot(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(PNG_MAGIC)

    @pytest.mark.filterwarnings("error")
    def test_before_the_first_pass(self, tmp_path: Path) -> None:
        ek.EBQM(Network((5, 3))).report().plot(tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 1000


class TestFiles:
    @pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("a", PNG_MAGIC)])
    def test_the_suffix_says_what_is_written(
        self, name: str, begins: bytes, tmp_path: Path
    ) -> None:
        report().plot(str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(begins)

    def test_another_suffix_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^path: got '.*a\.docx'.*allowed are .*png.*svg"):
            report().plot(tmp_path / "a.docx")
        assert not list(tmp_path.iterdir())

    def test_without_matplotlib(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        wanted = r"Report\.plot needs matplotlib.*ela-kernels\[train\]"
        with pytest.raises(ImportError, match=wanted):
            report().plot(tmp_path / "a.png")
        assert not list(tmp_path.iterdir())

    def test_matplotlib_is_not_imported_before(self) -> None:
        import subprocess

        code = (
            "import sys, ela_kernels.ebqm.picture, ela_kernels.training.logs; "
            "sys.exit('matplotlib' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
