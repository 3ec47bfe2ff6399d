"""Whole networks under torch.compile: plain, with the published attention, with ours, and with a third skipped."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, ratio, summarize
from benchmarks.networks import CONCATENATING, PLAIN, make_networks


def _step(network: Callable[[Tensor], Tensor], module: nn.Module, images: Tensor) -> Tensor:
    for p in module.parameters():
        p.grad = None
    out = network(images)
    nn.functional.cross_entropy(out, torch.zeros(len(images), dtype=torch.long)).backward()
    return out.detach()


def _check(name: str, module: nn.Module, images: Tensor, compiled: Any) -> None:
    """Refuse to time what is wrong: outputs and gradients of a first step."""
    twin = copy.deepcopy(module)
    outs = _step(compiled, module, images), _step(twin, twin, images)
    # float32, dozens of norms: other orders of sums are found a few 1e-5 apart
    torch.testing.assert_close(*outs, rtol=5e-3, atol=5e-3, msg=lambda m: f"{name}: {m}")
    # A ReLU whose input is within rounding of zero passes a whole gradient or none, and a filter's gradient may be next
    # to nothing: all of one kind together, as in the blocks.
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (key, got), want in zip(module.named_parameters(), twin.parameters(), strict=True):
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in (got, want))
        first, second = grads
        kinds.setdefault(".".join(key.split(".")[-2:]), []).append((first, second))
    for kind, pairs in kinds.items():
        got_all, want_all = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
        if (got_all - want_all).norm() > 0.05 * want_all.norm():
            raise AssertionError(f"{name}: gradients of {kind} differ from eager PyTorch's")


def measure_compiled(rounds: int, small: bool = False) -> dict[str, Any]:
    """Milliseconds of forward and backward of each network, eager and compiled in one run, and of the compilation."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(*((4, 3, 16, 16) if small else (8, 3, 128, 128)), generator=generator)
    steps: dict[str, Callable[[], Tensor]] = {}
    seconds_to_compile: dict[str, float] = {}
    networks = make_networks("resnet20" if small else "resnet50")
    for name, module in networks.items():
        compiled = torch.compile(module)
        start = time.perf_counter()
        _step(compiled, module, images)
        seconds_to_compile[name] = time.perf_counter() - start
        _check(name, module, images, compiled)
        steps[f"{name}, eager"] = partial(_step, module, module, images)
        steps[f"{name}, compiled"] = partial(_step, compiled, module, images)
    seconds = interleave(steps, rounds)
    plain, concatenating = (seconds[f"{name}, compiled"] for name in (PLAIN, CONCATENATING))
    return {
        "network": "resnet20, [4, 3, 16, 16]" if small else "resnet50, [8, 3, 128, 128]",
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "times_plain": {name: ratio(times, plain) for name, times in seconds.items()},
        "concatenating_over": {name: ratio(concatenating, t) for name, t in seconds.items()},
        "eager_over": {
            name: ratio(seconds[f"{name}, eager"], seconds[f"{name}, compiled"])
            for name in networks
        },
        "seconds_to_compile": seconds_to_compile,
    }
