"""An analysis as a picture."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from ela_kernels.optional import optional

if TYPE_CHECKING:
    from ela_kernels.analysis.report import Analysis, LayerAnalysis

_ROW, _MARGIN, _WIDTH = 0.28, 1.3, 10.0  # inches
_KEPT, _SKIPPED = "#4c72b0", "#dd8452"


def draw(analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """Write `analysis` to `path`: for each stage its weights, and the scores of its layers beside them."""
    # Not by way of pyplot, which keeps figures and asks for a display.
    figure_module = optional("matplotlib.figure", "Analysis.save_png")
    stages: dict[int, list[LayerAnalysis]] = {}
    for layer in analysis.layers:
        stages.setdefault(layer.stage, []).append(layer)
    heights = [_MARGIN + _ROW * len(layers) for layers in stages.values()]
    figure = figure_module.Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(stages), 2, height_ratios=heights, width_ratios=(3, 2))
    thresholds = (float(analysis.settings["low"]), float(analysis.settings["high"]))
    # All stages on one scale.
    most = 1.05 * max(1e-3, *thresholds, *(_finite(layer.score) for layer in analysis.layers))
    for i, (stage, layers) in enumerate(stages.items()):
        _draw_weights(figure, figure.add_subplot(grid[i, 0]), stage, layers)
        _draw_scores(figure.add_subplot(grid[i, 1]), layers, thresholds, most)
    figure.savefig(path, format="png", dpi=120)


def _draw_weights(figure: Any, axes: Any, stage: int, layers: list[LayerAnalysis]) -> None:
    width = max(1, *(len(layer.weights) for layer in layers))
    rows = [[*layer.weights, *[math.nan] * (width - len(layer.weights))] for layer in layers]
    image = axes.imshow(rows, vmin=0.0, vmax=1.0, aspect="auto", cmap="viridis")
    axes.set_title(f"stage {stage}: weights")
    axes.set_xlabel("pair")
    axes.xaxis.get_major_locator().set_params(integer=True)
    names = [layer.name or f"place {layer.place}" for layer in layers]
    axes.set_yticks(range(len(layers)), names, fontsize="small")
    figure.colorbar(image, ax=axes)


def _draw_scores(
    axes: Any, layers: list[LayerAnalysis], thresholds: tuple[float, float], most: float
) -> None:
    colors = [_SKIPPED if layer.skipped else _KEPT for layer in layers]
    places = range(len(layers))
    axes.barh(places, [_finite(layer.score) for layer in layers], color=colors)
    axes.plot([layer.divergence for layer in layers], places, "|", color="black")
    for threshold in thresholds:
        axes.axvline(threshold, color="gray", linestyle=":", linewidth=1)
    axes.set_xlim(0.0, most)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks([])
    title = "score (orange: would be skipped; |: mean)"
    axes.set_title(title, fontsize="small")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
