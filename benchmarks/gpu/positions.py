"""Attention at every position, and the sum by given weights, each operation against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.floor import Save, measure_cases
from benchmarks.gpu.footprint import POSITION_OPS, position_bytes
from benchmarks.gpu.ops import distance, tolerance
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import FEW_POSITION_CASES, POSITION_CASES, SMOKE_CASES, Case
from benchmarks.gpu.timing import Budget
from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.position import PositionCall, PositionLeft, PositionNeeds
from ela_kernels.ops.depth_mix.reference import depth_mix_backward_reference, depth_mix_reference
from ela_kernels.ops.position_attention.reference import (
    position_attention_backward_reference,
    position_attention_reference,
)

_EPS = 1e-6

Results = dict[str, Tensor | None]


class PositionOps:
    """The last retrieval of a stage, from values that are their own keys by one query; and a mix of the same values.

    `seed` makes another set of inputs: several sets are timed in turn where one would stay in the cache.
    """

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = case.shape
        depth, planes = shape.depth, (shape.batch, shape.depth, shape.size, shape.size)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        self.case = case
        self.values = [case.new_map(device, generator) for _ in range(depth)]
        self.douts = [case.new_map(device, generator) for _ in range(depth)]
        row = normal(shape.channels) * shape.channels**-0.5  # scores of order one
        self.call = PositionCall(row, None, self.values, None, True, _EPS, None, False)
        self.weights = position_attention_reference(self.call)[1]
        self.left = [
            PositionLeft(row, None, normal(*planes).softmax(1), normal(3, *planes), dout, 0)
            for dout in self.douts
        ]
        self.mix_weights = normal(shape.batch, shape.heads, depth)

    def run(self, op: str, kernels: KernelBackend) -> Results:
        """What an operation gives, by name."""
        call, values, dout = self.call, self.values, self.douts[-1]
        every = [True] * len(values)
        if op == "position forward":
            out, weights, _ = kernels.position_attend(call)
            return {"out": out, "weights": weights}
        if op == "position gather":
            return {"dvalue": kernels.position_gather(values[0], self.left, 0, False)}
        if op == "mix":
            return {"out": kernels.mix(self.mix_weights, values, False)}
        if op == "mix backward":
            mixed = kernels.mix_backward(self.mix_weights, values, dout, False, True, every)
            return {"dweights": mixed.weights} | _numbered(mixed.values)
        push = op == "position push"
        needs = PositionNeeds(True, False, False, every if push else (), ())
        found = kernels.position_attend_backward(call, self.weights, dout, None, None, needs)
        own: Results = {"drow": found.row}
        return own | (_numbered(found.values) if push else {"coefficients": found.coefficients})

    def expected(self, op: str) -> dict[str, Tensor]:
        """The same in float64; of a retrieval's coefficients the gradients that these stand for."""
        values, dout = [v.double() for v in self.values], self.douts[-1].double()
        call = self.call._replace(row=self.call.row.double(), values=values)
        mix_weights = self.mix_weights.double()
        if op == "position forward":
            out, weights, _ = position_attention_reference(call)
            return {"out": out, "weights": weights}
        if op == "position gather":
            return {"dvalue": sum((self._part(m, 0) for m in self.left), torch.zeros_like(dout))}
        if op == "mix":
            return {"out": depth_mix_reference(mix_weights, values, False)}
        if op == "mix backward":
            dweights, mixed = depth_mix_backward_reference(
                mix_weights, values, dout, False, True, [True] * len(values)
            )
            assert dweights is not None
            return {"dweights": dweights} | {
                n: d for n, d in _numbered(mixed).items() if d is not None
            }
        drow, _, dvalues, _, _ = position_attention_backward_reference(
            call, self.weights.double(), dout, None, None
        )
        return {"drow": drow} | {f"dvalues[{t}]": d for t, d in enumerate(dvalues)}

    def _part(self, left: PositionLeft, index: int) -> Tensor:
        """What one retrieval adds to the gradient of the value at `index`: `w * dout + alpha * row - beta * value`."""
        w, alpha, beta = (
            plane[:, index].double().unsqueeze(1)
            for plane in (left.weights, left.coefficients[0], left.coefficients[1])
        )
        assert left.dout is not None
        row = left.row.double().reshape(-1, 1, 1)
        return w * left.dout.double() + alpha * row - beta * self.values[index].double()

    def check(self, op: str, backend: str) -> float:
        """Refuse an operation whose results differ from float64; return how far the worst is off.

        Freed memory is filled with NaN before, so that a result that nothing wrote shows.
        """
        poisoned = [torch.full_like(v, float("nan")) for v in self.values[:3]]
        poisoned += [torch.full_like(m.coefficients, float("nan")) for m in self.left[:2]]
        del poisoned
        found, worst = self.run(op, KERNELS[backend]), 0.0
        coefficients = found.pop("coefficients", None)
        if coefficients is not None:
            left = PositionLeft(self.call.row, None, self.weights, coefficients, self.douts[-1], 0)
            found |= {f"dvalues[{t}]": self._part(left, t) for t in range(len(self.values))}
        for name, want in self.expected(op).items():
            got = found[name]
            is_rounded = got is not None and got.dtype == self.case.dtype
            allowed = tolerance(self.case.dtype if is_rounded else torch.float32)
            worst = max(worst, distance(f"{backend} {op}: {name}", got, want, allowed))
        return worst

    def operation(self, op: str, backend: str) -> Callable[[], object]:
        """One operation of one backend, as something to time."""
        return partial(self.run, op, KERNELS[backend])


def _numbered(dvalues: list[Tensor | None]) -> Results:
    return {f"dvalues[{t}]": d for t, d in enumerate(dvalues)}


def cases_of(setting: Setting) -> list[Case]:
    """Most important first."""
    if setting.smoke:
        return SMOKE_CASES[:1] if setting.few else SMOKE_CASES
    return FEW_POSITION_CASES if setting.few else POSITION_CASES


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """All cases, each saved as soon as it is there; what the budget does not reach is named."""

    def inputs(case: Case, seed: int) -> PositionOps:
        return PositionOps(case, setting.device, seed)

    def least(case: Case) -> dict[str, int]:
        return {op: position_bytes(op, case, case.shape.depth) for op in POSITION_OPS}

    measure_cases(cases_of(setting), inputs, least, setting, budget, save, seconds=3)
