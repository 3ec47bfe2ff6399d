"""The attention part of a stage, forward and backward: queries, keys and values are given, x <- x + retrieved."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import ela_kernels as ek
from benchmarks.contenders import WrongResultError
from benchmarks.gpu.floor import Save
from benchmarks.gpu.ops import ROUNDING, refusing
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import COMPILED_CASES, SMOKE_CASES, STAGE_CASES, Case
from benchmarks.gpu.timing import Budget, graphed, synchronize, take_turns
from benchmarks.measure import Contender, ratio, summarize
from ela_kernels.ops.layer_attention.reference import layer_attention_reference

EAGER, COMPILED, GRAPH = "eager", "compiled", " in a graph"
BASELINES = (EAGER, COMPILED)

# Maps up to this size also run inside CUDA graphs: with larger ones the launches are hidden behind the kernels.
_SMALL_MAP_BYTES = 40e6

# Distance from float64, in L2 norm. Of the float32 sums, in units of the root mean square norm of a kind of result: the
# query of a first layer has no influence and a gradient of zero. Eager PyTorch and the kernels are at 1e-7 to 1e-6.
_FLOAT32_TOLERANCE = 2e-5
# Of half types, in roundings of the result itself: x is rounded at every layer, independently; each gradient of ours
# once. The baselines round scores, weights, dot products and T partial gradients as well: up to three roundings were
# seen on the CPU. A form that takes a wrong layer or head is off by its whole size, 256 roundings of bfloat16.
_BASELINE_ROUNDINGS = 16


class AttentionStage:
    """The leaves of one stage, shared by all contenders: a query, key and value a layer, and the output gradient."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        self.case, self.device = case, device
        depth = case.shape.depth
        self.x = case.new_map(device, generator)
        self.dout = case.new_map(device, generator)
        self.queries = [case.new_row(device, generator).requires_grad_() for _ in range(depth)]
        self.keys = [case.new_row(device, generator).requires_grad_() for _ in range(depth)]
        self.values = [case.new_map(device, generator).requires_grad_() for _ in range(depth)]
        # The first layer has one key alone: its query has no influence, and its gradient is zero.
        self.leaves = [*self.queries, *self.keys, *self.values]

    def eager(
        self, x: Tensor, queries: list[Tensor], keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """The published form: keys and values concatenated anew at every layer, matrix products."""
        shape = self.case.shape
        batch, heads, head_dim = shape.batch, shape.heads, shape.head_dim
        all_keys = all_values = None
        for q, k, v in zip(queries, keys, values, strict=True):
            k = k.reshape(batch, heads, 1, head_dim)
            flat = v.reshape(batch, heads, 1, head_dim * shape.size * shape.size)
            all_keys = k if all_keys is None else torch.cat((all_keys, k), dim=2)
            all_values = flat if all_values is None else torch.cat((all_values, flat), dim=2)
            query = q.reshape(batch, heads, 1, head_dim) * head_dim**-0.5
            weights = (query @ all_keys.transpose(2, 3)).softmax(dim=-1)
            x = x + (weights @ all_values).reshape(v.shape)
        return x

    def ours(
        self, x: Tensor, queries: list[Tensor], keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """The fused op through a LayerHistory; the divergence is computed as well."""
        history = ek.LayerHistory()
        for q, k, v in zip(queries, keys, values, strict=True):
            x = x + history.attend(q, k, v, heads=self.case.shape.heads)
        return x

    def step(self, forward: Callable[..., Tensor], backend: str | None = None) -> list[Tensor]:
        """Output, and the gradients of all queries, keys and values."""
        if backend is not None:
            with ek.use_backend(backend):
                return self.step(forward)
        out = forward(self.x, self.queries, self.keys, self.values)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout, allow_unused=True)]

    def expected(self) -> list[Tensor]:
        """The same in float64, by the reference op and autograd."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        depth = self.case.shape.depth
        queries, keys, values = leaves[:depth], leaves[depth : 2 * depth], leaves[2 * depth :]
        out = self.x.double()
        for t, q in enumerate(queries, start=1):
            retrieved, _, _ = layer_attention_reference(
                q, keys[:t], values[:t], self.case.shape.heads, self.case.shape.head_dim**-0.5
            )
            out = out + retrieved
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout.double())]

    def check(self, name: str, results: list[Tensor], expected: list[Tensor]) -> float:
        """Refuse results that differ from float64; return how far the worst is off, relative to its kind."""
        depth = self.case.shape.depth
        roundings = _BASELINE_ROUNDINGS if name in BASELINES else 1
        kinds = {
            "output": (0, 1, depth**0.5),
            "gradients of the queries": (1, 1 + depth, roundings),
            "gradients of the keys": (1 + depth, 1 + 2 * depth, roundings),
            "gradients of the values": (1 + 2 * depth, 1 + 3 * depth, roundings),
        }
        worst = 0.0
        for kind, (start, stop, count) in kinds.items():
            pairs = list(zip(results[start:stop], expected[start:stop], strict=True))
            norms = [float(want.norm()) for _, want in pairs]
            size = (sum(norm**2 for norm in norms) / len(norms)) ** 0.5
            for (got, want), norm in zip(pairs, norms, strict=True):
                off = float((want if got is None else got.double() - want).norm())
                # A baseline's rounding errors are those of its intermediate results, not of a gradient that is small.
                own = max(norm, size) if name in BASELINES else norm
                allowed = _FLOAT32_TOLERANCE * size + count * ROUNDING[self.case.dtype] * own
                if not off <= allowed:
                    raise WrongResultError(
                        f"{kind} are {off / size:.2e} away from the reference (of their norm); allowed is "
                        f"{allowed / size:.1e}. A wrong result is not timed"
                    )
                worst = max(worst, off / size)
        return worst


def contenders_of(
    stage: AttentionStage, setting: Setting, compiled: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """The steps by name: the baselines, and ours on every backend."""
    steps: dict[str, Callable[[], list[Tensor]]] = {EAGER: partial(stage.step, stage.eager)}
    if compiled:
        # In a smoke run only traced: the compiler would take longer than everything else.
        kind = "aot_eager" if setting.smoke else "inductor"
        form = torch.compile(stage.eager, fullgraph=True, dynamic=False, backend=kind)
        steps[COMPILED] = partial(stage.step, form)
    for backend in setting.backends:
        steps[backend] = partial(stage.step, stage.ours, backend)
    return steps


def eager_bytes(case: Case) -> int:
    """About what the eager step holds at its peak: all concatenations, their gradients, inputs and outputs."""
    depth = case.shape.depth
    return (depth * (depth + 1) // 2 + 6 * depth + 8) * case.map_bytes


def measure_case(
    case: Case, setting: Setting, seconds: float, compiled: bool, refused: list[str]
) -> dict[str, Any]:
    """Times of all contenders that pass their check, and how much longer each takes than ours."""
    torch.compiler.reset()
    stage = AttentionStage(case, setting.device)
    expected = stage.expected()
    return time_contenders(
        case.name,
        case.map_bytes,
        contenders_of(stage, setting, compiled),
        lambda name, results: stage.check(name, results, expected),
        setting,
        seconds,
        refused,
        with_graphs=not compiled,
    )


def time_contenders(
    case_name: str,
    map_bytes: int,
    steps: dict[str, Callable[[], list[Tensor]]],
    check: Callable[[str, list[Tensor]], float],
    setting: Setting,
    seconds: float,
    refused: list[str],
    with_graphs: bool,
) -> dict[str, Any]:
    """Times of the steps that pass `check`, with small maps inside CUDA graphs too, and how much longer than ours."""
    report: dict[str, Any] = {"map_bytes": map_bytes, "contenders": {}}
    timed: dict[str, Contender] = {}
    for name, step in steps.items():
        with refusing(f"{case_name}: {name}", refused):
            start = time.perf_counter()
            results = step()
            synchronize(setting.device)
            first = time.perf_counter() - start
            error = check(name, results)
            report["contenders"][name] = {"largest_error": error, "first_call_seconds": first}
            timed[name] = step
            del results
    del check  # and what it compares with
    if map_bytes <= _SMALL_MAP_BYTES and with_graphs:
        for name in list(timed):
            with refusing(f"{case_name}: {name}{GRAPH}", refused):
                timed[name + GRAPH] = graphed(timed[name], setting.device)
                report["contenders"][name + GRAPH] = {}
    taken = take_turns(timed, setting.device, setting.rounds, seconds)
    for name, times in taken.items():
        report["contenders"][name]["ms"] = summarize(times)._asdict()
    report["over"] = {
        backend: {
            name: ratio(times, taken[backend]) for name, times in taken.items() if name != backend
        }
        for backend in setting.backends
        if backend in taken
    }
    return report


def measure(setting: Setting, budget: Budget, save: Save, compiled: bool = False) -> None:
    """All cases, each saved as soon as it is there; what the budget does not reach is named."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    cases = COMPILED_CASES if compiled else STAGE_CASES
    if setting.smoke:
        cases = SMOKE_CASES[:1] if compiled else SMOKE_CASES
    for case in cases:
        if (budget.left < 4 and report["cases"]) or eager_bytes(case) > setting.free_bytes():
            report["left_out"].append(case.name)
            continue
        seconds = min(3.0, max(budget.left / 4, 0.5))
        report["cases"][case.name] = measure_case(
            case, setting, seconds, compiled, report["refused"]
        )
        save(report)
    save(report)


def measure_compiled(setting: Setting, budget: Budget, save: Save) -> None:
    """The same with `torch.compile` of the eager form, which takes a while to compile."""
    measure(setting, budget, save, compiled=True)
