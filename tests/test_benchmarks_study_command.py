"""The study's command: which runs it makes, what it refuses, and going on where time ran out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.study.__main__ import main, make_parser, planned
from benchmarks.study.plans import PLANS
from benchmarks.study.records import read
from benchmarks.study.settings import Settings
from benchmarks.study.variants import GROUPS
from ela_kernels.modules.skipping import SKIP_MODES


def command(*words: str) -> list[Settings]:
    return planned(make_parser().parse_args(["run", "--out", "runs.jsonl", *words]))


def test_the_command_makes_the_runs() -> None:
    found = command(
        "--seeds", "0-1,7", "--depths", "8,20", "--variants", "plain,ela", "--lr", "0.2"
    )
    assert [r.seed for r in found] == [
        s for s in (0, 1, 7) for _ in range(2 * (1 + len(SKIP_MODES)))
    ]
    assert {r.lr for r in found} == {0.2}
    assert {r.variant for r in found} == {"plain", *GROUPS["ela"]}
    for plan in PLANS:
        runs = command("--plan", plan)
        assert len({r.seed for r in runs}) >= 5
        assert [r.seed for r in runs] == sorted(r.seed for r in runs)
        assert {r.epochs for r in command("--plan", plan, "--epochs", "3")} == {3}
        few = command("--plan", plan, "--depths", "8", "--variants", "plain")
        assert len(few) == len({r.key for r in few})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds a", "seeds: got 'a'; allowed are ints such as"),
        ("--seeds 3-1", "seeds: got '3-1'"),
        ("--seeds 0-999999999999", "seeds: got '0-999999999999'; .* at most 1000 in a row"),
        ("--seeds 1,1", r"seeds: got \[1, 1\]; allowed is at least one, each of them once"),
        ("--seeds 9999999999", "seeds: got 9999999999"),
        ("--depths 21", r"depths: got 21; allowed are 6 n \+ 2"),
        ("--variants plain,none", "variants: got 'none'; allowed are plain, self"),
        ("--epochs 0", "epochs: got 0"),
        ("--batch 1", "batch: got 1; allowed is an int of at least 2"),
        ("--lr nan", "lr: got nan"),
        ("--momentum 1", "momentum: got 1.0"),
        ("--train-images 0", "train-images: got 0"),
        ("--test-every 0", "test-every: got 0"),
        ("--low 0.5", "low, high: got low=0.5 and high=0.3"),
        ("--max-row 0", "max_row: got 0"),
        ("--threads 0", "threads: got 0"),
        ("--jobs 0", "jobs: got 0"),
        ("--minutes nan", "minutes: got nan"),
        ("--data cifar10", "root: got none for 'cifar10'"),
    ],
)
def test_bad_settings_are_refused_by_name(
    words: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--out", str(tmp_path / "runs.jsonl"), *words.split()]) == 2
    error = capfd.readouterr().err
    assert re.search(f"error: {message}", error), error


def test_the_command_goes_on_where_time_ran_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder" / "runs.jsonl"
    words = ["run", "--out", str(out), "--data", "digits", "--seeds", "0", "--depths", "8"]
    words += ["--variants", "plain", "--epochs", "1", "--batch", "16", "--train-images", "32"]
    assert main([*words, "--minutes", "1e-9"]) == 1
    assert "1 runs are left; the same command goes on" in capfd.readouterr().err
    assert main(words) == 0
    (record,) = read([out])
    assert record["settings"]["test_images"] is None
    assert len(record["test_accuracy"]) == 1


def test_the_runs_are_listed_and_none_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs.jsonl"
    words = ["--data", "digits", "--seeds", "0-1", "--variants", "plain,mrla", "--list"]
    assert main(["run", "--out", str(out), *words]) == 0
    listed = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(s["seed"], s["variant"]) for s in listed] == [
        (s, v) for s in (0, 1) for v in ("plain", "mrla")
    ]
    assert not out.exists()
