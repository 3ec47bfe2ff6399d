"""The parts of the recipe that need PyTorch alone: label smoothing, warm-up, compiled training."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.program import (
    DIGITS,
    RECIPE,
    assert_same,
    read_log,
    run_program,
    said,
    trainer,
    without_times,
)

from ela_kernels.models import CifarResNet
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.data import Task
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options
from ela_kernels.training.recipe import Recipe
from ela_kernels.training.scoring import right_among_five, totals

pytest.importorskip("sklearn")


def test_smoothed_labels_are_in_the_loss_that_is_trained_on_alone(digits: Task) -> None:
    recipes = (Recipe(), Recipe(label_smoothing=0.4))
    runs = [
        trainer(digits, Options(epochs=1, batch_size=1437, augment=False, recipe=r))
        for r in recipes
    ]
    # One step: what it begins with is the same.
    rows = [run.run_epoch() for run in runs]
    images, labels = runs[0].task.train.read(torch.arange(1437)), digits.train.labels
    torch.manual_seed(0)
    model = CifarResNet((3,), (8,), in_chans=1, attention="ela", head_dim=8).train()
    scores = model(images).log_softmax(1)
    plain = -scores[range(1437), labels].mean()
    smoothed = 0.6 * plain - 0.4 * scores.mean()
    # A mean of 1437 float32 numbers in another order.
    assert rows[0]["train_loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert rows[1]["train_loss"] == pytest.approx(smoothed.item(), rel=1e-5)
    model = runs[1].model.eval()
    with torch.no_grad():
        found = F.cross_entropy(
            model(digits.test.read(torch.arange(len(digits.test)))), digits.test.labels
        )
    assert rows[1]["test_loss"] == pytest.approx(float(found), rel=1e-5)


def test_of_mixed_labels_the_largest_share_counts() -> None:
    scores = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    labels = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.3, 0.0]])
    loss, right, seen = totals(scores, labels).tolist()
    assert (right, seen) == (1, 2)
    assert loss == pytest.approx(float(-(labels * scores.log_softmax(1)).sum()), rel=1e-6)


def test_among_five() -> None:
    scores = torch.arange(8.0).repeat(8, 1)
    assert right_among_five(scores, torch.arange(8)) == 5
    # Of fewer classes all are.
    assert right_among_five(scores[:, :3], torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])) == 8


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("decay", [0.01, 0.5])
def test_warm_up_is_that_of_pytorchs_schedules(digits: Task, schedule: str, decay: float) -> None:
    options = Options(
        epochs=4,
        batch_size=200,
        schedule=schedule,
        recipe=Recipe(lr_warmup_epochs=1, lr_warmup_decay=decay),
    )
    run = trainer(digits, options)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.lr)
    schedules, warmup = torch.optim.lr_scheduler, 7
    after = (
        schedules.CosineAnnealingLR(other, 28 - warmup)
        if schedule == "cosine"
        else schedules.LambdaLR(other, lambda _: 1.0)
    )
    first = schedules.LinearLR(other, decay, total_iters=warmup)
    chain = schedules.SequentialLR(other, [first, after], [warmup])
    for _ in range(28):
        # The chain multiplies rates step by step.
        for group in run.optimizer.param_groups:
            assert group["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-9)
        for o, s in ((run.optimizer, run.schedule), (other, chain)):
            o.step()
            s.step()


def stop_in(stops: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def step_and_stop(self: Trainer, *args: Any) -> None:
        step(self, *args)
        if self.steps + 1 in stops:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", step_and_stop)


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = f"{DIGITS} {RECIPE} --epochs 3 --log-every 2"
    assert run_program(tmp_path / "whole", more) == 0
    for stop, how in ((3, ""), (8, "--resume --workers 2"), (10, "--resume")):
        with monkeypatch.context() as patch:
            stop_in({stop}, patch)
            assert run_program(tmp_path / "parts", f"{more} {how}") == 130
    assert run_program(tmp_path / "parts", f"{more} --resume") == 0
    whole, parts = (without_times(load_checkpoint(tmp_path / n)) for n in ("whole", "parts"))
    assert any(whole["ebqm"]["skipped"])
    assert_same(whole, parts)
    # And the average is one: not the weights, nor what they were at first.
    weights, average = whole["model"]["stem.0.weight"], whole["average"]["module.stem.0.weight"]
    assert not torch.equal(weights, average)


def test_a_run_of_before_there_was_a_recipe_goes_on(tmp_path: Path) -> None:
    """Its checkpoint has no share among five, and none of the options; these a plain run of today has not either."""
    more = f"{DIGITS} --epochs 2"
    assert run_program(tmp_path / "whole", more) == 0
    state = load_checkpoint(tmp_path / "whole")
    assert "average" not in state
    names = {
        *("epochs", "batch_size", "lr", "optimizer", "schedule", "momentum", "weight_decay", "amp"),
        *("seed", "augment", "channels_last", "ebqm", "task"),
    }
    assert state["options"].keys() == names
    assert "reading" not in state["options"]["task"]
    with pytest.MonkeyPatch.context() as patch:
        stop_in({7}, patch)
        assert run_program(tmp_path / "parts", more) == 130
    path = tmp_path / "parts" / "checkpoint.pt"
    old = torch.load(path, weights_only=True)
    for row in old["history"]:
        del row["test_accuracy_5"]
    torch.save(old, path)
    assert run_program(tmp_path / "parts", f"{more} --resume") == 0
    assert [row["test_accuracy_5"] != "" for row in read_log(tmp_path / "parts")] == [False, True]
    assert_same(state["model"], load_checkpoint(tmp_path / "parts")["model"])


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="no compiler")],
        ),
    ],
)
def test_compiled_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Exact when interrupted; the checkpoint is that of the network, with which a plain run goes on."""
    compiled: list[bool] = []
    compile_ = torch.compile

    def compile_noted(model: torch.nn.Module) -> Any:
        def noted(graph: Any, inputs: Any) -> Any:
            compiled.append(model.training)
            return graph.forward

        return compile_(model, backend=noted if backend == "eager" else "inductor")

    monkeypatch.setattr(torch, "compile", compile_noted)
    more = f"{DIGITS} {RECIPE} --epochs 2"
    assert run_program(tmp_path / "whole", f"{more} --compile") == 0
    if backend == "eager":
        assert compiled
        assert all(compiled)
    with monkeypatch.context() as patch:
        stop_in({7}, patch)
        assert run_program(tmp_path / "parts", f"{more} --compile") == 130
    shutil.copytree(tmp_path / "parts", tmp_path / "across")
    assert run_program(tmp_path / "parts", f"{more} --compile --resume") == 0
    whole, parts = (without_times(load_checkpoint(tmp_path / n)) for n in ("whole", "parts"))
    assert any(whole["ebqm"]["skipped"])
    assert_same(whole, parts)

    assert run_program(tmp_path / "across", f"{more} --resume") == 0
    across = load_checkpoint(tmp_path / "across")
    assert across["model"].keys() == whole["model"].keys()
    losses = [s["history"][-1]["train_loss"] for s in (whole, across)]
    # Three steps of ten by other kernels: some roundings, which steps pass on.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--label-smoothing 1", "label-smoothing: got 1.0; allowed is a number in [0, 1)"),
        ("--label-smoothing nan", "label-smoothing: got nan; allowed"),
        ("--mixup-alpha -1", "mixup-alpha: got -1.0; allowed is a number from 0 to 1000"),
        ("--cutmix-alpha inf", "cutmix-alpha: got inf; allowed"),
        ("--random-erase 1.5", "random-erase: got 1.5; allowed is a number from 0 to 1"),
        ("--auto-augment ra --ra-magnitude 31", "ra-magnitude: got 31; allowed is an int from 0"),
        ("--ra-magnitude 5", "ra-magnitude: got 5 without --auto-augment ra; allowed"),
        ("--auto-augment augmix --ra-magnitude 5", "ra-magnitude: got 5 without --auto-augment"),
        ("--auto-augment ra", "auto-augment: got 'ra' with --data digits"),
        ("--random-erase 0.2", "random-erase: got 0.2 with --data digits"),
        ("--model-ema-decay 0.9", "model-ema-decay: got 0.9 without --model-ema; allowed"),
        ("--model-ema --model-ema-decay 1", "model-ema-decay: got 1.0; allowed is a number in"),
        ("--model-ema --model-ema-steps 0", "model-ema-steps: got 0; allowed is an int of at l"),
        ("--lr-warmup-epochs 2", "lr-warmup-epochs: got 2 with schedule 'one-cycle', which begins"),
        ("--lr-warmup-epochs -1", "lr-warmup-epochs: got -1; allowed is an int of at least 0"),
        (
            "--schedule cosine --lr-warmup-epochs 3 --epochs 3",
            "lr-warmup-epochs: got 3 with epochs 3; allowed is an int from 0 to 2",
        ),
        ("--lr-warmup-decay 0.1", "lr-warmup-decay: got 0.1 without --lr-warmup-epochs; allowed"),
        (
            "--schedule constant --lr-warmup-epochs 1 --lr-warmup-decay 2",
            "lr-warmup-decay: got 2.0; allowed is a number from 0 to 1",
        ),
        ("--mixup-alpha 1 --no-augment", "mixup-alpha: got 1.0 with --no-augment; allowed is one"),
        ("--cutmix-alpha 1 --batch-size 1", "batch-size: got 1 with cutmix-alpha, which mixes"),
        ("--evaluate --resume", "evaluate: got both --evaluate and --resume; allowed is one"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    assert run_program(tmp_path / "out", more) == 2
    assert said(capsys).startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--mixup-alpha", "--cutmix-alpha"])
def test_without_torchvision_mixing_names_the_extra(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    assert run_program(tmp_path / "out", f"--side 8 --model resnet20 {option} 0.2") == 2
    expected = "error: mixup and cutmix needs torchvision, which could not be imported ("
    sentence = said(capsys)
    assert sentence.startswith(expected)
    assert "pip install 'ela-kernels[vision]'" in sentence
    assert not (tmp_path / "out").exists()
