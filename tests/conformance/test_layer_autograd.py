"""What autograd asks of whole layers and blocks: parts of a graph, again, later, changed, and never."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from support.backends import WITH_KERNELS, Backend, on, over
from support.layer_checks import (
    FORMS,
    KINDS,
    calls,
    check,
    make,
    placed,
    step,
    with_gradients,
)
from support.layer_stages import gradients, run_blocks, run_stage
from support.on_gpu import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek

kernels = on(WITH_KERNELS)
kinds = pytest.mark.parametrize("kind", KINDS)


def _no_less(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@kinds
@kernels
def test_recomputed_layers(backend, kind, made):
    modules, x = placed(backend, kind, (2, 6, 3, 4), 3, 3)
    run = run_stage if kind == "layer" else run_blocks

    def results(through):
        copies = copy.deepcopy(modules)
        outs, _ = run(copies, x, through=through)
        return [outs[-1], *gradients(outs[-1].square().sum(), [x, *copies.parameters()])]

    plain = results(lambda f, *args: f(*args))
    _no_less(results(functools.partial(checkpoint, use_reentrant=False)), plain)
    assert made.count("layer") == 9
    assert {*made} == {"layer", "layer_backward"}


@kinds
@kernels
def test_parts_of_a_retained_graph(backend, kind):
    modules, x = placed(backend, kind, (2, 6, 4, 5), 3, 3)
    run = run_stage if kind == "layer" else run_blocks
    leaves = [x, *modules.parameters()]

    def results():
        outs, history = run(modules, x)
        loss = outs[-1].square().sum()
        first = gradients(outs[1].square().sum(), leaves, retain_graph=True)
        whole = gradients(loss, leaves, retain_graph=True)
        again = gradients(loss, leaves, retain_graph=True)
        _no_less(again, whole)
        return [*first, *whole, *gradients(history.kl.sum(), leaves)]

    found = results()
    with ek.use_backend("eager"):
        expected = results()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **_tolerance(backend))


def _tolerance(backend: Backend) -> dict[str, float]:
    exact = backend.exact == torch.float64
    return {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 2e-4, "atol": 2e-5}


@kernels
def test_a_part_of_a_stage_is_a_shorter_stage(backend):
    layers, x = placed(backend, "layer", (2, 12, 6, 7), 3, 4)
    outs, _ = run_stage(layers, x)
    leaves = [x, *layers.parameters()][:4]
    part = torch.autograd.grad(outs[1].square().sum(), leaves)
    alone = torch.autograd.grad(run_stage(layers[:2], x)[0][1].square().sum(), leaves)
    _no_less(part, alone)


@kernels
def test_accumulated_gradients_and_tensor_hooks(backend):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 3, 3)

    def run():
        seen = []
        for p in layers.parameters():
            p.grad = None
        for scale in (1.0, 3.0):
            y = x.detach().requires_grad_()
            outs, _ = run_stage(layers, y)
            outs[1].register_hook(lambda g: (seen.append(g.clone()), 2 * g)[1])
            (scale * outs[-1].square().sum()).backward()
        return [p.grad.clone() for p in layers.parameters()] + seen

    found = run()
    with ek.use_backend("eager"):
        expected = run()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **_tolerance(backend))


@kernels
def test_two_passes_before_one_backward(backend):
    def run(layers, x):
        losses = [run_stage(layers, k * x)[0][-1].square().sum() for k in (1.0, 2.0)]
        return with_gradients({}, sum(losses), layers, x)

    check(backend, run, *make("layer", (2, 6, 4, 5), 3, 3, backend.exact, FORMS[0]))


@kernels
def test_parametrized_weights(backend, made):
    layers, x = make("layer", (2, 6, 4, 5), 3, 3, backend.exact, FORMS[0])
    for layer in layers:
        nn.utils.parametrizations.weight_norm(layer.Wv)

    check(backend, step(), layers, x)
    assert made == calls(3)


@kernels
def test_modules_with_hooks_are_called(backend, made):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 2, 3)
    called = []
    layers[0].Wv.register_forward_hook(lambda *a: called.append("hook"))
    layers[1].Wv = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False).to(x)
    run_stage(layers, x)[0][-1].sum().backward()
    assert called == ["hook"]
    assert x.grad.isfinite().all()
    for change in ({"dilation": 2, "padding": 2}, {"bias": True}, {"padding_mode": "reflect"}):
        options = {"padding": 1, "groups": 6, "bias": False} | change
        layers[1].Wv = nn.Conv2d(6, 6, 3, **options).to(x)
        run_stage(layers, x)[0][-1].sum().backward()
    assert not {"layer", "layer_backward"} & {*made}


@kernels
def test_a_gradient_changed_in_place_is_refused(backend):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 3, 3)
    history = ek.LayerHistory()
    first = layers[0](x, history)
    second = layers[1](first, history)
    dout = torch.ones_like(second)

    def change(gradient):
        dout.zero_()

    first.register_hook(change)
    with pytest.raises(RuntimeError, match="changed in place"):
        second.backward(dout)


@kernels
def test_second_derivatives_are_refused(backend):
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 2, 3)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradients(run_stage(layers, x)[0][-1].square().sum(), [x], create_graph=True)


@kernels
def test_values_are_not_kept_alive(backend):
    """A pull layer's gradient of the value is never stored: nothing of a stage is left after its backward."""
    layers, x = placed(backend, "layer", (2, 6, 4, 5), 3, 3)
    outs, history = run_stage(layers, x)
    held = [weakref.ref(v) for v in history.values]
    outs[-1].sum().backward()
    del outs, history
    gc.collect()
    assert all(r() is None for r in held)


@over("first", lambda backend: [b for b in ("cpp", "triton") if b != backend.name], WITH_KERNELS)
def test_kernels_of_two_backends_do_not_meet(backend, first):
    """What one leaves for the layers before it the other cannot read."""
    if backend.device.type != "cpu":
        pytest.skip("of two backends on one device, none is known to be there")
    if ek.backend_status()[first] != "available":
        pytest.skip(f"{first}: {ek.backend_status()[first]}")
    for order in ((first, backend.name), (backend.name, first)):
        layers, x = make("layer", (2, 6, 3, 4), 2, 3, torch.float32, FORMS[0])
        history, y = ek.LayerHistory(), x
        for layer, name in zip(layers, order, strict=True):
            with ek.use_backend(name):
                y = layer(y, history)
        with pytest.raises(RuntimeError, match="kernels of different backends"):
            y.sum().backward()
