"""An analysis as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ela_kernels.drawing import BLUE, ORANGE, draw_weights, new_figure

if TYPE_CHECKING:
    from ela_kernels.analysis.report import Analysis, LayerAnalysis

_ROW, _MARGIN, _WIDTH = 0.28, 1.5, 10.0  # inches


def draw(analysis: Analysis, purpose: str) -> Any:
    """The figure: for each stage its weights, and the scores of its layers beside them.

    Raises:
        MissingLibraryError: there is no matplotlib; `purpose` is said to need it.
    """
    stages: dict[int, list[LayerAnalysis]] = {}
    for layer in analysis.layers:
        stages.setdefault(layer.stage, []).append(layer)
    heights = [_MARGIN + _ROW * len(layers) for layers in stages.values()]
    figure = new_figure(_WIDTH, sum(heights), purpose)
    grid = figure.add_gridspec(len(stages), 2, height_ratios=heights, width_ratios=(3, 2))
    thresholds = (float(analysis.settings["low"]), float(analysis.settings["high"]))
    # All stages on one scale.
    most = 1.05 * max(1e-3, *thresholds, *(_finite(layer.score) for layer in analysis.layers))
    for i, (stage, layers) in enumerate(stages.items()):
        axes = figure.add_subplot(grid[i, 0])
        skipped = [layer.skipped for layer in layers]
        title = f"stage {stage}: EBQM would skip {sum(skipped)} of {len(layers)}"
        # What a layer that would be skipped retrieves is what there is to see.
        image = draw_weights(axes, [x.weights for x in layers], [False] * len(layers), title)
        names = [layer.name or f"place {layer.place}" for layer in layers]
        axes.set_yticks([place + 0.5 for place in range(len(layers))], names, fontsize="small")
        axes.set_ylabel("")
        figure.colorbar(image, ax=axes, label="weight")
        _draw_scores(figure.add_subplot(grid[i, 1]), layers, thresholds, most)
    return figure


def _draw_scores(
    axes: Any, layers: list[LayerAnalysis], thresholds: tuple[float, float], most: float
) -> None:
    colours = [ORANGE if layer.skipped else BLUE for layer in layers]
    places = range(len(layers))
    axes.barh(places, [_finite(layer.score) for layer in layers], color=colours)
    axes.plot([layer.divergence for layer in layers], places, "|", color="black")
    for threshold in thresholds:
        axes.axvline(threshold, color="gray", linestyle=":", linewidth=1)
    axes.set_xlim(0.0, most)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("1 - exp(-kl): score, and mean (|)")
    axes.set_title("score (orange: would be skipped; dotted: low, high)", fontsize="medium")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
