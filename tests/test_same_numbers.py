"""The comparison of two checkouts finds nothing in one and the same, and one changed constant in a copy."""

from __future__ import annotations

import shutil

import pytest

from build_tools.same_numbers.__main__ import ROOT, main
from ela_kernels.backends.extension import extension

BACKEND = "eager" if extension() is None else "cpp"


def test_a_checkout_gives_the_same_numbers_as_itself(capsys):
    assert main([str(ROOT), str(ROOT), "--backend", BACKEND, "--cases", "14"]) == 0
    said = capsys.readouterr().out
    assert "0 of them differ" in said
    assert "\nthe same" in said
    assert "(1 refused)" in said
    # Nearly one of each form, with all that it gives.
    assert int(said.split(" tensors")[0].split()[-1]) > 60


def test_changes_are_found(tmp_path, capsys):
    """A constant and a message that are others in a copy."""
    shutil.copytree(
        ROOT / "ela_kernels",
        tmp_path / "ela_kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    changed = tmp_path / "ela_kernels" / "ops" / "checks.py"
    text = changed.read_text()
    for old, new in (
        ("return float(scale)", "return float(scale) * (1 + 1e-6)"),
        ("allowed is a positive divisor", "allowed is any divisor"),
        ("allowed is an int", "allowed is an integer"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    changed.write_text(text)
    cases = ["op ?", "layers [0-3]", "refusal: heads *", "refusal: q *"]
    arguments = [a for case in cases for a in ("--case", case)]
    arguments += ["--backend", BACKEND, "--allow", "refusal: heads T*"]
    assert main([str(ROOT), str(tmp_path), *arguments]) == 1
    said = capsys.readouterr().out
    assert "  op " in said
    assert "weights: max abs difference" in said
    assert "  layers " not in said  # they have no scale of their own
    assert "  refusal: heads 5\n" in said
    assert "any divisor" in said
    assert "  refusal: heads True (allowed)\n" in said
    assert "  refusal: q " not in said
    assert "and 1 that may" in said
    assert "NOT the same" in said


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(ROOT), str(tmp_path)])
    assert "no checkout" in capsys.readouterr().err
