"""What a checkpoint holds is looked through before any of it is taken."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ela_kernels.__main__ import main
from ela_kernels.models import CifarResNet
from ela_kernels.modules import ELA
from ela_kernels.training.checkpoint import NAME
from ela_kernels.training.data import Task
from ela_kernels.training.loop import Interrupted, Trainer
from ela_kernels.training.options import Options

pytest.importorskip("sklearn")

EBQM = {"warmup": 1, "interval": 1, "probe_interval": 1, "low": 0.98, "high": 0.99}
OPTIONS = Options(epochs=2, batch_size=400, ebqm=EBQM)
NAN = float("nan")
_REMOVED = object()


def make(task: Task, options: Options = OPTIONS, width: int = 8) -> Trainer:
    torch.manual_seed(0)
    model = CifarResNet((3,), (width,), in_chans=1, attention="ela", head_dim=8)
    return Trainer(model, task, options)


def stopped(task: Task, options: Options = OPTIONS) -> dict[str, Any]:
    """The state in the middle of the second epoch, of three steps."""
    trainer = make(task, options)
    trainer.stopping = lambda: int(trainer.steps == 4)
    trainer.run_epoch()
    with pytest.raises(Interrupted):
        trainer.run_epoch()
    return copy.deepcopy(trainer.state_dict())


@pytest.fixture(scope="module")
def state(digits: Task) -> dict[str, Any]:
    state = stopped(digits)
    assert any(state["ebqm"]["skipped"])
    assert len(state["ebqm"]["decisions"]) == 4
    return state


@pytest.fixture(scope="module")
def fresh(digits: Task) -> Trainer:
    """A run that has not begun, and that no refused state changes."""
    return make(digits)


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested containers with one entry put, or removed."""
    if not path:
        return new
    copied = value.copy()
    if new is _REMOVED and len(path) == 1:
        del copied[path[0]]
    else:
        before = copied[path[0]] if isinstance(value, list) or path[0] in value else {}
        copied[path[0]] = changed(before, path[1:], new)
    return copied


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    return (
        [t for v in value for t in tensors(v)]
        if isinstance(value, (list, tuple))
        or not isinstance(value, (str, int, float, bool, type(None)))
        else []
    )


ANY_LAYER = "attentions.0.1._extra_state"
GROUP = ("optimizer", "param_groups", 0)
MOMENT = ("optimizer", "state", 0, "momentum_buffer")
DECISION = ("ebqm", "decisions", 1)

CHANGES: list[tuple[tuple[Any, ...], Any, str]] = [
    *(((name,), _REMOVED, f"has no {name}") for name in ("processes", "model", "random", "totals")),
    (("extra",), 1, "has 'extra' besides"),
    (("options", "lr"), torch.zeros(3), r"lr=a tensor \[3\] of float32 \(now 0.03\)"),
    (("options", "lr"), _REMOVED, r"lr=missing \(now 0.03\)"),
    (("options", "later"), 3, r"later=3 \(now missing\)"),
    (("options", "task"), None, "task=None"),
    (("options", "ebqm"), None, "ebqm=None"),
    (("options", "ebqm", "low"), 0.5, r"ebqm low=0.5 \(now 0.98\)"),
    (("processes",), "1", "made by '1' processes; got 1"),
    (("processes",), 2, "made by 2 processes; got 1"),
    (("epoch",), -1, "epoch is -1; allowed is an int from 0 to 2"),
    (("epoch",), 1.0, "epoch is 1.0; allowed is an int"),
    (("epoch",), True, "epoch is True; allowed is an int"),
    (("batch",), 4, "batch is 4; allowed is an int from 0 to 3"),
    (("batch",), 2, "last_epoch is 4; allowed is 5, as epoch and batch say"),
    (("seconds",), NAN, "seconds is nan; allowed is a number"),
    (("history",), [], "history is a list of 0; allowed is a list of 1"),
    (("history", 0), None, "row 1 of history is None; allowed is a dict"),
    (("history", 0, "lr"), _REMOVED, "row 1 of history has no lr"),
    (("history", 0, "test_accuracy"), 10**400, "test_accuracy in row 1 of history is 1000"),
    (("history", 0, "train_loss"), "x", "train_loss in row 1 of history is 'x'"),
    (("history", 0, "epoch"), 2, "row 1 of history is of another epoch"),
    (("model",), {}, "model has no stem"),
    (("model",), [], "model is a list of 0; allowed is a dict"),
    (
        ("model", "stem.0.weight"),
        torch.zeros(3),
        r"a tensor \[3\] of float32; allowed is a tensor \[8, 1, 3, 3\]",
    ),
    (("model", "stem.0.weight"), torch.zeros(8, 1, 3, 3).half(), "of float16; allowed is"),
    (("model", "stem.0.weight"), torch.zeros(8, 1, 3, 3, device="meta"), "stem.0.weight"),
    (("model", "stem.0.weight"), torch.zeros(8, 1, 3, 3).to_sparse(), "stem.0.weight"),
    (
        ("model", "stem.0.weight"),
        torch.full((8, 1, 3, 3), NAN),
        "stem.0.weight has values that are not finite",
    ),
    (("model", "stem.1.running_var"), torch.full((8,), -1.0), "running_var has negative values"),
    (("model", ANY_LAYER), torch.tensor([1, 7, 1, 0]), "cannot be taken over"),
    (("model", ANY_LAYER), torch.tensor([1, 0, 1, 2]), "cannot be taken over: Unexpected key"),
    (("model", "other.weight"), torch.zeros(1), "model has 'other.weight' besides"),
    (("optimizer",), None, "optimizer is None; allowed is a dict"),
    (("optimizer", "param_groups"), [], "param_groups is a list of 0"),
    ((*GROUP, "params"), [0], "other parameters than this model's"),
    ((*GROUP, "lr"), NAN, "lr is nan; allowed is a number from 0"),
    ((*GROUP, "lr"), 1.0, "lr is 1.0; allowed is a number from 0"),
    ((*GROUP, "weight_decay"), _REMOVED, "has no weight_decay"),
    ((*GROUP, "momentum"), 0.5, "momentum is 0.5; allowed is 0.9"),
    ((*GROUP, "other"), 1, "has 'other' besides"),
    (("optimizer", "state"), {}, "optimizer, state is of 0 parameters; allowed are all"),
    (("optimizer", "state", 999), {}, "parameter 999"),
    (
        ("optimizer", "state", 0),
        {"exp_avg": torch.zeros(1)},
        "has no momentum_buffer and has 'exp_avg' besides",
    ),
    (MOMENT, torch.zeros(2), r"momentum_buffer is a tensor \[2\]"),
    (MOMENT, None, "momentum_buffer is None"),
    (
        MOMENT,
        torch.full((8, 1, 3, 3), float("inf")),
        "momentum_buffer of parameter 0 has values that are not",
    ),
    (("schedule",), {"T_max": 6, "eta_min": 0.0, "last_epoch": 4}, "schedule has 'T_max' besides"),
    (("schedule", "total_steps"), 99, "total_steps is 99; allowed is 7"),
    (
        ("schedule", "total_steps"),
        _REMOVED,
        "no total_steps; allowed is a one-cycle schedule's state",
    ),
    (("schedule", "optimizer"), 5, "schedule has 'optimizer' besides"),
    (("schedule", "_last_lr"), [0.1, 0.1], "other learning rates than the optimizer"),
    (("scaler",), None, "scaler is None"),
    (("scaler", "scale"), 1.0, "scaler has 'scale' besides"),
    (("ebqm",), None, "ebqm is None; allowed is a state"),
    (("ebqm", "version"), _REMOVED, "cannot be taken over"),
    (("ebqm", "version"), 99, "cannot be taken over: state: got version 99"),
    (("ebqm", "settings", "low"), 0.1, "cannot be taken over: state: got other settings"),
    (("ebqm", "settings"), None, "settings is None"),
    (("ebqm", "layers"), ["a"], "layers is a list of 1; allowed are this model's"),
    (("ebqm", "steps"), 99, "ebqm, steps is 99"),
    (("ebqm", "statistics"), torch.zeros(5, 9), r"statistics is a tensor \[5, 9\]"),
    (
        ("ebqm", "statistics"),
        torch.full((5, 3), NAN, dtype=torch.float64),
        "statistics has values that are negative or not finite",
    ),
    (("ebqm", "skipped"), [False] * 3, "other layers than the model has skipped"),
    (("ebqm", "skipped"), [True], "skipped is a list of 1"),
    (("ebqm", "reasons"), ["NOTHING"] * 3, "cannot be taken over"),
    (("ebqm", "since"), [1, 2, 99], "since is 99"),
    (("ebqm", "decisions"), None, "decisions is None"),
    ((*DECISION, "step"), "x", "step is 'x'"),
    ((*DECISION, "score"), [1.0], "score is a list of 1"),
    (("ebqm", "diagnostics"), None, "diagnostics is None; allowed is a dict"),
    (("ebqm", "diagnostics", "entropy"), [1.0], "entropy is a list of 1"),
    ((*DECISION, "divergence"), [1.0], "divergence is a list of 1"),
    (
        (*DECISION, "skipped"),
        [0, 1, 2],
        "skipped is a list of 3; allowed is a list of 3, each bool",
    ),
    ((*DECISION, "reasons"), ["NOTHING"] * 3, "cannot be taken over"),
    (("totals",), torch.zeros(4, dtype=torch.float64), r"totals is a tensor \[4\]"),
    (("totals",), torch.zeros(3, dtype=torch.float64), "of 0 and 0 images; allowed are 400"),
    (("totals",), torch.tensor([NAN, 1, 400], dtype=torch.float64), r"totals is \[nan"),
    (("reported",), torch.zeros(3), "reported is a tensor"),
    (("random",), {}, "random has the entries a list of 0"),
    (("random", "cpu"), [], "cpu is a list of 0; allowed is a list of 1"),
    (("random", "cpu", 0), torch.zeros(3, dtype=torch.uint8), r"cpu holds a tensor \[3\] of uint8"),
    (("random", "cpu", 0), "x", "cpu holds 'x'"),
]


@pytest.mark.parametrize(("path", "new", "message"), CHANGES)
def test_a_state_that_does_not_fit_is_refused(
    fresh: Trainer, state: dict[str, Any], path: tuple[Any, ...], new: Any, message: str
) -> None:
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=f"^resume: the file .*{message}") as refused:
        fresh.load_state_dict(changed(state, path, new), "the file")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    after = fresh.state_dict()
    assert (fresh.steps, after["history"], after["schedule"]) == (0, [], before["schedule"])
    assert after["ebqm"]["skipped"] == [False] * 3
    assert after["optimizer"]["state"] == {}
    for a, b in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(a, b)


def test_the_state_that_all_these_differ_from_fits(digits: Task, state: dict[str, Any]) -> None:
    run = make(digits)
    run.load_state_dict(state)
    assert (run.steps, run.layers_skipped) == (4, sum(state["ebqm"]["skipped"]))
    whole = make(digits)
    for trainer in (run, whole):
        while not trainer.done:
            trainer.run_epoch()
    for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        Options(epochs=2, batch_size=400, ebqm=None, optimizer="adamw", schedule="cosine"),
        Options(epochs=2, batch_size=400, ebqm=EBQM, momentum=0.0, schedule="constant", amp="fp16"),
    ],
)
def test_states_of_other_kinds_of_runs(
    digits: Task, state: dict[str, Any], options: Options
) -> None:
    other = stopped(digits, options)
    make(digits, options).load_state_dict(other)
    with pytest.raises(
        ValueError, match=f"optimizer='sgd'.* {options.schedule}|schedule='one-cycle'"
    ):
        make(digits, options).load_state_dict(state)
    for name in ("optimizer", "schedule", "scaler"):
        if other[name].keys() != state[name].keys() or name == "optimizer":
            with pytest.raises(ValueError, match=f"does not fit this run: {name}"):
                make(digits, options).load_state_dict({**other, name: state[name]})


def test_a_state_of_an_adamw_run_with_a_negative_average(digits: Task) -> None:
    options = Options(epochs=2, batch_size=400, ebqm=None, optimizer="adamw")
    state = stopped(digits, options)
    state["optimizer"]["state"][0]["exp_avg_sq"] -= 1
    with pytest.raises(ValueError, match="parameter 0, exp_avg_sq is negative"):
        make(digits, options).load_state_dict(state)


def test_a_wider_model_is_another(digits: Task, state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not fit this run: model, stem\.0\.weight"):
        make(digits, width=16).load_state_dict(state)


def test_the_program_says_so_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--out", str(tmp_path), "--side", "8", "--batch-size", "1400"]
    command += ["--model", "resnet20", "--attention", "none", "--threads", "1", "--epochs", "1"]
    assert main(command) == 0
    path = tmp_path / NAME
    whole = torch.load(path, weights_only=True)
    capsys.readouterr()
    for content in (
        {"options": whole["options"]},
        {k: v for k, v in whole.items() if k != "model"},
        {**whole, "model": {}},
        {**whole, "epoch": -1},
        {**whole, "random": {"cpu": [torch.zeros(3, dtype=torch.uint8)]}},
    ):
        torch.save(content, path)
        assert main([*command, "--resume"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: resume: {path} does not fit this run: ")
        assert said.count("\n") == 1
    # Written without a checksum, as by earlier releases.
    torch.save({k: v for k, v in whole.items() if k != "version"}, path)
    assert main([*command, "--resume"]) == 0


def test_a_run_of_the_earlier_rule_goes_on(state: dict[str, Any], digits: Task) -> None:
    """Statistics of it lack the squares; decisions, and everything else of the run, are kept."""
    saved = copy.deepcopy(state)
    saved["options"]["ebqm"] = {**EBQM, "ceiling": 1.0, "prior_count": 4.0}
    old = saved["ebqm"]
    del old["diagnostics"]
    old["version"] = 1
    old["settings"] = {**EBQM, "ceiling": 1.0, "reference": [2.0, 2.0]}
    old["statistics"] = torch.rand(4, 3)
    old["reasons"] = ["CEILING"] * 3
    old["decisions"] = [{"step": 1, "fit": None, "retention": [0.5] * 3}]
    run = make(digits)
    with pytest.warns(UserWarning, match="EBQM's earlier rule") as told:
        run.load_state_dict(saved)
    assert len([w for w in told if "earlier rule" in str(w.message)]) == 1
    assert run.layers_skipped == sum(state["ebqm"]["skipped"]) > 0
    assert run.steps == 4
    while not run.done:
        run.run_epoch()
    assert [d.step for d in run.ebqm.report().decisions] == [5, 6]
    with pytest.raises(ValueError, match="since is 99"):
        make(digits).load_state_dict(changed(saved, ("ebqm", "since"), [1, 2, 99]))
    with pytest.raises(ValueError, match="skipped has other layers than the model"):
        make(digits).load_state_dict(changed(saved, ("ebqm", "skipped"), [False] * 3))


def test_a_skipped_layer_is_not_moved_by_momentum_and_decay(digits: Task) -> None:
    """As several processes would: each hands over gradients of zeros."""
    made = make(digits)
    layer = next(m for m in made.model.modules() if isinstance(m, ELA))
    layer.skipped = True
    query, key = layer.attn.Wq.weight, layer.attn.Wk.weight
    before = query.detach().clone(), key.detach().clone()
    for parameter in made.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step()
    assert torch.equal(query, before[0])
    assert not torch.equal(key, before[1])
