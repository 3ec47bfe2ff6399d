"""Tables for users from the results of `python -m benchmarks run`: less than the run itself prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.converted import CONVERTED, ORIGINAL
from benchmarks.depth import depth_lines
from benchmarks.environment import DEFAULT, KEPT
from benchmarks.measure import fastest_baseline
from benchmarks.mixes import MIX_HEAD, mix_rows
from benchmarks.networks import CONCATENATING, FUSED, PLAIN
from benchmarks.position import position_lines
from benchmarks.report_left_out import left_out_lines, left_out_network_lines
from benchmarks.report_networks import compiled_lines
from benchmarks.shapes import parse_shape
from benchmarks.tables import Results, machine_sentence, table


def stages(results: Results) -> Iterator[str]:
    """Forward and backward of a stage under both settings of malloc, and its peak memory."""
    yield machine_sentence(results)
    yield ""
    names = ("eager", "compiled", "layer")
    rows = []
    for shape in results["stages"][KEPT]:
        for setting in (KEPT, DEFAULT):
            found = results["stages"][setting][shape]
            fastest = found["times_ours"][found["fastest_baseline"]]["of_medians"]
            is_first = setting == KEPT
            maps = [f"{results['memory'][shape][name]['maps']:.1f}" for name in names]
            rows.append(
                [
                    _stage(shape) if is_first else "",
                    setting,
                    *(_ms(found["contenders"][name]["ms"]) for name in names),
                    f"{fastest:.2f}x",
                    ", ".join(maps) if is_first else "",
                ]
            )
    head = ["layers, maps, head_dim", "allocator", "eager", "compiled", "ours", "faster"]
    yield from table([*head, "peak memory in maps: eager, compiled, ours"], rows)


def _blocks(part: str) -> Callable[[Results], Iterator[str]]:
    def make(results: Results) -> Iterator[str]:
        yield machine_sentence(results)
        yield ""
        rows = []
        for shape, found in results[part].items():
            cells = [_stage(shape)]
            for phase in ("training", "inference"):
                ms = found[phase]["ms"]
                names = ("eager", "compiled", "block")
                fastest = found[phase]["times_ours"][fastest_baseline(ms)]["of_medians"]
                cells.append(", ".join(_ms(ms[name]) for name in names))
                cells += [f"{fastest:.2f}x", _ms(ms["block bfloat16"])]
            rows.append(cells)
        head = ["layers, maps, head_dim"]
        for phase in ("training", "inference"):
            head += [f"{phase}: eager, compiled, ours", "faster", "ours in bfloat16"]
        yield from table(head, rows)

    return make


def networks(results: Results) -> Iterator[str]:
    """Whole networks, and the share of attention's cost that is gone: between plain and concatenating."""
    yield machine_sentence(results)
    yield ""
    rows = []
    for name, found in results["networks"].items():
        cells = [name]
        for phase in ("training", "inference"):
            of = found[phase]
            cells.append(", ".join(_ms(ms) for ms in of["ms"].values()))
            cells.append(f"{100 * of['share_removed']['mrla']:.0f} %")
        rows.append(cells)
    names = "plain, concatenating, ours, ours with a third skipped"
    head = ["network", f"a step, ms: {names}", "attention's cost removed"]
    yield from table([*head, "inference, ms: the same", "removed"], rows)


def whole(results: Results) -> Iterator[str]:
    """Whole networks, the little that a first look needs: a training step, and the most that it holds at once."""
    yield machine_sentence(results)
    yield ""
    kinds = (PLAIN, CONCATENATING, FUSED)
    rows = []
    for name, found in results["networks"].items():
        ms, peak = found["training"]["ms"], found["peak_bytes"]
        rows.append(
            [name, *(_ms(ms[k]) for k in kinds), *(f"{peak[k] / 2**20:.0f}" for k in kinds)]
        )
    head = ["network, batch", "a step, ms: plain", "concatenating", "ours"]
    yield from table([*head, "peak memory, MiB: plain", "concatenating", "ours"], rows)


def compiled(results: Results) -> Iterator[str]:
    """Whole networks under `torch.compile`."""
    found = results["compiled"]
    yield f"{machine_sentence(results)} {found['network']}; in ela every third layer is skipped."
    yield ""
    yield from compiled_lines(found, _ms)


def converted(results: Results) -> Iterator[str]:
    """Networks in their published shapes, before and after `convert`."""
    yield machine_sentence(results)
    yield ""
    rows = []
    for name, found in results["converted"].items():
        batch, _, height, width = found["shape"]
        cells = [f"{name}, {batch} at {height}x{width}"]
        for phase in ("training", "inference"):
            ms = found[phase]["ms"]
            cells.append(f"{_ms(ms[ORIGINAL])} to {_ms(ms[CONVERTED])}")
            cells.append(f"{found[phase]['times_faster']['of_medians']:.2f}x")
        rows.append([*cells, f"{found['peak_ratio']:.2f}x"])
    head = ["network", "a training step, ms", "faster", "inference, ms", "faster"]
    yield from table([*head, "peak memory of a step"], rows)


def history_dtype(results: Results) -> Iterator[str]:
    """What a history in half precision costs in error, and saves in memory and time."""
    yield machine_sentence(results)
    yield ""
    rows = []
    for shape, found in results["history_dtype"].items():
        for i, (name, errors) in enumerate(found["error"].items()):
            gradients = (error for kind, error in errors.items() if kind.startswith("gradient"))
            rows.append(
                [
                    _stage(shape) if i == 0 else "",
                    name,
                    *(f"{errors[kind]:.1e}" for kind in ("output", "weights", "divergence")),
                    f"{max(gradients):.1e}",
                    f"{found['peak_maps'][name]:.1f}",
                    *(_ms(found[phase]["ms"][name]) for phase in ("training", "inference")),
                ]
            )
    head = ["layers, maps, head_dim", "values in", "output", "weights", "divergence"]
    head += ["gradients", "peak memory, maps", "a step, ms", "inference, ms"]
    yield from table(head, rows)


def _of(part: str, lines: Callable[[Any], Iterable[str]]) -> Callable[[Results], Iterator[str]]:
    """The lines of a part of the results, below the machine."""

    def found(results: Results) -> Iterator[str]:
        yield machine_sentence(results)
        yield ""
        yield from lines(results[part])

    return found


TABLES: dict[str, Callable[[Results], Iterator[str]]] = {
    "stages": stages,
    "blocks": _blocks("blocks"),
    "light": _blocks("light"),
    "networks": networks,
    "whole": whole,
    "depth": _of("depth", depth_lines),
    "compiled": compiled,
    "converted": converted,
    "history_dtype": history_dtype,
    "left_out": _of("left_out", left_out_lines),
    "position": _of("position", position_lines),
    "mixes": _of("mixes", lambda found: table(MIX_HEAD, mix_rows(found))),
    "left_out_networks": _of("left_out_networks", left_out_network_lines),
}


def _stage(shape: str) -> str:
    of = parse_shape(shape)
    return f"{of.depth}, [{of.batch}, {of.channels}, {of.size}, {of.size}], {of.head_dim}"


def _ms(summary: dict[str, float]) -> str:
    return f"{summary['median']:.1f}"
