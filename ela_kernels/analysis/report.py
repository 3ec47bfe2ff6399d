"""What an analysis found, for people and for programs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ela_kernels.ebqm import Reason


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer in one place of its stage.

    Attributes:
        name: in the model, without what wrappers add; that of the :class:`ela_kernels.ELA` around a layer, and `""`
            where a history was called without `caller`.
        layer: name of its class.
        stage, place: number of the stage in the order in which they ran, and place in it; both from 0.
        retrieves: False where the layer is skipped now. Then the rest is what it would have retrieved, from query and
            key alone, as EBQM probes it.
        weights: for each pair held, its own last, the mean over samples and heads. Empty where there are none: of a
            layer that was pruned, or that gives its pair only.
        samples: how many samples that mean is over.
        kl: mean over samples and heads of the divergence from the layer before it; NaN without one.
        divergence: x_t of EBQM, the same bounded before it is averaged, z = `1 - exp(-kl)`, and smoothed over the
            batches as over steps; NaN without one.
        deviation: the standard deviation of z over samples, heads and batches; NaN without one.
        score: the upper quantile of the Beta distribution with these moments, by which EBQM decides; NaN without one.
        skipped: whether EBQM would skip the layer from here on.
        reason: why; None of a layer that EBQM does not know.
    """

    name: str
    layer: str
    stage: int
    place: int
    retrieves: bool
    weights: tuple[float, ...]
    samples: int
    kl: float
    divergence: float
    deviation: float
    score: float
    skipped: bool
    reason: Reason | None


@dataclass(frozen=True)
class Analysis:
    """All layers of a model on some batches. `print()` it for a table.

    Attributes:
        layers: stage by stage, each in the order in which its layers ran.
        left: by name the layers that were left out, and why.
        batches: how many batches were run.
        settings: what the decisions were made with, by the names of :class:`ela_kernels.EBQM`.
    """

    layers: tuple[LayerAnalysis, ...]
    left: dict[str, str]
    batches: int
    settings: dict[str, Any]

    @property
    def skipped(self) -> list[str]:
        """Names of the layers that EBQM would skip, each once."""
        return list(dict.fromkeys(layer.name for layer in self.layers if layer.skipped))

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python, which `json.dumps` takes: a number that is not finite is None."""
        return {
            "batches": self.batches,
            "settings": dict(self.settings),
            "layers": [
                {
                    "name": layer.name,
                    "layer": layer.layer,
                    "stage": layer.stage,
                    "place": layer.place,
                    "retrieves": layer.retrieves,
                    "weights": [_finite(weight) for weight in layer.weights],
                    "samples": layer.samples,
                    "kl": _finite(layer.kl),
                    "divergence": _finite(layer.divergence),
                    "deviation": _finite(layer.deviation),
                    "score": _finite(layer.score),
                    "skipped": layer.skipped,
                    "reason": None if layer.reason is None else layer.reason.value,
                }
                for layer in self.layers
            ],
            "left": dict(self.left),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the weights of each stage as a heat map, beside it the layers' scores as bars.

        Args:
            path: of the file, whose suffix says what is written; PNG without one.

        Raises:
            ImportError: matplotlib, which the extra `train` brings, is not there.
            ValueError: a suffix of files that matplotlib does not write.
        """
        from ela_kernels.analysis.picture import draw
        from ela_kernels.drawing import save

        save(draw(self, "Analysis.plot"), path)

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """As :meth:`plot`, and PNG whatever the suffix."""
        from ela_kernels.analysis.picture import draw
        from ela_kernels.drawing import encoded

        content = encoded(draw(self, "Analysis.save_png"))
        Path(path).write_bytes(content)

    def __str__(self) -> str:
        count = len({(layer.name, layer.layer) for layer in self.layers})
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        title = f"{count} layers on {batches}: EBQM would skip {len(self.skipped)}"
        header = (
            "layer",
            "stage",
            "place",
            "kl",
            "divergence",
            "score",
            "EBQM",
            "why",
            "weights in percent, its own last",
        )
        rows = [header, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 6, 7, 8) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        left = [f"left out: {name or '-'}: {reason}" for name, reason in self.left.items()]
        rule = "-" * max(len(line) for line in lines)
        return "\n".join([title, lines[0], rule, *lines[1:], *left])


def _cells(layer: LayerAnalysis) -> tuple[str, ...]:
    weights = " ".join("nan" if math.isnan(w) else f"{100 * w:.0f}" for w in layer.weights)
    decision = "-" if layer.reason is None else "skip" if layer.skipped else "keep"
    return (
        layer.name or "-",
        str(layer.stage),
        str(layer.place),
        _number(layer.kl),
        _number(layer.divergence),
        _number(layer.score),
        decision if layer.retrieves else f"{decision} (skipped now)",
        "not a layer that EBQM watches" if layer.reason is None else layer.reason.value,
        weights or "-",
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
