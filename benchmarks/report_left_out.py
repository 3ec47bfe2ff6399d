"""The table of what a tolerance leaves out, for the text report and for pages."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.shapes import parse_shape
from benchmarks.tables import Results, table, time_cell

PHASES = {"training": "a step", "inference": "inference"}


def left_out_lines(found: Results) -> Iterator[str]:
    """A row for each stage, form of maps and distribution of weights."""
    rows = []
    names: list[str] = []
    for shape, forms in found.items():
        stage = str(parse_shape(shape))
        for form, of_form in forms.items():
            for weights, measured in of_form.items():
                names = [name for name in measured["left_out"] if name != "0"]
                cells = [stage, form, weights]
                cells += [f"{100 * measured['left_out'][name]:.0f} %" for name in names]
                for phase in PHASES:
                    cells.append(f"{measured[phase]['ms']['0']['median']:.1f}")
                    faster = measured[phase]["times_faster"]
                    cells += [f"{faster[name]['of_medians']:.2f}" for name in names]
                rows.append(cells)
                stage = ""
    head = ["stage", "maps", "weights", *(f"left out at {name}" for name in names)]
    for phase in PHASES.values():
        head += [f"{phase}, ms", *(f"times faster at {name}" for name in names)]
    yield from table(head, rows)


def left_out_network_lines(found: Results) -> Iterator[str]:
    """A row for each network and tolerance."""
    rows = []
    for network, measured in found.items():
        for name, share in measured["left_out"].items():
            cells = [network if name == "0" else "", name, f"{100 * share:.0f} %"]
            for phase in PHASES:
                cells.append(time_cell(measured[phase]["ms"][name]))
                cells.append(f"{measured[phase]['times_faster'][name]['of_medians']:.2f}")
            rows.append(cells)
    head = ["network", "tolerance", "left out"]
    for phase in PHASES.values():
        head += [f"{phase}, ms", "times faster"]
    yield from table(head, rows)
