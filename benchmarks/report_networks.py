"""Tables and targets of whole networks: as they are, compiled, and converted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.converted import CONVERTED, FAMILIES, ORIGINAL
from benchmarks.tables import Results, Target, table, time_cell

# Percent of attention's cost in a training step: what lies between the plain network and the one that concatenates.
_REMOVED = {"resnet50, 8 at 224x224": 85.0, "resnet50, 8 at 128x128": 75.0}


def network_targets(networks: Results) -> Iterator[Target]:
    for name, found in networks.items():
        value = 100 * found["training"]["share_removed"]["mrla"]
        bound = _REMOVED.get(name, 70.0)
        yield Target("network, % of attention's cost removed", name, value, bound, True)
        if name.startswith("resnet50"):
            value = found["inference"]["times_plain"]["mrla"]["of_medians"]
            yield Target("network, inference, mrla over plain", name, value, 1.1, False)


def network_tables(networks: Results) -> Iterator[str]:
    for phase, what in (("training", "a training step"), ("inference", "inference")):
        yield f"Whole networks, {what}, ms (kept malloc); in ela every third layer is skipped"
        yield ""
        rows = []
        for name, found in networks.items():
            of = found[phase]
            over = (f"{of['times_plain'][n]['of_medians']:.2f}" for n in ("mrla", "ela"))
            removed = f"{100 * of['share_removed']['mrla']:.0f} %"
            rows.append([name, *map(time_cell, of["ms"].values()), " / ".join(over), removed])
        head = ["network", *next(iter(networks.values()))[phase]["ms"]]
        yield from table([*head, "mrla / ela over plain", "attention's cost removed"], rows)
        yield ""


def compiled_targets(compiled: Results) -> Iterator[Target]:
    network = compiled["network"]
    value = compiled["times_plain"]["mrla, compiled"]["of_medians"]
    yield Target("compiled network, mrla over plain", network, value, 1.14, False)
    value = compiled["concatenating_over"]["mrla, compiled"]["of_medians"]
    yield Target("compiled network, concatenating over mrla", network, value, 1.15, True)
    value = compiled["eager_over"]["mrla"]["of_medians"]
    yield Target("compiled network, eager mrla over compiled", network, value, 1.0, True)
    seconds = compiled["seconds_to_compile"]
    value = seconds["mrla"] / seconds["concatenating"]
    yield Target("compilation, mrla over concatenating", network, value, 1.0, False)


def compiled_lines(compiled: Results, cell: Callable[[dict[str, float]], str]) -> list[str]:
    """A table of networks, eager and compiled; `cell` writes a time."""
    rows = [
        [
            name,
            *(cell(compiled["ms"][f"{name}, {how}"]) for how in ("eager", "compiled")),
            f"{compiled['times_plain'][f'{name}, compiled']['of_medians']:.2f}",
            f"{seconds:.0f} s",
        ]
        for name, seconds in compiled["seconds_to_compile"].items()
    ]
    head = ["network", "eager, ms", "compiled, ms", "over compiled plain", "compilation"]
    return table(head, rows)


def compiled_table(compiled: Results) -> list[str]:
    what = f"Forward and backward of {compiled['network']} (kept malloc)"
    lines = compiled_lines(compiled, time_cell)
    return [f"{what}; in ela every third layer is skipped", "", *lines, ""]


def converted_targets(converted: Results) -> Iterator[Target]:
    for name, found in converted.items():
        family = FAMILIES[name]
        for phase in ("training", "inference"):
            value = found[phase]["times_faster"]["of_medians"]
            what = f"converted, {phase}, times faster than the original"
            yield Target(what, name, value, family.faster, True)
        if family.memory is not None:
            what = "converted, peak memory of a step over the original's"
            yield Target(what, name, found["peak_ratio"], family.memory, False)


def converted_table(converted: Results) -> list[str]:
    lines = ["Networks in their published shapes, as they are and converted (kept malloc)", ""]
    rows = []
    for name, found in converted.items():
        cells = [f"{name} {found['shape']}", f"{found['converted']} of {_layers(found)}"]
        for phase in ("training", "inference"):
            ms = found[phase]["ms"]
            cells.append(f"{time_cell(ms[ORIGINAL])} -> {time_cell(ms[CONVERTED])}")
            cells.append(f"{found[phase]['times_faster']['of_medians']:.2f}")
        peaks = [found["peak_bytes"][form] / 2**20 for form in (ORIGINAL, CONVERTED)]
        cells += [f"{peaks[0]:.1f} -> {peaks[1]:.1f}", f"{found['peak_ratio']:.2f}"]
        rows.append(cells)
    head = ["network", "layers", "training step, ms", "faster", "inference, ms", "faster"]
    head += ["peak of a step, MiB", "ratio"]
    lines += [*table(head, rows), ""]
    reasons = {(n, why) for n, found in converted.items() for why in found["left"].values()}
    if reasons:
        lines += [f"- {name}: left alone: {why}" for name, why in sorted(reasons)]
        lines.append("")
    return lines


def _layers(found: Results) -> int:
    """Layers that were converted or left."""
    return int(found["converted"]) + len(found["left"])
