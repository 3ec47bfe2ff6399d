"""A report of EBQM as a picture: what layers retrieve, their scores over training, and what is left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ela_kernels.drawing import BLUE, GREEN, HATCH, ORANGE, draw_nothing, draw_weights, new_figure
from ela_kernels.optional import optional

if TYPE_CHECKING:
    from ela_kernels.ebqm.report import DecisionRecord, Report

PURPOSE = "Report.plot"
_STAGE, _LEAST = 3.6, 7.5  # inches
_SKIPPED_LINE = (0, (2, 1.5))
_UNDECIDED = "no decision yet"


def draw(report: Report) -> Any:
    """The figure: a column for each stage, weights above scores, and below both the share that is left out."""
    stages: dict[int, list[int]] = {}
    for i, layer in enumerate(report.layers):
        # Before the first pass nobody knows what is a stage.
        stages.setdefault(-1 if layer.stage is None else layer.stage, []).append(i)
    for members in stages.values():
        members.sort(key=lambda i: report.layers[i].place or 0)
    figure = new_figure(max(_LEAST, _STAGE * len(stages) + 1.2), 9.5, PURPOSE)
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=(3.2, 3, 2))
    columns = max(1, len(stages))
    maps = upper.subplots(1, columns, squeeze=False)[0]
    scores = middle.subplots(1, columns, squeeze=False, sharey=True)[0]
    for above, below, (stage, members) in zip(maps, scores, sorted(stages.items()), strict=True):
        layers = [report.layers[i] for i in members]
        title = f"{_name(stage)}: {sum(x.skipped for x in layers)} of {len(layers)} skipped"
        weights, skipped = [x.weights for x in layers], [x.skipped for x in layers]
        image = draw_weights(above, weights, skipped, title)
        _draw_scores(below, report, members)
    upper.colorbar(image, ax=list(maps), label="weight, mean over\nsamples and heads")
    scores[0].set_ylabel(f"score: {report.settings['quantile']:g}-quantile of 1 - exp(-kl)")
    _draw_left_out(lower.subplots(), report)
    _legend(lower, report)
    upper.suptitle(f"EBQM at step {report.step}", fontsize="large")
    return figure


def _name(stage: int) -> str:
    return "layers" if stage < 0 else f"stage {stage}"


def _draw_scores(axes: Any, report: Report, members: list[int]) -> None:
    """A line for each layer, darker the earlier; dashed where it is skipped, with marks where that changes."""
    colours = optional("matplotlib", PURPOSE).colormaps["viridis"]
    steps = [d.step for d in report.decisions]
    for number, i in enumerate(members):
        colour = colours(0.9 * number / max(1, len(members) - 1))
        scores = [d.score[i] for d in report.decisions]
        skipped = [d.skipped[i] for d in report.decisions]
        name = report.layers[i].name
        known = [s if math.isfinite(s) else math.nan for s in scores]
        axes.plot(steps, known, color=colour, linewidth=1.5, label=name)
        dashed: list[tuple[int, float]] = []
        for j in range(1, len(steps)):
            if skipped[j - 1]:
                if not dashed or dashed[-1][0] != steps[j - 1]:
                    dashed += [(steps[j - 1], math.nan), (steps[j - 1], known[j - 1])]
                dashed.append((steps[j], known[j]))
        if dashed:  # gaps in the line
            gaps = {"color": "white", "linewidth": 1.9, "linestyle": _SKIPPED_LINE}
            axes.plot(*zip(*dashed, strict=True), label="gaps", **gaps)
        for mark, dropped in (("v", True), ("^", False)):
            at = [
                j
                for j in range(len(steps))
                if skipped[j] is dropped
                and (skipped[j - 1] if j else False) is not dropped
                and math.isfinite(known[j])
            ]
            if not at:  # the layout cannot do with marks nowhere
                continue
            axes.plot(
                [steps[j] for j in at],
                [known[j] for j in at],
                linestyle="",
                marker=mark,
                markersize=7,
                markerfacecolor=ORANGE if dropped else GREEN,
                markeredgecolor="black",
                clip_on=False,
                zorder=3,
            )
    for threshold in ("low", "high"):
        axes.axhline(report.settings[threshold], color="black", linestyle=":", linewidth=1)
    axes.axvspan(0, report.settings["warmup"], color="#EEEEEE", zorder=0)
    if not steps:
        draw_nothing(axes, _UNDECIDED)
    # The root spreads small scores, where decisions are made.
    axes.set_yscale("function", functions=(_root, _square))
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    axes.set_xlim(0, max(1, report.step))
    axes.set_xlabel("training step")
    axes.spines[["top", "right"]].set_visible(False)


def left_out_shares(report: Report, record: DecisionRecord) -> tuple[float, float]:
    """Of all retrievals of a pass, percent that are left out by skipped layers, and by the tolerance of the others.

    A layer in place p retrieves from p + 1 pairs.
    """
    skipping = tolerance = total = 0.0
    for i, layer in enumerate(report.layers):
        pairs = 1 + (layer.place or 0)
        total += pairs
        share = record.left_out[i]
        if record.skipped[i]:
            skipping += pairs
        elif math.isfinite(share):
            tolerance += pairs * share
    return (100 * skipping / total, 100 * tolerance / total) if total else (0.0, 0.0)


def _draw_left_out(axes: Any, report: Report) -> None:
    steps = [*(d.step for d in report.decisions), report.step]
    shares = [left_out_shares(report, d) for d in report.decisions]
    shares += shares[-1:] or [(0.0, 0.0)]  # what was decided last holds until now
    skipping, tolerance = ([pair[i] for pair in shares] for i in (0, 1))
    together = [a + b for a, b in shares]
    # From a decision to the next one.
    axes.step(steps, skipping, where="post", color=ORANGE, label="by skipped layers")
    axes.step(
        steps, together, where="post", color=BLUE, linestyle="--", label="and by the tolerance"
    )
    axes.fill_between(steps, skipping, step="post", color=ORANGE, alpha=0.25, linewidth=0)
    if any(tolerance):
        axes.fill_between(
            steps, skipping, together, step="post", color=BLUE, alpha=0.25, linewidth=0
        )
    axes.set_xlim(0, max(1, report.step))
    axes.set_ylim(0, max(10.0, 1.1 * max(together, default=0.0)))
    axes.set_xlabel("training step")
    axes.set_ylabel("retrievals\nleft out, %")
    axes.spines[["top", "right"]].set_visible(False)
    if report.decisions:
        axes.legend(loc="upper left", frameon=False, fontsize="small")
    else:
        draw_nothing(axes, _UNDECIDED)


def _legend(figure: Any, report: Report) -> None:
    lines, patches = (optional(f"matplotlib.{name}", PURPOSE) for name in ("lines", "patches"))

    def line(**how: Any) -> Any:
        return lines.Line2D([], [], **{"color": "0.3", **how})

    thresholds = f"low, high: {report.settings['low']:g}, {report.settings['high']:g}"
    colours = optional("matplotlib", PURPOSE).colormaps["viridis"]
    marks = {"linestyle": "", "markeredgecolor": "black", "markersize": 7}
    handles = [
        patches.Patch(label="skipped", **HATCH),
        line(color=colours(0.0), label="earlier layers"),
        line(color=colours(0.9), label="later layers"),
        line(linestyle=_SKIPPED_LINE, label="while skipped"),
        line(marker="v", markerfacecolor=ORANGE, label="dropped", **marks),
        line(marker="^", markerfacecolor=GREEN, label="came back", **marks),
        line(color="black", linestyle=":", label=thresholds),
        patches.Patch(color="#EEEEEE", label="warm-up"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def _root(x: Any) -> Any:
    numpy = optional("numpy", PURPOSE)
    return numpy.sign(x) * numpy.sqrt(numpy.abs(x))


def _square(x: Any) -> Any:
    return optional("numpy", PURPOSE).sign(x) * x * x
