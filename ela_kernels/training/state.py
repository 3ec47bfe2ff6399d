"""What a checkpoint must hold for a run to go on from it: looked through before anything of it is taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ela_kernels.ebqm.diagnostics import ADDED_LATER
from ela_kernels.ebqm.state import EARLIER_RULE
from ela_kernels.training.finite import first_not_finite
from ela_kernels.training.plain import same, shown

if TYPE_CHECKING:
    from ela_kernels.training.loop import Trainer

ENTRIES = (
    *("options", "processes", "model", "optimizer", "schedule", "scaler", "ebqm", "epoch", "batch"),
    *("seconds", "history", "totals", "reported", "random"),
)
_LARGEST = 1e100
# How numbers are called that are at most 1.
_SHARES = ("accuracy", "precision", "precision_50")
# What a schedule's state has of the run so far; all else in it follows from the options.
_PROGRESS = ("last_epoch", "_step_count", "_last_lr")
_MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


class _UnfitError(Exception):
    """What of a state does not fit, and what would."""


def check_state(state: Mapping[str, Any], trainer: Trainer, source: str) -> None:
    """Refuse a state that `trainer` cannot go on from, whatever it is; nothing is changed.

    Raises:
        ValueError: it does not fit; the message names the source, the entry, and what would fit.
    """
    try:
        _entries("the state", state, ENTRIES)
        _mapping("options", state["options"])
        trainer.options.check_same(state["options"], source)
        _progress(state, trainer)
        _model(state["model"], trainer)
        _optimizer(state["optimizer"], trainer, _steps(state, trainer))
        _schedule(state["schedule"], state["optimizer"], trainer, _steps(state, trainer))
        _scaler(state["scaler"], trainer)
        _sums(state, trainer)
        _random(state["random"], trainer)
        _layers(state, trainer)
    except _UnfitError as error:
        raise ValueError(
            f"resume: {source} does not fit this run: {error}. Give the --out of a run of this command, or train into "
            "another folder without --resume"
        ) from None


def _progress(state: Mapping[str, Any], trainer: Trainer) -> None:
    processes = state["processes"]
    if type(processes) is not int or processes != trainer.processes.count:
        raise _UnfitError(
            f"it was made by {shown(processes)} processes; got {trainer.processes.count}, start as many"
        )
    epochs = trainer.options.epochs
    epoch = _count("epoch", state["epoch"], epochs)
    _count("batch", state["batch"], trainer.steps_per_epoch if epoch < epochs else 0)
    _number("seconds", state["seconds"])
    history = state["history"]
    if not isinstance(history, list) or len(history) != epoch:
        raise _UnfitError(
            f"history is {shown(history)}; allowed is a list of {epoch}, one an epoch"
        )
    for number, row in enumerate(history, 1):
        _entries(f"row {number} of history", row, trainer.columns)
        for name, value in row.items():
            most = 1.0 if name.endswith(_SHARES) else _LARGEST
            _number(f"{name} in row {number} of history", value, most)
        if row["epoch"] != number or row["step"] != number * trainer.steps_per_epoch:
            raise _UnfitError(
                f"row {number} of history is of another epoch, or of another number of steps"
            )


def _steps(state: Mapping[str, Any], trainer: Trainer) -> int:
    steps: int = state["epoch"] * trainer.steps_per_epoch + state["batch"]
    return steps


def _model(saved: Any, trainer: Trainer) -> None:
    expected = trainer.model.state_dict()
    # Layers know by themselves what they wrote in earlier versions; all is loaded into a copy first.
    ours = {k: v for k, v in expected.items() if not k.endswith((".decision", "._extra_state"))}
    _mapping("model", saved)
    _entries("model", {k: v for k, v in saved.items() if k in ours or k not in expected}, ours)
    for name, value in ours.items():
        _like(f"model, {name}", saved[name], value)
        if name.endswith("running_var") and bool((saved[name] < 0).any()):
            raise _UnfitError(f"model, {name} has negative values")
    found = first_not_finite(saved, {"state": {}})
    if found is not None:
        raise _UnfitError(f"model, {found} has values that are not finite")


def _optimizer(saved: Any, trainer: Trainer, steps: int) -> None:
    expected = trainer.optimizer.state_dict()
    _entries("optimizer", saved, expected)
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(expected["param_groups"]):
        raise _UnfitError(
            f"optimizer, param_groups is {shown(groups)}; allowed is a list of {len(expected['param_groups'])}"
        )
    for number, (group, present) in enumerate(zip(groups, expected["param_groups"], strict=True)):
        where = f"optimizer, group {number}"
        _mapping(where, group)
        _no_others(where, group, present)
        for name, value in present.items():
            # Releases of PyTorch add settings that are off by default, and one that names what AdamW does anyway.
            added = value is None or value is False or name == "decoupled_weight_decay"
            if name not in group and not added:
                raise _UnfitError(f"{where} has no {name}; allowed is {shown(value)}")
            if name not in ("lr", "params") and not same(group.get(name, value), value):
                raise _UnfitError(
                    f"{where}, {name} is {shown(group[name])}; allowed is {shown(value)}"
                )
        if not same(group.get("params"), present["params"]):
            raise _UnfitError(f"{where} has other parameters than this model's")
        lr = group.get("lr")
        # No schedule goes beyond it; a cosine's rate is a product of many rounded factors.
        _number(f"{where}, lr", lr, trainer.options.lr * (1 + 1e-6))
    _moments(saved, trainer, steps)


def _moments(saved: Mapping[str, Any], trainer: Trainer, steps: int) -> None:
    """The optimizer's averages, one set a parameter that has had a gradient."""
    options = trainer.options
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    _mapping("optimizer, state", saved["state"])
    averages = options.optimizer == "adamw" or options.momentum > 0
    # The first steps in fp16 may all be left out. In other formats every layer is in use in the first step.
    if steps and averages and options.amp != "fp16" and len(saved["state"]) < len(parameters):
        raise _UnfitError(
            f"optimizer, state is of {len(saved['state'])} parameters; allowed are all {len(parameters)}"
        )
    for number, state in saved["state"].items():
        where = f"optimizer, state of parameter {shown(number)}"
        if type(number) is not int or not 0 <= number < len(parameters):
            raise _UnfitError(f"{where}; allowed are those from 0 to {len(parameters) - 1}")
        _entries(where, state, _MOMENTS[options.optimizer])
        for name, value in state.items():
            expected = torch.zeros((), device="cpu") if name == "step" else parameters[number]
            _like(f"{where}, {name}", value, expected)
            if name in ("step", "exp_avg_sq") and bool((value < 0).any()):
                raise _UnfitError(f"{where}, {name} is negative")
    found = first_not_finite({}, saved)
    if found is not None:
        raise _UnfitError(f"optimizer, {found} has values that are not finite")


def _schedule(saved: Any, optimizer: Mapping[str, Any], trainer: Trainer, steps: int) -> None:
    expected = trainer.schedule.state_dict()
    _mapping("schedule", saved)
    _no_others("schedule", saved, (*expected, "verbose"))  # an entry of earlier releases of PyTorch
    for name, value in expected.items():
        # Names with an underscore come and go with releases of PyTorch.
        if name not in saved and not name.startswith("_"):
            raise _UnfitError(
                f"schedule has no {name}; allowed is a {trainer.options.schedule} schedule's state"
            )
        if name not in _PROGRESS and not same(saved.get(name, value), value):
            raise _UnfitError(
                f"schedule, {name} is {shown(saved[name])}; allowed is {shown(value)}"
            )
    for name, count in (("last_epoch", steps), ("_step_count", steps + 1)):
        if not same(saved.get(name), count):
            raise _UnfitError(
                f"schedule, {name} is {shown(saved.get(name))}; allowed is {count}, as epoch and batch say"
            )
    rates = [group["lr"] for group in optimizer["param_groups"]]
    if not same(saved.get("_last_lr"), rates):
        raise _UnfitError("schedule has other learning rates than the optimizer")


def _scaler(saved: Any, trainer: Trainer) -> None:
    expected = trainer.scaler.state_dict()
    _entries("scaler", saved, expected)
    for name, value in saved.items():
        _number(f"scaler, {name}", value)
        if name not in ("scale", "_growth_tracker") and value != expected[name]:
            raise _UnfitError(f"scaler, {name} is {value}; allowed is {expected[name]}")
    if saved:
        _count("scaler, _growth_tracker", saved["_growth_tracker"], expected["growth_interval"])
        if saved["scale"] == 0:
            raise _UnfitError("scaler, scale is 0; allowed is a positive number")


def _sums(state: Mapping[str, Any], trainer: Trainer) -> None:
    """Loss, right answers and images of the epoch so far, and the part of them that a log has had."""
    for name in ("totals", "reported"):
        _like(name, state[name], torch.zeros(3, dtype=torch.float64, device="cpu"))
        if not bool((state[name].isfinite() & (state[name] >= 0)).all()):
            raise _UnfitError(
                f"{name} is {state[name].tolist()}; allowed are numbers of at least 0"
            )
    seen = state["batch"] * trainer.options.batch_size * trainer.processes.count
    if float(state["totals"][2]) != seen or float(state["reported"][2]) > seen:
        raise _UnfitError(
            f"totals and reported are of {float(state['totals'][2]):g} and {float(state['reported'][2]):g} images; "
            f"allowed are {seen} and at most as many"
        )


def _random(saved: Any, trainer: Trainer) -> None:
    _mapping("random", saved)
    if not {"cpu"} <= set(saved) <= {"cpu", "cuda"}:
        raise _UnfitError(f"random has the entries {shown(list(saved))}; allowed are cpu and cuda")
    for kind, states in saved.items():
        if not isinstance(states, (list, tuple)) or len(states) != trainer.processes.count:
            raise _UnfitError(
                f"random, {kind} is {shown(states)}; allowed is a list of {trainer.processes.count}, one a process"
            )
        if kind == "cuda" and trainer.device.type != "cuda":
            continue
        device = trainer.device if kind == "cuda" else torch.device("cpu")
        for state in states:
            _generator(kind, state, torch.Generator(device))


def _generator(kind: str, state: Any, generator: torch.Generator) -> None:
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise _UnfitError(
            f"random, {kind} holds {shown(state)}; allowed is the state of a generator of this PyTorch"
        ) from error


def _layers(state: Mapping[str, Any], trainer: Trainer) -> None:
    """What layers and EBQM take in by rules of their own: tried on copies."""
    saved, ebqm = state["ebqm"], trainer.ebqm
    if (saved is None) != (ebqm is None):
        raise _UnfitError(
            f"ebqm is {shown(saved)}; allowed is {'None' if ebqm is None else 'a state'}"
        )
    if ebqm is not None:
        _watching(saved, ebqm.state_dict(), _steps(state, trainer))
    # One call, so that the copy of EBQM watches the copy of the model.
    model, watching = copy.deepcopy((trainer.model, ebqm))
    try:
        model.load_state_dict(state["model"])
        if watching is not None:
            skipped = watching.state_dict()["skipped"]
            with warnings.catch_warnings():  # once, when it is taken over
                warnings.simplefilter("ignore")
                watching.load_state_dict(saved)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [""])[-1].strip()[:200].rstrip(". ")
        raise _UnfitError(f"model or ebqm cannot be taken over: {line}") from error
    if model.state_dict().keys() != trainer.model.state_dict().keys():
        raise _UnfitError("model is one with layers pruned; allowed is one with all of them")
    if watching is not None and not same(saved["skipped"], skipped):
        raise _UnfitError("ebqm, skipped has other layers than the model has skipped")


def _watching(saved: Any, present: Mapping[str, Any], steps: int) -> None:
    """What EBQM has seen and decided; its entries, settings and layers are for itself to compare."""
    _mapping("ebqm", saved)
    # Of the earlier rule's state, statistics and the record of decisions are not taken over.
    is_old = saved.get("version") == EARLIER_RULE
    for name in ("skipped", "since") if is_old else ("statistics", "skipped", "reasons", "since"):
        _like(f"ebqm, {name}", saved.get(name), present[name])
    if not is_old:
        statistics = saved["statistics"]
        if not bool((statistics.isfinite() & (statistics >= 0)).all()):
            raise _UnfitError("ebqm, statistics has values that are negative or not finite")
    _mapping("ebqm, settings", saved.get("settings"))
    if not same(saved.get("layers"), present["layers"]):
        raise _UnfitError(f"ebqm, layers is {shown(saved.get('layers'))}; allowed are this model's")
    _count("ebqm, steps", saved.get("steps"), steps)
    for step in saved["since"]:
        _count("ebqm, since", step, steps)
    if is_old:
        return
    decisions = saved.get("decisions")
    if not isinstance(decisions, list):
        raise _UnfitError(f"ebqm, decisions is {shown(decisions)}; allowed is a list")
    layers = len(present["layers"])
    for decision in decisions:
        _mapping("ebqm, decisions", decision)
        _count("ebqm, decisions, step", decision.get("step"), steps)
        for name in ("divergence", "score"):
            _values(f"ebqm, decisions, {name}", decision.get(name), layers, (float,))
        _values("ebqm, decisions, skipped", decision.get("skipped"), layers, (bool,))
        _values("ebqm, decisions, reasons", decision.get("reasons"), layers, (str,))
    _mapping("ebqm, diagnostics", saved.get("diagnostics"))
    for name in present["diagnostics"]:
        if name in ADDED_LATER and name not in saved["diagnostics"]:
            continue
        _values(f"ebqm, diagnostics, {name}", saved["diagnostics"].get(name), layers, (float,))


def _values(where: str, value: Any, count: int, types: tuple[type, ...]) -> None:
    if (
        not isinstance(value, list)
        or len(value) != count
        or any(type(v) not in types for v in value)
    ):
        names = " or ".join(t.__name__ for t in types)
        raise _UnfitError(f"{where} is {shown(value)}; allowed is a list of {count}, each {names}")


def _like(where: str, value: Any, expected: Any) -> None:
    """A tensor of the same kind, or a list as long with values of the same type."""
    if isinstance(expected, Tensor):
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise _UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise _UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
    elif not isinstance(value, type(expected)):
        raise _UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
    elif isinstance(expected, list):
        if len(value) != len(expected):
            raise _UnfitError(f"{where} is {shown(value)}; allowed is {shown(expected)}")
        for number, (one, other) in enumerate(zip(value, expected, strict=True)):
            if type(one) is not type(other):
                raise _UnfitError(f"{where}[{number}] is {shown(one)}; allowed is {shown(other)}")


def _mapping(where: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _UnfitError(f"{where} is {shown(value)}; allowed is a dict")


def _entries(where: str, value: Any, expected: Mapping[str, Any] | Sequence[str]) -> None:
    """A dict with these entries and no others."""
    _mapping(where, value)
    missing = [name for name in expected if name not in value]
    extra = [name for name in value if name not in expected]
    if missing or extra:
        words = [f"has no {', '.join(missing[:3])}"] if missing else []
        words += [f"has {', '.join(map(shown, extra[:3]))} besides"] if extra else []
        raise _UnfitError(
            f"{where} {' and '.join(words)} ({len(missing)} entries too few, {len(extra)} too many)"
        )


def _no_others(where: str, value: Mapping[str, Any], expected: Iterable[str]) -> None:
    for name in value:
        if name not in expected:
            raise _UnfitError(
                f"{where} has {shown(name)} besides; allowed are {', '.join(expected)}"
            )


def _number(where: str, value: Any, most: float = _LARGEST) -> None:
    # NaN is in no order; an int may be too large for a float.
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise _UnfitError(f"{where} is {shown(value)}; allowed is a number from 0 to {most:g}")


def _count(where: str, value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _UnfitError(f"{where} is {shown(value)}; allowed is an int from 0 to {most}")
    return value
