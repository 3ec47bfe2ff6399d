"""The examples run as a newcomer runs them, and leave what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PICTURES = ("attention_weights.png", "divergence.png", "accuracy.png")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def run_example(*arguments: str, cwd: Path, status: int = 0) -> str:
    """Run an example in `cwd`; what it printed, or its error where `status` says that it has to fail."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == status, finished.stderr
    return finished.stderr if status else finished.stdout


def test_minimal_trains_and_reports_every_layer(tmp_path: Path) -> None:
    out = run_example(str(EXAMPLES / "minimal.py"), cwd=tmp_path)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("step ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert sum(line.startswith("retrievals.") for line in out.splitlines()) == 9


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    for library in ("sklearn", "matplotlib", "rich", "tqdm"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("demo")
    out = run_example(str(EXAMPLES / "digits_demo.py"), "--quick", "--out", "deep/er", cwd=folder)
    return out, folder / "deep" / "er"


class TestDigitsDemo:
    def test_table_has_a_row_for_each_of_the_three_runs(self, demo: tuple[str, Path]) -> None:
        rows = [line for line in demo[0].splitlines() if "MiB" in line]
        assert len(rows) == 3
        assert [row.split("│")[1].strip().split(",")[0] for row in rows] == [
            "plain residual",
            "MRLA",
            "ELA",
        ]

    def test_says_where_the_files_are_and_leaves_them(self, demo: tuple[str, Path]) -> None:
        out, folder = demo
        assert "deep/er" in out
        assert {path.name for path in folder.iterdir()} == {"results.json", "ebqm.txt", *PICTURES}

    @pytest.mark.parametrize("name", PICTURES)
    def test_pictures_show_something(self, demo: tuple[str, Path], name: str) -> None:
        from matplotlib.image import imread

        path = demo[1] / name
        assert path.read_bytes().startswith(PNG_MAGIC)
        assert imread(path)[..., :3].std() > 0.05

    def test_results_are_of_a_training_that_happened(self, demo: tuple[str, Path]) -> None:
        results = json.loads((demo[1] / "results.json").read_text())
        steps = results["plan"]["epochs"] * results["steps_per_epoch"]
        for run in results["runs"].values():
            assert len(run["losses"]) == steps
            assert sum(run["losses"][-5:]) < sum(run["losses"][:5])
            assert run["training_seconds"] == sorted(run["training_seconds"])
            assert 0 < run["step_ms_median"] / 1e3 * steps < 10 * run["training_seconds"][-1]
            assert run["test_accuracy"] == pytest.approx(run["test_accuracies"][-1], abs=1e-5)
            assert run["peak_step_bytes"] > 0

    def test_weights_of_every_layer_sum_to_one(self, demo: tuple[str, Path]) -> None:
        results = json.loads((demo[1] / "results.json").read_text())
        for kind in ("mrla", "ela"):
            stages = results["weights"][kind]
            assert [len(stage) for stage in stages] == results["plan"]["blocks"]
            retrieving = [layer for stage in stages for layer in stage if layer is not None]
            assert (
                len(retrieving)
                == sum(results["plan"]["blocks"]) - results["runs"][kind]["layers_skipped"]
            )
            for layer in retrieving:
                # Up to 9 weights, each rounded to five digits after the point.
                assert sum(layer) == pytest.approx(1.0, abs=9 * 5e-6 + 1e-6)

    def test_decisions_are_those_of_the_run(self, demo: tuple[str, Path]) -> None:
        results = json.loads((demo[1] / "results.json").read_text())
        ebqm = results["ebqm"]
        assert len(ebqm["layers"]) == sum(results["plan"]["blocks"])
        for layer in ebqm["layers"]:
            assert len(layer["divergence"]) == len(layer["skipped"]) == len(ebqm["steps"]) > 0
        skipped = sum(layer["skipped"][-1] for layer in ebqm["layers"])
        assert skipped == results["runs"]["ela"]["layers_skipped"]


def test_the_detection_example_leaves_what_it_says(tmp_path: Path) -> None:
    for library in ("sklearn", "matplotlib", "rich", "tqdm", "torchvision", "torchmetrics"):
        pytest.importorskip(library)
    example = str(EXAMPLES / "detect_digits.py")
    out = run_example(example, "--quick", "--threads", "1", "--out", "here", cwd=tmp_path)
    for title in ("plain residual", "MRLA, fused", "ELA, fused, EBQM"):
        assert title in out
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    for run in results["runs"].values():
        assert len(run["history"]) == 1
        assert 0 <= run["history"][0]["test_precision"] <= 1
    assert "layer" in (tmp_path / "here" / "ebqm.txt").read_text()
    assert (tmp_path / "here" / "detections.png").read_bytes().startswith(b"\x89PNG")


def test_demo_refuses_no_epochs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    demo = str(EXAMPLES / "digits_demo.py")
    error = run_example(demo, "--epochs", "0", cwd=tmp_path, status=2)
    assert "--epochs: got 0; allowed is an int of at least 1" in error
