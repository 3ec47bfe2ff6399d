"""What EBQM found and decided, for people and for plots."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ela_kernels.ebqm.beta import BetaFit
from ela_kernels.ebqm.decision import Reason


@dataclass(frozen=True)
class LayerReport:
    """One layer: where it stands, how new its retrieval is, and what was decided about it.

    Attributes:
        name: the layer's name in the model.
        stage, place: number of the stage, and place in it from 0; None before the first forward pass.
        divergence: smoothed x_t = mean of 1 - exp(-kl_t) now; NaN when never seen.
        fitted: u_t, the place in the fitted Beta distribution at the last decision; NaN without one.
        retention: r_t, the same on the scale of the reference; NaN without one.
        skipped: whether the layer is skipped now.
        reason: why; which guard held.
        since: step of the last change of `skipped`; 0 if there was none.
        over_time: `(step, divergence)` at every decision point, warm-up included.
    """

    name: str
    stage: int | None
    place: int | None
    divergence: float
    fitted: float
    retention: float
    skipped: bool
    reason: Reason
    since: int
    over_time: list[tuple[int, float]] = field(repr=False)


@dataclass(frozen=True)
class DecisionRecord:
    """One decision point: what was seen and decided, with one entry a layer in each list.

    `fit` is None when no layer had been seen. `skipped` is the state after the decision.
    """

    step: int
    fit: BetaFit | None
    divergence: list[float]
    fitted: list[float]
    retention: list[float]
    skipped: list[bool]
    reasons: list[Reason]


@dataclass(frozen=True)
class Report:
    """All layers now, and every decision point so far. `print()` it for a table."""

    step: int
    fit: BetaFit | None
    layers: list[LayerReport]
    decisions: list[DecisionRecord] = field(repr=False)

    @property
    def skipped(self) -> list[str]:
        """Names of the layers skipped now."""
        return [layer.name for layer in self.layers if layer.skipped]

    def __str__(self) -> str:
        fit = (
            "no fit yet"
            if self.fit is None
            else f"Beta({self.fit.a:.3g}, {self.fit.b:.3g}) over {self.fit.layers} layers"
        )
        title = f"EBQM at step {self.step}: {len(self.skipped)} of {len(self.layers)} layers skipped, {fit}"
        header = ("layer", "stage", "place", "divergence", "retention", "decision", "why")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 5, 6) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([title, lines[0], "-" * max(len(line) for line in lines), *lines[1:]])


def _row(layer: LayerReport) -> tuple[str, ...]:
    since = f" (since step {layer.since})" if layer.since else ""
    return (
        layer.name,
        "?" if layer.stage is None else str(layer.stage),
        "?" if layer.place is None else str(layer.place),
        _number(layer.divergence),
        _number(layer.retention),
        "skipped" if layer.skipped else "kept",
        layer.reason.value + since,
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
