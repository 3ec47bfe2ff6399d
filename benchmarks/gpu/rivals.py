"""The nearest public kernels, where they compute the same thing as ours; left out where they are not installed.

Liger-Kernel's `attn_res`, flash-linear-attention's `fused_attnres` and flash-attn-res compute attention residuals
(arXiv 2603.15031): over depth, as here, but with a score for every token, `softmax_j <w, rms_norm(v_j)>`, one learned
query w for all tokens and one head of all C channels. Their maps are stacked in one tensor, but for
flash-linear-attention, which takes them apart as ours does. Ours has G heads, queries and keys given for each sample,
one set of weights for all positions of it, and the divergence. The two coincide in:

- `uniform`: the learned query is zero, and so is ours. All weights are 1 / T, output and gradients of the maps are
  equal on maps of any size. Both read T maps and write one (backward: T), so times can be compared; theirs also take
  a norm and a dot product of every token, which they have to and we need not.
- `token`: one position a sample, one head, keys rms_norm(v_j) made beforehand. Equal for any query. Ours reads the keys
  as well, twice the bytes of theirs: comparable in what comes out, not in what goes in; making the keys is not counted.

Several heads, weights shared by the positions of a sample, the divergence and channels-first maps have no counterpart,
nor has a whole step: theirs gives a map its gradient from one later layer at a time, ours from all of them at once.
flash-linear-attention tries its configurations in a first call, which is not timed but takes seconds. flash-attn-res
gives bfloat16, takes C of a power of two, and of its two phases only the first is the like of ours; its gradients of
the maps are compared, not those of the query, which is a parameter there.
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
from benchmarks.gpu.timing import Budget, take_turns
from benchmarks.measure import ratio, summarize

_EPS = 1e-6
# Depth, samples, positions a sample, channels. Below 2^31 elements in the stack, as theirs count in 32 bits.
_SIZES = {"uniform": [(12, 32, 1024, 256), (8, 16, 1024, 1024)], "token": [(12, 32768, 1, 256)]}
_SMOKE_SIZES = {"uniform": [(3, 2, 5, 16)], "token": [(3, 10, 1, 16)]}

# Sums over T in float32 as ours, then one rounding to bfloat16; theirs round weights or partial results once or twice
# more. A wrong weight is off by its whole size.
_ALLOWED = 4 * ROUNDING[torch.bfloat16]

# Of the maps, in one tensor or apart, and the query.
Attend = Callable[[Tensor, Tensor], Tensor] | Callable[[list[Tensor], Tensor], Tensor]


class Rival(NamedTuple):
    """A package, its function as the measurement calls it, and whether it takes maps that are stacked in one tensor."""

    package: str
    load: Callable[[], Attend]
    stacked: bool = True


def _liger() -> Attend:
    from liger_kernel.transformers.functional import liger_attn_res

    def attend(stacked: Tensor, w: Tensor) -> Tensor:
        out: Tensor = liger_attn_res(stacked, w, torch.ones_like(w), _EPS)
        return out

    return attend


def _flash_attn_res() -> Attend:
    from flash_attn_res import phase_1_batched_attention_triton_op

    def attend(stacked: Tensor, w: Tensor) -> Tensor:
        out: Tensor = phase_1_batched_attention_triton_op(stacked, w[None], _EPS)[0][0]
        return out

    return attend


def _fla() -> Attend:
    from fla.ops.attnres import fused_attnres

    def attend(values: list[Tensor], w: Tensor) -> Tensor:
        out: Tensor = fused_attnres(w, values, torch.ones_like(w), rms_eps=_EPS)
        return out

    return attend


RIVALS = {
    "liger attn_res": Rival("liger_kernel", _liger),
    "flash-linear-attention attnres": Rival("fla", _fla, stacked=False),
    "flash-attn-res": Rival("flash_attn_res", _flash_attn_res),
}


def measure(setting: Setting, budget: Budget, save: Save) -> None:
    """Forward, and forward with backward, of each rival that is installed, and of ours on the same maps."""
    report: dict[str, Any] = {"cases": {}, "left_out": [], "refused": [], "rivals": {}}
    attends: dict[str, Attend] = {}
    for name, rival in RIVALS.items():
        if importlib.util.find_spec(rival.package) is None:
            report["rivals"][name] = "not installed"
            continue
        with refusing(name, report["refused"]):
            attends[name] = rival.load()
            report["rivals"][name] = "installed"
    save(report)
    if not attends and not setting.smoke:
        return
    for kind, sizes in (_SMOKE_SIZES if setting.smoke else _SIZES).items():
        for size in sizes:
            name = f"{kind} T={size[0]} [{', '.join(map(str, size[1:]))}] bfloat16"
            if budget.left < 3 and report["cases"]:
                report["left_out"].append(name)
                continue
            report["cases"][name] = _measure_case(kind, size, attends, setting, budget, report)
            save(report)


def _measure_case(
    kind: str,
    size: tuple[int, int, int, int],
    attends: dict[str, Attend],
    setting: Setting,
    budget: Budget,
    report: dict[str, Any],
) -> dict[str, Any]:
    depth, batch, positions, channels = size
    generator = torch.Generator(device=setting.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=setting.device, dtype=torch.bfloat16)

    stacked = normal(depth, batch, positions, channels).requires_grad_()
    values = [v.detach().requires_grad_() for v in stacked]
    w = normal(channels) * channels**-0.5 if kind == "token" else normal(channels) * 0
    dout = normal(batch, positions, channels)
    keys = [F.rms_norm(v.detach().mean(1), (channels,), eps=_EPS) for v in values]
    query = w.expand(batch, channels).contiguous()

    def ours() -> Tensor:
        return ek.layer_attention(query, keys, values, 1, 1.0, channels_last=True).out

    # Theirs keeps the norm in the graph: the gradient of a value through its key is nothing at w = 0, and is left
    # out of the comparison of gradients elsewhere.
    want_out, want_grad = _expected(stacked.detach().double(), w.double(), dout.double())
    steps: dict[str, tuple[Callable[[], Tensor], list[Tensor], str | None]] = {
        name: (
            partial(
                attend, stacked if RIVALS[name].stacked else values, w.clone().requires_grad_()
            ),
            [stacked] if RIVALS[name].stacked else values,
            None,
        )
        for name, attend in attends.items()
    }
    steps |= {backend: (ours, values, backend) for backend in setting.backends}
    passes: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "forward and backward": {}}
    for name, (forward, leaves, backend) in steps.items():
        with refusing(f"{kind}: {name}", report["refused"]):
            out, grads = _step(forward, leaves, dout, backend)
            distance(f"{name}: output", out, want_out, _ALLOWED)
            if kind == "uniform":
                grad = grads[0] if len(grads) == 1 else torch.stack(grads)
                distance(f"{name}: gradients of the maps", grad, want_grad, _ALLOWED)
            passes["forward"][name] = partial(_forward, forward, backend)
            passes["forward and backward"][name] = partial(_step, forward, leaves, dout, backend)
    found: dict[str, Any] = {}
    for name, runs in passes.items():
        if not runs:
            continue
        taken = take_turns(runs, setting.device, setting.rounds, min(1.0, budget.left / 4))
        found[name] = {
            "ms": {n: summarize(times)._asdict() for n, times in taken.items()},
            "over": {
                backend: {n: ratio(t, taken[backend]) for n, t in taken.items() if n in attends}
                for backend in setting.backends
                if backend in taken
            },
        }
    return found


def _expected(stacked: Tensor, w: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    leaf = stacked.requires_grad_()
    scores = (F.rms_norm(leaf, leaf.shape[-1:], eps=_EPS) * w).sum(-1, keepdim=True)
    out = (scores.softmax(0) * leaf).sum(0)
    (grad,) = torch.autograd.grad(out, leaf, dout)
    return out.detach(), grad


def _forward(forward: Callable[[], Tensor], backend: str | None) -> Tensor:
    if backend is None:
        return forward()
    with ek.use_backend(backend):
        return forward()


def _step(
    forward: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor, backend: str | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = _forward(forward, backend)
    return out.detach(), torch.autograd.grad(out, leaves, dout.to(out.dtype))
