"""The targets of a run, each with what was measured in the worst of the cases that it is meant for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.footprint import PIECES, POSITION_OPS
from benchmarks.gpu.networks import FUSED, PUBLISHED, SKIPPING
from benchmarks.gpu.rivals import BOTH, FORWARD
from benchmarks.gpu.stages import COMPILED, EAGER, GRAPH
from benchmarks.shapes import parse_shape

Results = dict[str, Any]
CUDA, TRITON = "cuda", "triton"
OP_PARTS = ("floor", "positions", "pieces")
STAGE_PARTS = ("layers", "stages", "compiled", "layers_compiled")


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


def cases_of(results: Results, part: str) -> dict[str, Any]:
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
    for backend in backends_of(results):
        yield from _floor_targets(results, backend)
        yield from _position_targets(results, backend)
        yield from _rival_targets(results, backend)
        yield from _stage_targets(results, backend)
        yield from _piece_targets(results, backend)
        yield from _layer_targets(results, backend)
        yield from _network_targets(results, backend)
        memory = [
            (case["contenders"][backend]["maps"] - 2 * case["depth"], name)
            for name, case in cases_of(results, "memory").items()
            if backend in case["contenders"]
        ]
        yield from _worst(f"{backend}: peak memory, maps beyond 2 T", memory, 4.0, False)
        divergence = [
            (case[backend]["percent_of_forward"]["median"], name)
            for name, case in cases_of(results, "divergence").items()
            if backend in case
        ]
        yield from _worst(f"{backend}: divergence, % of the forward", divergence, 1.0, False)
    slower = [
        (100 * (ops[TRITON] / ops[CUDA] - 1), f"{name}: {op}")
        for name, op, ops in _op_times(results)
        if CUDA in ops and TRITON in ops
    ]
    yield from _worst("triton: % slower than cuda, worst operation", slower, 10.0, False)


def backends_of(results: Results) -> list[str]:
    """Ours, as far as any part has numbers of them."""
    found = {
        backend
        for part in OP_PARTS
        for case in cases_of(results, part).values()
        for op in case["ops"].values()
        for backend in op["backends"]
    }
    found |= {
        b for part in STAGE_PARTS for c in cases_of(results, part).values() for b in c["over"]
    }
    found |= {
        name.split()[1]
        for case in cases_of(results, "networks").values()
        for name in case["over_plain"]
        if not name.startswith(PUBLISHED)
    }
    found |= {
        b for c in cases_of(results, "rivals").values() for p in c.values() for b in p["over"]
    }
    found |= {
        b for c in cases_of(results, "memory").values() for b in c["contenders"] if b != EAGER
    }
    found |= {b for c in cases_of(results, "divergence").values() for b in c}
    return sorted(found)


def _op_times(results: Results) -> Iterator[tuple[str, str, dict[str, float]]]:
    of_parts = {"floor": ("forward", "dots", "gather", "push"), "positions": POSITION_OPS}
    cases = [
        (n, c, ops) for part, ops in of_parts.items() for n, c in cases_of(results, part).items()
    ]
    for name, case, ops in cases:
        if case["exceeds_cache"]:
            for op in ops:
                backends = case["ops"].get(op, {}).get("backends", {})
                yield name, op, {b: n["ms"]["median"] for b, n in backends.items()}


def backward_percent(case: dict[str, Any], backend: str, of: str = "") -> float | None:
    """Least bytes of dots and gather over their time together, in percent of the copy's bandwidth.

    `of`: what their names begin with, where they are not those of layer attention.
    """
    milliseconds = least = copied = 0.0
    for op in ("dots", "gather"):
        found = case["ops"].get(of + op, {})
        if backend not in found.get("backends", {}):
            return None
        milliseconds += found["backends"][backend]["ms"]["median"]
        least += found["least_bytes"]
        copied += found["least_bytes"] / (found["copy_gb_per_s"] * 1e6)  # ms at the copy's rate
    return 100 * copied / milliseconds


def _floor_targets(results: Results, backend: str) -> Iterator[Target]:
    forward, backward = [], []
    for name, case in cases_of(results, "floor").items():
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


def _position_targets(results: Results, backend: str) -> Iterator[Target]:
    """Of the maps beyond the cache: attention at every position, and the mix, each forward and backward."""
    numbers: dict[str, list[tuple[float, str]]] = {}
    for name, case in cases_of(results, "positions").items():
        if not case["exceeds_cache"]:
            continue
        for op in ("position forward", "mix", "mix backward"):
            found = case["ops"].get(op, {}).get("backends", {})
            if backend in found:
                numbers.setdefault(op, []).append((found[backend]["percent_of_copy"], name))
        percent = backward_percent(case, backend, "position ")
        if percent is not None:
            numbers.setdefault("position backward", []).append((percent, name))
    bounds = {
        "position forward": 85.0,
        "position backward": 80.0,
        "mix": 92.0,
        "mix backward": 88.0,
    }
    for op, bound in bounds.items():
        what = f"{backend}: {op}, % of copy bandwidth"
        yield from _worst(what, numbers.get(op, []), bound, True)


def _rival_targets(results: Results, backend: str) -> Iterator[Target]:
    """Inside CUDA graphs, where nobody's Python counts: of the fastest rival, and of PyTorch's own pieces."""
    for what in (FORWARD, BOTH):
        of_rivals, of_eager = [], []
        for name, case in cases_of(results, "rivals").items():
            over = case.get(what + GRAPH, {}).get("over", {}).get(backend, {})
            for rival, numbers in over.items():
                value = numbers["of_medians"]
                if rival == EAGER:
                    of_eager.append((value, name))
                elif rival not in (CUDA, TRITON):
                    of_rivals.append((value, f"{name}: {rival}"))
        start = f"{backend}: position attention, {what}, times faster than"
        yield from _worst(f"{start} the fastest rival", of_rivals, 1.0, True)
        yield from _worst(f"{start} eager", of_eager, 3.0, True)


def _stage_targets(results: Results, backend: str) -> Iterator[Target]:
    def times(part: str, baseline: str) -> Iterator[tuple[float, str]]:
        for name, case in cases_of(results, part).items():
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
        for name, case in cases_of(results, "pieces").items():
            found = case["ops"].get(piece, {}).get("backends", {})
            if case["exceeds_cache"] and backend in found:
                numbers.append((found[backend]["percent_of_copy"], name))
        yield from _worst(f"{backend}: {piece}, % of copy bandwidth", numbers, 85.0, True)


def _layer_targets(results: Results, backend: str) -> Iterator[Target]:
    def times(part: str, baseline: str, depths: range) -> list[tuple[float, str]]:
        return [
            (case["over"][backend][baseline]["of_medians"], name)
            for name, case in cases_of(results, part).items()
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
            for name, case in cases_of(results, "networks").items()
            if name.startswith("resnet50 ") and f"{kind} {backend}" in case["over_plain"]
        ]
        what = f"{backend}: {called}'s training step, of the plain network's"
        yield from _worst(what, numbers, bound, False)
