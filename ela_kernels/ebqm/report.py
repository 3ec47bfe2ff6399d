"""What EBQM found and decided, for people and for plots."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from ela_kernels.ebqm.decision import Reason


@dataclass(frozen=True)
class LayerReport:
    """One layer: where it stands, how new its retrieval is, and what was decided about it.

    Attributes:
        name: the layer's name in the model.
        stage, place: number of the stage, and place in it from 0; None before the first forward pass.
        divergence: x_t, the mean of z = 1 - exp(-kl_t) over images, heads and, smoothed, steps; NaN when never seen.
        deviation: the standard deviation of z; NaN when never seen.
        score: the upper quantile of the Beta distribution with these moments, now; NaN when never seen.
        entropy: a diagnostic, by which nothing is decided: of the weights in the pass before the last decision point,
            the mean over batch and heads as a share of the most that so many pairs can have, `log T`. 0: all weight on
            one pair; 1: the same on all. NaN where the layer did not retrieve in eager PyTorch then, or from one pair.
        importance: a diagnostic, by which nothing is decided: what leaving the block out would change the loss by, to
            first order and squared: the mean over the norm's channels of `(gamma * dL/dgamma + beta * dL/dbeta) ** 2`,
            with the gradients as they were when :meth:`EBQM.step` was called at the last decision point. A factor of
            `torch.amp.GradScaler` is in them, squared, where they were not unscaled; clipping too. NaN where the norm
            had no parameters, or these no gradients.
        left_out: a diagnostic too: the share of the layer's retrievals, of every image and head, that weighed less than
            its tolerance and were not made, in the same pass as `entropy`, and NaN where that is.
        skipped: whether the layer is skipped now.
        reason: why; which guard held.
        since: step of the last change of `skipped`; 0 if there was none.
        over_time: `(step, divergence)` at the decision points that are kept, warm-up included.
        weights: for each pair held, its own last, the mean over this process's samples and heads in the same pass as
            `entropy`. Empty where that is NaN but of a layer with one pair, and until the first decision point after a
            state was loaded, which has none.
    """

    name: str
    stage: int | None
    place: int | None
    divergence: float
    deviation: float
    score: float
    entropy: float
    importance: float
    left_out: float
    skipped: bool
    reason: Reason
    since: int
    over_time: list[tuple[int, float]] = field(repr=False)
    weights: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class DecisionRecord:
    """One decision point: what was seen and decided, with one entry a layer in each list.

    `divergence` and `score` are NaN of a layer that had not been seen. `skipped` is the state after the decision.
    `left_out` is that of :class:`LayerReport`, NaN where it is.
    """

    step: int
    divergence: list[float]
    score: list[float]
    skipped: list[bool]
    reasons: list[Reason]
    left_out: list[float]


@dataclass(frozen=True)
class Report:
    """All layers now, and the decision points so far. `print()` it for a table, :meth:`plot` it for a picture.

    Attributes:
        step: training steps so far.
        layers: in the order of the model.
        decisions: from the first to the last. A long run keeps some hundreds of them: of those in which no layer was
            dropped or came back about every second one goes when there are too many, evenly over the run. They are in
            EBQM's state.
        settings: those of the EBQM, by name.
    """

    step: int
    layers: list[LayerReport]
    decisions: list[DecisionRecord] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    @property
    def skipped(self) -> list[str]:
        """Names of the layers skipped now."""
        return [layer.name for layer in self.layers if layer.skipped]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw it: the weights of each stage, scores and decisions over training, the share of retrievals left out.

        Args:
            path: of the file, whose suffix says what is written; PNG without one.

        Raises:
            ImportError: matplotlib, which the extra `train` brings, is not there.
            ValueError: a suffix of files that matplotlib does not write.
        """
        from ela_kernels.drawing import save
        from ela_kernels.ebqm.picture import draw

        save(draw(self), path)

    def __str__(self) -> str:
        title = (
            f"EBQM at step {self.step}: {len(self.skipped)} of {len(self.layers)} layers skipped; entropy, "
            "importance and left out are diagnostics, which decide nothing"
        )
        numbers = ("divergence", "score", "entropy", "importance", "left out")
        header: tuple[str, ...] = ("layer", "stage", "place", *numbers, "decision", "why")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 8, 9) else cell.rjust(width)
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
        _number(layer.score),
        _number(layer.entropy),
        "-" if math.isnan(layer.importance) else f"{layer.importance:.2e}",
        "-" if math.isnan(layer.left_out) else f"{layer.left_out:.0%}",
        "skipped" if layer.skipped else "kept",
        layer.reason.value + since,
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
