"""The kernels of a whole light layer against its eager form: outputs, gradients, running statistics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.light_layers import ACTS, FORMS, block_step, layer_step, make_blocks, make_layer
from torch import nn

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.models import build_model
from ela_kernels.modules import light, residual
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")

# Both sides in float64: sums of up to a few thousand products through a few layers and norms, 1e-16 each.
EXACT = {"rtol": 1e-8, "atol": 1e-9}
SHAPES = [
    ((2, 6, 1, 1), 2),
    ((2, 6, 3, 5), 2),
    ((3, 37, 7, 7), 37),
    ((2, 12, 9, 33), 1),
    ((5, 70, 17, 4), 14),
    ((1, 3, 56, 56), 3),
]


@pytest.fixture
def fused_calls(monkeypatch):
    """What the kernels of whole light layers were called for."""
    calls = []
    for module, name in ((light, "light_layer"), (residual, "light_block")):
        real = module.light_layer
        monkeypatch.setattr(
            module,
            "light_layer",
            lambda *a, real=real, name=name: (calls.append(name), real(*a))[1],
        )
    return calls


@pytest.fixture
def compare(fused_calls):
    """Runs a function with the kernels and in eager PyTorch, and compares all tensors that it returns."""

    def on_both(run, calls=1, tolerance=EXACT):
        found = run()
        assert len(fused_calls) == calls
        with ek.use_backend("eager"):
            expected = run()
        assert len(fused_calls) == calls
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a is None or b is None:
                assert a is b, i
                continue
            assert a.dtype == b.dtype, i
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f"{i}: {m}")

    return on_both


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_output_and_gradients(compare, poisoned_memory, shape, head_dim, form):
    compare(lambda: layer_step(*make_layer(shape, head_dim, form=form)))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES[:5], ids=str)
def test_an_activation_of_the_value(compare, poisoned_memory, shape, head_dim, form, act):
    compare(lambda: layer_step(*make_layer(shape, head_dim, form=form, act=act)))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_activation_within_residual_blocks(compare, form, act):
    blocks, x = make_blocks((3, 12, 17, 5), 3, 4, form, drop_path=0.3, act=act)
    for training in (True, False):
        compare(lambda: block_step(blocks, x), calls=3 if training else 6)
        blocks.eval()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("act", ACTS)
def test_derivatives_of_an_activation(act, backend):
    layer, x, prev = make_layer((2, 4, 3, 2), 2, act=act)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x, prev, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x, prev))

    with ek.use_backend(backend):
        assert torch.autograd.gradcheck(run, (x, prev, *parameters))
        if backend == "eager":
            assert torch.autograd.gradgradcheck(run, (x, prev, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_an_activation_from_end_to_end(fused_calls, act, dtype):
    """Both sides and zero, in each lane of a vector; beyond, nothing is left of one side and all of the other."""
    layer = ek.LightLayerAttention(1, 1, value_act=act).to(dtype)
    with torch.no_grad():
        layer.Wv.weight.zero_()[..., 1, 1] = 1
        layer.Wq.weight.zero_()  # a gate of one half
    near = torch.linspace(-8, 8, 40001, dtype=dtype)
    x = torch.cat((near, torch.tensor([-1e30, -20.0, 20.0, 1e30, 0.0, -0.0], dtype=dtype)))
    x = x.view(1, 1, 1, -1).requires_grad_()
    (slope,) = torch.autograd.grad(2 * layer(x, torch.zeros_like(x)).sum(), x)
    assert fused_calls == ["light_layer"]
    found, slope = 2 * layer(x, torch.zeros_like(x)).detach().flatten().double(), slope.double()
    exact = x.detach().double().requires_grad_()
    if act == "gelu":  # by erfc, since 1 + erf(x) has no digits left on the far negative side
        want = exact * torch.special.erfc(-exact / 2**0.5) / 2
    else:
        want = nn.functional.gelu(exact, approximate="tanh")
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    want = want.detach().flatten()
    eps = torch.finfo(dtype).eps
    assert ((found - want).abs() <= 8 * eps * want.abs().clamp(min=1.0)).all()
    # In float64 PyTorch's own slope is rounded too: 1 - tanh(w)^2 once, and that is multiplied with up to 80.
    near = (want_slope - slope).abs().flatten()[:-6]
    assert (near <= (80 if dtype == torch.float64 else 16) * eps).all()
    if act == "gelu" and dtype == torch.float32:
        # An exponential is off by as many roundings as its exponent is large: 32, of half an eps.
        here = (x.detach() >= -8).flatten()
        assert ((found - want).abs() <= 16 * eps * want.abs())[here].all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("act", ACTS)
def test_what_is_no_number_stays_none(act):
    layer, x, prev = make_layer((1, 2, 5, 5), 1, torch.float32, act=act)
    with torch.no_grad():
        x[0, 0, 2, 2] = float("nan")
    out = layer(x, prev)
    assert out[0, 0].isnan().all()  # by the gate
    assert out[0, 1].isfinite().all()


def test_another_activation_is_refused():
    for wrong in ("relu", 1, nn.GELU()):
        with pytest.raises(
            ValueError, match=r"value_act: got .*; allowed are None, 'gelu', 'gelu_tanh'"
        ):
            ek.LightLayerAttention(8, 4, value_act=wrong)
    layer, x, prev = make_layer((2, 6, 3, 3), 3)
    layer.value_act = "silu"
    for backend in ("auto", "eager"):
        with ek.use_backend(backend), pytest.raises(ValueError, match="value_act: got 'silu'"):
            layer(x, prev)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "act"),
    [
        (torch.float32, 2e-6, None),
        (torch.bfloat16, 1.6e-2, None),
        (torch.float16, 2e-3, None),
        (torch.float32, 2e-6, "gelu"),
        (torch.float32, 2e-6, "gelu_tanh"),
        (torch.bfloat16, 1.6e-2, "gelu"),
        (torch.float16, 2e-3, "gelu"),
    ],
    ids=str,
)
def test_dtypes_against_float64(fused_calls, dtype, tolerance, act, form):
    found = layer_step(*make_layer((2, 24, 9, 13), 8, dtype, form, act))
    assert fused_calls == ["light_layer"]
    layer, x, prev = make_layer((2, 24, 9, 13), 8, dtype, form, act)
    exact = (t.detach().double().requires_grad_() for t in (x, prev))
    with ek.use_backend("eager"):
        expected = layer_step(layer.double(), *exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_residual_blocks(compare, shape, head_dim, form, training):
    blocks, x = make_blocks(shape, 3, head_dim, form)
    for norm in (block.norm for block in blocks):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    blocks.train(training)
    compare(lambda: block_step(blocks, x), calls=3)


def test_drop_path_draws_as_the_modules_do(compare):
    blocks, x = make_blocks((6, 8, 5, 5), drop_path=0.5)
    compare(lambda: block_step(blocks, x), calls=3)


def test_maps_of_mixed_forms_and_slices(compare):
    layer, x, _ = make_layer((4, 12, 6, 6), 4)
    wide = torch.randn(4, 24, 6, 6, dtype=torch.float64, requires_grad=True)
    compare(lambda: layer_step(layer, x, wide[:, 4:16]), 1)
    last = torch.randn(4, 6, 6, 12, dtype=torch.float64).movedim(3, 1).requires_grad_()
    compare(lambda: layer_step(layer, x, last), 2)
    spatial = torch.randn(4, 12, 9, 9, dtype=torch.float64, requires_grad=True)
    compare(lambda: layer_step(layer, spatial[:, :, 2:8, 1:7], x), 3)


def test_a_gradient_that_is_expanded_or_negated(compare):
    layer, x, prev = make_layer((2, 6, 4, 4))

    def run():
        out = layer(x, prev)
        summed = torch.autograd.grad(out.sum(), [x, prev], retain_graph=True)
        imaginary = torch.complex(torch.zeros_like(out), out).conj().imag
        return [*summed, *torch.autograd.grad(imaginary.square().sum(), [x, prev])]

    compare(run)


@pytest.mark.parametrize("act", [None, "gelu"])
@pytest.mark.parametrize(
    "frozen", ["x", "prev", "Wq", "Wk", "Wv", "lambda_t", "all parameters", "x and Wv"]
)
def test_what_needs_no_gradient(compare, frozen, act):
    layer, x, prev = make_layer((2, 6, 5, 4), 3, act=act)
    if frozen == "x and Wv":  # a value whose gradient nobody asks for
        x = x.detach()
        layer.Wv.requires_grad_(False)
    elif frozen == "x":
        x = x.detach()
    elif frozen == "prev":
        prev = prev.detach()
    else:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(frozen not in (name.split(".")[0], "all parameters"))
    compare(lambda: layer_step(layer, x, prev))


def test_without_gradients_nothing_is_kept(fused_calls):
    blocks, x = make_blocks((2, 6, 5, 4))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = blocks[0](x, PreviousOutput())
        assert out.grad_fn is None
    assert fused_calls == ["light_block"] * 2


@pytest.mark.parametrize("act", [None, "gelu"])
def test_same_bits_on_any_number_of_threads(act):
    for form in FORMS:
        layer, x, prev = make_layer((6, 24, 17, 19), 8, torch.float32, form, act)
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(layer_step(layer, x, prev))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.Wv.register_forward_hook(lambda *a: None),
        lambda m: m.Wq.register_full_backward_hook(lambda *a: None),
        lambda m: setattr(m, "Wv", nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False).double()),
        lambda m: setattr(m, "Wv", nn.Conv2d(6, 6, 3, padding=1, groups=6).double()),
        lambda m: setattr(m, "Wk", nn.Identity()),
    ],
    ids=["forward hook", "backward hook", "5x5", "bias", "another filter"],
)
def test_what_may_not_be_passed_by_is_called(fused_calls, change):
    layer, x, prev = make_layer((2, 6, 5, 4), 3)
    change(layer)
    if isinstance(layer.Wk, nn.Identity):
        with pytest.raises(Exception, match="shape"):
            layer(x, prev)
    else:
        layer(x, prev)
    assert fused_calls == []


def test_hooks_of_the_block_are_called(fused_calls):
    blocks, x = make_blocks((2, 6, 5, 4), 1)
    seen = []
    blocks[0].norm.register_forward_hook(lambda *a: seen.append(1))
    blocks[0](x, PreviousOutput())
    assert seen == [1]
    assert fused_calls == ["light_layer"]  # the layer itself is fused still


def test_weight_norm(compare):
    def run():
        layer, x, prev = make_layer((2, 6, 5, 4), 3)
        nn.utils.parametrizations.weight_norm(layer.Wv)
        return layer_step(layer, x, prev)

    compare(run)


def test_gradients_accumulate_and_graphs_are_retained(compare):
    def run():
        layer, x, prev = make_layer((2, 6, 5, 4), 3)
        out = layer(x, prev)
        for _ in range(2):
            out.square().sum().backward(retain_graph=True)
        return [x.grad, prev.grad, *(p.grad for p in layer.parameters())]

    compare(run)


def test_copies_and_pickles(fused_calls):
    layer, x, prev = make_layer((2, 6, 5, 4), 3)
    out = layer(x, prev)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, prev), out)
    assert len(fused_calls) == 3


def test_second_derivatives_are_refused():
    layer, x, prev = make_layer((2, 6, 5, 4), 3)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(layer(x, prev).sum(), x, create_graph=True)


def test_other_backends_run_in_pytorch(fused_calls):
    layer, x, prev = make_layer((2, 6, 5, 4), 3, torch.float32)
    with ek.use_backend("eager"):
        layer(x, prev)
    assert fused_calls == []
    layer(x, prev)
    assert fused_calls == ["light_layer"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network(compare, checkpointing):
    torch.manual_seed(1)
    model = build_model(
        "resnet20", attention="mrla_light", drop_path=0.2, checkpointing=checkpointing
    ).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)

    def run():
        network = copy.deepcopy(model)
        torch.manual_seed(6)
        scores = network(images)
        scores.square().sum().backward()
        return [scores, *(p.grad for p in network.parameters())]

    compare(run, calls=18 if checkpointing else 9)
