"""The pictures of digits_demo.py, drawn from its results.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

Results = dict[str, Any]
COLOURS = {"none": "#7f7f7f", "mrla": "#d95f02", "ela": "#1b6ca8"}
HATCH = {"facecolor": "#f2f2f2", "edgecolor": "#606060", "hatch": "////", "linewidth": 0.0}
DPI = 110


def draw_weights(results: Results, path: Path) -> None:
    """Heat maps: a row for each layer, a column for each layer that it retrieves from; skipped layers hatched."""
    skipped = {(x["stage"], x["place"]) for x in results["ebqm"]["layers"] if x["skipped"][-1]}
    kinds = [("mrla", results["weights"]["mrla"]), ("ela", results["weights"]["ela"])]
    stages = len(kinds[0][1])
    figure, grid = plt.subplots(
        len(kinds), stages, figsize=(3.4 * stages + 1.2, 7.0), squeeze=False, layout="constrained"
    )
    image = None
    for row, (kind, weights) in zip(grid, kinds, strict=True):
        title = results["runs"][kind]["title"]
        for i, (axes, layers) in enumerate(zip(row, weights, strict=True)):
            hatched = {j for stage, j in skipped if stage == i and kind == "ela"}
            image = _heat_map(axes, layers, hatched)
            axes.set_title(f"{title}: stage {i + 1}", fontsize=10)
        row[0].set_ylabel("layer")
    for axes in grid[-1]:
        axes.set_xlabel("retrieved layer")
    assert image is not None
    figure.colorbar(
        image, ax=grid, shrink=0.6, label="attention weight, mean over test images and heads"
    )
    figure.legend(
        handles=[
            Patch(
                label="skipped by EBQM: takes over what the last layer before it retrieved", **HATCH
            )
        ],
        loc="outside lower center",
        frameon=False,
    )
    _save(figure, path)


def _heat_map(axes: Axes, layers: list[list[float] | None], skipped: set[int]) -> Any:
    size = len(layers)
    filled = np.full((size, size), np.nan)
    for i, weights in enumerate(layers):
        if weights is None or i in skipped:
            axes.add_patch(plt.Rectangle((-0.5, i - 0.5), i + 1, 1, **HATCH))
        else:
            filled[i, : len(weights)] = weights
    image = axes.imshow(filled, vmin=0.0, vmax=1.0, cmap="magma_r")
    ticks = range(0, size, 2 if size > 6 else 1)
    axes.set_xticks(ticks, [str(t + 1) for t in ticks])
    axes.set_yticks(ticks, [str(t + 1) for t in ticks])
    axes.set_xticks(np.arange(size) - 0.5, minor=True)
    axes.set_yticks(np.arange(size) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def draw_divergence(results: Results, path: Path) -> None:
    """The score of every layer's divergences over training, with what EBQM decided by it."""
    ebqm = results["ebqm"]
    steps, settings = ebqm["steps"], ebqm["settings"]
    stages = sorted({layer["stage"] for layer in ebqm["layers"]})
    figure, row = plt.subplots(
        1,
        len(stages),
        figsize=(4.2 * len(stages) + 0.6, 5.0),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    deepest = max(layer["place"] for layer in ebqm["layers"])
    for axes, stage in zip(row[0], stages, strict=True):
        axes.axvspan(0, settings["warmup"], color="#eeeeee", zorder=0)
        for threshold in ("low", "high"):
            axes.axhline(settings[threshold], color="black", linestyle=":", linewidth=1)
        for layer in ebqm["layers"]:
            if layer["stage"] == stage and layer["place"] > 0:
                colour = plt.get_cmap("turbo")((layer["place"] - 0.5) / deepest * 0.94 + 0.03)
                _curve(axes, steps, layer, colour)
        skipped = sum(x["skipped"][-1] for x in ebqm["layers"] if x["stage"] == stage)
        count = sum(x["stage"] == stage for x in ebqm["layers"])
        axes.set_title(f"stage {stage + 1}: {skipped} of {count} skipped at the end", fontsize=10)
        axes.set_xlabel("training step")
        axes.set_xlim(0, steps[-1] * 1.01)
        # The root spreads the small values; it is the bound on the total variation between both layers' weights.
        axes.set_yscale("function", functions=(_signed_root, _signed_square))
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    row[0][0].set_ylabel(
        f"divergence from the layer before\n{settings['quantile']:g}-quantile of 1 - exp(-KL), smoothed"
    )
    layers = [
        Line2D(
            [],
            [],
            color=plt.get_cmap("turbo")((p - 0.5) / deepest * 0.94 + 0.03),
            label=f"layer {p + 1}",
        )
        for p in range(1, deepest + 1)
    ]
    marks = [
        Line2D([], [], color="0.3", linestyle=(0, (2, 1.5)), label="skipped, only probed"),
        Line2D([], [], color="0.3", linestyle="", marker="v", markersize=8, label="dropped"),
        Line2D([], [], color="0.3", linestyle="", marker="^", markersize=8, label="came back"),
        Line2D(
            [],
            [],
            color="black",
            linestyle=":",
            label=f"low, high: {settings['low']:g}, {settings['high']:g}",
        ),
        Patch(color="#eeeeee", label="warm-up"),
    ]
    figure.legend(
        handles=layers + marks, loc="outside lower center", ncols=7, frameon=False, fontsize=9
    )
    _save(figure, path)


def _curve(axes: Axes, steps: list[int], layer: dict[str, Any], colour: Any) -> None:
    x = np.array([np.nan if value is None else value for value in layer["score"]])
    skipped = layer["skipped"]
    for i in range(1, len(steps)):
        style = (0, (2, 1.5)) if skipped[i - 1] else "-"
        axes.plot(
            steps[i - 1 : i + 1], x[i - 1 : i + 1], color=colour, linestyle=style, linewidth=1.5
        )
    for i in range(len(steps)):
        if skipped[i] != (i > 0 and skipped[i - 1]):
            axes.plot(
                steps[i],
                x[i],
                marker="v" if skipped[i] else "^",
                markersize=9,
                markerfacecolor=colour,
                markeredgecolor="black",
                zorder=3,
                clip_on=False,
            )


def _signed_root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def draw_accuracy(results: Results, path: Path) -> None:
    """Test accuracy against the seconds of training that it took."""
    figure, axes = plt.subplots(figsize=(7.0, 4.4), layout="constrained")
    lowest = 1.0
    for kind, run in results["runs"].items():
        accuracy = np.array(run["test_accuracies"])
        axes.plot(
            run["training_seconds"],
            100 * accuracy,
            color=COLOURS[kind],
            marker="o",
            markersize=4,
            linewidth=1.8,
            label=f"{run['title']}: {accuracy[-1]:.1%} after {run['training_seconds'][-1]:.0f} s",
        )
        lowest = min(lowest, float(np.min(accuracy)))
    axes.set_xlim(left=0)
    axes.set_ylim(100 * lowest - 3, 101)
    axes.set_xlabel("training time in seconds, one mark an epoch")
    axes.set_ylabel("test accuracy in %")
    axes.grid(color="0.9")
    axes.legend(loc="lower right")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
