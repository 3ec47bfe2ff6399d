"""What a checkpoint must hold for a run to go on from it: looked through before anything of it is taken."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ela_kernels.ebqm.diagnostics import ADDED_LATER as DIAGNOSTICS_ADDED_LATER
from ela_kernels.ebqm.state import EARLIER_RULE
from ela_kernels.training.finite import first_not_finite
from ela_kernels.training.fitting import (
    LARGEST,
    UnfitError,
    check_count,
    check_entries,
    check_like,
    check_mapping,
    check_no_others,
    check_number,
    check_values,
)
from ela_kernels.training.logs import ADDED_LATER
from ela_kernels.training.plain import same, shown

if TYPE_CHECKING:
    from ela_kernels.training.loop import Trainer

ENTRIES = (
    *("options", "processes", "model", "optimizer", "schedule", "scaler", "ebqm", "epoch", "batch"),
    *("seconds", "history", "totals", "reported", "random"),
)
# How numbers are called that are at most 1.
_SHARES = ("accuracy", "accuracy_5", "precision", "precision_50")
# What a schedule's state has of the run so far; all else in it follows from the options.
_PROGRESS = ("last_epoch", "_step_count", "_last_lr")
_MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


def check_state(state: Mapping[str, Any], trainer: Trainer, source: str) -> None:
    """Refuse a state that `trainer` cannot go on from, whatever it is; nothing is changed.

    Raises:
        ValueError: it does not fit; the message names the source, the entry, and what would fit.
    """
    try:
        check_mapping("the state", state)
        if "options" in state:
            # First of all: these are what was chosen, and what else is in a state follows from them.
            check_mapping("options", state["options"])
            trainer.options.check_same(state["options"], source)
        check_entries(
            "the state", state, ENTRIES if trainer.average is None else (*ENTRIES, "average")
        )
        _progress(state, trainer)
        _weights(state, trainer)
        _optimizer(state["optimizer"], trainer, _steps(state, trainer))
        _schedule(state["schedule"], state["optimizer"], trainer, _steps(state, trainer))
        _scaler(state["scaler"], trainer)
        _sums(state, trainer)
        _random(state["random"], trainer)
        _layers(state, trainer)
    except UnfitError as error:
        raise ValueError(
            f"resume: {source} does not fit this run: {error}. Give the --out of a run of this command, or train into "
            "another folder without --resume"
        ) from None


def check_weights(state: Mapping[str, Any], trainer: Trainer, source: str) -> None:
    """Refuse weights, and an average of them where `trainer` has one, that are not of its network.

    Raises:
        ValueError: they are not; the message names the source, the entry, and what would fit.
    """
    try:
        check_mapping("options", state.get("options"))
        trainer.options.check_same_network(state["options"], source)
        for name in ("model", *(() if trainer.average is None else ("average",))):
            if name not in state:
                raise UnfitError(f"the state has no {name}")
        _weights(state, trainer)
        _taken_over(copy.deepcopy(trainer.model), state["model"], "model")
    except UnfitError as error:
        raise ValueError(
            f"evaluate: {source} does not fit this network: {error}. Give the --out of a run of this network"
        ) from None


def _progress(state: Mapping[str, Any], trainer: Trainer) -> None:
    processes = state["processes"]
    if type(processes) is not int or processes != trainer.processes.count:
        raise UnfitError(
            f"it was made by {shown(processes)} processes; got {trainer.processes.count}, start as many"
        )
    epochs = trainer.options.epochs
    epoch = check_count("epoch", state["epoch"], epochs)
    check_count("batch", state["batch"], trainer.steps_per_epoch if epoch < epochs else 0)
    check_number("seconds", state["seconds"])
    history = state["history"]
    if not isinstance(history, list) or len(history) != epoch:
        raise UnfitError(f"history is {shown(history)}; allowed is a list of {epoch}, one an epoch")
    for number, row in enumerate(history, 1):
        check_mapping(f"row {number} of history", row)
        later = [name for name in ADDED_LATER if name not in row]
        columns = [name for name in trainer.columns if name not in later]
        check_entries(f"row {number} of history", row, columns)
        for name, value in row.items():
            most = 1.0 if name.endswith(_SHARES) else LARGEST
            check_number(f"{name} in row {number} of history", value, most)
        if row["epoch"] != number or row["step"] != number * trainer.steps_per_epoch:
            raise UnfitError(
                f"row {number} of history is of another epoch, or of another number of steps"
            )


def _steps(state: Mapping[str, Any], trainer: Trainer) -> int:
    steps: int = state["epoch"] * trainer.steps_per_epoch + state["batch"]
    return steps


def _weights(state: Mapping[str, Any], trainer: Trainer) -> None:
    """The model's, and those of its average."""
    _module("model", state["model"], trainer.model)
    if trainer.average is not None:
        _module("average", state["average"], trainer.average.model)
        if bool(state["average"]["n_averaged"] < 0):
            raise UnfitError("average, n_averaged is negative")
        average = copy.deepcopy(trainer.average.model)
        _taken_over(average, state["average"], "average")


def _module(what: str, saved: Any, module: nn.Module) -> None:
    expected = module.state_dict()
    # Layers know by themselves what they wrote in earlier versions; all is loaded into a copy first.
    ours = {k: v for k, v in expected.items() if not k.endswith((".decision", "._extra_state"))}
    check_mapping(what, saved)
    check_entries(what, {k: v for k, v in saved.items() if k in ours or k not in expected}, ours)
    for name, value in ours.items():
        check_like(f"{what}, {name}", saved[name], value)
        if name.endswith("running_var") and bool((saved[name] < 0).any()):
            raise UnfitError(f"{what}, {name} has negative values")
    found = first_not_finite(saved, {"state": {}})
    if found is not None:
        raise UnfitError(f"{what}, {found} has values that are not finite")


def _taken_over(copied: nn.Module, saved: Mapping[str, Any], what: str) -> None:
    """Try a state by what a module makes of it, on a copy."""
    before = copied.state_dict().keys()
    try:
        copied.load_state_dict(saved)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnfitError(f"{what} cannot be taken over: {_last_line(error)}") from error
    if copied.state_dict().keys() != before:
        raise UnfitError(f"{what} is one with layers pruned; allowed is one with all of them")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()[:200].rstrip(". ")


def _optimizer(saved: Any, trainer: Trainer, steps: int) -> None:
    expected = trainer.optimizer.state_dict()
    check_entries("optimizer", saved, expected)
    groups = saved["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(expected["param_groups"]):
        raise UnfitError(
            f"optimizer, param_groups is {shown(groups)}; allowed is a list of {len(expected['param_groups'])}"
        )
    for number, (group, present) in enumerate(zip(groups, expected["param_groups"], strict=True)):
        where = f"optimizer, group {number}"
        check_mapping(where, group)
        check_no_others(where, group, present)
        for name, value in present.items():
            # Releases of PyTorch add settings that are off by default, and one that names what AdamW does anyway.
            added = value is None or value is False or name == "decoupled_weight_decay"
            if name not in group and not added:
                raise UnfitError(f"{where} has no {name}; allowed is {shown(value)}")
            if name not in ("lr", "params") and not same(group.get(name, value), value):
                raise UnfitError(
                    f"{where}, {name} is {shown(group[name])}; allowed is {shown(value)}"
                )
        if not same(group.get("params"), present["params"]):
            raise UnfitError(f"{where} has other parameters than this model's")
        lr = group.get("lr")
        # No schedule goes beyond it; a cosine's rate is a product of many rounded factors.
        check_number(f"{where}, lr", lr, trainer.options.lr * (1 + 1e-6))
    _moments(saved, trainer, steps)


def _moments(saved: Mapping[str, Any], trainer: Trainer, steps: int) -> None:
    """The optimizer's averages, one set a parameter that has had a gradient."""
    options = trainer.options
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    check_mapping("optimizer, state", saved["state"])
    averages = options.optimizer == "adamw" or options.momentum > 0
    # The first steps in fp16 may all be left out. In other formats every layer is in use in the first step.
    if steps and averages and options.amp != "fp16" and len(saved["state"]) < len(parameters):
        raise UnfitError(
            f"optimizer, state is of {len(saved['state'])} parameters; allowed are all {len(parameters)}"
        )
    for number, state in saved["state"].items():
        where = f"optimizer, state of parameter {shown(number)}"
        if type(number) is not int or not 0 <= number < len(parameters):
            raise UnfitError(f"{where}; allowed are those from 0 to {len(parameters) - 1}")
        check_entries(where, state, _MOMENTS[options.optimizer])
        for name, value in state.items():
            expected = torch.zeros((), device="cpu") if name == "step" else parameters[number]
            check_like(f"{where}, {name}", value, expected)
            if name in ("step", "exp_avg_sq") and bool((value < 0).any()):
                raise UnfitError(f"{where}, {name} is negative")
    found = first_not_finite({}, saved)
    if found is not None:
        raise UnfitError(f"optimizer, {found} has values that are not finite")


def _schedule(saved: Any, optimizer: Mapping[str, Any], trainer: Trainer, steps: int) -> None:
    expected = trainer.schedule.state_dict()
    check_mapping("schedule", saved)
    check_no_others(
        "schedule", saved, (*expected, "verbose")
    )  # an entry of earlier releases of PyTorch
    for name, value in expected.items():
        # Names with an underscore come and go with releases of PyTorch.
        if name not in saved and not name.startswith("_"):
            raise UnfitError(
                f"schedule has no {name}; allowed is a {trainer.options.schedule} schedule's state"
            )
        if name not in _PROGRESS and not same(saved.get(name, value), value):
            raise UnfitError(f"schedule, {name} is {shown(saved[name])}; allowed is {shown(value)}")
    for name, count in (("last_epoch", steps), ("_step_count", steps + 1)):
        if not same(saved.get(name), count):
            raise UnfitError(
                f"schedule, {name} is {shown(saved.get(name))}; allowed is {count}, as epoch and batch say"
            )
    rates = [group["lr"] for group in optimizer["param_groups"]]
    if not same(saved.get("_last_lr"), rates):
        raise UnfitError("schedule has other learning rates than the optimizer")


def _scaler(saved: Any, trainer: Trainer) -> None:
    expected = trainer.scaler.state_dict()
    check_entries("scaler", saved, expected)
    for name, value in saved.items():
        check_number(f"scaler, {name}", value)
        if name not in ("scale", "_growth_tracker") and value != expected[name]:
            raise UnfitError(f"scaler, {name} is {value}; allowed is {expected[name]}")
    if saved:
        check_count(
            "scaler, _growth_tracker", saved["_growth_tracker"], expected["growth_interval"]
        )
        if saved["scale"] == 0:
            raise UnfitError("scaler, scale is 0; allowed is a positive number")


def _sums(state: Mapping[str, Any], trainer: Trainer) -> None:
    """Loss, right answers and images of the epoch so far, and the part of them that a log has had."""
    for name in ("totals", "reported"):
        check_like(name, state[name], torch.zeros(3, dtype=torch.float64, device="cpu"))
        if not bool((state[name].isfinite() & (state[name] >= 0)).all()):
            raise UnfitError(f"{name} is {state[name].tolist()}; allowed are numbers of at least 0")
    seen = state["batch"] * trainer.options.batch_size * trainer.processes.count
    if float(state["totals"][2]) != seen or float(state["reported"][2]) > seen:
        raise UnfitError(
            f"totals and reported are of {float(state['totals'][2]):g} and {float(state['reported'][2]):g} images; "
            f"allowed are {seen} and at most as many"
        )


def _random(saved: Any, trainer: Trainer) -> None:
    check_mapping("random", saved)
    if not {"cpu"} <= set(saved) <= {"cpu", "cuda"}:
        raise UnfitError(f"random has the entries {shown(list(saved))}; allowed are cpu and cuda")
    for kind, states in saved.items():
        if not isinstance(states, (list, tuple)) or len(states) != trainer.processes.count:
            raise UnfitError(
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
        raise UnfitError(
            f"random, {kind} holds {shown(state)}; allowed is the state of a generator of this PyTorch"
        ) from error


def _layers(state: Mapping[str, Any], trainer: Trainer) -> None:
    """What layers and EBQM take in by rules of their own: tried on copies."""
    saved, ebqm = state["ebqm"], trainer.ebqm
    if (saved is None) != (ebqm is None):
        raise UnfitError(
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
        raise UnfitError(f"model or ebqm cannot be taken over: {_last_line(error)}") from error
    if model.state_dict().keys() != trainer.model.state_dict().keys():
        raise UnfitError("model is one with layers pruned; allowed is one with all of them")
    if watching is not None and not same(saved["skipped"], skipped):
        raise UnfitError("ebqm, skipped has other layers than the model has skipped")


def _watching(saved: Any, present: Mapping[str, Any], steps: int) -> None:
    """What EBQM has seen and decided; its entries, settings and layers are for itself to compare."""
    check_mapping("ebqm", saved)
    # Of the earlier rule's state, statistics and the record of decisions are not taken over.
    is_old = saved.get("version") == EARLIER_RULE
    for name in ("skipped", "since") if is_old else ("statistics", "skipped", "reasons", "since"):
        check_like(f"ebqm, {name}", saved.get(name), present[name])
    if not is_old:
        statistics = saved["statistics"]
        if not bool((statistics.isfinite() & (statistics >= 0)).all()):
            raise UnfitError("ebqm, statistics has values that are negative or not finite")
    check_mapping("ebqm, settings", saved.get("settings"))
    if not same(saved.get("layers"), present["layers"]):
        raise UnfitError(f"ebqm, layers is {shown(saved.get('layers'))}; allowed are this model's")
    check_count("ebqm, steps", saved.get("steps"), steps)
    for step in saved["since"]:
        check_count("ebqm, since", step, steps)
    if is_old:
        return
    decisions = saved.get("decisions")
    if not isinstance(decisions, list):
        raise UnfitError(f"ebqm, decisions is {shown(decisions)}; allowed is a list")
    layers = len(present["layers"])
    for decision in decisions:
        check_mapping("ebqm, decisions", decision)
        check_count("ebqm, decisions, step", decision.get("step"), steps)
        for name in ("divergence", "score"):
            check_values(f"ebqm, decisions, {name}", decision.get(name), layers, (float,))
        if "left_out" in decision:  # an earlier release wrote none
            check_values("ebqm, decisions, left_out", decision["left_out"], layers, (float,))
        check_values("ebqm, decisions, skipped", decision.get("skipped"), layers, (bool,))
        check_values("ebqm, decisions, reasons", decision.get("reasons"), layers, (str,))
    check_mapping("ebqm, diagnostics", saved.get("diagnostics"))
    for name in present["diagnostics"]:
        if name in DIAGNOSTICS_ADDED_LATER and name not in saved["diagnostics"]:
            continue
        check_values(f"ebqm, diagnostics, {name}", saved["diagnostics"].get(name), layers, (float,))
