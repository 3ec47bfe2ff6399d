"""What the options of a run change, and what they must not."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import pytest
import torch

from ela_kernels import optional
from ela_kernels.__main__ import main
from ela_kernels.models import CifarResNet
from ela_kernels.training import logs
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.data import Task
from ela_kernels.training.logs import STEP_COLUMNS, Logs, Progress, print_table
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options
from ela_kernels.training.reading import Part

pytest.importorskip("sklearn")


def trainer(task: Task, options: Options, workers: int = 0) -> Trainer:
    torch.manual_seed(0)
    model = CifarResNet((2,), (16,), in_chans=1, attention="ela", head_dim=8)
    return Trainer(model, task, options, workers=workers)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay(digits: Task, optimizer: str) -> None:
    run = trainer(digits, Options(optimizer=optimizer, weight_decay=0.5))
    decay = {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert decay.keys() == set(run.model.parameters())
    norms = [m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    free = {p for m in norms for p in m.parameters()}
    free |= {p for name, p in run.model.named_parameters() if name.endswith("bias")}
    for parameter, rate in decay.items():
        assert rate == (0.0 if parameter in free else 0.5)


def test_batches_read_ahead_are_the_same(digits: Task) -> None:
    options = Options(batch_size=200, seed=3)
    runs = [trainer(digits, options, workers)._rest_of_epoch() for workers in (0, 3)]
    count = 0
    random = torch.get_rng_state()
    for (images, labels), (ahead, theirs) in zip(*runs, strict=True):
        assert torch.equal(images, ahead)
        assert torch.equal(labels, theirs)
        count += 1
    assert count == 1437 // 200
    # What the model draws, drop path say, is the same with and without processes.
    assert torch.equal(torch.get_rng_state(), random)


def test_what_reads_can_be_sent_to_another_process(digits: Task) -> None:
    """As systems do that do not fork."""
    part = Part(torch.arange(5), seed=3)
    other = pickle.loads(pickle.dumps(digits.read))
    for found, expected in zip(other(part), digits.read(part), strict=True):
        assert torch.equal(found, expected)


def test_channels_last_reaches_model_and_images(digits: Task) -> None:
    run = trainer(digits, Options(epochs=1, batch_size=700, channels_last=True))
    seen: list[bool] = []
    first = next(m for m in run.model.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(
        lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    # Three channels, since with one both formats are the same.
    images, _ = run.place(torch.rand(2, 3, 4, 4), torch.zeros(2))
    assert images.is_contiguous(memory_format=torch.channels_last)
    row = run.run_epoch()
    assert seen
    assert all(seen)
    plain = trainer(digits, Options(epochs=1, batch_size=700)).run_epoch()
    # Two steps; the formats differ in the order of sums in convolutions, a few 1e-7 relative each, and a step at this
    # rate passes such a difference on without blowing it up.
    assert row["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


def test_without_ebqm_every_layer_retrieves(tmp_path: Path) -> None:
    more = "--side 8 --batch-size 400 --model resnet20 --threads 1 --epochs 1 --no-ebqm"
    command = ["train", "--out", str(tmp_path), *more.split()]
    assert main(command) == 0
    state = load_checkpoint(tmp_path)
    assert state["ebqm"] is None
    assert state["history"][-1]["layers_skipped"] == 0
    assert main([*command, "--resume"]) == 0


def test_rows_of_steps_are_means_since_the_row_before(tmp_path: Path, digits: Task) -> None:
    run = trainer(digits, Options(epochs=1, batch_size=300, augment=False))
    rows = []

    def after_step() -> None:
        if run.steps in (1, 4):
            rows.append(run.latest())

    epoch = run.run_epoch(after_step)
    assert [tuple(row) for row in rows] == [STEP_COLUMNS] * 2
    assert [row["step"] for row in rows] == [1, 4]
    for name in ("loss", "accuracy"):
        # One step and three of equal size make up the epoch; sums are in float64.
        mean = (rows[0][name] + 3 * rows[1][name]) / 4
        assert mean == pytest.approx(epoch[f"train_{name}"], rel=1e-12)


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    rows = [dict.fromkeys(STEP_COLUMNS, step) for step in (10, 20, 30)]
    first = Logs(tmp_path)
    for row in rows:
        first.write_step(row)
    Logs(tmp_path, done=20).write_step(rows[2])
    Logs(tmp_path, done=29).write_step(rows[2])
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("3")  # of 31: a row that was cut short
    Logs(tmp_path, done=30).close()
    with (tmp_path / "steps.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10", "20", "30"]


def test_progress_and_table_without_their_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(module: str, purpose: str) -> None:
        raise optional.MissingLibraryError(f"{purpose} needs {module}")

    monkeypatch.setattr(logs, "optional", absent)
    for shown in (True, False):
        progress = Progress(10, 0, shown=shown)
        progress.step()
        progress.epoch({"epoch": 1, "layers_skipped": 2}, "test accuracy 50.00%")
        progress.close()
    print_table("title", ("", "value"), [("accuracy", "98 %"), ("layers", "2")])
    shown_text = capsys.readouterr()
    assert shown_text.err == "epoch 1, test accuracy 50.00%, 2 layers skipped\n"
    assert shown_text.out.splitlines() == [
        "title",
        "          value",
        "accuracy   98 %",
        "layers        2",
    ]


@pytest.mark.parametrize("name", ["runs/[red]x", "runs/[/] :smile:", "a[/x]b", "[link=x]"])
def test_a_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """What stands in brackets in a path means something to rich."""
    pytest.importorskip("rich")
    print_table(name, ("", name), [(name, "98 %"), ("layers", name)])
    # The title is broken to the table's width.
    assert capsys.readouterr().out.count(name) >= 3
