"""Pictures in README and docs show what the committed files of results say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders import COMPILED, EAGER, LAYER
from benchmarks.depth import depth_lines, measure_depth
from benchmarks.pages import command
from benchmarks.pages.filling import TABLES
from benchmarks.pages.pictures import (
    PICTURES,
    Drawn,
    depth_data,
    draw_depth,
    draw_skipped,
    pictures,
    shown,
    skipped_data,
)

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "docs" / "digits_demo" / "results.json"


def depth_results() -> dict[str, Any]:
    """As a run leaves them, of two depths; the deeper one was not compiled."""
    ms = {EAGER: (10.0, 90.0), COMPILED: (8.0, None), LAYER: (4.0, 12.0)}
    mib = {EAGER: (20, 300), COMPILED: (16, None), LAYER: (8, 30)}
    machine = {"threads": 2, "cpu": "C", "simd_level": "avx2", "torch": "2.13.0"}
    return {
        "machine": {**machine, "date": "2026-11-29T10:00:00+00:00"},
        "depth": {
            f"{depth}x8x256x14x16": {
                name: {"ms": {"median": ms[name][i]}, "peak_bytes": mib[name][i] * 2**20}
                for name in ms
                if ms[name][i] is not None
            }
            for i, depth in enumerate((3, 24))
        },
    }


def page(tmp_path: Path, kind: str, name: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(f"<!-- picture: {kind} {name} -->\n\n![What it shows](deep/er.svg)\n")
    return path


class TestReadme:
    def test_has_both_pictures_and_they_show_what_their_files_say(self) -> None:
        found = list(pictures(README, ROOT, ROOT))
        assert {picture.kind for picture in found} == set(PICTURES)
        for picture in found:
            assert shown(picture.path) == picture.data
            assert not picture.is_stale

    def test_the_command_looks_at_it(self) -> None:
        assert ROOT / "README.md" in command.pages()


class TestDepth:
    def test_lines_are_the_numbers_of_the_file(self) -> None:
        pytest.importorskip("matplotlib")
        data = depth_data(depth_results())
        time, memory = draw_depth(data).axes
        drawn = {line.get_label(): line.get_xydata().tolist() for line in time.lines}
        assert list(drawn.values()) == [[[3, 10], [24, 90]], [[3, 8]], [[3, 4], [24, 12]]]
        assert "up to 3 layers" in list(drawn)[1]
        assert [line.get_ydata().tolist() for line in memory.lines] == [[20, 300], [16], [8, 30]]
        said = [text.get_text() for axes in (time, memory) for text in axes.texts]
        assert [text for text in said if text] == ["7.5 times\nless", "10.0 times\nless"]
        assert "ms" in time.get_ylabel()
        assert "MiB" in memory.get_ylabel()

    def test_a_table_has_a_row_for_each_depth(self) -> None:
        rows = depth_lines(depth_results()["depth"])[2:]
        cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
        assert cells[1] == ["24", "[8, 256, 14, 14], 16", "90.0", "-", "12.0", "300.0", "-", "30.0"]

    def test_what_is_measured(self) -> None:
        found = measure_depth([EAGER, LAYER], rounds=1, small=True)
        assert list(found) == ["2x2x16x6x8", "4x2x16x6x8"]
        for contenders in found.values():
            assert list(contenders) == [EAGER, LAYER]
            assert all(of["ms"]["median"] > 0 for of in contenders.values())
        # Concatenating holds a copy of all maps for each layer: more than twice as much at twice the depth.
        two, four = (of[EAGER]["peak_bytes"] for of in found.values())
        assert four > 2 * two
        assert found["4x2x16x6x8"][LAYER]["peak_bytes"] < four


class TestSkipped:
    def test_skipped_rows_are_hatched_and_the_others_are_the_weights(self) -> None:
        pytest.importorskip("matplotlib")
        results = json.loads(DEMO.read_text())
        data = skipped_data(results)
        figure = draw_skipped(data)
        for i, axes in enumerate(figure.axes[: len(data["stages"])]):
            layers = [x for x in results["ebqm"]["layers"] if x["stage"] == i]
            places = [x["place"] for x in layers if x["skipped"][-1]]
            assert [round(patch.get_y() - 0.04) for patch in axes.patches] == places
            cells = axes.collections[0].get_array().filled(-1).reshape(len(layers), -1)
            for place, row in enumerate(cells.tolist()):
                weights = [] if place in places else results["weights"]["ela"][i][place]
                assert row == [*weights, *[-1] * (len(layers) - len(weights))]
        assert sum(len(stage["skipped"]) for stage in data["stages"]) == len(
            results["ebqm"]["layers"]
        )

    def test_some_are_skipped(self) -> None:
        assert "hatched" in README
        assert any(any(s["skipped"]) for s in skipped_data(json.loads(DEMO.read_text()))["stages"])


class TestCommand:
    def test_a_picture_of_other_numbers_is_found_and_drawn(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr(command, "ROOT", tmp_path)
        path, picture = page(tmp_path, "depth", "r.json"), tmp_path / "deep" / "er.svg"
        results = depth_results()
        for change in (1.0, 2.0):
            results["depth"]["3x8x256x14x16"][LAYER]["ms"]["median"] = change
            (tmp_path / "r.json").write_text(json.dumps(results))
            assert command.main(["--check", str(path)]) == 1
            assert f"{picture}: has other numbers" in capsys.readouterr().out
            assert command.main([str(path)]) == 0
            data = shown(picture)
            assert data is not None
            assert data["lines"][LAYER]["ms"] == [change, 12.0]
            assert command.main(["--check", str(path)]) == 0
        first = picture.read_bytes()
        picture.unlink()
        assert command.main([str(path)]) == 0
        assert picture.read_bytes() == first  # no date and nothing drawn by chance in it

    @pytest.mark.parametrize("kind", PICTURES)
    def test_what_is_no_picture_is_refused(self, kind: str, tmp_path: Path) -> None:
        text = page(tmp_path, kind, "r.json").read_text()
        with pytest.raises(ValueError, match=r"file: got .*r\.json"):
            list(pictures(text, tmp_path, tmp_path))
        (tmp_path / "r.json").write_text("{}")
        with pytest.raises(ValueError, match=f"what the picture '{kind}' needs"):
            list(pictures(text, tmp_path, tmp_path))
        with pytest.raises(ValueError, match="page: got the picture 'speed'; allowed are depth"):
            list(pictures(text.replace(kind, "speed"), tmp_path, tmp_path))

    def test_a_file_that_is_no_picture_shows_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "a.svg"
        assert shown(path) is None
        for text in ("no XML", "<svg/>", "<svg><a/></svg>"):
            path.write_text(text)
            assert shown(path) is None
            assert Drawn("depth", {}, path).is_stale


class TestTables:
    def test_the_demo(self) -> None:
        text, results = TABLES["demo"](DEMO), json.loads(DEMO.read_text())
        for run in results["runs"].values():
            (row,) = (line for line in text.splitlines() if run["title"] in line)
            assert f"{100 * run['test_accuracy']:.2f} %" in row
            assert f" {run['step_ms_median']:.1f} " in row
            assert f" {run['peak_step_bytes'] / 2**20:.1f} " in row
            assert not run["layers"] or f" {run['layers_skipped']} of {run['layers']} " in row
        assert results["runs"]["ela"]["layers_skipped"] > 0

    def test_whole_networks(self, tmp_path: Path) -> None:
        names = ("plain", "concatenating", "mrla", "ela")
        network = {
            "training": {"ms": {n: {"median": 10.0 * i} for i, n in enumerate(names, start=1)}},
            "peak_bytes": {n: i * 2**20 for i, n in enumerate(names, start=5)},
        }
        results = copy.deepcopy(depth_results())
        path = tmp_path / "results.json"
        path.write_text(json.dumps({**results, "networks": {"resnet50, 8 at 224x224": network}}))
        row = TABLES["whole"](path).splitlines()[-1]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells == ["resnet50, 8 at 224x224", "10.0", "20.0", "30.0", "5", "6", "7"]
