"""Tables, targets and a picture from the results of a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.blocks import OURS
from benchmarks.depth import depth_lines
from benchmarks.environment import DEFAULT, KEPT
from benchmarks.limits import limits
from benchmarks.measure import fastest_baseline
from benchmarks.mixes import MIX_HEAD, mix_rows
from benchmarks.position import position_lines, position_targets
from benchmarks.report_left_out import left_out_lines, left_out_network_lines
from benchmarks.report_networks import (
    compiled_table,
    compiled_targets,
    converted_table,
    converted_targets,
    network_tables,
    network_targets,
)
from benchmarks.shapes import parse_shape
from benchmarks.tables import Results, Target, table, time_cell


def targets(results: Results) -> list[Target]:
    """All targets that this run has numbers for."""
    return list(_targets(results))


def _targets(results: Results) -> Iterator[Target]:
    for shape, stage in results["stages"].get(KEPT, {}).items():
        fastest = stage["fastest_baseline"]
        what = f"kept malloc: stage, times faster than {fastest}"
        if "compiled" not in stage["contenders"]:
            what += " (compiled not timed)"
        bound = 3.0 if results["machine"]["simd_level"] == "avx2" else 3.5
        yield Target(what, shape, stage["times_ours"][fastest]["of_medians"], bound, True)
        what = what.replace("stage", "stage, op alone")
        yield Target(what, shape, stage["times_op"][fastest]["of_medians"], 1.4, True)
    for shape, stage in results["stages"].get(DEFAULT, {}).items():
        depth = parse_shape(shape).depth
        if depth >= 6:
            value = stage["times_ours"]["eager"]["of_medians"]
            bound = 12.0 if depth >= 12 else 6.0
            yield Target(
                "default malloc: stage, times faster than eager", shape, value, bound, True
            )
    for shape, blocks in results["blocks"].items():
        for phase, bound in (("training", 3.0), ("inference", 4.0)):
            fastest = fastest_baseline(blocks[phase]["ms"])
            value = blocks[phase]["times_ours"][fastest]["of_medians"]
            yield Target(f"blocks, {phase}, times faster than {fastest}", shape, value, bound, True)
        value = blocks["training"]["times_bfloat16"]["of_medians"]
        yield Target(
            "blocks, training, bfloat16 times faster than float32", shape, value, 1.5, True
        )
    if not results["small"]:  # a small network's time is that of everything but its layers
        yield from network_targets(results["networks"])
        if results.get("compiled"):
            yield from compiled_targets(results["compiled"])
        yield from converted_targets(results["converted"])
        yield from position_targets(results.get("position") or {})
    for shape, floor in results["floor"].items():
        forward, backward = (floor[f"{name}_percent_of_probe"] for name in ("forward", "backward"))
        yield Target("op forward, % of read probe", shape, forward, 80.0, True)
        yield Target("op backward, % of read probe", shape, backward, 75.0, True)
    for shape, floor in results["layer_floor"].items():
        if parse_shape(shape).depth >= 6:
            value = floor["percent_of_probe"]
            yield Target("whole layer, % of read probe", shape, value, 75.0, True)
        probe = floor.get("transfer_ms")
        if probe:
            taken = sum(phase["op"]["median"] for phase in floor["phases"].values())
            value = 100 * (probe["forward"] + probe["backward"]) / taken
            bound = 75.0 if parse_shape(shape).depth >= 6 else 65.0
            yield Target("whole layer, % of transfer probe", shape, value, bound, True)
    for shape, memory in results["memory"].items():
        limit = 2.0 * parse_shape(shape).depth + 4
        yield Target("peak memory, maps", shape, memory["layer"]["maps"], limit, False)
    for shape, divergence in results["divergence"].items():
        value = divergence["percent_of_forward"]
        yield Target("divergence, % of op forward", shape, value, 2.0, False)
    if results["overhead"]:
        for what, bound in (("op", 120.0), ("module", 100.0)):
            overhead = results["overhead"][what]["both"]["median"]
            name = f"overhead of the {what}, us a layer"
            yield Target(name, results["overhead"]["shape"], overhead, bound, False)


def _history_dtype_tables(found: Results) -> list[str]:
    lines = ["Blocks whose history holds values in a dtype: relative L2 distance from float64", ""]
    names = list(next(iter(found.values()))["error"]["float32"])
    rows = [
        [str(parse_shape(shape)), held, *(f"{errors[name]:.1e}" for name in names)]
        for shape, of_shape in found.items()
        for held, errors in of_shape["error"].items()
    ]
    lines += [*table(["", "values", *names], rows), ""]
    rows = []
    for shape, of_shape in found.items():
        for held, maps in of_shape["peak_maps"].items():
            cells = [str(parse_shape(shape)), held, f"{maps:.1f}"]
            for phase in ("training", "inference"):
                cells.append(time_cell(of_shape[phase]["ms"][held]))
                cells.append(f"{of_shape[phase]['over_float32'][held]['of_medians']:.2f}")
            rows.append(cells)
    head = ["", "values", "peak of a step, maps", "training step, ms", "over float32"]
    what = "The same: peak memory, and times (kept malloc)"
    return [*lines, what, "", *table([*head, "inference, ms", "over float32"], rows), ""]


def text_report(results: Results) -> str:
    """The tables as plain text, which is Markdown too."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['simd_level']}, torch {machine['torch']}, "
        f"{machine['date']}, load before {machine['load_before'][0]}",
        "",
        "Stage, forward and backward, ms: median [quartiles]",
        "",
    ]
    for setting, stages in results["stages"].items():
        names = list(next(iter(stages.values()))["contenders"])
        rows = []
        for shape, stage in stages.items():
            cells = [time_cell(stage["contenders"][name]["ms"]) for name in names]
            faster = [f"{r['of_medians']:.2f}" for r in stage["times_ours"].values()]
            rows.append([str(parse_shape(shape)), *cells, " / ".join(faster)])
        others = [name for name in names if name != "layer"]
        head = [f"{setting} malloc", *names, f"{' / '.join(others)} over layer"]
        lines += [*table(head, rows), ""]
    for part, what in (
        ("blocks", "Residual blocks"),
        ("light", "Residual blocks of the light form"),
    ):
        for phase in ("training", "inference") if results[part] else ():
            stages = {shape: blocks[phase] for shape, blocks in results[part].items()}
            names = list(next(iter(stages.values()))["ms"])
            others = [name for name in names if name != "block"]
            rows = []
            for shape, stage in stages.items():
                faster = [f"{stage['times_ours'][name]['of_medians']:.2f}" for name in others]
                cells = [time_cell(stage["ms"][name]) for name in names]
                rows.append([str(parse_shape(shape)), *cells, " / ".join(faster)])
            lines += [f"{what} with BatchNorm and ReLU, {phase}, ms (kept malloc)", ""]
            lines += [*table(["", *names, f"{' / '.join(others)} over block"], rows), ""]
    if results["networks"]:
        lines += network_tables(results["networks"])
    if results.get("compiled"):
        lines += compiled_table(results["compiled"])
    if results["converted"]:
        lines += converted_table(results["converted"])
    if results["floor"]:
        lines += ["Op against the read probe (GB/s of the least bytes)", ""]
        rows = [
            [*_against_probe(shape, floor), f"{floor['backward_percent_of_probe']:.0f} %"]
            for shape, floor in results["floor"].items()
        ]
        lines += [*table(["", "forward", "dots", "gather", "dots + gather"], rows), ""]
    if results["layer_floor"]:
        lines += ["Whole layer against the read probe (GB/s of the least bytes)", ""]
        rows = [
            [*_against_probe(shape, floor), f"{floor['percent_of_probe']:.0f} %"]
            for shape, floor in results["layer_floor"].items()
        ]
        lines += [*table(["", "forward", "backward", "both"], rows), ""]
        lines += _transfer_table(results)
    if results["memory"]:
        lines += ["Peak memory of a stage in maps: tensors (resident)", ""]
        names = list(next(iter(results["memory"].values())))
        rows = [
            [str(parse_shape(shape)), *(_maps(memory[name]) for name in names)]
            for shape, memory in results["memory"].items()
        ]
        lines += [*table(["", *names], rows), ""]
    if results.get("history_dtype"):
        lines += _history_dtype_tables(results["history_dtype"])
    if results.get("left_out"):
        what = "Retrievals with a tolerance: what is left out, and how much faster (kept malloc)"
        lines += [what, "", *left_out_lines(results["left_out"]), ""]
    if results.get("mixes"):
        rows = mix_rows(results["mixes"])
        lines += ["Sums of all maps of a stage by given weights, ms (kept malloc)", ""]
        lines += [*table(MIX_HEAD, rows), ""]
    if results.get("left_out_networks"):
        what = "Whole networks with a tolerance, as they are initialised:"
        lines += [what, "", *left_out_network_lines(results["left_out_networks"]), ""]
    if results.get("position"):
        what = "Attention over depth at every position, ms: median [quartiles]"
        lines += [what, "", *position_lines(results["position"]), ""]
    if results.get("depth"):
        what = "A stage against its depth, forward and backward, ms and peak MiB (kept malloc)"
        lines += [what, "", *depth_lines(results["depth"]), ""]
    if results["overhead"]:
        lines += ["Overhead on tiny maps, us a layer", ""]
        rows = [
            [name, *(f"{results['overhead'][name][p]['median']:.0f}" for p in _PASSES)]
            for name in ("op", "module", "block", "bare")
            if name in results["overhead"]
        ]
        lines += [*table(["", *_PASSES], rows), ""]
    found = limits(results)
    if found:
        lines += ["Times faster than a baseline, and the most that any layer could be", ""]
        rows = [
            [
                limit.what,
                limit.shape,
                f"{limit.reached:.2f}",
                f"{limit.most:.2f}",
                f"{100 * limit.reached / limit.most:.0f} %",
            ]
            for limit in found
        ]
        lines += [*table(["", "shape", "reached", "most", ""], rows), ""]
    rows = [
        [
            target.what,
            target.shape,
            f"{target.value:.2f}",
            f"{'>=' if target.at_least else '<='} {target.bound:g}",
            "yes" if target.met else "NO",
        ]
        for target in targets(results)
    ]
    lines += table(["target", "shape", "measured", "allowed", "met"], rows)
    return "\n".join(lines) + "\n"


_PASSES = ("forward", "backward", "both")


def _against_probe(shape: str, floor: dict[str, Any]) -> list[str]:
    """A row's first cells: the stage, and each phase."""
    cells = [
        f"{p['percent_of_probe']:.0f} % ({p['op_gb_per_s']:.1f} of {p['probe_gb_per_s']:.1f})"
        for p in floor["phases"].values()
    ]
    return [str(parse_shape(shape)), *cells]


def _transfer_table(results: dict[str, Any]) -> list[str]:
    """Layers and blocks of a stage against the probe that really writes what they write."""
    rows = []
    for shape, floor in results["layer_floor"].items():
        probe = floor.get("transfer_ms")
        if not probe:  # an older run, or no compiler
            continue
        layer = {name: phase["op"]["median"] for name, phase in floor["phases"].items()}
        both = probe["forward"] + probe["backward"]
        cells = [_percent(probe[name], layer[name]) for name in ("forward", "backward")]
        cells.append(_percent(both, sum(layer.values())))
        blocks = results["blocks"].get(shape)
        if blocks is not None:
            training = probe["block forward"] + probe["block backward"]
            least = {"training": training, "inference": probe["block inference"]}
            cells += [_percent(ms, blocks[p]["ms"][OURS]["median"]) for p, ms in least.items()]
        rows.append([str(parse_shape(shape)), *cells, *["-"] * (5 - len(cells))])
    if not rows:
        return []
    head = ["", "layer forward", "layer backward", "both", "block training", "block inference"]
    title = "Layers and blocks against the transfer probe (ms of the probe of ms taken, a stage)"
    return [title, "", *table(head, rows), ""]


def _percent(probe_ms: float, ms: float) -> str:
    return f"{100 * probe_ms / ms:.0f} % ({probe_ms:.1f} of {ms:.1f})"


def _maps(memory: dict[str, Any]) -> str:
    resident = memory["resident_maps"]
    return f"{memory['maps']:.1f}" + ("" if resident is None else f" ({resident:.1f})")


def plot(results: Results, path: Path) -> None:
    """Bars of every contender's time under both settings of malloc; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = results["stages"]
    figure, axes = pyplot.subplots(
        1, len(settings), figsize=(6 * len(settings), 4), squeeze=False, layout="constrained"
    )
    for axis, (setting, stages) in zip(axes[0], settings.items(), strict=True):
        names = list(next(iter(stages.values()))["contenders"])
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            ms = [stage["contenders"][name]["ms"] for stage in stages.values()]
            medians = [m["median"] for m in ms]
            spread = [
                [m["median"] - m["q1"] for m in ms],
                [m["q3"] - m["median"] for m in ms],
            ]
            places = [j + i * width for j in range(len(ms))]
            axis.bar(places, medians, width, yerr=spread, label=name)
        axis.set_xticks(
            [j + 0.4 - width / 2 for j in range(len(stages))],
            [str(parse_shape(shape)).replace(" [", "\n[") for shape in stages],
            fontsize=7,
        )
        axis.set_title(f"{setting} malloc")
        axis.set_ylabel("forward and backward of a stage, ms")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
