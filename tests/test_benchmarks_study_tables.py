"""The study's tables against numbers worked out by hand, its picture, its steps and its page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import WrongResultError
from benchmarks.study import steps
from benchmarks.study.__main__ import main
from benchmarks.study.records import FORMAT
from benchmarks.study.settings import Settings
from benchmarks.study.steps import CONCATENATING, FUSED, PLAIN, WATCHED, measure, time_table
from benchmarks.study.tables import (
    accuracy_tables,
    at_the_end,
    changes_of,
    decision_tables,
    groups,
    mean_of,
    paired,
    skipped_at,
)
from benchmarks.study.variants import make_network
from ela_kernels.modules.skipping import SKIP_MODES

MODE = SKIP_MODES[0]
# After steps 4 and 6 of ten: two layers, then one, which has come back.
DECISIONS = [
    {"step": 4, "skipped": ["011", "0"], "divergence": [None, 0.1, 0.1, None]},
    {"step": 6, "skipped": ["001", "0"], "divergence": [None, 0.4, 0.1, None]},
]


def record(
    variant: str, seed: int, accuracy: float, seconds: float = 1.0, depth: int = 20, **changes: Any
) -> dict[str, Any]:
    chosen = variant.startswith(("ela", "random", "last"))
    skipping = {"stages": [3, 1], "share": 0.2, "decisions": DECISIONS} if chosen else None
    return {
        "settings": Settings(variant, depth, "digits", seed).as_dict(),
        "machine": {},
        "steps": 10,
        "train_loss": [1.0],
        "test_accuracy": [[1, 0.0], [2, accuracy]],
        "training_seconds": [0.1, seconds],
        "skipping": skipping,
        **changes,
    }


RECORDS = [
    record("mrla", 0, 0.50, 2.0),
    record("mrla", 1, 0.60, 4.0),
    record("mrla", 2, 0.70, 3.0),
    record("plain", 0, 0.49),
    record("plain", 1, 0.57),
    record("plain", 2, 0.68),
    record(f"ela-{MODE}", 0, 0.52),
    record(f"ela-{MODE}", 1, 0.61),
    record(f"random-{MODE}", 1, 0.58),
    record("mrla", 0, 0.90, depth=56),
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"format": FORMAT, **r}) + "\n" for r in records))
    return path


def cells(text: str, name: str) -> list[str]:
    (line,) = (x for x in text.splitlines() if x.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_standard_error_by_hand() -> None:
    found = mean_of([1.0, 2.0, 6.0])
    # Deviations -2, -1, 3; their squares add up to 14; 14 / 2 = 7 is the variance, over n = 3.
    assert found == (3.0, pytest.approx(math.sqrt(7 / 3)), 3)
    single = mean_of([5.0])
    assert (single.mean, single.number) == (5.0, 1)
    assert math.isnan(single.error)


def test_differences_are_paired_by_seed() -> None:
    found = paired({0: 50.0, 1: 60.0, 2: 70.0, 7: 0.0}, {2: 68.0, 1: 57.0, 0: 49.0, 9: 99.0})
    # 1, 3 and 2: their deviation is 1, far less than that of either side.
    assert found == (2.0, pytest.approx(1 / math.sqrt(3)), 3)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_the_table_of_accuracies_by_hand() -> None:
    text = accuracy_tables(RECORDS)
    twenty, fifty_six = text.split("digits, resnet56")
    assert twenty.startswith("digits, resnet20: 10 epochs of all images, batch 128, highest")
    # 50, 60, 70: deviation 10, over the root of 3 it is 5.77. Seconds: (2 + 4 + 3) / 3.
    assert cells(twenty, "mrla") == [
        "mrla", "3", "60.00 ± 5.77", "", "+2.00 ± 0.58 (3)", "", "3",
    ]  # fmt: skip
    # 49, 57, 68: mean 58; the squares of -9, -1 and 10 add up to 182, and the root of 91 / 3 is 5.51.
    assert cells(twenty, "plain") == [
        "plain", "3", "58.00 ± 5.51", "-2.00 ± 0.58 (3)", "", "", "1",
    ]  # fmt: skip
    # +2 and +1 to mrla; +3 and +4 to plain: deviation 0.71, over the root of 2 it is 0.5.
    assert cells(twenty[: twenty.index("chosen by")], f"ela-{MODE}") == [
        f"ela-{MODE}", "2", "56.50 ± 4.50", "+1.50 ± 0.50 (2)", "+3.50 ± 0.50 (2)", "20", "1",
    ]  # fmt: skip
    assert cells(fifty_six, "mrla") == ["mrla", "1", "90.00", "", "-", "", "1"]


def test_the_choice_of_layers_is_compared_with_chance() -> None:
    text = accuracy_tables(RECORDS)
    chance = text[text.index("chosen by EBQM") :]
    # Of the one seed that both have: 61 - 58. None of the last layers.
    assert cells(chance, f"ela-{MODE}") == [f"ela-{MODE}", "+3.00 (1)", "-"]


def test_runs_of_other_settings_are_never_averaged() -> None:
    changed = record("mrla", 5, 0.1)
    changed["settings"]["lr"] = 0.3
    found = groups([*RECORDS, changed])
    assert [len(group.runs["mrla"]) for group in found] == [3, 1, 1]


def test_a_run_that_diverged_is_named() -> None:
    diverged = record("plain", 3, 0.1, train_loss=[1.0, None])
    note = "A loss that was not finite, counted with the accuracy it led to: plain with seed 3."
    assert note in accuracy_tables([*RECORDS, diverged])
    assert note not in accuracy_tables(RECORDS)


def test_decisions_over_time_by_hand() -> None:
    run = record(f"ela-{MODE}", 0, 0.5)
    assert [skipped_at(run, moment) for moment in (0.25, 0.5, 0.75, 1.0)] == [0, 2, 1, 1]
    # What is decided after step 4 does not hold in it.
    assert skipped_at(run, 0.4) == 0
    assert changes_of(run) == (2, 1)
    other = record(f"ela-{MODE}", 1, 0.5)
    other["skipping"] = {**other["skipping"], "decisions": DECISIONS[:1]}
    assert at_the_end([run, other]) == [[0, 1, 2], [0]]
    text = decision_tables([run, other, record("mrla", 0, 0.5)])
    top, bottom = text.split("In how many of the runs")
    # At the end one and two layers: 1.5, deviation 0.71, over the root of 2.
    assert cells(top, f"ela-{MODE}") == [
        f"ela-{MODE}", "2", "4", "0.0 ± 0.0", "2.0 ± 0.0", "1.5 ± 0.5", "1.5 ± 0.5", "2.0", "0.5",
    ]  # fmt: skip
    assert cells(bottom, f"ela-{MODE}") == [f"ela-{MODE}", "0 1 2", "0"]
    assert decision_tables([record("mrla", 0, 0.5)]) == "No runs.\n"


def test_the_commands_print_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        write(tmp_path / "a.jsonl", RECORDS[:4]),
        write(tmp_path / "b.jsonl", RECORDS[4:]),
    ]
    assert main(["accuracy", *map(str, paths)]) == 0
    assert capsys.readouterr().out == accuracy_tables(RECORDS)
    assert main(["decisions", *map(str, paths)]) == 0
    assert capsys.readouterr().out == decision_tables(RECORDS)
    assert main(["accuracy", str(tmp_path / "none.jsonl")]) == 2
    assert "file: got" in capsys.readouterr().err


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    png = tmp_path / "accuracy.png"
    assert main(["picture", str(write(tmp_path / "a.jsonl", RECORDS)), "--png", str(png)]) == 0
    image = pyplot.imread(png)
    # Two depths side by side.
    assert image.shape[1] > 1.5 * image.shape[0]
    assert main(["picture", str(write(tmp_path / "b.jsonl", [])), "--png", str(png)]) == 2
    assert "got no finished runs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found = measure(layers=3, batch=2, side=8, rounds=2)
    return {
        "machine": {
            "cpu": "a processor",
            "threads": 1,
            "simd_level": "avx2",
            "torch": torch.__version__,
            "date": "today",
            "load_before": [0.0],
        },
        "steps": {"default": {"3": json.loads(json.dumps(found))}},
    }


def test_steps_are_measured_in_turns(measured: dict[str, Any]) -> None:
    found = measured["steps"]["default"]["3"]
    skipping = [f"{mode}, {share}" for mode in SKIP_MODES for share in ("third", "half")]
    assert list(found["ms"]) == [PLAIN, CONCATENATING, FUSED, WATCHED, *skipping]
    assert all(ms["rounds"] == 2 for ms in found["ms"].values())
    assert found["skipped_of_a_stage"] == dict.fromkeys(skipping, 1)


def test_the_table_of_times_by_hand(measured: dict[str, Any]) -> None:
    found = measured["steps"]["default"]["3"]
    name = f"{MODE}, third"
    found["ms"][name] |= {"median": 61.0, "q1": 60.0, "q3": 62.0}
    found["over_concatenating"][name] = {"of_medians": 0.61, "q1": 0.6, "q3": 0.62}
    found["over_fused"][name] = {"of_medians": 0.9, "q1": 0.875, "q3": 1.125}
    text = time_table(measured)
    assert "default malloc, 3 layers a stage (resnet20), [2, 1, 8, 8]" in text
    assert cells(text, name) == [
        name,
        "1 of 3",
        "61.0 [60.0, 62.0]",
        "-39.0 % [-40.0 %, -38.0 %]",
        "-10.0 % [-12.5 %, +12.5 %]",
    ]
    assert cells(text, CONCATENATING)[3] == ""
    assert cells(text, "fused ")[4] == ""


def test_a_network_with_other_scores_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(attention: str, **options: Any) -> Any:
        network = make_network(attention, **options)
        if attention == "ela":
            with torch.no_grad():
                network.attentions[1][2].attn.Wv.weight.neg_()
        return network

    monkeypatch.setattr(steps, "make_network", wrong)
    with pytest.raises(WrongResultError, match="fused, watched: scores"):
        measure(layers=3, batch=2, side=8, rounds=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--measure --layers 0", "layers: got 0"),
        ("--measure --rounds 0", "rounds: got 0"),
        ("--measure --batch 1", "batch: got 1"),
        ("--measure --threads 0", "threads: got 0"),
        ("", "which cannot be read"),
    ],
)
def test_bad_settings_of_the_steps(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.json"
    assert main(["time", str(path), *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()
