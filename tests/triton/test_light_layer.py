"""The Triton kernels of a whole light layer and of a block around it against the modules without them."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import (
    INTERPRETED,
    assert_as_close,
    autocast_results,
    check,
    gradients,
    recorded_calls,
)
from support.light_layers import (
    ACTS,
    FORMS,
    WithPrevious,
    block_step,
    make_blocks,
    make_layer,
    run_blocks,
)
from support.small_published import TokenNetwork
from torch import nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.extension import extension
from ela_kernels.backends.types import LightFilters
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

# One head, heads of one channel, channels that are few and more than a strip; positions that are one and several.
SHAPES = [
    ((1, 1, 1, 1), 1),
    ((2, 6, 1, 1), 2),
    ((3, 6, 3, 5), 6),
    ((1, 37, 7, 7), 1),
    ((1, 6, 9, 33), 3),
    ((1, 70, 2, 5), 14),
]


@pytest.fixture
def calls(monkeypatch):
    """What the Triton kernels of a light layer were called for, in order."""
    names = ("light_layer", "light_layer_backward", "norm_forward", "norm_backward")
    return recorded_calls(monkeypatch, KERNELS["triton"], names)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are the light form's own, as they are launched."""
    from ela_kernels.backends.triton import light as module

    names = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    return names


def layer_step(module, x):
    out = module(x)
    loss = (out.float() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
    return [out, *gradients(loss, [t for t in (x, *module.parameters()) if t.requires_grad])]


def factor_of(dtype):
    return INTERPRETED if dtype == torch.bfloat16 else 4


def check_layer(shape, head_dim, dtype=torch.float32, form=FORMS[0], step=layer_step, act=None):
    layer, x, prev = make_layer(shape, head_dim, dtype, form, act)
    check(step, WithPrevious(layer, prev), x, factor_of(dtype))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), SHAPES, ids=str)
def test_a_layer(shape, head_dim, form, calls):
    check_layer(shape, head_dim, form=form)
    assert calls == ["light_layer", "light_layer_backward"]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("shape", "head_dim"), [SHAPES[2], SHAPES[5]], ids=str)
def test_an_activation_of_the_value(shape, head_dim, form, act, launched):
    check_layer(shape, head_dim, form=form, act=act)
    assert launched == [f"light_layer_{n}_kernel" for n in ("fwd", "bwd", "bwd_rows")]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_activation_in_half_precision_and_in_blocks(form):
    check_layer((2, 12, 3, 6), 4, torch.bfloat16, form, act="gelu")
    check(block_step, *make_blocks((2, 6, 3, 5), 2, 3, form, dtype=torch.float32, act="gelu"))


@pytest.mark.usefixtures("few_programs")
def test_a_converted_network_on_tokens(calls):
    """Maps that are views of tokens, behind a class token."""
    torch.manual_seed(0)
    network = TokenNetwork(6)
    ek.convert(network, strict=True)

    def run(network, x):
        out = network(x)
        return [out, *gradients(out.square().sum(), [x, *network.parameters()])]

    check(run, network, torch.randn(2, 3, 6, 6, requires_grad=True))
    assert calls == ["light_layer"] * 3 + ["light_layer_backward"] * 3


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("act", ACTS)
def test_activations_far_from_zero(act):
    """Nothing overflows, and what is no number stays none."""
    layer, _, prev = make_layer((1, 1, 1, 6), 1, torch.float32, act=act)
    with torch.no_grad():
        layer.Wv.weight.zero_()[..., 1, 1] = 1
        layer.Wq.weight.zero_()
    x = torch.tensor([-1e18, -20.0, -8.0, 8.0, 20.0, 1e18]).view(1, 1, 1, 6)

    def run(module, x):
        out = module(x)
        return [out, *gradients(out.sum(), [x])]

    check(run, WithPrevious(layer, prev), x.requires_grad_())
    with torch.no_grad():
        assert layer(torch.full((1, 1, 1, 6), float("nan")), prev).isnan().all()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, form):
    check_layer((2, 12, 3, 6), 4, dtype, form)

    def block(blocks, x):
        out = run_blocks(blocks, x)[-1]
        return [out, *gradients(out.float().square().sum(), [x, *blocks.parameters()])]

    blocks, x = make_blocks((2, 8, 3, 4), 2, 4, form, dtype=dtype)
    found = block(copy.deepcopy(blocks), x)
    with ek.use_backend("eager"):
        plain = block(copy.deepcopy(blocks), x)
        exact = block(copy.deepcopy(blocks).double(), x.detach().double().requires_grad_())
    assert_as_close(found, plain, exact, dtype, factor_of(dtype))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_channels_in_several_programs(form):
    """More parts of a channel than a program adds up at once, and tiles that begin within a head."""
    check_layer((1, 3, 17, 18), 3, form=form)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_wide_heads_have_their_gates_made_first(form, launched):
    check_layer((1, 310, 1, 1), 310, form=form)
    assert launched == [
        "light_layer_gates_kernel",
        "light_layer_fwd_kernel",
        "light_layer_bwd_kernel",
        "light_layer_bwd_rows_kernel",
    ]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("frozen", "act"),
    [
        *((name, None) for name in ("x", "prev", "Wq", "Wk", "Wv", "lambda_t")),
        *((name, None) for name in ("all but Wv", "all but lambda_t", "all")),
        *((name, "gelu") for name in ("Wv", "all but Wv", "all but lambda_t")),
    ],
)
def test_what_needs_no_gradient(frozen, act, launched):
    layer, x, prev = make_layer((2, 6, 3, 4), 3, torch.float32, act=act)
    module = WithPrevious(layer, prev)
    names = [name for name, _ in module.named_parameters()]
    if frozen == "x":
        x = x.detach()
    elif frozen.startswith("all"):
        only = frozen.removeprefix("all").removeprefix(" but ") or "nothing"
        kept = [name for name in names if only in name]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in kept)
        x = x.detach() if kept else x
    else:
        (name,) = (name for name in names if frozen in name)
        module.get_parameter(name).requires_grad_(False)
    check(layer_step, module, x)
    if (
        frozen == "all but Wv"
    ):  # the output's gradient and the gates are all that its own needs, and the slope
        assert launched == [f"light_layer_{n}_kernel" for n in (["fwd", "bwd"] if act else ["fwd"])]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "head_dim"), [((2, 6, 3, 5), 6), ((1, 9, 7, 7), 3)], ids=str)
def test_blocks(shape, head_dim, training, form, calls):
    """Each block's light output has two gradients: from the norm, and from the next layer."""
    blocks, x = make_blocks(shape, 2, head_dim, form, dtype=torch.float32)
    for block in blocks:
        nn.init.uniform_(block.norm.running_mean, -1, 1)
        nn.init.uniform_(block.norm.running_var, 0.5, 2)
    blocks.train(training)
    check(block_step, blocks, x)
    forward = ["light_layer", "norm_forward"]
    assert calls == 2 * forward + 2 * ["light_layer_backward", "norm_backward"]


@pytest.mark.usefixtures("few_programs")
def test_a_block_without_parameters_of_the_norm():
    blocks, x = make_blocks((2, 6, 3, 4), 2, 3, dtype=torch.float32)
    for block in blocks:
        block.norm = nn.BatchNorm2d(6, affine=False)
    for training in (True, False):
        check(block_step, blocks.train(training), x)


@pytest.mark.usefixtures("few_programs")
def test_dropped_samples():
    blocks, x = make_blocks((4, 6, 2, 3), 2, 3, drop_path=0.4, dtype=torch.float32)
    found = block_step(blocks, x)
    with ek.use_backend("eager"):  # in the same dtype: another draws other samples
        expected = block_step(blocks, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("reaches", [("block",), ("o",), ("o", "block")], ids=str)
def test_gradients_that_reach_one_output_of_a_block(reaches, calls):
    def run(blocks, x):
        previous = PreviousOutput()
        found = {"block": blocks[0](x, previous), "o": previous.find(blocks[0], x)}
        found["o"] = previous._out
        loss = sum(found[name].sin().sum() for name in reaches)
        return [*found.values(), *gradients(loss, [x, *blocks.parameters()])]

    check(run, *make_blocks((2, 6, 3, 4), 1, 3, dtype=torch.float32))
    assert ("norm_backward" in calls) == ("block" in reaches)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype, form, calls):
    """Float32 parameters beside maps of autocast's dtype; a block around a float32 input takes PyTorch's norm."""
    layer, x, prev = make_layer((2, 6, 5, 6), 3, torch.float32, form)
    found = autocast_results(
        lambda module, x: ([module(x)], None),
        WithPrevious(layer, prev),
        x.detach().to(dtype).requires_grad_(),
        torch.bfloat16,
    )
    assert_as_close(*found, torch.bfloat16, INTERPRETED)
    blocks, x = make_blocks((3, 6, 5, 6), 2, 3, form, dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    found = autocast_results(
        lambda blocks, x: (run_blocks(blocks, x), None), blocks, x, torch.bfloat16
    )
    assert_as_close(*found, torch.bfloat16, INTERPRETED)
    in_layer = ["light_layer"] * 2 + ["light_layer_backward"] * 2
    in_block = ["light_layer", "norm_forward"] * 2
    in_block += ["light_layer_backward", "norm_backward"] * 2
    assert calls == [
        "light_layer",
        "light_layer_backward",
        *(in_layer if dtype == torch.float32 else in_block),
    ]


def test_the_decay_is_not_rounded_under_autocast():
    """No operation of autocast's takes it: rounded to float16, 1 + 2^-11 would leave the previous output as it is."""
    layer, x, prev = make_layer((2, 6, 3, 4), 3, torch.float32)
    nn.init.constant_(layer.lambda_t, 1 + 2**-11)
    nn.init.zeros_(layer.Wv.weight)
    prev = prev.detach().half()
    with torch.autocast("cpu", torch.float16):
        found = layer(x, prev)
        with ek.use_backend("eager"):
            expected = layer(x, prev)
    assert torch.equal(found, expected)
    assert not torch.equal(found, prev)


@pytest.mark.usefixtures("few_programs")
def test_checkpointing(calls):
    def run(blocks, x):
        previous, out = PreviousOutput(), x
        for block in blocks:
            out = checkpoint(block, out, previous, use_reentrant=False)
        return [out, *gradients(out.square().sum(), [x, *blocks.parameters()])]

    check(run, *make_blocks((2, 6, 3, 4), 2, 3, dtype=torch.float32))
    assert calls.count("light_layer") == 4


@pytest.mark.usefixtures("few_programs")
def test_maps_laid_out_otherwise():
    """A slice as input, a previous output of the other form, and gradients that are expanded or transposed."""
    layer, _, prev = make_layer((2, 8, 4, 5), 4, torch.float32, FORMS[1])
    wide = torch.randn(2, 11, 4, 5, requires_grad=True)

    def run(module, wide):
        out = module(wide[:, 1:9])
        first = out.transpose(2, 3).contiguous().square().sum()
        inputs = [wide, *module.parameters()]
        return [*gradients(first, inputs, retain_graph=True), *gradients(out.sum(), inputs)]

    check(run, WithPrevious(layer, prev), wide)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, calls):
    def run(blocks, x):
        with mode():
            return [blocks.eval()[0](x, PreviousOutput())]

    blocks, x = make_blocks((2, 6, 3, 4), 1, 3, dtype=torch.float32)
    check(run, blocks, x.detach())
    assert calls == ["light_layer", "norm_forward"]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_same_call_gives_the_same_bits(form):
    blocks, x = make_blocks((1, 6, 5, 7), 1, 3, form, dtype=torch.float32)
    for a, b in zip(block_step(blocks, x), block_step(blocks, x), strict=True):
        assert torch.equal(a, b)


def test_a_gate_at_both_ends():
    """Scores beyond what an exponential of float32 holds: the gate is 0 or 1, and no NaN."""
    kernels = KERNELS["triton"]
    layer, _, prev = make_layer((2, 2, 2, 2), 1, torch.float32)
    ones, center = torch.ones(1, 1, 1), torch.zeros(2, 1, 3, 3)
    center[:, :, 1, 1] = 1.0
    filters = LightFilters(ones, -ones, center, layer.lambda_t.detach())
    x = torch.full((2, 2, 2, 2), 20.0)
    for key, gate in ((-ones, 0.0), (ones, 1.0)):
        r = kernels.light_layer(x, filters._replace(wk=key), prev, 2, 1.0)
        assert r.block is None
        torch.testing.assert_close(r.factors, torch.full((2, 2), gate), rtol=0, atol=1e-30)
        torch.testing.assert_close(r.out, gate * x + filters.decay * prev)


def test_which_kernels_serve(monkeypatch):
    layer, x, prev = make_layer((2, 6, 3, 4), 3, torch.float32)
    triton = KERNELS["triton"]
    assert layer.plan(x, prev).backend is triton
    with ek.use_backend("eager"):
        assert layer.plan(x, prev).forced == "eager"
    with ek.use_backend("cuda"):
        assert layer.plan(x, prev).forced == "cuda"
        with pytest.raises(ValueError, match="it has no kernel for light_layer"):
            layer(x, prev)
    if extension() is not None:
        for backend in ("auto", "cpp"):  # on the CPU Triton is never taken of itself
            with ek.use_backend(backend):
                assert layer.plan(x, prev).backend is KERNELS["cpp"]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.plan(x, prev).backend is triton
    assert layer.plan(x[:0], prev[:0]).obstacles == ("the input is empty",)
    assert "prev_out has another shape" in layer.plan(x, prev[:, :, :1]).obstacles[0]
    double = layer.double().plan(x.double(), prev.double())
    assert double.reasons == (
        "it serves bfloat16, float16, float32, and the values are torch.float64",
    )
