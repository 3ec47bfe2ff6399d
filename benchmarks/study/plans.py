"""Plans: what a study of a given length on a given machine holds."""

from __future__ import annotations

from typing import Any

# What holds where neither the plan nor the command says otherwise.
DEFAULTS: dict[str, Any] = {
    "data": "fashion-mnist",
    "seeds": [0, 1, 2, 3, 4],
    "depths": [20],
    "variants": ["all"],
    "order": "seed",
}

PLANS: dict[str, dict[str, Any]] = {}


def merged(plan: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a command: its own before those of the plan before the defaults; None is none."""
    if plan is not None and plan not in PLANS:
        raise ValueError(f"plan: got {plan!r}; allowed are {', '.join(PLANS)}")
    chosen = PLANS[plan] if plan is not None else {}
    return {**DEFAULTS, **chosen, **{n: v for n, v in given.items() if v is not None}}
