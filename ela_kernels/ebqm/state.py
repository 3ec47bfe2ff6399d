"""What is saved of an EBQM, in tensors and plain Python, and what may be loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.ebqm.decision import Reason
from ela_kernels.ebqm.diagnostics import ADDED_LATER, Diagnostics
from ela_kernels.ebqm.report import DecisionRecord
from ela_kernels.ebqm.settings import Settings
from ela_kernels.ebqm.stages import plain_name
from ela_kernels.ebqm.statistics import ROWS
from ela_kernels.modules.watched import Watched

VERSION = 2
# The version of states of the rule that compared the layers with each other: without the mean squares.
EARLIER_RULE = 1

_KEYS = {"version", "settings", "layers", "steps", "statistics", "skipped", "reasons", "since"}
_KEYS |= {"decisions", "diagnostics"}


class State(NamedTuple):
    """What was saved, read and checked."""

    steps: int
    statistics: Tensor
    skipped: list[bool]
    reasons: list[Reason]
    since: list[int]
    decisions: list[DecisionRecord]
    diagnostics: Diagnostics
    is_partial: bool = False  # without statistics, which the saved run had


def saved(state: State, settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    """`state` as it is saved."""
    return {
        "version": VERSION,
        "settings": settings.as_dict(),
        "layers": list(names),
        "steps": state.steps,
        "statistics": state.statistics,
        "skipped": state.skipped,
        "reasons": [reason.name for reason in state.reasons],
        "since": state.since,
        "decisions": [_plain(d) for d in state.decisions],
        "diagnostics": {name: list(v) for name, v in state.diagnostics._asdict().items()},
    }


def loaded(
    state: object, settings: Settings, names: Sequence[str], layers: Sequence[Watched], strict: bool
) -> State:
    """What :func:`saved` gave, now or in an earlier version, for a model with the layers `names`.

    Raises:
        TypeError, ValueError: not such a state, other layers, or (strict) other settings.
    """
    is_old = isinstance(state, Mapping) and state.get("version") == EARLIER_RULE
    keys = _KEYS - {"diagnostics"} if is_old else _KEYS
    if not isinstance(state, Mapping) or set(state) != keys:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise TypeError(
            f"state: got {got}; allowed is what EBQM.state_dict() gives, {sorted(keys)}"
        )
    if state["version"] not in (VERSION, EARLIER_RULE):
        raise ValueError(
            f"state: got version {state['version']}; allowed are {VERSION} and, in part, {EARLIER_RULE}"
        )
    try:
        found = _read_old(state) if is_old else _read(state, len(names))
        its_names = [plain_name(name) for name in state["layers"]]
        its_settings = dict(state["settings"])
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"state: got a damaged one, {type(error).__name__}: {error}; allowed is what EBQM.state_dict() gives for "
            f"{len(names)} layers"
        ) from error
    if its_names != [plain_name(name) for name in names]:
        raise ValueError(
            f"state: got the layers {list(state['layers'])}; allowed are this model's, {list(names)}"
        )
    present = settings.as_dict()
    differing = [k for k in present if its_settings.get(k) != present[k]]
    if strict and differing and not is_old:
        raise ValueError(
            "state: got other settings than this EBQM has, "
            + ", ".join(f"{k}={its_settings.get(k)!r} (here {present[k]!r})" for k in differing)
            + "; allowed are equal ones. Make the EBQM with them, or load with strict=False to go on with its own"
        )
    for name, layer, skipped in zip(names, layers, found.skipped, strict=True):
        if layer.pruned and not skipped:
            raise ValueError(
                f"state: got layer {name!r} in use, but it was pruned in this model; allowed is a state in which "
                "pruned layers are skipped"
            )
    if is_old:
        warnings.warn(
            "state: got one of EBQM's earlier rule, by which layers were compared with each other. Steps and decisions "
            "are taken over; statistics and the record of decisions start anew, and the present rule and its settings "
            f"hold: {', '.join(f'{k}={v}' for k, v in present.items())}",
            stacklevel=3,
        )
    return found


def _diagnostics(found: Mapping[str, Any], count: int) -> Diagnostics:
    """Without what a state of an earlier version has not."""
    unknown = {name: [math.nan] * count for name in ADDED_LATER}
    return Diagnostics(*([float(x) for x in {**unknown, **found}[n]] for n in Diagnostics._fields))


def _read(state: Mapping[str, Any], layers: int) -> State:
    other = len(state["layers"]) != layers  # said in words of its own later
    count = len(state["layers"]) if other else layers
    statistics = state["statistics"]
    if tuple(statistics.shape) != (ROWS, count) or not statistics.is_floating_point():
        raise ValueError(f"statistics of shape {list(statistics.shape)} for {count} layers")
    found = State(
        int(state["steps"]),
        statistics,
        [bool(skipped) for skipped in state["skipped"]],
        [Reason[name] for name in state["reasons"]],
        [int(step) for step in state["since"]],
        [_record(d) for d in state["decisions"]],
        _diagnostics(state["diagnostics"], count),
    )
    lengths = {len(found.skipped), len(found.reasons), len(found.since)}
    lengths |= {len(values) for values in found.diagnostics}
    for d in found.decisions:
        lengths |= {len(d.divergence), len(d.score), len(d.skipped), len(d.reasons)}
        lengths.add(len(d.left_out))
    if lengths != {count} or found.steps < 0:
        raise ValueError(f"{found.steps} steps, and entries for {sorted(lengths)} layers")
    return found


def _read_old(state: Mapping[str, Any]) -> State:
    """What still says something of a state of the earlier rule."""
    count = len(state["layers"])
    found = State(
        int(state["steps"]),
        torch.zeros((ROWS, count), dtype=torch.float64, device="cpu"),
        [bool(skipped) for skipped in state["skipped"]],
        [Reason.UNDECIDED] * count,
        [int(step) for step in state["since"]],
        [],
        Diagnostics.none(count),
        is_partial=True,
    )
    lengths = {len(found.skipped), len(found.since)}
    if lengths != {count} or found.steps < 0:
        raise ValueError(f"{found.steps} steps, and entries for {sorted(lengths)} layers")
    return found


def rearranged(record: DecisionRecord, numbers: Sequence[int | None]) -> DecisionRecord:
    """`record` for other layers, each with the number that it had, or None for a new one."""

    def of(values: Sequence[float]) -> list[float]:
        return [math.nan if i is None else values[i] for i in numbers]

    return DecisionRecord(
        record.step,
        of(record.divergence),
        of(record.score),
        [i is not None and record.skipped[i] for i in numbers],
        [Reason.UNDECIDED if i is None else record.reasons[i] for i in numbers],
        of(record.left_out),
    )


def _plain(record: DecisionRecord) -> dict[str, Any]:
    return {
        "step": record.step,
        "divergence": list(record.divergence),
        "score": list(record.score),
        "skipped": list(record.skipped),
        "reasons": [reason.name for reason in record.reasons],
        "left_out": list(record.left_out),
    }


def _record(plain: Mapping[str, Any]) -> DecisionRecord:
    return DecisionRecord(
        int(plain["step"]),
        [float(x) for x in plain["divergence"]],
        [float(x) for x in plain["score"]],
        [bool(x) for x in plain["skipped"]],
        [Reason[name] for name in plain["reasons"]],
        # A state of an earlier version has none.
        [float(x) for x in plain.get("left_out", [math.nan] * len(plain["skipped"]))],
    )
