"""The picture of the study: accuracy against training time, a point for each variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.records import Record
from benchmarks.study.tables import Group, accuracy, groups, mean_of, seconds
from benchmarks.study.variants import VARIANTS
from ela_kernels.optional import optional

# By who chooses what is skipped, and the variants without skipping.
_MARKERS = {None: "o", "ebqm": "D", "random": "x", "last": "v"}


def draw(records: Sequence[Record], path: Path) -> None:
    """Write the picture; the kind of file by its name.

    Raises:
        ValueError: no runs.
        MissingLibraryError: matplotlib is not installed.
    """
    found = groups(records)
    if not found:
        raise ValueError("file: got no finished runs; allowed is at least one")
    matplotlib = optional("matplotlib", "the picture")
    matplotlib.use("Agg")
    pyplot = optional("matplotlib.pyplot", "the picture")
    colours = pyplot.get_cmap("tab20").colors
    figure, row = pyplot.subplots(
        1,
        len(found),
        figsize=(6.2 * len(found), 5.6),
        squeeze=False,
        layout="constrained",
    )
    names = list(dict.fromkeys(name for group in found for name in group.variants))
    style = {name: colours[i % len(colours)] for i, name in enumerate(names)}
    shown: dict[str, Any] = {}
    for axes, group in zip(row[0], found, strict=True):
        _points(axes, group, style, shown)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(axes: Any, group: Group, style: dict[str, Any], shown: dict[str, Any]) -> None:
    for name in group.variants:
        # Bars of both kinds are standard errors over seeds; of a single seed there are none.
        x, y = (mean_of(list(group.values(name, value).values())) for value in (seconds, accuracy))
        bars = [[0.0 if math.isnan(m.error) else m.error] for m in (x, y)]
        variant = VARIANTS.get(name)
        shown[name] = axes.errorbar(
            [x.mean],
            [y.mean],
            xerr=[bars[0], bars[0]],
            yerr=[bars[1], bars[1]],
            marker=_MARKERS.get(variant.chosen_by if variant else None, "o"),
            linestyle="",
            color=style[name],
            capsize=3,
            label=name,
        )
    settings = group.settings
    axes.set_title(
        f"{settings['data']}, resnet{settings['depth']}, {settings['epochs']} epochs, rate {settings['lr']}",
        fontsize=10,
    )
    axes.set_xlabel("seconds of training steps, mean ± standard error over seeds")
    axes.set_ylabel("test accuracy in %, mean ± standard error over seeds")
    axes.grid(color="0.9")
