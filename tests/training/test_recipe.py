"""The parts of the recipe that need PyTorch alone: label smoothing, averages, warm-up, compiled training."""

from __future__ import annotations

import copy
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.program import assert_same, read_log, said, without_times

from ela_kernels import ELA
from ela_kernels.__main__ import main
from ela_kernels.models import CifarResNet
from ela_kernels.training.average import Average, decay_of
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.data import Task, load_task
from ela_kernels.training.logs import columns_of
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options
from ela_kernels.training.recipe import Recipe
from ela_kernels.training.scoring import right_among_five, totals

pytest.importorskip("sklearn")

EBQM = "--ebqm warmup=4 interval=2 probe_interval=3 low=0.98 high=0.99 smoothing=0.5"
DIGITS = f"--side 8 --batch-size 240 --model resnet20 --threads 1 --drop-path 0.1 {EBQM}"
RECIPE = (
    "--label-smoothing 0.1 --model-ema --model-ema-steps 2 --schedule cosine --lr-warmup-epochs 1"
)


def train(out: Path, more: str) -> int:
    return main(["train", "--out", str(out), *more.split()])


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", side=8)


def trainer(task: Task, options: Options) -> Trainer:
    torch.manual_seed(0)
    model = CifarResNet((3,), (8,), in_chans=1, attention="ela", head_dim=8)
    return Trainer(model, task, options)


# Labels.


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


# The average.


def test_the_decay_is_torchvisions() -> None:
    """Of its recipe for ResNet-50: 8 processes of 128 images, 600 epochs, 32 steps between updates."""
    recipe = Recipe(model_ema=True, model_ema_decay=0.99998, model_ema_steps=32)
    assert decay_of(recipe, 8 * 128, 600) == pytest.approx(1 - 2e-5 * 8 * 128 * 32 / 600)
    assert decay_of(Recipe(model_ema_decay=0.9), 1000, 1) == 0.0


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ELA(16)
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("flag", torch.tensor(False))


def test_an_average_is_what_its_formula_says() -> None:
    """Parameters and statistics are averaged, counters and flags copied, decisions followed."""
    net = Net()
    recipe = Recipe(model_ema=True, model_ema_decay=0.75, model_ema_steps=1)
    average = Average(net, Options(batch_size=2, epochs=2, recipe=recipe))
    expected = None
    for step in range(60):
        with torch.no_grad():
            for tensor in (*net.parameters(), net.norm.running_mean):
                tensor.copy_(torch.randn_like(tensor))
        net.norm.num_batches_tracked.fill_(7 * step)
        net.flag.fill_(step % 3 == 0)
        net.layer.skipped = step % 4 == 0
        average.step(step, epoch=0)
        now = torch.cat((net.norm.weight.detach(), net.norm.running_mean)).double()
        decay = min(0.75, (1 + step) / (10 + step))
        expected = now if expected is None else decay * expected + (1 - decay) * now
        copy_ = average.model.module
        got = torch.cat((copy_.norm.weight.detach(), copy_.norm.running_mean)).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert copy_.norm.num_batches_tracked == 7 * step
        assert bool(copy_.flag) == (step % 3 == 0)
        assert copy_.layer.skipped == (step % 4 == 0)
        assert torch.equal(copy_.layer.decision, net.layer.decision)
    assert not copy_.training


def test_updates_come_every_so_many_steps_and_begin_anew_after_the_warm_up() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    recipe = Recipe(model_ema=True, model_ema_decay=0.5, model_ema_steps=3, lr_warmup_epochs=1)
    average = Average(net, Options(batch_size=1, epochs=3, schedule="cosine", recipe=recipe))
    found = []
    for step in range(12):
        with torch.no_grad():
            net.weight.fill_(step)
        average.step(step, epoch=step // 6)
        found.append(average.model.module.weight.item())
    # In the first epoch copies; after it the first is a copy, and the second by a decay of 2/11.
    assert found[:9] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert found[9:] == pytest.approx([2 / 11 * 6 + 9 / 11 * 9] * 3)


def test_the_average_follows_ebqm_in_a_run(digits: Task) -> None:
    ebqm = {"warmup": 1, "interval": 1, "probe_interval": 1, "low": 0.98, "high": 0.99}
    run = trainer(
        digits, Options(epochs=1, batch_size=200, ebqm=ebqm, recipe=Recipe(model_ema=True))
    )
    row = run.run_epoch()
    assert list(row) == list(columns_of(has_top=True, averaged=True))
    assert run.layers_skipped > 0
    pairs = zip(run.average.model.module.modules(), run.model.modules(), strict=True)
    assert all(a.skipped == b.skipped for a, b in pairs if isinstance(b, ELA))
    assert 0 <= row["ema_accuracy"] <= row["ema_accuracy_5"] <= 1
    with torch.no_grad():
        scores = run.average.model(digits.test.read(torch.arange(len(digits.test))))
    right = (scores.argmax(1) == digits.test.labels).float().mean()
    assert row["ema_accuracy"] == pytest.approx(float(right), abs=1e-6)


def test_an_average_that_does_not_fit_is_refused(digits: Task) -> None:
    options = Options(epochs=1, batch_size=700, recipe=Recipe(model_ema=True))
    run = trainer(digits, options)
    run.run_epoch()
    state = copy.deepcopy(run.state_dict())
    fresh = trainer(digits, options)
    for change, message in (
        ({"average": {}}, "average has no n_averaged"),
        ({"average": None}, "average is None; allowed is a dict"),
        ({"average": {**state["average"], "n_averaged": torch.tensor(-1)}}, "n_averaged is negat"),
        (
            {"average": {**state["average"], "module.stem.0.weight": torch.zeros(2)}},
            r"average, module\.stem\.0\.weight is a tensor \[2\]",
        ),
        (
            {"average": {**state["average"], "module.stem.1.running_var": -torch.ones(8)}},
            "running_var has negative values",
        ),
    ):
        with pytest.raises(ValueError, match=f"^resume: the file .*{message}"):
            fresh.load_state_dict({**state, **change}, "the file")
    without = {k: v for k, v in state.items() if k != "average"}
    with pytest.raises(ValueError, match="the state has no average"):
        fresh.load_state_dict(without, "the file")
    with pytest.raises(ValueError, match=r"model-ema=True \(now missing\)"):
        trainer(digits, Options(epochs=1, batch_size=700)).load_state_dict(state)
    fresh.load_state_dict(state)
    assert_same(without_times(fresh.state_dict()), without_times(state))


# The learning rate.


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


# The whole program.


def stop_in(stops: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def step_and_stop(self: Trainer, *args: Any) -> None:
        step(self, *args)
        if self.steps + 1 in stops:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_step", step_and_stop)


def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = f"{DIGITS} {RECIPE} --epochs 3 --log-every 2"
    assert train(tmp_path / "whole", more) == 0
    for stop, how in ((3, ""), (8, "--resume --workers 2"), (10, "--resume")):
        with monkeypatch.context() as patch:
            stop_in({stop}, patch)
            assert train(tmp_path / "parts", f"{more} {how}") == 130
    assert train(tmp_path / "parts", f"{more} --resume") == 0
    whole, parts = (without_times(load_checkpoint(tmp_path / n)) for n in ("whole", "parts"))
    assert any(whole["ebqm"]["skipped"])
    assert_same(whole, parts)
    # And the average is one: not the weights, nor what they were at first.
    weights, average = whole["model"]["stem.0.weight"], whole["average"]["module.stem.0.weight"]
    assert not torch.equal(weights, average)


def test_a_run_of_before_there_was_a_recipe_goes_on(tmp_path: Path) -> None:
    """Its checkpoint has no share among five, and none of the options; these a plain run of today has not either."""
    more = f"{DIGITS} --epochs 2"
    assert train(tmp_path / "whole", more) == 0
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
        assert train(tmp_path / "parts", more) == 130
    path = tmp_path / "parts" / "checkpoint.pt"
    old = torch.load(path, weights_only=True)
    for row in old["history"]:
        del row["test_accuracy_5"]
    torch.save(old, path)
    assert train(tmp_path / "parts", f"{more} --resume") == 0
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
    assert train(tmp_path / "whole", f"{more} --compile") == 0
    if backend == "eager":
        assert compiled
        assert all(compiled)
    with monkeypatch.context() as patch:
        stop_in({7}, patch)
        assert train(tmp_path / "parts", f"{more} --compile") == 130
    assert train(tmp_path / "parts", f"{more} --compile --resume") == 0
    whole, parts = (without_times(load_checkpoint(tmp_path / n)) for n in ("whole", "parts"))
    assert any(whole["ebqm"]["skipped"])
    assert_same(whole, parts)

    with monkeypatch.context() as patch:
        stop_in({7}, patch)
        assert train(tmp_path / "across", f"{more} --compile") == 130
    assert train(tmp_path / "across", f"{more} --resume") == 0
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
    assert train(tmp_path / "out", more) == 2
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
    assert train(tmp_path / "out", f"--side 8 --model resnet20 {option} 0.2") == 2
    expected = "error: mixup and cutmix needs torchvision, which could not be imported ("
    sentence = said(capsys)
    assert sentence.startswith(expected)
    assert "pip install 'ela-kernels[vision]'" in sentence
    assert not (tmp_path / "out").exists()


# Testing alone.


def test_evaluate_tells_what_the_run_told_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert train(out, f"{DIGITS} {RECIPE} --epochs 2") == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    row = load_checkpoint(out)["history"][-1]
    capsys.readouterr()
    short = "--side 8 --batch-size 240 --model resnet20"
    (out / "checkpoint.pt").rename(tmp_path / "other.pt")
    assert train(tmp_path / "none", f"{short} --evaluate {tmp_path / 'other.pt'}") == 0
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
    assert train(tmp_path / "out", f"{DIGITS} --epochs 1") == 0
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
        assert train(tmp_path / "out", more) == 2
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
        assert train(tmp_path / "out", short) == 2
        sentence = said(capsys)
        assert sentence.startswith(f"error: evaluate: {path} does not fit this network: ")
        assert re.search(message, sentence), sentence
