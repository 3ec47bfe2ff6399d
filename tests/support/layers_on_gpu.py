"""Stages of layers and of blocks on the device, against the same modules without the kernels and against float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from support.layer_stages import run_blocks, run_stage
from support.on_gpu import DEVICE
from torch import Tensor, nn

import ela_kernels as ek

CPU = torch.device("cpu")

Results = dict[str, Tensor]


def layers_step(
    modules: nn.ModuleList, x: Tensor, autocast: torch.dtype | None = None, **options: Any
) -> Results:
    """One step of a stage `x <- x + layer(x)`, or of blocks: outputs, gradients and buffers, by kind.

    The gradients of one kind of parameter together: that of a filter over the channels is three numbers, sums with
    cancellation, whose rounding errors scatter too much to be compared alone.
    """
    modules = copy.deepcopy(modules)
    run: Any = run_blocks if isinstance(modules[0], ek.ELA) else run_stage
    torch.manual_seed(5)  # of the drop path
    scope: Any = contextlib.nullcontext()
    if autocast is not None:
        scope = torch.autocast(x.device.type, autocast)
    with scope:
        outs, history = run(modules, x, **options)
    loss = outs[-1].double().square().sum() + outs[0].double().sin().sum()
    if history.kl is not None:
        loss = loss + history.kl.sum() + history.weights.square().sum()
    named = {"x": x} | dict(modules.named_parameters())
    leaves = {name: p for name, p in named.items() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found: dict[str, list[Tensor]] = {f"output {i}": [out.detach()] for i, out in enumerate(outs)}
    found["weights"] = [history.weights.detach()]
    if history.kl is not None:
        found["divergence"] = [history.kl.detach()]
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad is None or grad.dtype == leaf.dtype, name
        kind = "gradients of " + name.partition(".")[2].removeprefix("attn.")
        kind = kind.replace("Wq", "Wq or Wk").replace("of Wk", "of Wq or Wk")
        found.setdefault(kind, []).append(torch.zeros_like(leaf) if grad is None else grad)
    for name, buffer in modules.named_buffers():
        found.setdefault("buffers " + name.rpartition(".")[2], []).append(buffer)
    return {
        kind: torch.cat([t.double().cpu().flatten() for t in tensors])
        for kind, tensors in found.items()
    }


def assert_right(
    modules: nn.ModuleList,
    x: Tensor,
    backend: str,
    step: Callable[..., Results] = layers_step,
    autocast: torch.dtype | None = None,
    factor: float = 8,
    **options: Any,
) -> Results:
    """`step` on the kernels is as near to float64 as PyTorch's own pieces are in the same dtypes on the same device.

    Up to some times as far, since either is one draw of random roundings, of few numbers; and 2e-5 of the norm in
    float32 besides, half an ulp in half precision, where PyTorch happens to be exact.
    """
    modules, x = modules.to(DEVICE), on_device(x)
    if autocast is not None:
        options["autocast"] = autocast
    with ek.use_backend(backend):
        found = step(modules, x, **options)
    with ek.use_backend("eager"):
        plain = step(modules, x, **options)
        options.pop("autocast", None)
        leaf = x.detach().to(CPU, torch.float64).requires_grad_(x.requires_grad)
        exact = step(copy.deepcopy(modules).to(CPU, torch.float64), leaf, **options)
    dtype = x.dtype if autocast is None else autocast
    own = 2e-5 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert found.keys() == exact.keys()
    for kind, truth in exact.items():
        assert found[kind].isfinite().all(), kind
        error, theirs = ((r[kind] - truth).norm() for r in (found, plain))
        allowed = factor * theirs + own * truth.norm()
        assert error <= allowed, f"{kind}: {error:.3g} from float64, allowed is {allowed:.3g}"
    return found


def on_device(x: Tensor) -> Tensor:
    """A leaf on the device, in the memory format of `x`."""
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad)
