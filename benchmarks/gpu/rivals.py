"""The nearest public kernels, where they are installed, beside our `position_attention` on the same inputs.

Liger-Kernel's `attn_res`, flash-linear-attention's `fused_attnres` and flash-attn-res compute attention residuals
(arXiv 2603.15031): at every token `softmax_j <w, rms_norm(v_j) * g>` over T maps, w one learned query, g the norm's
weight. So does `position_attention` without keys. Output, and gradients of maps, query and norm weight, are compared
with float64 in all of them; flash-attn-res knows no norm weight, and is given the product.

Their maps are stacked in one tensor, but for flash-linear-attention, which takes them apart as ours does; making the
stack is not counted, though a network whose layers give one map each would have to. In eager and compiled PyTorch it
is a part of the formula, in the dtype of the maps. Of flash-attn-res's two phases only the first is the like of ours.

Every contender is timed as it is called, which on small maps is what its Python takes, and inside a CUDA graph.
flash-linear-attention and flash-attn-res try their configurations in a first call, which takes many seconds and is
not timed: a first look leaves them out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ela_kernels as ek
from benchmarks.gpu.floor import Save
from benchmarks.gpu.ops import ROUNDING, distance, refusing
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import COMPILED, EAGER, GRAPH
from benchmarks.gpu.timing import Budget, graphed, take_turns
from benchmarks.measure import Contender, ratio, summarize

_EPS = 1e-6
# Depth, samples, positions a sample, channels. Below 2^31 elements in the stack, as theirs count in 32 bits.
SIZES = [(8, 8, 2048, 1024), (12, 32, 1024, 256)]
SMOKE_SIZES = [(3, 2, 5, 16)]
FORWARD, BOTH = "forward", "forward and backward"
# What a rival that searches takes for it at one size, its kernels being compiled.
_SEARCH_SECONDS = 12

# Sums over T in float32 as ours, then one rounding to bfloat16; theirs round weights, keys or partial results once or
# twice more, PyTorch's pieces each. A wrong weight is off by its whole size.
_ALLOWED = 4 * ROUNDING[torch.bfloat16]
_ALLOWED_EAGER = 16 * ROUNDING[torch.bfloat16]

# Of the maps, in one tensor or apart, the query and the norm's weight.
Attend = (
    Callable[[Tensor, Tensor, Tensor], Tensor] | Callable[[list[Tensor], Tensor, Tensor], Tensor]
)


class Rival(NamedTuple):
    """A package, its function as the measurement calls it, and what it wants.

    `stacked`: maps in one tensor. `searches`: it compiles and tries many configurations in a first call.
    """

    package: str
    load: Callable[[], Attend]
    stacked: bool
    searches: bool


def _liger() -> Attend:
    from liger_kernel.transformers.functional import liger_attn_res

    def attend(stacked: Tensor, query: Tensor, norm: Tensor) -> Tensor:
        out: Tensor = liger_attn_res(stacked, query, norm, _EPS)
        return out

    return attend


def _flash_attn_res() -> Attend:
    from flash_attn_res import phase_1_batched_attention_triton_op

    def attend(stacked: Tensor, query: Tensor, norm: Tensor) -> Tensor:
        out: Tensor = phase_1_batched_attention_triton_op(stacked, (query * norm)[None], _EPS)[0][0]
        return out

    return attend


def _fla() -> Attend:
    from fla.ops.attnres import fused_attnres

    def attend(values: list[Tensor], query: Tensor, norm: Tensor) -> Tensor:
        # What it mixed is kept for the backward, which is the faster of its two forms.
        out: Tensor = fused_attnres(query, values, norm, rms_eps=_EPS, checkpoint_level=0)
        return out

    return attend


RIVALS = {
    "liger attn_res": Rival("liger_kernel", _liger, stacked=True, searches=False),
    "flash-linear-attention attnres": Rival("fla", _fla, stacked=False, searches=True),
    "flash-attn-res": Rival("flash_attn_res", _flash_attn_res, stacked=True, searches=True),
}


def eager(values: list[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    """As it is written in PyTorch."""
    v = torch.stack(values)
    scores = F.rms_norm(v, v.shape[-1:], norm.to(v.dtype), _EPS) @ query.to(v.dtype)
    return (scores.softmax(0).unsqueeze(-1) * v).sum(0)


def ours(values: list[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    return ek.position_attention(query, values, norm_weight=norm, eps=_EPS).out


class Step(NamedTuple):
    """One contender on its leaves: the maps, stacked or apart, then query and norm weight."""

    attend: Callable[..., Tensor]
    leaves: list[Tensor]
    stacked: bool
    backend: str | None

    def forward(self) -> Tensor:
        *maps, query, norm = self.leaves
        if self.backend is None:
            return self.attend(maps[0] if self.stacked else maps, query, norm)
        with ek.use_backend(self.backend):
            return self.attend(maps, query, norm)

    def both(self, dout: Tensor) -> list[Tensor]:
        """Output, gradients of the maps in one tensor each, of the query and of the norm weight."""
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, self.leaves, dout.to(out.dtype))]


class Inputs:
    """What all contenders are given, and what they have to give, in float64."""

    def __init__(self, size: tuple[int, int, int, int], device: torch.device) -> None:
        depth, batch, positions, channels = size
        generator = torch.Generator(device=device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.stacked = normal(depth, batch, positions, channels).bfloat16().requires_grad_()
        self.values = [v.detach().clone().requires_grad_() for v in self.stacked]
        self.query = (normal(channels) * channels**-0.5).requires_grad_()
        self.norm = (1 + normal(channels) / 8).requires_grad_()
        self.dout = normal(batch, positions, channels).bfloat16()

    def step(
        self, attend: Callable[..., Tensor], stacked: bool, backend: str | None = None
    ) -> Step:
        maps = [self.stacked] if stacked else self.values
        return Step(attend, [*maps, self.query, self.norm], stacked, backend)

    def expected(self) -> list[Tensor]:
        """Output, gradients of all maps in one tensor, of the query and of the norm weight."""
        leaves = [
            x.detach().double().requires_grad_() for x in (self.stacked, self.query, self.norm)
        ]
        out = eager(list(leaves[0]), *leaves[1:])
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout.double())]

    def check(self, name: str, step: Step, expected: list[Tensor]) -> float:
        """Refuse a contender whose output or gradients are wrong; return how far the worst is off."""
        out, *maps, dquery, dnorm = step.both(self.dout)
        found = [out, maps[0] if step.stacked else torch.stack(maps), dquery, dnorm]
        allowed = _ALLOWED_EAGER if name in (EAGER, COMPILED) else _ALLOWED
        names = "output", "gradients of the maps", "gradient of the query", "gradient of the norm"
        return max(
            distance(f"{name}: {what}", got, want, allowed)
            for what, got, want in zip(names, found, expected, strict=True)
        )


def contenders_of(inputs: Inputs, setting: Setting, attends: dict[str, Attend]) -> dict[str, Step]:
    """Ours on every backend first, then PyTorch's own pieces, then the rivals."""
    steps = {backend: inputs.step(ours, False, backend) for backend in setting.backends}
    steps[EAGER] = inputs.step(eager, False)
    if not setting.few:
        kind = "aot_eager" if setting.smoke else "inductor"  # in a smoke run only traced
        form = torch.compile(eager, fullgraph=True, dynamic=False, backend=kind)
        steps[COMPILED] = inputs.step(form, False)
    return steps | {name: inputs.step(a, RIVALS[name].stacked) for name, a in attends.items()}


def load(setting: Setting, refused: list[str]) -> tuple[dict[str, Attend], dict[str, str]]:
    """The rivals that are installed and have their turn, and what there is to say of each."""
    attends: dict[str, Attend] = {}
    said = {}
    for name, rival in RIVALS.items():
        said[name] = "installed"
        if importlib.util.find_spec(rival.package) is None:
            said[name] = "not installed"
        elif setting.few and rival.searches:
            said[name] = "left out of a first look: it searches for many seconds"
        else:
            with refusing(name, refused):
                attends[name] = rival.load()
    return attends, said


def sizes_of(setting: Setting) -> list[tuple[int, int, int, int]]:
    if setting.smoke:
        return SMOKE_SIZES
    return SIZES[:1] if setting.few else SIZES


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """Forward, and forward with backward, of ours, of PyTorch's own pieces and of each rival."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": [], "rivals": {}}
    attends, report["rivals"] = load(setting, report["refused"])
    save(report)
    for size in sizes_of(setting):
        name = f"T={size[0]} [{', '.join(map(str, size[1:]))}] bfloat16"
        if budget.left < 4 and report["cases"]:
            report["left_out"].append(name)
            continue
        torch.compiler.reset()
        here = dict(attends)
        for rival in attends:
            if RIVALS[rival].searches and budget.left < _SEARCH_SECONDS:
                report["left_out"].append(f"{name}: {rival}")
                del here[rival]
        report["cases"][name] = _measure_case(name, size, here, setting, budget, report)
        save(report)
    save(report)


def _measure_case(
    case: str,
    size: tuple[int, int, int, int],
    attends: dict[str, Attend],
    setting: Setting,
    budget: Budget,
    report: dict[str, Any],
) -> dict[str, Any]:
    inputs = Inputs(size, setting.device)
    expected = inputs.expected()
    passes: dict[str, dict[str, Contender]] = {
        FORWARD: {},
        BOTH: {},
        FORWARD + GRAPH: {},
        BOTH + GRAPH: {},
    }
    errors = {}
    for name, step in contenders_of(inputs, setting, attends).items():
        with refusing(f"{case}: {name}", report["refused"]):
            errors[name] = inputs.check(name, step, expected)
            runs = {FORWARD: step.forward, BOTH: partial(step.both, inputs.dout)}
            for what, run in runs.items():
                passes[what][name] = run
            for what, run in runs.items():
                passes[what + GRAPH][name] = graphed(run, setting.device)
    del expected
    found: dict[str, Any] = {}
    for what, runs in passes.items():
        taken = take_turns(runs, setting.device, setting.rounds, min(1.0, budget.left / 4))
        found[what] = {
            "ms": {n: summarize(times)._asdict() for n, times in taken.items()},
            "over": {
                backend: {n: ratio(t, taken[backend]) for n, t in taken.items() if n != backend}
                for backend in setting.backends
                if backend in taken
            },
            "largest_error": {n: errors[n] for n in taken},
        }
    return found
