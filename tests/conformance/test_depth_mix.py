"""The mix by given weights on every backend: layouts, sizes, depths, forms of weights, and what IEEE 754 says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import ALL, WITH_FLOAT64, WITH_KERNELS, Backend, on, over, words
from support.factors import (
    FORMS,
    one_is_usual,
    over_depths,
    over_sizes,
    over_sizes_beyond_all_pieces,
    over_sizes_of_tokens,
)
from support.freed import empty, free, shorten
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
    one_number,
)
from support.mixes import WEIGHTS, Mix, assert_mixed, by_hand, evaluate, make_mix, put_mix
from support.on_gpu import same_bits
from support.pairs import pairs

import ela_kernels as ek


def on_backend(backend: Backend, mix: Mix) -> Mix:
    return put_mix(mix, backend.put)


def run(backend: Backend, mix: Mix) -> dict[str, torch.Tensor]:
    return {name: x.cpu() for name, x in evaluate(on_backend(backend, mix)).items()}


def check(backend: Backend, mix: Mix) -> dict[str, torch.Tensor]:
    found = run(backend, mix)
    assert_mixed(found, mix)
    return found


@over(
    "pair",
    lambda backend: pairs(
        {
            "layout": MAP_LAYOUTS,
            "dout": MAP_LAYOUTS,
            "dtype": backend.dtypes,
            "size": [((3, 12, 5, 7), 3), ((2, 16, 4, 8), 16), ((2, 6, 4, 5), 1)],
            "depth": [2, 3],
            "form": WEIGHTS,
            "wide": [True, False],
        },
        one_is_usual,
    ),
    ids=words,
)
def test_layouts_of_maps(backend, pair):
    (shape, heads), layout = pair["size"], pair["layout"]
    options = {name: pair[name] for name in ("form", "wide", "dout")}
    check(backend, make_mix(shape, pair["depth"], heads, pair["dtype"], layout, **options))


@over(
    "pair",
    lambda backend: pairs(
        {
            "layout": TOKEN_LAYOUTS,
            "dout": TOKEN_LAYOUTS,
            "dtype": backend.dtypes,
            "size": [((2, 9, 12), 2), ((2, 5, 32), 32), ((2, 5, 6), 1)],
            "depth": [2, 3],
            "form": WEIGHTS,
        },
        one_is_usual,
    ),
    ids=words,
)
def test_layouts_of_tokens(backend, pair):
    (shape, heads), layout = pair["size"], pair["layout"]
    options = {"form": pair["form"], "dout": pair["dout"], "channels_last": True}
    check(backend, make_mix(shape, pair["depth"], heads, pair["dtype"], layout, **options))


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(backend, turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    check(backend, make_mix((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn]))


@over_sizes
def test_sizes(backend, pair):
    shape, heads = pair["size"]
    check(backend, make_mix(shape, 3, heads, pair["dtype"], pair["layout"]))


@over_sizes_of_tokens
def test_sizes_of_tokens(backend, pair):
    shape, heads = pair["size"]
    check(backend, make_mix(shape, 3, heads, pair["dtype"], channels_last=True))


@over_depths
def test_depths(backend, pair):
    if pair["depth"] > (backend.max_depth or pair["depth"]):
        pytest.skip(f"{backend} serves fewer maps, and refuses more")
    check(backend, make_mix((2, 16, 3, 5), pair["depth"], 2, pair["dtype"], pair["layout"]))


@over_sizes_beyond_all_pieces
def test_beyond_all_pieces(backend, pair):
    shape, heads = pair["size"]
    check(backend, make_mix(shape, 3, heads, pair["dtype"], pair["layout"]))


WANTED = {
    "nothing": lambda mix: [],
    "the weights": lambda mix: ["weights"],
    "values": lambda mix: mix.wanted[1:],
    "one value": lambda mix: mix.wanted[2:3],
    "weights and one value": lambda mix: [mix.wanted[0], mix.wanted[-1]],
}


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("layout", FORMS, ids=words)
@pytest.mark.parametrize("form", WEIGHTS)
def test_gradients_of_what_is_asked_for(backend, form, layout, wanted, made):
    mix = make_mix(makers=layout, form=form)
    mix.wanted = WANTED[wanted](mix)
    check(backend, mix)
    calls = ["mix"] if wanted == "nothing" else ["mix", "mix_backward"]
    assert made == (calls if backend.has_kernels else [])


@st.composite
def mixes(draw: st.DrawFn, backend: Backend) -> Mix:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    heads, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    batch, depth = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    tokens = draw(st.booleans())
    spatial = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    channels = heads * head_dim
    layouts = st.sampled_from(TOKEN_LAYOUTS if tokens else MAP_LAYOUTS)
    mix = make_mix(
        (batch, *spatial, channels) if tokens else (batch, channels, *spatial),
        depth,
        heads,
        draw(st.sampled_from(backend.dtypes)),
        draw(st.lists(layouts, min_size=1, max_size=3)),
        form=draw(st.sampled_from(WEIGHTS)),
        wide=draw(st.booleans()),
        channels_last=tokens,
        dout=draw(layouts),
    )
    mix.wanted = draw(st.lists(st.sampled_from(mix.wanted), unique=True))
    return mix


def test_random_calls(backend):
    @settings(
        max_examples=20 if backend.is_slow else 150,
        deadline=None,
        derandomize=True,
        database=None,
        # The backend is forced for the whole test: nothing of it changes between examples.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(mix=mixes(backend))
    def run_one(mix: Mix) -> None:
        check(backend, mix)

    run_one()


@pytest.mark.parametrize("layout", [*FORMS, one_number], ids=words)
def test_the_output_keeps_the_memory_format(backend, layout):
    mix = on_backend(backend, make_mix((2, 6, 4, 5), 2, 2, makers=layout))
    expected = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert ek.depth_mix(mix.weights, mix.values).is_contiguous(memory_format=expected)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_stacked_tensor_equals_separate_ones(backend, tokens):
    values = torch.randn(2, 4, 6, 6, device=backend.device).requires_grad_()
    weights = torch.randn(2, 2, 4, device=backend.device).requires_grad_()
    stacked = ek.depth_mix(weights, values, channels_last=tokens)
    single = ek.depth_mix(weights, values.unbind(1), channels_last=tokens)
    assert torch.equal(stacked, single)
    dout = torch.randn_like(stacked)
    for a, b in zip(
        torch.autograd.grad(stacked, [weights, values], dout),
        torch.autograd.grad(single, [weights, values], dout),
        strict=True,
    ):
        assert a.abs().max() > 0
        assert torch.equal(a, b)


def test_a_value_used_twice_gets_both_gradients(backend):
    value = torch.randn(2, 6, 4, device=backend.device).requires_grad_()
    weights = torch.tensor([0.75, -2.0], device=backend.device)
    (grad,) = torch.autograd.grad(ek.depth_mix(weights, [value, value]).sum(), value)
    assert torch.equal(grad, torch.full_like(grad, -1.25))


def test_one_value_with_a_weight_of_minus_one(backend):
    value = torch.randn(2, 6, 4, 5, device=backend.device)
    assert torch.equal(ek.depth_mix(-torch.ones(1, device=backend.device), [value]), -value)


@over("dtype", lambda backend: backend.dtypes)
def test_the_same_call_gives_the_same_bits(backend, dtype):
    for shape, heads, layout in (
        ((2, 12, 9, 7), 3, contiguous),
        ((2, 37, 9, 5), 37, channels_last),
    ):
        mix = on_backend(backend, make_mix(shape, 5, heads, dtype, layout))
        first, again = evaluate(mix), evaluate(mix)
        for name, x in first.items():
            assert not x.isnan().any(), name
            assert same_bits(x, again[name]), name


@on(WITH_FLOAT64)
@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("layout", FORMS, ids=words)
def test_derivatives(backend, layout, form):
    mix = make_mix((2, 4, 3, 2), 3, 2, torch.float64, layout, form=form)
    inputs = [x.requires_grad_() for x in mix.inputs().values()]
    assert torch.autograd.gradcheck(lambda w, *v: ek.depth_mix(w, v), inputs)
    assert torch.autograd.gradgradcheck(lambda w, *v: ek.depth_mix(w, v), inputs)


def test_second_derivatives_of_values_alone(backend):
    """Without a gradient of the weights no value is kept, and the first derivative is linear in what arrives."""
    mix = on_backend(backend, make_mix((2, 4, 3), 2, 2))
    values = [v.requires_grad_() for v in mix.values]
    dout = mix.dout.requires_grad_()
    out = ek.depth_mix(mix.weights, values)
    first = torch.autograd.grad(out, values, dout, create_graph=True)
    (second,) = torch.autograd.grad([d.sum() for d in first], dout)
    expected = mix.weights.sum(-1).repeat_interleave(2, 1).unsqueeze(-1).expand_as(second)
    torch.testing.assert_close(second, expected)


# Of numbers that are not finite, and of those that a softmax's weights never are.

SPECIAL = [float("nan"), float("inf"), float("-inf")]


def kinds(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 and -1 infinite, 2 NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0)).to(torch.int8)


@pytest.mark.parametrize("where", ["weights", "values[1]", "dout"])
@pytest.mark.parametrize("number", SPECIAL, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=words)
@pytest.mark.parametrize("heads", [2, 8])
def test_what_is_not_finite_goes_through(backend, heads, layout, number, where):
    mix = make_mix((2, 8, 3, 5), 3, heads, makers=layout)
    target = mix.dout if where == "dout" else mix.inputs()[where]
    target[(1, 1, *[2] * (target.dim() - 2))] = number
    found, expected = run(backend, mix), by_hand(mix)
    assert not all(x.isfinite().all() for x in found.values())
    for name, x in found.items():
        assert torch.equal(kinds(x), kinds(expected[name])), name
        rest = x.isfinite()
        torch.testing.assert_close(x[rest].double(), expected[name][rest], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", FORMS, ids=words)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_weight_of_zero_is_no_value_left_out(backend, layout, zero):
    """As IEEE has it, zero times infinity is no number."""
    mix = make_mix((1, 4, 2, 3), 3, 2, makers=layout)
    mix.weights[0, 0, 1] = zero
    mix.values[1][0, 0, 0, 0] = float("inf")
    mix.dout[0, 0, 1, 1] = float("inf")
    found = run(backend, mix)
    assert found["out"].isnan().nonzero().tolist() == [[0, 0, 0, 0]]
    assert found["d values[1]"].isnan().nonzero().tolist() == [[0, 0, 1, 1]]


@over("dtype", lambda backend: [d for d in backend.dtypes if d.itemsize >= 4])
@pytest.mark.parametrize("layout", FORMS, ids=words)
@pytest.mark.parametrize("heads", [2, 8])
def test_a_weight_below_the_least_normal_number_counts(backend, dtype, layout, heads):
    """A softmax's may be taken for none; a given one times a large value is a number like others."""
    info = torch.finfo(dtype)
    mix = make_mix((1, 8, 3, 5), 2, heads, dtype, layout)
    mix.weights.copy_(mix.weights.sign() * info.smallest_normal / 4)
    for x in (*mix.values, mix.dout):
        x.mul_(info.max / 64)
    mix.wanted = mix.wanted[1:]  # those of the weights are beyond the dtype
    found, expected = run(backend, mix), by_hand(mix)
    for name, x in found.items():
        assert x.abs().max() > 1e-3, name
        torch.testing.assert_close(x.double(), expected[name], rtol=1e-5, atol=1e-6)


# What has no memory, and what is changed.

REFUSED = r"has no memory|got shape"
on_cpu = on([b for b in ALL if b.device.type == "cpu"])


@on_cpu
@pytest.mark.parametrize("name", ["weights", "values[1]"])
def test_a_freed_tensor_is_refused(backend, name):
    mix = make_mix()
    free(mix.inputs()[name])
    with pytest.raises(ValueError, match="which has no memory"):
        ek.depth_mix(mix.weights, mix.values)


@on([b for b in WITH_KERNELS if b.device.type == "cpu"])
@pytest.mark.parametrize("lose", [free, empty, shorten])
@pytest.mark.parametrize("name", ["weights", "values[1]"])
def test_a_tensor_that_is_lost_before_the_backward(backend, name, lose):
    mix = make_mix()
    inputs = {n: x.requires_grad_() for n, x in mix.inputs().items()}
    out = ek.depth_mix(mix.weights, mix.values)
    lose(inputs[name])
    with pytest.raises((ValueError, RuntimeError), match=rf"{REFUSED}|invalid gradient"):
        out.sum().backward()


def test_a_change_in_place_before_the_backward_is_noticed(backend):
    mix = on_backend(backend, make_mix())
    mix.weights.requires_grad_()
    value = mix.values[0].requires_grad_() * 1.0
    out = ek.depth_mix(mix.weights, [value, *mix.values[1:]])
    value.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_tensor_with_its_sign_as_a_flag(backend):
    """PyTorch may hold a negation back, which a kernel cannot see."""
    complex_map = torch.randn(2, 6, 4, dtype=torch.complex64, device=backend.device)
    value = complex_map.conj().imag
    assert value.is_neg()
    weights = torch.randn(2, 3, 1, 2, device=backend.device, dtype=torch.complex64).conj().imag
    weights = weights.squeeze(2)
    assert weights.is_neg()
    plain = [value.resolve_neg()] * 2
    expected = ek.depth_mix(weights.resolve_neg(), plain)
    assert torch.equal(ek.depth_mix(weights, [value, value]), expected)
