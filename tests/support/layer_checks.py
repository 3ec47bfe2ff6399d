"""Stages of layers and of blocks on a backend's kernels, held to the same modules in eager PyTorch.

A step runs modules forward and backward and names all that it finds. In float64 that is compared with eager PyTorch in
float64 number by number; in another dtype it has to be as near to float64 as eager PyTorch in that dtype is.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from support.backends import Backend
from support.layer_stages import (
    TOLERANCE,
    assert_as_close,
    make_blocks,
    make_stage,
    run_blocks,
    run_stage,
)
from torch import Tensor, nn

import ela_kernels as ek

Results = dict[str, Tensor]
Step = Callable[[Any, Tensor], Results]

# Both sides in float64: sums of up to a few thousand products through a few layers, 1e-16 each; a norm divides them.
EXACT = {"rtol": 1e-9, "atol": 1e-10}
EXACT_WITH_NORM = {"rtol": 1e-8, "atol": 1e-9}
CPU = torch.device("cpu")
KINDS = ("layer", "block")
FORMS = (torch.contiguous_format, torch.channels_last)
LOSSES = ("out", "first", "kl", "weights")


def with_gradients(found: Results, loss: Tensor, modules: nn.Module, x: Tensor) -> Results:
    """What was found, the gradients of a loss (zero where autograd gives None), and the modules' buffers."""
    named = {"x": x} | dict(modules.named_parameters())
    wanted = {name: t for name, t in named.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for (name, t), grad in zip(wanted.items(), grads, strict=True):
        found["d " + name] = torch.zeros_like(t) if grad is None else grad
    return found | dict(modules.named_buffers())


def loss_of(outs: Sequence[Tensor], history: ek.LayerHistory, losses: Iterable[str]) -> Tensor:
    terms = {
        "out": lambda: outs[-1].double().square().sum(),
        "first": lambda: outs[0].double().sin().sum(),
        "kl": lambda: history.kl.double().sum() if history.kl is not None else 0 * outs[0].sum(),
        "weights": lambda: history.weights.double().square().sum(),
    }
    return sum(terms[name]() for name in losses)


def step(losses: Iterable[str] = LOSSES, seed: int = 5, **options: Any) -> Step:
    """Of layers or blocks that share a history; `options` as of :func:`support.layer_stages.run_stage`."""

    def run(modules: nn.ModuleList, x: Tensor) -> Results:
        torch.manual_seed(seed)  # of the drop path
        run_them: Any = run_blocks if isinstance(modules[0], ek.ELA) else run_stage
        outs, history = run_them(modules, x, **options)
        found = {f"output {i}": out.detach() for i, out in enumerate(outs)}
        if history.weights is not None:
            found["weights"] = history.weights.detach()
        if history.kl is not None:
            found["divergence"] = history.kl.detach()
        return with_gradients(found, loss_of(outs, history, losses), modules, x)

    return run


def forward_only(mode: Any) -> Step:
    """The last output of blocks under `mode`."""

    def run(modules: nn.ModuleList, x: Tensor) -> Results:
        run_them: Any = run_blocks if isinstance(modules[0], ek.ELA) else run_stage
        with mode():
            outs, _ = run_them(modules, x)
        return {f"output {i}": out for i, out in enumerate(outs)}

    return run


def make(
    kind: str,
    shape: Sequence[int],
    depth: int,
    head_dim: int,
    dtype: Any,
    form: Any,
    **options: Any,
) -> tuple[nn.ModuleList, Tensor]:
    """Modules of a kind (`layer` or `block`) and their input; the norms' statistics are not what a new norm has."""
    modules, x = {"layer": make_stage, "block": make_blocks}[kind](
        shape, depth, head_dim, dtype, form, **options
    )
    for norm in modules.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return modules, x


def calls(depth: int, backward: int | None = None) -> list[str]:
    """What the kernels of a stage are called for."""
    return ["layer"] * depth + ["layer_backward"] * (depth if backward is None else backward)


def leaf(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A leaf in the memory format of `x`."""
    return x.detach().to(device, dtype or x.dtype).requires_grad_(x.requires_grad)


def placed(backend: Backend, kind: str, *args: Any, **options: Any) -> Any:
    """Modules and their input where the backend runs, in the widest dtype that it serves."""
    shape, depth, head_dim = args
    modules, x = make(kind, shape, depth, head_dim, backend.exact, FORMS[0], **options)
    return modules.to(backend.device), leaf(x, backend.device)


def check(
    backend: Backend,
    run: Step,
    modules: nn.Module,
    x: Tensor,
    autocast: torch.dtype | None = None,
) -> Results:
    """`run` on the kernels finds what it finds in eager PyTorch, as nearly as the dtype allows."""
    modules, x = modules.to(backend.device), leaf(x, backend.device)
    dtype = autocast or x.dtype

    def scope() -> Any:
        if autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(backend.device.type, autocast)

    with scope():
        found = run(copy.deepcopy(modules), x)
    with ek.use_backend("eager"):
        with scope():
            plain = run(copy.deepcopy(modules), x)
        exact = plain
        if dtype != torch.float64:
            exact = run(copy.deepcopy(modules).to(CPU, torch.float64), leaf(x, CPU, torch.float64))
    assert_near(backend, found, plain, exact, dtype)
    return found


def assert_near(
    backend: Backend, found: Results, plain: Results, exact: Results, dtype: torch.dtype
) -> None:
    """`found` is as near to `exact` as `plain` is, which is in the same dtypes."""
    assert list(found) == list(plain) == list(exact)
    for name, x in found.items():
        assert x.dtype == plain[name].dtype, name
        assert x.shape == exact[name].shape, name
    if dtype == torch.float64:
        bound = EXACT_WITH_NORM if any("norm" in name for name in found) else EXACT
        for name, x in found.items():
            torch.testing.assert_close(
                x, plain[name], **bound, msg=lambda m, name=name: f"{name}: {m}"
            )
    elif backend.device.type == "cuda":
        _assert_near_by_kind(found, plain, exact, dtype)
    elif dtype == torch.float32 and not backend.is_as_exact_as_eager:
        for name, x in found.items():
            torch.testing.assert_close(
                x.double(),
                exact[name].double(),
                **TOLERANCE,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    else:
        factor = backend.rounding(dtype) / (torch.finfo(dtype).eps / 2)
        factor = 4 if factor == 1 else INTERPRETED
        exact = {name: x.double() for name, x in exact.items()}
        found, plain, exact = (filters_together(results) for results in (found, plain, exact))
        assert_as_close(*(r.values() for r in (found, plain, exact)), dtype, factor, list(found))


# Triton's interpreter cuts float32 to bfloat16 where a GPU rounds, in every step of a sum.
INTERPRETED = 32


def _kind(name: str) -> str:
    """The gradients of one kind of parameter are compared together.

    That of a filter over the channels is three numbers, sums with cancellation, whose rounding errors scatter too much
    to be compared alone.
    """
    name = re.sub(r"\b\d+\.", "", name).replace("attn.", "").replace("layer.", "")
    return name.replace("d Wq", "d Wq or Wk").replace("d Wk", "d Wq or Wk")


def filters_together(results: Results) -> Results:
    """The gradients of all layers' filters over the channels as one, all else by itself.

    Of a filter of size 1 it is one number, which PyTorch's own pieces may happen to have exactly.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, x in results.items():
        is_filter = "Wq" in name or "Wk" in name
        kinds.setdefault(_kind(name) if is_filter else name, []).append(x)
    return {
        kind: parts[0] if len(parts) == 1 else torch.cat([p.flatten() for p in parts])
        for kind, parts in kinds.items()
    }


def _assert_near_by_kind(
    found: Results, plain: Results, exact: Results, dtype: torch.dtype, factor: float = 8
) -> None:
    """As near as PyTorch's own pieces are in the same dtypes on the same device.

    Up to some times as far, since either is one draw of random roundings, of few numbers; and 2e-5 of the norm in
    float32 besides, half an ulp in half precision, where PyTorch happens to be exact.
    """

    def by_kind(results: Results) -> dict[str, Tensor]:
        kinds: dict[str, list[Tensor]] = {}
        for name, x in results.items():
            kinds.setdefault(_kind(name), []).append(x.double().cpu().flatten())
        return {kind: torch.cat(parts) for kind, parts in kinds.items()}

    found, plain, exact = by_kind(found), by_kind(plain), by_kind(exact)
    own = 2e-5 + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    for kind, truth in exact.items():
        assert found[kind].isfinite().all(), kind
        error, theirs = ((r[kind] - truth).norm() for r in (found, plain))
        allowed = factor * theirs + own * truth.norm()
        assert error <= allowed, f"{kind}: {error:.3g} from float64, allowed is {allowed:.3g}"
