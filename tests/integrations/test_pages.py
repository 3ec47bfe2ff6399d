"""The pages' code that needs another library runs; the rest is run by `tests/test_readme.py`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs"
BLOCKS = {
    f"{name}-{i}": block
    for name in ("distributed.md", "export.md")
    for i, block in enumerate(
        re.findall(r"```py\n(.*?)```", (PAGES / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    )
}

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_there_are_some() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what it writes
    block = BLOCKS[name]
    for library in re.findall(r"^(?:import|from) (\w+)", block, flags=re.MULTILINE):
        pytest.importorskip(library)
    exec(compile(block, name, "exec"), {})
