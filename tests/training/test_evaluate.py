"""Testing a finished run alone, by --evaluate."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from support.program import DIGITS, RECIPE, run_program, said

from ela_kernels.__main__ import main
from ela_kernels.training.checkpoint import load_checkpoint


def test_evaluate_tells_what_the_run_told_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run_program(out, f"{DIGITS} {RECIPE} --epochs 2") == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    row = load_checkpoint(out)["history"][-1]
    capsys.readouterr()
    short = "--side 8 --batch-size 240 --model resnet20"
    (out / "checkpoint.pt").rename(tmp_path / "other.pt")
    assert run_program(tmp_path / "none", f"{short} --evaluate {tmp_path / 'other.pt'}") == 0
    (tmp_path / "other.pt").rename(out / "checkpoint.pt")
    shown = [capsys.readouterr().out]
    for command in (
        ["--out", str(out), *short.split(), "--evaluate"],
        ["--out", str(tmp_path / "none"), *short.split(), "--evaluate", str(out)],
        ["--config", str(out / "config.json"), "--evaluate"],
        ["--out", str(tmp_path / "none"), *short.split(), "--evaluate", "."],
    ):
        monkeypatch.chdir(out if command[-1] == "." else tmp_path)
        assert main(["train", *command]) == 0
        shown.append(capsys.readouterr().out)
    for text in shown:
        for name in ("test", "ema"):
            for share in (row[f"{name}_accuracy"], row[f"{name}_accuracy_5"]):
                assert f"{share:.2%}" in text
            assert f"{row[f'{name}_loss']:.4f}" in text
        assert text.index("model") < text.index("average")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_evaluate_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(tmp_path / "out", f"{DIGITS} --epochs 1") == 0
    capsys.readouterr()
    short = "--side 8 --model resnet20 --evaluate"
    for more, message in (
        (
            f"{short} {tmp_path / 'nowhere'}",
            f"evaluate: {tmp_path / 'nowhere'}/checkpoint.pt not found. Train first, or give the folder",
        ),
        (f"{short} --attention mrla", "evaluate: .* was made with other settings: attention='ela'"),
        ("--model resnet20 --evaluate", r"evaluate: .*: side=8 \(now None\)"),
        (
            f"{short} {tmp_path / 'out' / 'log.csv'}",
            "evaluate: .*log.csv is no checkpoint.*; give the --out of an earlier run, or the path",
        ),
    ):
        assert run_program(tmp_path / "out", more) == 2
        sentence = said(capsys)
        assert re.match(f"error: {message}", sentence), sentence
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    weights = state["model"]
    for model, message in (
        ({**weights, "stem.0.weight": torch.zeros(1)}, r"model, stem\.0\.weight is a tensor \[1\]"),
        ({**weights, "stem.0.weight": weights["stem.0.weight"] * math.nan}, "not finite"),
        ({**weights, "more": torch.zeros(1)}, "model has 'more' besides"),
        (None, "model is None"),
    ):
        torch.save({**state, "model": model}, path)
        assert run_program(tmp_path / "out", short) == 2
        sentence = said(capsys)
        assert sentence.startswith(f"error: evaluate: {path} does not fit this network: ")
        assert re.search(message, sentence), sentence
