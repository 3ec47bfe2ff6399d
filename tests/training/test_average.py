"""The average of the weights: its formula, when it is updated, and what of it a run takes back."""

from __future__ import annotations

import copy

import pytest
import torch
from support.program import assert_same, trainer, without_times

from ela_kernels import ELA
from ela_kernels.training.average import Average, decay_of
from ela_kernels.training.data import Task
from ela_kernels.training.logs import columns_of
from ela_kernels.training.options import Options
from ela_kernels.training.recipe import Recipe


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
