"""Pictures of a run: its curves, and what EBQM saw and decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from ela_kernels.drawing import BLUE, GREEN, ORANGE, encoded, new_figure
from ela_kernels.ebqm import Report
from ela_kernels.ebqm.picture import draw as draw_report
from ela_kernels.ebqm.picture import left_out_shares
from ela_kernels.optional import optional
from ela_kernels.training.files import write_whole

PURPOSE = "--plots"
CURVES, EBQM = "curves", "ebqm"
# What columns are called that are losses, and those that are shares, drawn in percent.
_LOSSES = ("loss",)
_SHARES = ("accuracy", "accuracy_5", "precision", "precision_50", "recall")
# What the numbers in some of them mean.
_MEANINGS = {
    "accuracy 5": "accuracy, among the 5 likeliest",
    "precision 50": "precision, overlap of 0.5",
}
_STYLES = ((ORANGE, "-"), (BLUE, "-"), (GREEN, "-"), (BLUE, "--"), (GREEN, "--"), ("0.3", ":"))


def check_drawable() -> None:
    """Refuse to begin a run whose pictures could not be drawn.

    Raises:
        MissingLibraryError: matplotlib is not there.
    """
    optional("matplotlib.figure", PURPOSE)


def draw_curves(history: Sequence[Mapping[str, float]]) -> Any:
    """Losses, and accuracies or precisions in percent, by epoch."""
    figure = new_figure(10.0, 4.2, PURPOSE)
    parts = (("loss", _LOSSES, 1.0), ("accuracy or precision, %", _SHARES, 100.0))
    for axes, (what, endings, factor) in zip(figure.subplots(1, 2), parts, strict=True):
        names = [n for n in (history[-1] if history else {}) if n.endswith(endings)]
        for name, (colour, style) in zip(names, cycle(_STYLES), strict=False):
            # An epoch of an earlier release may lack one.
            values = [factor * row.get(name, math.nan) for row in history]
            label = name.replace("_", " ")
            for ending, meaning in _MEANINGS.items():
                label = label.replace(ending, meaning)
            epochs = [row["epoch"] for row in history]
            how = {"color": colour, "linestyle": style, "marker": "o", "markersize": 3}
            axes.plot(epochs, values, label=label, **how)
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if names:
            axes.legend(frameon=False)
    return figure


def write_plots(
    folder: Path, history: Sequence[Mapping[str, float]], report: Report | None
) -> dict[str, bytes]:
    """Write `curves.png`, and `ebqm.png` where EBQM watches, each whole; what is in them, by name.

    Raises:
        UnwritableFileError: a file could not be written.
    """
    figures = {CURVES: draw_curves(history)}
    if report is not None:
        figures[EBQM] = draw_report(report)
    pictures = {name: encoded(figure) for name, figure in figures.items()}
    for name, content in pictures.items():
        write_whole(folder / f"{name}.png", content)
    return pictures


def scalars(report: Report) -> dict[str, float]:
    """What the picture shows of the present, for a log: scores by layer, and the share of retrievals left out."""
    found = {
        f"ebqm/score/{layer.name}": layer.score
        for layer in report.layers
        if math.isfinite(layer.score)
    }
    if report.decisions:
        found["ebqm/retrievals_left_out"] = sum(left_out_shares(report, report.decisions[-1])) / 100
    return found
