"""A stage of whole layers, forward and backward, from its input: `x <- x + layer(x)`, and with norm and activation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.contenders import WrongResultError
from benchmarks.gpu.floor import Save
from benchmarks.gpu.ops import ROUNDING
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.shapes import (
    COMPILED_LAYER_CASES,
    FEW_CASES,
    LAYER_CASES,
    SMOKE_CASES,
    Case,
)
from benchmarks.gpu.stages import BASELINES, COMPILED, EAGER, eager_bytes, time_contenders
from benchmarks.gpu.timing import Budget
from ela_kernels.modules.published import ConcatHistory, ConcatLayerAttention

LAYER, BLOCK = "layer", "block"
KINDS = (LAYER, BLOCK)

# Relative L2 distance from float64, of all that is of one kind together. In float32 as on the CPU: the kernels are at
# 1e-6 to 4e-6; and where a ReLU's input is within rounding of zero it passes a whole gradient or none.
_OUTPUT_TOLERANCE = 2e-5
_GRADIENT_TOLERANCE = {LAYER: 2e-5, BLOCK: 1e-2}
# The baselines' convolutions over the channels run in TensorFloat32 by PyTorch's default.
_BASELINE_TOLERANCE = 5e-2
# Half types round x, value and retrieval at every layer, and so do the baselines: ours may be this many roundings
# off, or twice as far as the baseline is.
_ROUNDINGS = 16


class LayerStage:
    """Published layers, with a norm each in a stage of blocks, and ours with the same parameters."""

    def __init__(self, case: Case, device: torch.device, kind: str, seed: int = 0) -> None:
        shape = case.shape
        torch.manual_seed(seed)
        generator = torch.Generator(device=device).manual_seed(seed)
        self.case, self.kind = case, kind
        size = shape.channels, shape.head_dim
        self.layers = nn.ModuleList(ConcatLayerAttention(*size) for _ in range(shape.depth))
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(shape.channels) for _ in range(shape.depth if kind == BLOCK else 0)
        )
        for layer in self.layers:
            # Without a norm the maps would grow with depth, and rounding errors with them.
            nn.init.normal_(layer.Wv.weight, std=1 / (3 * shape.depth))
        self.layers.to(device, case.dtype)
        self.norms.to(device, case.dtype)
        self.ours = nn.ModuleList()
        for i, theirs in enumerate(self.layers):
            block = ek.ELA(*size).to(device, case.dtype)
            assert block.attn is not None
            block.attn.Wq, block.attn.Wk, block.attn.Wv = theirs.Wq, theirs.Wk, theirs.Wv
            if kind == BLOCK:
                block.norm = self.norms[i]
            self.ours.append(block if kind == BLOCK else block.attn)
        # Channels with means of their own, as activations have: else all queries are zero and all weights alike.
        means = torch.randn(
            shape.batch, shape.channels, 1, 1, generator=generator, device=device, dtype=case.dtype
        )
        self.x = (case.new_map(device, generator) + means).requires_grad_()
        self.dout = case.new_map(device, generator)
        self.parameters = dict(self.ours.named_parameters())

    def eager(self, x: Tensor) -> Tensor:
        """The published form: concatenates at every layer."""
        history = ConcatHistory()
        for i, layer in enumerate(self.layers):
            out = layer(x, history)
            x = x + (self.norms[i](out).relu() if self.kind == BLOCK else out)
        return x

    def fused(self, x: Tensor, modules: nn.ModuleList | None = None) -> Tensor:
        """The kernels of a whole layer or block, where the backend has them."""
        history = ek.LayerHistory()
        for module in self.ours if modules is None else modules:
            x = module(x, history) if self.kind == BLOCK else module(x, history, residual=True)
        return x

    def step(self, forward: Callable[[Tensor], Tensor], backend: str | None = None) -> list[Tensor]:
        """Output, and the gradients of the input and of every parameter."""
        if backend is not None:
            with ek.use_backend(backend):
                return self.step(forward)
        out = forward(self.x)
        leaves = [self.x, *self.parameters.values()]
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout)]

    def expected(self) -> list[Tensor]:
        """The same in float64, by PyTorch's own pieces."""
        modules = copy.deepcopy(self.ours).double()
        x = self.x.detach().double().requires_grad_()
        with ek.use_backend("eager"):
            out = self.fused(x, modules)
            grads = torch.autograd.grad(out, [x, *modules.parameters()], self.dout.double())
        return [out.detach(), *grads]

    def errors(self, results: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        """Relative L2 distances of output and gradients, those of one kind of parameter together."""
        names = ["output", "gradient of x", *(_kind_of(name) for name in self.parameters)]
        off: dict[str, float] = {}
        norm: dict[str, float] = {}
        for name, got, want in zip(names, results, expected, strict=True):
            off[name] = off.get(name, 0.0) + float((got.double() - want).square().sum())
            norm[name] = norm.get(name, 0.0) + float(want.square().sum())
        return {name: (off[name] / norm[name]) ** 0.5 for name in off}

    def checker(self, expected: list[Tensor]) -> Callable[[str, list[Tensor]], float]:
        """Refuses results that are too far from float64; returns how far the worst is off."""
        of_baseline: dict[str, float] = {}

        def check(name: str, results: list[Tensor]) -> float:
            found = self.errors(results, expected)
            if name in BASELINES:
                of_baseline.update(found)
            for what, error in found.items():
                allowed = self._allowed(what, name, of_baseline.get(what, 0.0))
                if not error <= allowed:
                    raise WrongResultError(
                        f"{what}: {error:.2e} away from float64; allowed is {allowed:.1e}. A wrong result is not timed"
                    )
            return max(found.values())

        return check

    def _allowed(self, what: str, name: str, of_baseline: float) -> float:
        own = _OUTPUT_TOLERANCE if what == "output" else _GRADIENT_TOLERANCE[self.kind]
        rounding = _ROUNDINGS * ROUNDING[self.case.dtype]
        if name in BASELINES:
            return max(_BASELINE_TOLERANCE, 1.0 if rounding else 0.0)
        return own + rounding if not rounding else max(own + rounding, 2 * of_baseline)


def _kind_of(parameter: str) -> str:
    parts = [part for part in parameter.split(".") if not part.isdigit() and part != "attn"]
    return "gradients of " + ".".join(parts)


def contenders_of(
    stage: LayerStage, setting: Setting, compiled: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """The steps by name: the baselines, and ours on every backend."""
    steps: dict[str, Callable[[], list[Tensor]]] = {EAGER: partial(stage.step, stage.eager)}
    if compiled:
        kind = "aot_eager" if setting.smoke else "inductor"  # in a smoke run only traced
        form = torch.compile(stage.eager, fullgraph=True, dynamic=False, backend=kind)
        steps[COMPILED] = partial(stage.step, form)
    for backend in setting.backends:
        steps[backend] = partial(stage.step, stage.fused, backend)
    return steps


def cases_of(setting: Setting, compiled: bool) -> list[Case]:
    """Most important first."""
    if setting.smoke:
        return SMOKE_CASES[:1] if compiled or setting.few else SMOKE_CASES[::2]
    if setting.few:
        return FEW_CASES
    return COMPILED_LAYER_CASES if compiled else LAYER_CASES


def measure(setting: Setting, budget: Budget, save: Save, compiled: bool = False) -> None:
    """All cases, layers and blocks, each saved as soon as it is there; what the budget does not reach is named."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": []}
    for case in cases_of(setting, compiled):
        for kind in KINDS:
            name = f"{case.name} {kind}"
            # The norm keeps two maps more a layer.
            if (budget.left < 4 and report["cases"]) or 2 * eager_bytes(
                case
            ) > setting.free_bytes():
                report["left_out"].append(name)
                continue
            torch.compiler.reset()
            stage = LayerStage(case, setting.device, kind)
            seconds = min(2.0, max(budget.left / 4, 0.5))
            report["cases"][name] = time_contenders(
                name,
                case.map_bytes,
                contenders_of(stage, setting, compiled),
                stage.checker(stage.expected()),
                setting,
                seconds,
                report["refused"],
                with_graphs=not compiled,
            )
            save(report)
    save(report)


def measure_compiled(setting: Setting, budget: Budget, save: Save) -> None:
    """The same with `torch.compile` of the eager form, which takes a while to compile."""
    measure(setting, budget, save, compiled=True)
