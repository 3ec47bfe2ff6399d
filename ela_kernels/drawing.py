"""What the package's pictures share. matplotlib, which the extra `train` brings, is imported when one is drawn."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ela_kernels.optional import optional

# Okabe and Ito's colours, which colour-blind people tell apart too.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
HATCH = {"facecolor": "#FBE9DD", "edgecolor": ORANGE, "hatch": "////", "linewidth": 0.0}
# More labels than that along a heat map cannot be read.
_MOST_TICKS = 10


def new_figure(width: float, height: float, purpose: str) -> Any:
    """A figure of inches, whose parts keep apart; not by way of pyplot, which keeps figures and asks for a display.

    Raises:
        MissingLibraryError: there is no matplotlib; `purpose` is said to need it.
    """
    figure_module = optional("matplotlib.figure", purpose)
    return figure_module.Figure(figsize=(width, height), layout="constrained")


def encoded(figure: Any, kind: str = "png") -> bytes:
    """The figure as a file of that kind has it, on white, so that it can be read on a dark page too."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=120, facecolor="white")
    return content.getvalue()


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write the figure; the path's suffix says as what, PNG where it has none.

    Raises:
        ValueError: matplotlib writes no such files; nothing is written then.
    """
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    known = sorted(figure.canvas.get_supported_filetypes())
    if kind not in known:
        raise ValueError(
            f"path: got {os.fspath(path)!r}, of no kind that matplotlib writes; allowed are a path without a suffix, "
            f"for PNG, and the suffixes {', '.join(known)}"
        )
    content = encoded(figure, kind)
    Path(path).write_bytes(content)


def draw_nothing(axes: Any, why: str) -> None:
    """Say in an empty part of a figure why it is empty."""
    place = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, why, color="0.35", **place)


def draw_weights(
    axes: Any, weights: Sequence[Sequence[float]], skipped: Sequence[bool], title: str
) -> Any:
    """A heat map of one stage: a row for each layer, a column for each pair that it retrieves from.

    Args:
        axes: where.
        weights: of each layer; empty where they are not known.
        skipped: which layers are, and are hatched.
        title: above it.

    Returns:
        What a colour bar is made of.
    """
    patches = optional("matplotlib.patches", title)
    width = max(1, *(len(row) for row in weights), len(weights))
    rows = [
        [*(() if is_skipped else row), *[math.nan] * (width - (0 if is_skipped else len(row)))]
        for row, is_skipped in zip(weights, skipped, strict=True)
    ]
    image = axes.pcolormesh(rows, vmin=0.0, vmax=1.0, cmap="Blues")
    for place, is_skipped in enumerate(skipped):
        if is_skipped:
            length = len(weights[place]) or place + 1
            axes.add_patch(patches.Rectangle((0, place + 0.05), length, 0.9, **HATCH))
    if not any(skipped) and not any(map(len, weights)):
        draw_nothing(axes, "no weights seen yet")
    axes.set_xlim(0, width)
    axes.set_ylim(len(rows), 0)
    for axis, count in ((axes.xaxis, width), (axes.yaxis, len(rows))):
        ticks = range(0, count, math.ceil(count / _MOST_TICKS))
        axis.set_ticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("pair retrieved from (place)")
    axes.set_ylabel("layer (place)")
    return image
