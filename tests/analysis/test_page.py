"""The code of the page on analyze() runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ela_kernels as ek

ROOT = Path(ek.__file__).resolve().parents[1]


def test_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "analysis.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "docs/analysis.md", "exec"), {})
    assert (tmp_path / "layers.png").stat().st_size > 1000
    (shown,) = re.findall(
        r"```\n(.*?)```", page.replace("```python\n" + code + "```", ""), flags=re.DOTALL
    )
    printed = capsys.readouterr().out.splitlines()
    lines = shown.splitlines()
    assert printed[0].split(":")[0] == lines[0].split(":")[0]
    assert printed[1].split() == lines[1].split()
    assert [row.split()[0] for row in printed[3:6]] == [row.split()[0] for row in lines[3:6]]
