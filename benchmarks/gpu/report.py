"""Tables of targets and results, and pictures, from what the parts have written."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.footprint import PIECES
from benchmarks.gpu.networks import FUSED, PUBLISHED, SKIPPING
from benchmarks.gpu.stages import COMPILED, EAGER
from benchmarks.shapes import parse_shape
from benchmarks.tables import table

Results = dict[str, Any]
CUDA, TRITON = "cuda", "triton"
_STAGE_PARTS = ("layers", "stages", "compiled", "layers_compiled")


class Target(NamedTuple):
    """A ratio to reach, and what was measured in the worst of the cases that it is meant for."""

    what: str
    case: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """True when the measured number reaches the bound."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> list[str]:
        """As it stands in the table."""
        sign = ">=" if self.at_least else "<="
        return [
            self.what,
            f"{sign} {self.bound:g}",
            f"{self.value:.2f}",
            "yes" if self.met else "NO",
            self.case,
        ]


def _cases(results: Results, part: str) -> dict[str, Any]:
    found: dict[str, Any] = results["parts"].get(part, {}).get("cases", {})
    return found


def _depth(case: str) -> int:
    return parse_shape(case.split()[0]).depth


def _is_cifar(case: str) -> bool:
    shape = parse_shape(case.split()[0])
    return shape.batch == 128 and shape.size <= 32 and shape.depth == 12


def _worst(
    what: str, numbers: list[tuple[float, str]], bound: float, at_least: bool
) -> Iterator[Target]:
    if numbers:
        value, case = min(numbers) if at_least else max(numbers)
        yield Target(what, case, value, bound, at_least)


def targets(results: Results) -> list[Target]:
    """All targets that there are numbers for, each with its worst case."""
    return list(_targets(results))


def _targets(results: Results) -> Iterator[Target]:
    for backend in _backends(results):
        yield from _floor_targets(results, backend)
        yield from _stage_targets(results, backend)
        yield from _piece_targets(results, backend)
        yield from _layer_targets(results, backend)
        yield from _network_targets(results, backend)
        memory = [
            (case["contenders"][backend]["maps"] - 2 * case["depth"], name)
            for name, case in _cases(results, "memory").items()
            if backend in case["contenders"]
        ]
        yield from _worst(f"{backend}: peak memory, maps beyond 2 T", memory, 4.0, False)
        divergence = [
            (case[backend]["percent_of_forward"]["median"], name)
            for name, case in _cases(results, "divergence").items()
            if backend in case
        ]
        yield from _worst(f"{backend}: divergence, % of the forward", divergence, 1.0, False)
    slower = [
        (100 * (ops[TRITON] / ops[CUDA] - 1), f"{name}: {op}")
        for name, op, ops in _op_times(results)
        if CUDA in ops and TRITON in ops
    ]
    yield from _worst("triton: % slower than cuda, worst operation", slower, 10.0, False)


def _backends(results: Results) -> list[str]:
    """Ours, as far as any part has numbers of them."""
    found = {
        backend
        for case in _cases(results, "floor").values()
        for op in case["ops"].values()
        for backend in op["backends"]
    }
    found |= {b for part in _STAGE_PARTS for c in _cases(results, part).values() for b in c["over"]}
    found |= {
        name.split()[1]
        for case in _cases(results, "networks").values()
        for name in case["over_plain"]
        if not name.startswith(PUBLISHED)
    }
    found |= {
        backend
        for case in _cases(results, "pieces").values()
        for op in case["ops"].values()
        for backend in op["backends"]
    }
    found |= {b for c in _cases(results, "memory").values() for b in c["contenders"] if b != EAGER}
    found |= {b for c in _cases(results, "divergence").values() for b in c}
    return sorted(found)


def _op_times(results: Results) -> Iterator[tuple[str, str, dict[str, float]]]:
    for name, case in _cases(results, "floor").items():
        if case["exceeds_cache"]:
            for op in ("forward", "dots", "gather", "push"):
                backends = case["ops"].get(op, {}).get("backends", {})
                yield name, op, {b: n["ms"]["median"] for b, n in backends.items()}


def backward_percent(case: dict[str, Any], backend: str) -> float | None:
    """Least bytes of dots and gather over their time together, in percent of the copy's bandwidth."""
    milliseconds = least = copied = 0.0
    for op in ("dots", "gather"):
        found = case["ops"].get(op, {})
        if backend not in found.get("backends", {}):
            return None
        milliseconds += found["backends"][backend]["ms"]["median"]
        least += found["least_bytes"]
        copied += found["least_bytes"] / (found["copy_gb_per_s"] * 1e6)  # ms at the copy's rate
    return 100 * copied / milliseconds


def _floor_targets(results: Results, backend: str) -> Iterator[Target]:
    forward, backward = [], []
    for name, case in _cases(results, "floor").items():
        if not case["exceeds_cache"]:
            continue
        numbers = case["ops"].get("forward", {}).get("backends", {})
        if backend in numbers:
            forward.append((numbers[backend]["percent_of_copy"], name))
        percent = backward_percent(case, backend)
        if percent is not None:
            backward.append((percent, name))
    yield from _worst(f"{backend}: forward, % of copy bandwidth", forward, 92.0, True)
    yield from _worst(f"{backend}: backward, % of copy bandwidth", backward, 88.0, True)


def _stage_targets(results: Results, backend: str) -> Iterator[Target]:
    def times(part: str, baseline: str) -> Iterator[tuple[float, str]]:
        for name, case in _cases(results, part).items():
            over = case["over"].get(backend, {})
            if baseline in over:
                yield over[baseline]["of_medians"], name

    eager = list(times("stages", EAGER))
    for depth, bound in ((12, 5.0), (23, 8.0)):
        numbers = [(v, n) for v, n in eager if _depth(n) == depth and not _is_cifar(n)]
        what = f"{backend}: stage, T = {depth}, times faster than eager"
        yield from _worst(what, numbers, bound, True)
    cifar = [(v, n) for v, n in eager if _is_cifar(n)]
    yield from _worst(f"{backend}: CIFAR stages, times faster than eager", cifar, 2.0, True)
    compiled = list(times("compiled", COMPILED))
    what = f"{backend}: stage, times faster than torch.compile"
    yield from _worst(what, compiled, 2.5, True)


def _piece_targets(results: Results, backend: str) -> Iterator[Target]:
    """Of the maps beyond the cache, forward and backward of what makes key and value, and of a block's end."""
    for piece in PIECES:
        numbers = []
        for name, case in _cases(results, "pieces").items():
            found = case["ops"].get(piece, {}).get("backends", {})
            if case["exceeds_cache"] and backend in found:
                numbers.append((found[backend]["percent_of_copy"], name))
        yield from _worst(f"{backend}: {piece}, % of copy bandwidth", numbers, 85.0, True)


def _layer_targets(results: Results, backend: str) -> Iterator[Target]:
    def times(part: str, baseline: str, depths: range) -> list[tuple[float, str]]:
        return [
            (case["over"][backend][baseline]["of_medians"], name)
            for name, case in _cases(results, part).items()
            if baseline in case["over"].get(backend, {}) and _depth(name) in depths
        ]

    every, shallow, deep = range(1, 10**6), range(3, 12), range(12, 10**6)
    what = f"{backend}: whole layer"
    eager = times("layers", EAGER, deep)
    cifar = [(v, n) for v, n in eager if _is_cifar(n)]
    beyond = [(v, n) for v, n in eager if not _is_cifar(n)]
    yield from _worst(f"{what}, T >= 12, times faster than eager", beyond, 8.0, True)
    shallow_times = times("layers", EAGER, shallow)
    yield from _worst(f"{what}, T < 12, times faster than eager", shallow_times, 4.0, True)
    yield from _worst(f"{what}, CIFAR stages, times faster than eager", cifar, 2.0, True)
    compiled = times("layers_compiled", COMPILED, every)
    yield from _worst(f"{what}, times faster than torch.compile", compiled, 3.0, True)


def _network_targets(results: Results, backend: str) -> Iterator[Target]:
    for kind, called, bound in ((FUSED, "fused MRLA", 1.3), (SKIPPING, "ELA", 1.15)):
        numbers = [
            (case["over_plain"][f"{kind} {backend}"]["of_medians"], name)
            for name, case in _cases(results, "networks").items()
            if name.startswith("resnet50 ") and f"{kind} {backend}" in case["over_plain"]
        ]
        what = f"{backend}: {called}'s training step, of the plain network's"
        yield from _worst(what, numbers, bound, False)


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
    for part in ("floor", "pieces"):
        rows = []
        for name, case in _cases(results, part).items():
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
    for name, case in _cases(results, "networks").items():
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
    for part in _STAGE_PARTS:
        rows = []
        for name, case in _cases(results, part).items():
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
    return " / ".join(_backends(results))


def _memory_lines(results: Results) -> list[str]:
    rows = [
        [name, contender, f"{found['maps']:.1f}", str(2 * case["depth"] + 4)]
        for name, case in _cases(results, "memory").items()
        for contender, found in case["contenders"].items()
    ]
    return [*table(["memory", "", "maps", "2 T + 4"], rows), ""] if rows else []


def _small_lines(results: Results) -> list[str]:
    lines = []
    rows = [
        [name, backend, f"{p['median']:.2f} [{p['q1']:.2f}, {p['q3']:.2f}]"]
        for name, case in _cases(results, "divergence").items()
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
    rows = [
        [name, what, contender, f"{ms['median']:.3f}"]
        for name, case in part["cases"].items()
        for what, found in case.items()
        for contender, ms in found["ms"].items()
    ]
    return [*lines, "", *(table(["rivals", "", "", "ms"], rows) if rows else []), ""]


def write_report(results: Results, folder: Path) -> str:
    """Write `tables.md`; return the table of targets, and before it what was refused."""
    (folder / "tables.md").write_text(text_report(results))
    return "\n".join([*_refused_lines(results), target_table(results)])


def write_pictures(results: Results, folder: Path) -> None:
    """Write the pictures, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks.gpu.pictures import draw

        draw(results, folder)
