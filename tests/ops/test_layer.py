"""The kernels of a whole layer against the same modules without them: outputs, gradients, promises of a history."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import FORMS, assert_as_close, gradients, make_stage, run_stage
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.cpp import layer as cpp_layer
from ela_kernels.backends.dispatch import Refusal
from ela_kernels.backends.extension import extension

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

# Both sides in float64: sums of up to a few thousand products through a few layers, 1e-16 each.
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def compare(monkeypatch):
    """Runs a function with the kernels of a whole layer and without, and compares all tensors that it returns."""

    def on_both(run, tolerance=EXACT, calls=None):
        made = []
        real = cpp_layer.layer
        monkeypatch.setattr(cpp_layer, "layer", lambda *a: (made.append(1), real(*a))[1])
        found = run()
        assert made if calls is None else len(made) == calls
        with monkeypatch.context() as patch:
            patch.setattr(ek.LayerHistory, "plan_layer", lambda *a, **k: Refusal(("a test",), None))
            made.clear()
            expected = run()
            assert not made
        assert len(found) == len(expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f"{i}: {m}")
        return found

    return on_both


SIZES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 3, 5), 2),
    ((3, 37, 7, 7), 37),
    ((2, 12, 9, 33), 1),  # channel-wise heads
    ((5, 70, 17, 4), 14),
    ((1, 3, 56, 56), 3),
    ((2, 130, 2, 1), 26),
    ((2, 4, 1, 40), 2),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SIZES, ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_outputs_and_gradients(compare, shape, head_dim, form, residual):
    layers, x = make_stage(shape, 3, head_dim, form=form)

    def run():
        outs, history = run_stage(layers, x, residual)
        loss = outs[-1].square().sum() + outs[0].sin().sum() + history.kl.sum()
        loss = loss + history.weights.square().sum()
        return [*outs, history.weights, *gradients(loss, [x, *layers.parameters()])]

    compare(run, calls=3)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, form):
    layers, x = make_stage((2, 12, 9, 10), 4, 4, dtype, form)
    exact_layers, exact_x = copy.deepcopy(layers).double(), x.detach().double().requires_grad_()

    def run(layers, x):
        outs, _ = run_stage(layers, x)
        return [outs[-1], *gradients(outs[-1].float().square().sum(), [x, *layers.parameters()])]

    with ek.use_backend("eager"):
        expected, plain = run(exact_layers, exact_x), run(layers, x)
    found = run(layers, x)
    assert_as_close(found, plain, expected, dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("skip", [(0,), (1, 2), (3,)])
def test_layers_that_only_provide(compare, skip, form):
    layers, x = make_stage((2, 6, 4, 5), 4, 3, form=form)

    def run():
        outs, _ = run_stage(layers, x, skip=skip)
        return [outs[-1], *gradients(outs[-1].square().sum(), [x, *layers.parameters()])]

    compare(run)


def test_some_parameters_are_frozen(compare):
    layers, x = make_stage((2, 6, 4, 5), 4, 3)
    layers[0].Wv.weight.requires_grad_(False)
    layers[1].Wq.weight.requires_grad_(False)
    layers[2].Wk.weight.requires_grad_(False)
    for parameter in layers[3].parameters():
        parameter.requires_grad_(False)
    wanted = [p for p in layers.parameters() if p.requires_grad]
    compare(lambda: gradients(run_stage(layers, x)[0][-1].square().sum(), [x, *wanted]))
    compare(lambda: gradients(run_stage(layers, x)[0][-1].square().sum(), wanted))
    x = x.detach()
    compare(lambda: gradients(run_stage(layers, x)[0][-1].square().sum(), wanted))


def test_parts_of_the_graph(compare):
    layers, x = make_stage((2, 6, 4, 5), 4, 3)

    def run():
        outs, history = run_stage(layers, x)
        first = gradients(outs[1].square().sum(), [x, layers[0].Wv.weight], retain_graph=True)
        whole = gradients(outs[-1].square().sum(), [x, *layers.parameters()], retain_graph=True)
        again = gradients(outs[-1].square().sum(), [x, *layers.parameters()], retain_graph=True)
        kl = gradients(history.kl.sum(), [x, *layers.parameters()])
        return [*first, *whole, *again, *kl]

    compare(run)


def test_two_passes_before_one_backward(compare):
    layers, x = make_stage((2, 6, 4, 5), 3, 3)

    def run():
        losses = [run_stage(layers, k * x)[0][-1].square().sum() for k in (1.0, 2.0)]
        return gradients(sum(losses), [x, *layers.parameters()])

    compare(run)


def test_gradients_laid_out_otherwise(compare):
    """Expanded, transposed and sliced gradients, and an input that is a slice."""
    layers, wide = make_stage((2, 9, 6, 5), 3, 3)
    layers, _ = make_stage((2, 6, 6, 5), 3, 3)

    def run():
        outs, _ = run_stage(layers, wide[:, 1:7], residual=False)
        loss = outs[0].sum() + outs[1].transpose(2, 3).contiguous().square().sum()
        return gradients(loss + outs[2][:, ::2].sum(), [wide, *layers.parameters()])

    compare(run)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layers_of_both_memory_formats(compare, form):
    """As many positions as channels: then strides alone do not tell the two forms apart."""
    layers, x = make_stage((2, 8, 2, 4), 4, 4, form=form)

    def run():
        history, y = ek.LayerHistory(), x
        for i, layer in enumerate(layers):
            y = y.contiguous(memory_format=FORMS[i % 2])
            y = layer(y, history, residual=True)
        return [y, *gradients(y.square().sum(), [x, *layers.parameters()])]

    compare(run)


def test_other_users_of_the_history(compare):
    """Pairs given by hand, and a later layer that eager PyTorch serves, on one history."""
    layers, x = make_stage((2, 6, 4, 5), 4, 3)
    given = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)

    def run():
        history = ek.LayerHistory()
        y = layers[0](x, history, residual=True)
        q = y.mean((2, 3))
        y = y + history.attend(q, q.sin(), given, heads=2)
        y = layers[1](y, history, residual=True)
        with ek.use_backend("eager"):
            y = layers[2](y, history, residual=True)
        y = layers[3](y, history, residual=True)
        loss = y.square().sum() + history.values[0].sin().sum() + history.keys[2].sum()
        return [y, *gradients(loss, [x, given, *layers.parameters()])]

    compare(run, calls=2)


def test_checkpointing(compare):
    layers, x = make_stage((2, 6, 4, 5), 4, 3)

    def run():
        outs, _ = run_stage(layers, x, through=lambda f, *a: checkpoint(f, *a, use_reentrant=False))
        return [outs[-1], *gradients(outs[-1].square().sum(), [x, *layers.parameters()])]

    compare(run)


def test_accumulation_and_tensor_hooks(compare):
    layers, x = make_stage((2, 6, 4, 5), 3, 3)

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

    compare(run)


def test_a_gradient_changed_in_place_is_refused():
    layers, x = make_stage((2, 6, 4, 5), 3, 3)
    history = ek.LayerHistory()
    first = layers[0](x, history)
    second = layers[1](first, history)
    dout = torch.ones_like(second)

    def change(gradient):
        dout.zero_()

    first.register_hook(change)
    with pytest.raises(RuntimeError, match="changed in place"):
        second.backward(dout)


def test_modules_that_may_not_be_passed_by(compare, monkeypatch):
    layers, x = make_stage((2, 6, 4, 5), 2, 3)
    monkeypatch.setattr(
        cpp_layer, "layer", lambda *a: pytest.fail("the kernels passed by a module")
    )
    called = []
    layers[0].Wv.register_forward_hook(lambda *a: called.append("hook"))
    layers[1].Wv = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False).double()
    run_stage(layers, x)[0][-1].sum().backward()
    assert called == ["hook"]
    for change in ({"dilation": 2, "padding": 2}, {"bias": True}, {"padding_mode": "reflect"}):
        options = {"padding": 1, "groups": 6, "bias": False} | change
        layers[1].Wv = nn.Conv2d(6, 6, 3, **options).double()
        run_stage(layers, x)[0][-1].sum().backward()


def test_parametrized_weights(compare):
    layers, x = make_stage((2, 6, 4, 5), 3, 3)
    for layer in layers:
        nn.utils.parametrizations.weight_norm(layer.Wv)

    def run():
        outs, _ = run_stage(layers, x)
        return [outs[-1], *gradients(outs[-1].square().sum(), [x, *layers.parameters()])]

    compare(run, calls=3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(compare, mode):
    layers, x = make_stage((2, 6, 4, 5), 3, 3)

    def run():
        with mode():
            return [run_stage(layers, x.detach(), skip=(1,))[0][-1]]

    compare(run, calls=3)


def test_second_derivatives_are_refused():
    layers, x = make_stage((2, 6, 4, 5), 2, 3)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradients(run_stage(layers, x)[0][-1].square().sum(), [x], create_graph=True)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_the_same_bits_on_any_number_of_threads(batch, form, monkeypatch):
    """A batch is worked on sample by sample or as a whole, by the number of threads; nothing may depend on it."""
    monkeypatch.setattr("ela_kernels.backends.cpp.attention._ONE_THREAD_ELEMENTS", 0)
    layers, x = make_stage((batch, 20, 19, 9), 3, 5, torch.float32, form)
    first = None
    for threads in (1, 2, 3, *[4] * 12):  # often enough for threads to meet
        torch.set_num_threads(threads)
        outs, history = run_stage(layers, x)
        loss = outs[-1].square().sum() + history.kl.sum()
        found = [outs[-1], *gradients(loss, [x, *layers.parameters()])]
        first = found if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), threads


def test_values_are_not_kept_alive():
    """A pull layer's gradient of the value is never stored: nothing of a stage is left after its backward."""
    import gc
    import weakref

    layers, x = make_stage((2, 6, 4, 5), 3, 3)
    outs, history = run_stage(layers, x)
    held = [weakref.ref(v) for v in history.values]
    outs[-1].sum().backward()
    del outs, history
    gc.collect()
    assert all(r() is None for r in held)
