"""Pictures of a run: bars of every part, with the targets as lines. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.gpu.footprint import PIECES, POSITION_OPS

_OPS = ("forward", "dots", "gather", "push")


def draw(results: dict[str, Any], folder: Path) -> None:
    """`floor.png`, `stages.png` and `others.png`, those that there are numbers for."""
    parts = results["parts"]
    floor = parts.get("floor", {}).get("cases", {})
    pieces = parts.get("pieces", {}).get("cases", {})
    positions = parts.get("positions", {}).get("cases", {})
    panels = [(_floor_axis(op), floor) for op in _OPS if floor]
    panels += [(_floor_axis(op), positions) for op in POSITION_OPS if positions]
    panels += [(_floor_axis(piece), pieces) for piece in PIECES if pieces]
    if panels:
        _save(folder / "floor.png", panels)
    stages = [
        (_stage_axis(part), parts[part]["cases"])
        for part in ("layers", "stages", "compiled", "layers_compiled")
        if parts.get(part, {}).get("cases")
    ]
    networks = parts.get("networks", {}).get("cases", {})
    stages += [(_network_axis, networks)] if networks else []
    if stages:
        _save(folder / "stages.png", stages)
    others: list[tuple[Callable[..., None], dict[str, Any]]] = []
    for part, axis in (("memory", _memory_axis), ("divergence", _divergence_axis)):
        if parts.get(part, {}).get("cases"):
            others.append((axis, parts[part]["cases"]))
    if parts.get("overhead", {}).get("contenders"):
        others.append((_overhead_axis, parts["overhead"]["contenders"]))
    if others:
        _save(folder / "others.png", others)


def _save(path: Path, panels: list[tuple[Callable[..., None], dict[str, Any]]]) -> None:
    rows = max(len(cases) for _, cases in panels)
    size = (max(6, 1.1 * rows), 4.5 * len(panels))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (draw_panel, cases) in zip(axes[:, 0], panels, strict=True):
        draw_panel(axis, cases)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _bars(axis: Any, labels: list[str], series: dict[str, list[float | None]], title: str) -> None:
    width = 0.8 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        places = [j + i * width for j, v in enumerate(values) if v is not None]
        axis.bar(places, [v for v in values if v is not None], width, label=name)
    axis.set_xticks(
        [j + 0.4 - width / 2 for j in range(len(labels))],
        [label.replace(" ", "\n") for label in labels],
        fontsize=6,
    )
    axis.set_ylabel(title)
    if series:
        axis.legend(fontsize=7)


def _names(cases: dict[str, Any], key: Callable[[Any], dict[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for case in cases.values():
        names |= dict.fromkeys(key(case))
    return list(names)


def _floor_axis(op: str) -> Callable[..., None]:
    def axis_of(axis: Any, cases: dict[str, Any]) -> None:
        def backends(case: Any) -> dict[str, Any]:
            return case["ops"].get(op, {}).get("backends", {})

        series = {
            name: [backends(c).get(name, {}).get("percent_of_copy") for c in cases.values()]
            for name in _names(cases, backends)
        }
        _bars(axis, list(cases), series, f"{op}, % of copy bandwidth")
        if op == "forward" or op in PIECES:
            axis.axhline(90 if op == "forward" else 85, linestyle="--", linewidth=0.8)

    return axis_of


def _stage_axis(part: str) -> Callable[..., None]:
    def axis_of(axis: Any, cases: dict[str, Any]) -> None:
        def timed(case: Any) -> dict[str, Any]:
            return {n: c["ms"]["median"] for n, c in case["contenders"].items() if "ms" in c}

        series = {
            name: [timed(c).get(name) for c in cases.values()] for name in _names(cases, timed)
        }
        _bars(axis, list(cases), series, f"{part}: forward and backward, ms")
        axis.set_yscale("log")

    return axis_of


def _network_axis(axis: Any, cases: dict[str, Any]) -> None:
    def timed(case: Any) -> dict[str, Any]:
        return {n: c["ms"]["median"] for n, c in case["contenders"].items()}

    series = {name: [timed(c).get(name) for c in cases.values()] for name in _names(cases, timed)}
    _bars(axis, list(cases), series, "a training step, ms")


def _memory_axis(axis: Any, cases: dict[str, Any]) -> None:
    def maps(case: Any) -> dict[str, Any]:
        return {name: found["maps"] for name, found in case["contenders"].items()}

    series = {name: [maps(c).get(name) for c in cases.values()] for name in _names(cases, maps)}
    series["2 T + 4"] = [2.0 * case["depth"] + 4 for case in cases.values()]
    _bars(axis, list(cases), series, "peak memory, maps")
    axis.set_yscale("log")


def _divergence_axis(axis: Any, cases: dict[str, Any]) -> None:
    series = {
        name: [c.get(name, {}).get("percent_of_forward", {}).get("median") for c in cases.values()]
        for name in _names(cases, lambda case: case)
    }
    _bars(axis, list(cases), series, "divergence, % of the forward")
    axis.axhline(1, linestyle="--", linewidth=0.8)


def _overhead_axis(axis: Any, contenders: dict[str, Any]) -> None:
    series: dict[str, list[float | None]] = {
        name: [found[p]["median"] for p in ("forward", "backward")]
        for name, found in contenders.items()
    }
    _bars(axis, ["forward", "backward"], series, "CPU time of a layer, us")
