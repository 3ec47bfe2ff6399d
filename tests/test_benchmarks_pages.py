"""The tables in README and docs are what the committed files of results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.pages import command
from benchmarks.pages.filling import TABLES, filled
from benchmarks.pages.speed import TABLES as SPEED
from benchmarks.study.records import read
from benchmarks.study.tables import accuracy_tables, decision_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = next(RESULTS.glob("*/runs.jsonl"))


def mark(kind: str, name: str) -> str:
    return f"words\n<!-- table: {kind} {name} -->\nold\n<!-- end of table -->\n"


def test_a_page_is_filled_from_the_files_it_names() -> None:
    name = str(RUNS.relative_to(ROOT))
    page = mark("accuracy", name) + mark("decisions", name) + mark("accuracy", "later.jsonl")
    found = filled(page, ROOT)
    assert "old" not in found
    assert found.count("words\n<!-- table: ") == found.count("\n<!-- end of table -->\n") == 3
    records = read([RUNS])
    assert accuracy_tables(records) in found
    assert decision_tables(records) in found
    assert "later.jsonl -->\n\nNot measured yet.\n\n<!-- end" in found
    assert filled(found, ROOT) == found


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="page: got the table 'speed'; allowed are accuracy"):
        filled(mark("speed", "a.json"), tmp_path)
    (tmp_path / "a.json").write_text(json.dumps({"machine": {}}))
    for kind in SPEED:
        with pytest.raises(ValueError, match=r"file: got .*a\.json, which does not hold what"):
            filled(mark(kind, "a.json"), tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"file: got .*a\.json"):
        filled(mark("stages", "a.json"), tmp_path)


def test_the_numbers_of_a_table_are_those_of_its_file() -> None:
    path = RESULTS / "2026-11-26-intel-xeon-2-threads" / "results.json"
    results = json.loads(path.read_text())
    for kind, part in (("blocks", "blocks"), ("light", "light")):
        text = TABLES[kind](path)
        assert results["machine"]["cpu"] in text
        for found in results[part].values():
            for phase in ("training", "inference"):
                ms = found[phase]["ms"]
                names = ("eager", "compiled", "block")
                assert ", ".join(f"{ms[name]['median']:.1f}" for name in names) in text
    text = TABLES["stages"](path)
    for shape, found in results["stages"]["default"].items():
        assert f"| {found['contenders']['layer']['ms']['median']:.1f} " in text
        assert f"{results['memory'][shape]['layer']['maps']:.1f}" in text


def test_committed_pages_have_what_their_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in command.pages()}
    assert {"README.md", "docs/study.md"} <= pages
    assert command.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_with_other_numbers_is_found_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(mark("accuracy", str(RUNS.relative_to(ROOT))))
    assert command.main(["--check", str(page)]) == 1
    assert "has other numbers" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert command.main([str(page)]) == 0
    assert "old" not in page.read_text()
    assert command.main(["--check", str(page)]) == 0
    page.write_text(mark("speed", "a.json"))
    assert command.main([str(page)]) == 2
    assert "error: " in capsys.readouterr().err


def test_every_folder_of_results_is_named_by_a_page() -> None:
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(page.read_text() for page in pages)
    assert [path.name for path in RESULTS.iterdir() if path.name not in text] == []
