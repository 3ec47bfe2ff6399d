"""Tables of targets and results, and pictures, from what the parts have written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks.gpu.targets import (
    OP_PARTS,
    STAGE_PARTS,
    Results,
    backends_of,
    cases_of,
    targets,
)
from benchmarks.tables import table


def text_report(results: Results) -> str:
    """All tables, the one of the targets last."""
    machine = results.get("machine", {})
    lines = [
        f"{machine.get('device')}, torch {machine.get('torch')}, triton {machine.get('triton')}, "
        f"{machine.get('date')}",
        "",
    ]
    for section in (
        _floor_lines,
        _stage_lines,
        _network_lines,
        _memory_lines,
        _small_lines,
        _rival_lines,
    ):
        lines += section(results)
    lines += _refused_lines(results)
    return "\n".join(lines) + "\n" + target_table(results)


def target_table(results: Results) -> str:
    """Targets and results, each in its worst case."""
    rows = [target.row() for target in targets(results)]
    if not rows:
        return "There are no numbers yet that a target is for.\n"
    return "\n".join(table(["", "target", "result", "met", "worst case"], rows)) + "\n"


def _refused_lines(results: Results) -> list[str]:
    refused = [line for part in results["parts"].values() for line in part.get("refused", [])]
    if not refused:
        return []
    return ["Refused, and therefore not timed", "", *(f"- {line}" for line in refused), ""]


def _floor_lines(results: Results) -> list[str]:
    lines = []
    for part in OP_PARTS:
        rows = []
        for name, case in cases_of(results, part).items():
            for op, found in case["ops"].items():
                cells = [
                    f"{backend} {n['ms']['median']:.4f} ms, {n['percent_of_copy']:.0f} %"
                    for backend, n in found["backends"].items()
                ]
                rows.append([name, op, f"{found['copy_gb_per_s']:.0f}", " / ".join(cells)])
        if rows:
            head = [f"{part}: % of copy bandwidth", "", "copy GB/s", "each backend"]
            lines += [*table(head, rows), ""]
    return lines


def _network_lines(results: Results) -> list[str]:
    rows = []
    for name, case in cases_of(results, "networks").items():
        for contender, found in case["contenders"].items():
            ms = found["ms"]
            over = case["over_plain"].get(contender)
            rows.append(
                [
                    name,
                    contender,
                    f"{ms['median']:.3f} [{ms['q1']:.3f}, {ms['q3']:.3f}]",
                    "1" if over is None else f"{over['of_medians']:.2f}",
                ]
            )
    if not rows:
        return []
    head = ["networks: a training step, bfloat16 autocast, channels_last", "", "ms", "of plain"]
    return [*table(head, rows), ""]


def _stage_lines(results: Results) -> list[str]:
    lines = []
    for part in STAGE_PARTS:
        rows = []
        for name, case in cases_of(results, part).items():
            for contender, found in case["contenders"].items():
                if "ms" not in found:
                    continue
                ms = found["ms"]
                over = [
                    f"{numbers[contender]['of_medians']:.2f}" if contender in numbers else "1"
                    for numbers in case["over"].values()
                ]
                time = f"{ms['median']:.3f} [{ms['q1']:.3f}, {ms['q3']:.3f}]"
                rows.append([name, contender, time, " / ".join(over)])
        if rows:
            head = [f"{part}: forward and backward", "", "ms", f"over {_slashed(results)}"]
            lines += [*table(head, rows), ""]
    return lines


def _slashed(results: Results) -> str:
    return " / ".join(backends_of(results))


def _memory_lines(results: Results) -> list[str]:
    rows = [
        [name, contender, f"{found['maps']:.1f}", str(2 * case["depth"] + 4)]
        for name, case in cases_of(results, "memory").items()
        for contender, found in case["contenders"].items()
    ]
    return [*table(["memory", "", "maps", "2 T + 4"], rows), ""] if rows else []


def _small_lines(results: Results) -> list[str]:
    lines = []
    rows = [
        [name, backend, f"{p['median']:.2f} [{p['q1']:.2f}, {p['q3']:.2f}]"]
        for name, case in cases_of(results, "divergence").items()
        for backend, found in case.items()
        for p in (found["percent_of_forward"],)
    ]
    if rows:
        lines += [*table(["divergence", "", "% of the forward"], rows), ""]
    contenders = results["parts"].get("overhead", {}).get("contenders", {})
    rows = [
        [name, *(f"{found[p]['median']:.0f}" for p in ("forward", "backward"))]
        for name, found in contenders.items()
    ]
    if rows:
        lines += [*table(["overhead, CPU us a layer", "forward", "backward"], rows), ""]
    return lines


def _rival_lines(results: Results) -> list[str]:
    part = results["parts"].get("rivals")
    if part is None:
        return []
    lines = [f"{name}: {state}" for name, state in part["rivals"].items()]
    rows = []
    for name, case in part["cases"].items():
        for what, found in case.items():
            for contender, ms in found["ms"].items():
                over = [
                    f"{numbers[contender]['of_medians']:.2f}" if contender in numbers else "1"
                    for numbers in found["over"].values()
                ]
                rows.append([name, what, contender, f"{ms['median']:.3f}", " / ".join(over)])
    head = ["rivals: attention residuals", "", "", "ms", f"over {_slashed(results)}"]
    return [*lines, "", *(table(head, rows) if rows else []), ""]


def write_report(results: Results, folder: Path) -> str:
    """Write `tables.md`; return the table of targets, and before it what was refused."""
    (folder / "tables.md").write_text(text_report(results))
    return "\n".join([*_refused_lines(results), target_table(results)])


def write_pictures(results: Results, folder: Path) -> None:
    """Write the pictures, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks.gpu.pictures import draw

        draw(results, folder)
