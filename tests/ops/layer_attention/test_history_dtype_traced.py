"""LayerHistory(dtype=...) under second derivatives, torch.func, compiled graphs and hooks on saved tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.held_stages import BF16, assert_near, held_dtypes, run, stage
from support.layer_stages import gradients
from torch import Tensor

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("kernels")


def test_second_derivatives() -> None:
    modules, x = stage("layer", 2)
    history = ek.LayerHistory(dtype=BF16)
    out = modules[1](modules[0](x, history), history)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    modules, x = stage("layer", 2, torch.float64)
    with ek.use_backend("eager"):
        history = ek.LayerHistory(dtype=BF16)
        out = modules[1](modules[0](x, history), history)
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()
    assert second.count_nonzero() == second.numel()


@pytest.mark.parametrize("forced", ["auto", "eager"])
def test_transforms(forced: str) -> None:
    """Eager PyTorch serves them, in the same numbers."""
    modules, x = stage("layer", 3)
    with ek.use_backend(forced):
        parameters = dict(modules.named_parameters())

        def loss(parameters: Any, x: Tensor) -> Tensor:
            history, y = ek.LayerHistory(dtype=BF16), x
            for i, module in enumerate(modules):
                own = {n[2:]: p for n, p in parameters.items() if n.startswith(f"{i}.")}
                y = torch.func.functional_call(module, own, (y, history, True))
            return y.square().sum()

        found = torch.func.grad(loss)(parameters, x.detach())
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach()[:, None])
    history, y = ek.LayerHistory(dtype=BF16), x
    for module in modules:
        y = module(y, history, True)
    assert held_dtypes(history) == {BF16}
    expected = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    assert_near(list(found.values()), list(expected), 2e-3)
    assert_near([g.sum(0) for g in each.values()], list(expected), 2e-3)


@pytest.mark.parametrize(
    ("kind", "fullgraph"), [("layer", True), ("block", True), ("layer", False)]
)
def test_compiled_graphs(kind: str, fullgraph: bool) -> None:
    """They round, and hold what they like: the compiler decides what is kept."""
    modules, x = stage(kind, 2)

    def forward(y: Tensor) -> tuple[Tensor, ek.LayerHistory]:
        history = ek.LayerHistory(dtype=BF16)
        for module in modules:
            y = module(y, history)
            if not fullgraph:
                torch._dynamo.graph_break()
        return y, history.kl

    expected = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=BF16))
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=fullgraph)
    out, kl = compiled(x)
    found = [out.detach(), *gradients(out.square().sum() + kl.sum(), [x, *modules.parameters()])]
    assert_near(found, expected, 2e-3)


def test_layers_compiled_one_by_one() -> None:
    """Between graphs the history holds what they made; eager layers before and after them read the same."""
    modules, x = stage("layer", 3)
    expected = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=BF16))
    compiled = torch.compile(modules[1], backend="aot_eager")
    chain = [modules[0], compiled, modules[2]]
    history, y = ek.LayerHistory(dtype=BF16), x
    for module in chain:
        y = module(y, history)
    loss = y.square().sum() + history.kl.sum()
    found = [y.detach(), *gradients(loss, [x, *modules.parameters()])]
    assert_near(found, expected, 2e-3)


def test_compiled_autograd() -> None:
    modules, x = stage("block", 2)
    expected = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=BF16))[1:]
    y, history = x, ek.LayerHistory(dtype=BF16)
    for module in modules:
        y = module(y, history)
    x.grad = None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        (y.square().sum() + history.kl.sum()).backward()
    assert_near([x.grad, *(p.grad for p in modules.parameters())], expected)


def test_saved_tensors_hooks() -> None:
    modules, x = stage("block", 3)
    expected = run(copy.deepcopy(modules), x, ek.LayerHistory(dtype=BF16))
    seen = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.dtype)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        found = run(modules, x, ek.LayerHistory(dtype=BF16))
    assert seen.count(BF16) == 1 + 2 + 3
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
