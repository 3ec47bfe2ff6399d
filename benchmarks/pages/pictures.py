"""Pictures in pages, drawn from committed files of results.

A picture stands below `<!-- picture: KIND FILE -->`, the file relative to the root of the repository, as an image in
Markdown with the picture's path relative to the page. What was drawn stands in the picture too, as its description, so
that a picture of other numbers than its file has can be found without drawing it.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contenders import COMPILED, EAGER, LAYER
from benchmarks.depth import depth_rows
from benchmarks.shapes import parse_shape
from benchmarks.tables import Results, machine_sentence

Data = dict[str, Any]

# Okabe and Ito's colours, told apart by colour-blind people too; a shape each, for prints without colour.
STYLES = {
    EAGER: ("#D55E00", "o", "eager, concatenating (as published)"),
    COMPILED: ("#7F7F7F", "s", "torch.compile of it"),
    LAYER: ("#0072B2", "D", "ela_kernels"),
}
_SKIPPED = "#D55E00"
_MARK = re.compile(r"<!-- picture: (\S+) (\S+) -->\n+!\[[^\]]*\]\(([^)\s]+)\)")
_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def depth_data(results: Results) -> Data:
    """Time and peak memory of each contender by depth."""
    lines: dict[str, dict[str, list[float]]] = {}
    for depth, name, ms, mib in depth_rows(results["depth"]):
        line = lines.setdefault(name, {"depth": [], "ms": [], "mib": []})
        for key, value in (("depth", depth), ("ms", round(ms, 1)), ("mib", round(mib, 1))):
            line[key].append(value)
    shape = parse_shape(next(iter(results["depth"])))
    maps = [shape.batch, shape.channels, shape.size, shape.size]
    return {"maps": maps, "machine": machine_sentence(results), "lines": lines}


def draw_depth(data: Data) -> Any:
    """Milliseconds and MiB against depth, side by side."""
    figure = _figure(9.4, 4.3)
    for axes, (key, what) in zip(
        figure.subplots(1, 2),
        (("ms", "forward and backward, ms"), ("mib", "peak memory, MiB")),
        strict=True,
    ):
        for name, line in data["lines"].items():
            colour, marker, label = STYLES[name]
            if line["depth"][-1] < data["lines"][EAGER]["depth"][-1]:
                label += f", up to {line['depth'][-1]} layers"
            axes.plot(
                line["depth"], line[key], color=colour, marker=marker, markersize=5, label=label
            )
        eager, ours = (data["lines"][name] for name in (EAGER, LAYER))
        deepest, most, least = eager["depth"][-1], eager[key][-1], ours[key][-1]
        blue = STYLES[LAYER][0]
        axes.annotate(
            "",
            (deepest, least),
            xytext=(deepest, most),
            arrowprops={"arrowstyle": "<->", "color": blue, "shrinkA": 4, "shrinkB": 4},
        )
        axes.text(1.04 * deepest, (most + least) / 2, f"{most / least:.1f} times\nless", color=blue)
        axes.set_xlabel("layers of the stage")
        axes.set_ylabel(what)
        axes.set_xticks(eager["depth"])
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 1.3 * deepest)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.suptitle(f"One stage of layer attention, maps {data['maps']}, float32", fontsize=11)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def skipped_data(results: Results) -> Data:
    """Of each stage of the demo's ELA network: the weights, a row a layer, and which rows are skipped."""
    stages: list[dict[str, Any]] = [{"weights": rows} for rows in results["weights"]["ela"]]
    for i, stage in enumerate(stages):
        layers = [layer for layer in results["ebqm"]["layers"] if layer["stage"] == i]
        layers.sort(key=lambda layer: layer["place"])
        stage["skipped"] = [layer["skipped"][-1] for layer in layers]
    return {"stages": stages}


def draw_skipped(data: Data) -> Any:
    """A heat map for each stage, a row a layer; rows of skipped layers hatched."""
    from matplotlib.patches import Patch, Rectangle

    figure = _figure(9.4, 4.0)
    hatch = {"facecolor": "#FBE9DD", "edgecolor": _SKIPPED, "hatch": "////", "linewidth": 0.0}
    grid = figure.subplots(1, len(data["stages"]), squeeze=False)[0]
    for i, (axes, stage) in enumerate(zip(grid, data["stages"], strict=True)):
        size = len(stage["weights"])
        rows = [
            [
                float("nan") if skipped or weights is None or j >= len(weights) else weights[j]
                for j in range(size)
            ]
            for weights, skipped in zip(stage["weights"], stage["skipped"], strict=True)
        ]
        # Cells as polygons, not as an image, which would be scaled and blurred.
        image = axes.pcolormesh(
            rows, vmin=0, vmax=1, cmap="Blues", edgecolors="white", linewidth=0.8
        )
        for place, skipped in enumerate(stage["skipped"]):
            if skipped:
                axes.add_patch(Rectangle((0, place + 0.04), place + 1, 0.92, **hatch))
        axes.plot([0, *(x for t in range(size) for x in (t + 1, t + 1)), 0, 0],
                  [0, *(y for t in range(size) for y in (t, t + 1)), size, 0], color="0.6", linewidth=0.8)  # fmt: skip
        axes.set_aspect("equal")
        axes.invert_yaxis()
        ticks = range(0, size, 2)
        axes.set_xticks([t + 0.5 for t in ticks], [str(t + 1) for t in ticks])
        axes.set_yticks([t + 0.5 for t in ticks], [str(t + 1) for t in ticks])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("layer that is retrieved from")
        axes.set_title(f"stage {i + 1}: {sum(stage['skipped'])} of {size} skipped", fontsize=10)
    grid[0].set_ylabel("layer that retrieves")
    figure.colorbar(image, ax=list(grid), shrink=0.7, label="attention weight")
    figure.legend(
        handles=[
            Patch(label="skipped by EBQM: it repeats what the layer above it retrieved", **hatch)
        ],
        loc="outside lower center",
        frameon=False,
    )
    return figure


class Picture(NamedTuple):
    """What a picture shows of a file of results, in plain numbers, and how that is drawn."""

    data: Callable[[Results], Data]
    draw: Callable[[Data], Any]


PICTURES = {
    "depth": Picture(depth_data, draw_depth),
    "skipped": Picture(skipped_data, draw_skipped),
}


class Drawn(NamedTuple):
    """A picture of a page: its kind, what it has to show, and where it is."""

    kind: str
    data: Data
    path: Path

    @property
    def is_stale(self) -> bool:
        """Whether the file is not there, or shows something else."""
        return shown(self.path) != self.data

    def write(self) -> None:
        """Draw it anew, on white, so that it can be read on a dark page too."""
        import matplotlib as mpl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": self.kind}):
            PICTURES[self.kind].draw(self.data).savefig(
                self.path,
                format="svg",
                facecolor="white",
                metadata={"Description": json.dumps(self.data), "Date": None},
            )


def has_pictures(text: str) -> bool:
    """Whether a page has a picture to draw."""
    return _MARK.search(text) is not None


def pictures(text: str, folder: Path, root: Path) -> Iterator[Drawn]:
    """The pictures of a page that lies in `folder`.

    Raises:
        ValueError: a kind of picture that there is not, or a file that is not there or holds something else.
    """
    for kind, name, target in _MARK.findall(text):
        if kind not in PICTURES:
            raise ValueError(f"page: got the picture {kind!r}; allowed are {', '.join(PICTURES)}")
        try:
            results = json.loads((root / name).read_text(encoding="utf-8"))
            data = PICTURES[kind].data(results)
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise ValueError(
                f"file: got {root / name}, which does not hold what the picture {kind!r} needs ({error!r}); allowed is "
                "a results.json with that part"
            ) from error
        yield Drawn(kind, data, folder / target)


def shown(path: Path) -> Data | None:
    """What a picture says that it shows; None where it is not there or says nothing."""
    try:
        found = ET.parse(path).getroot().iter(_DESCRIPTION)
        data: Data | None = json.loads(next(found).text or "null")
    except (OSError, ET.ParseError, StopIteration, json.JSONDecodeError):
        return None
    return data


def _figure(width: float, height: float) -> Any:
    """Not by way of pyplot, which keeps figures and asks for a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
