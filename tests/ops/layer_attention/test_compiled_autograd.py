"""Compiled autograd over an eager forward: the kernels' backwards run between its graphs, with the same gradients."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support import stage_forms
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

import ela_kernels as ek

# Compiling takes seconds for each.
slow = pytest.mark.slow
FORMS = [form if form == "layer" else pytest.param(form, marks=slow) for form in stage_forms.STAGES]
pytestmark = pytest.mark.usefixtures("kernels", "fresh_compiler")


def compiled(**options: Any) -> AbstractContextManager[None]:
    def compile_graph(graph: Any) -> Any:
        return torch.compile(graph, backend="eager", **options)

    found: AbstractContextManager[None] = compiled_autograd._enable(compile_graph)
    return found


def halve(parameter: Tensor) -> None:
    """As data parallelism takes a mean."""
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def check(form: str, run: Callable[[nn.ModuleList, Tensor, Any], None], depth: int = 2) -> None:
    """The gradients that `run` leaves in compiled autograd and out of it."""
    modules, x = stage_forms.make(form, depth)
    found = []
    for mode in (nullcontext, compiled):
        own, leaf = copy.deepcopy(modules), x.detach().clone().requires_grad_()
        with ek.use_backend("cpp"):
            run(own, leaf, mode)
        grads = [leaf.grad, *(p.grad for p in own.parameters())]
        # Where nothing arrives, graphs that add up gradients have zeros, and the engine has none.
        found.append([torch.zeros(()) if g is None else g for g in grads])
    assert any(g.any() for g in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.expand_as(a) if b.dim() == 0 else b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_two_passes_over_a_retained_graph_and_one_more_step(form):
    def run(modules, x, mode):
        for scale in (1.0, 0.5):
            outs, _ = stage_forms.run(form, modules, x * scale)
            loss = outs[-1].square().sum() + outs[0].sin().sum()
            with mode():
                loss.backward(retain_graph=True)
                loss.backward()

    check(form, run)


@pytest.mark.parametrize(
    "form", ["layer", pytest.param("op", marks=slow), pytest.param("block", marks=slow)]
)
def test_gradients_that_meet_where_one_layer_sends_none(form):
    """The weights of each layer go to the loss and to the next layer's divergence, which nothing asks for."""

    def run(modules, x, mode):
        history, y, loss = ek.LayerHistory(), x, 0.0
        for module in modules:
            y = module(y, history)
            loss = loss + history.weights.square().sum()
        with mode():
            (loss + y.square().sum()).backward()

    check(form, run, depth=3)


@slow
@pytest.mark.parametrize("form", ["op", "layer"])
def test_two_continuations_of_one_history(form):
    def run(modules, x, mode):
        history = ek.LayerHistory()
        y = modules[0](x, history)
        a, b = (m(y, h) for m, h in zip(modules[1:], (history, copy.copy(history)), strict=True))
        with mode():
            (a.square().sum() + b.sin().sum()).backward()

    check(form, run, depth=3)


@pytest.mark.parametrize("form", ["layer", pytest.param("light", marks=slow)])
def test_hooks(form):
    def run(modules, x, mode):
        for p in modules.parameters():
            p.register_post_accumulate_grad_hook(halve)
        outs, _ = stage_forms.run(form, modules, x)
        outs[0].register_hook(lambda g: g * 2)
        loss = outs[-1].square().sum()
        with mode():
            loss.backward()

    check(form, run)


def test_a_compiled_training_step():
    modules, x = stage_forms.make("layer", 2)
    found = []
    for mode in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        own, leaf = copy.deepcopy(modules), x.detach().clone().requires_grad_()

        def backward(loss):
            loss.backward()

        with ek.use_backend("cpp"), torch._dynamo.config.patch(compiled_autograd=True):
            mode(backward)(stage_forms.run("layer", own, leaf)[0][-1].square().sum())
        found.append([leaf.grad, *(p.grad for p in own.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["op", "layer", "block", "light"])
def test_a_graph_of_one_piece_is_refused_in_words(form):
    modules, x = stage_forms.make(form, 2)
    with ek.use_backend("cpp"):
        loss = stage_forms.run(form, modules, x)[0][-1].sum()
        with (
            compiled(fullgraph=True),
            pytest.raises(Exception, match=r"kernels of ela_kernels read memory.*fullgraph=False"),
        ):
            loss.backward()


@slow
@pytest.mark.parametrize("form", stage_forms.STAGES)
def test_values_go_with_the_backward_that_they_serve(form):
    modules, x = stage_forms.make(form, 2)
    with ek.use_backend("cpp"):
        for _ in range(3):  # the compiler keeps the first arguments that it saw
            outs, shared = stage_forms.run(form, modules, x)
            is_there = [weakref.ref(t.untyped_storage()) for t in stage_forms.maps(outs, shared)]
            loss = outs[-1].square().sum()
            del outs, shared
            with compiled():
                loss.backward()
    gc.collect()
    assert not any(r() is not None for r in is_there)
    assert loss.grad_fn is not None
