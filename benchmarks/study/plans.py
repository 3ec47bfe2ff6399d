"""Plans: what a study of a given length on a given machine holds."""

from __future__ import annotations

from typing import Any

from benchmarks.study.settings import Settings, plan_runs

# What holds where neither the plan nor the command says otherwise.
DEFAULTS: dict[str, Any] = {
    "data": "fashion-mnist",
    "seeds": [0, 1, 2, 3, 4],
    "depths": [20],
    "variants": ["all"],
    "order": "seed",
}

_SHORT: dict[str, Any] = {
    "data": "fashion-mnist",
    "seeds": [0, 1, 2, 3, 4],
    "side": 14,
    "epochs": 8,
    "batch": 64,
    # In a trial at 0.1 the loss of layer attention rose again in the third epoch; plain was as good at 0.03.
    "lr": 0.03,
    "train_images": 6000,
    "test_every": 4,
}
# Each plan in parts, which differ in more than one number.
PLANS: dict[str, list[dict[str, Any]]] = {
    "two-hours": [
        # Of nine layers six may be skipped, too few to tell a choice of them from chance.
        {
            **_SHORT,
            "depths": [20],
            "variants": ["plain", "self", "uniform", "mrla", "mrla-1e-3", "mrla_light", "ela"],
        },
        {
            **_SHORT,
            "depths": [56],
            # At 0.03 the loss of every variant with a branch beside the residual one rose in the third epoch, also
            # without any attention in it, and what came after was luck.
            "lr": 0.01,
            "variants": ["plain", "self", "uniform", "mrla", "mrla-1e-3", "ela", "random", "last"],
        },
    ],
}


def runs_of(plan: str | None, given: dict[str, Any]) -> list[Settings]:
    """All runs of a plan in their order, each once; options that are given count before those of the plan.

    Args:
        plan: a name of :data:`PLANS`; None: the defaults.
        given: options of :func:`benchmarks.study.settings.plan_runs`; None is none.
    """
    given = {name: value for name, value in given.items() if value is not None}
    parts = [{**DEFAULTS, **part, **given} for part in (PLANS[plan] if plan is not None else [{}])]
    runs = {run.key: run for part in parts for run in plan_runs(**part)}
    if parts[0]["order"] == "depth":
        return list(runs.values())
    places = {seed: i for i, seed in enumerate(parts[0]["seeds"])}
    return sorted(runs.values(), key=lambda run: places[run.seed])
