"""Outputs and all gradients of layer attention, on both backends, against a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from support.cases import DTYPES, evaluate, make_case
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
    one_number,
)
from support.oracle import assert_matches

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_maps(layout, dtype):
    case = make_case((3, 12, 5, 7), 3, 3, dtype, layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_tokens(layout, dtype):
    case = make_case((2, 9, 12), 3, 2, dtype, layout, channels_last=True)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("values", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_layouts_of_the_output_gradient(values, layout):
    case = make_case((2, 6, 4, 5), 2, 2, makers=values, dout=layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_the_output_gradient_of_tokens(layout):
    case = make_case((2, 5, 6), 2, 2, dout=layout, channels_last=True)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    case = make_case((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn])
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 31, 33, 65, 256])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_depths(depth, layout):
    case = make_case((2, 6, 3, 5), depth, 2, makers=layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("prev_depth", [None, 1, 2, 5])
def test_depths_of_the_previous_weights(prev_depth):
    case = make_case(depth=5, prev_depth=prev_depth)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 1, 3, 5), 1),
        ((1, 37, 7, 7), 1),
        ((2, 37, 7, 7), 37),
        ((3, 8, 1, 1), 8),
        ((2, 24, 9, 33), 3),
        ((2, 10, 1), 5),
        ((2, 4, 123), 2),
        ((2, 6, 2, 3, 5), 3),
        ((1, 66, 1, 3), 2),
    ],
    ids=str,
)
def test_sizes(shape, heads, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize(
    "shape", [(2, 1, 6), (2, 123, 1), (1, 1, 1), (2, 3, 5, 8), (2, 2, 3, 2, 8)], ids=str
)
def test_sizes_of_tokens(shape):
    case = make_case(shape, 3, 1, channels_last=True)
    assert_matches(evaluate(case), case)


def test_values_without_spatial_dimensions():
    case = make_case((3, 8), 3, 2)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5)], ids=str)
def test_nothing_in_a_batch_or_a_map(shape, layout):
    case = make_case(shape, 3, 2, makers=layout)
    assert_matches(evaluate(case), case)


# Planar maps are worked on in chunks of 2048 elements, eight chunks to a partial sum; interleaved ones in blocks of
# 32 768 elements, 1024 channels to a running sum. Each shape ends in the middle of one of these.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "heads", "layout"),
    [
        ((1, 2, 149, 131), 1, contiguous),  # one head of 39 038 elements without gaps
        ((1, 18, 33, 67), 2, channel_slice),
        (
            (1, 18, 33, 67),
            2,
            lambda s, d: contiguous((s[0], s[1], s[2] * s[3] + 5), d)[..., :-5].unflatten(
                -1, s[2:]
            ),
        ),
        ((2, 37, 33, 31), 37, channels_last),
        ((1, 1030, 6, 7), 5, channels_last),  # heads of 206 channels: the fifth straddles 1024
        ((1, 2100, 3, 3), 3, channels_last),
        ((1, 33000, 1, 2), 2, channels_last),  # a position larger than a block
    ],
    ids=["planar", "sliced", "gaps", "channelwise", "straddling", "strips", "wide"],
)
def test_beyond_chunks_and_blocks(shape, heads, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("channels_last", [False, True])
def test_stacked_tensors_equal_separate_ones(channels_last):
    keys, values = torch.randn(2, 4, 6), torch.randn(2, 4, 6, 6)
    keys.requires_grad_()
    values.requires_grad_()
    q = torch.randn(2, 6)
    stacked = ek.layer_attention(q, keys, values, 2, channels_last=channels_last)
    single = ek.layer_attention(
        q, list(keys.unbind(1)), tuple(values.unbind(1)), 2, channels_last=channels_last
    )
    assert torch.equal(stacked.out, single.out)
    assert torch.equal(stacked.weights, single.weights)
    dout = torch.randn_like(stacked.out)
    for a, b in zip(
        torch.autograd.grad(stacked.out, [keys, values], dout),
        torch.autograd.grad(single.out, [keys, values], dout),
        strict=True,
    ):
        assert a.abs().max() > 0
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0, 1, -0.7, 3.5])
def test_scales(scale):
    case = make_case(scale=scale)
    assert_matches(evaluate(case), case)


def test_strided_queries_keys_and_previous_weights():
    case = make_case((3, 12, 4), 3, 2)
    case.q = torch.randn(12, 3).t()
    case.keys = [
        torch.randn(3, 24)[:, ::2],
        torch.randn(1, 12).expand(3, 12),
        torch.randn(6, 12)[::2],
    ]
    case.prev_weights = torch.randn(2, 3, 2).softmax(-1).transpose(0, 1)
    case.dweights = torch.randn(3, 3, 2).transpose(1, 2)
    case.dkl = torch.tensor(0.7).expand(3, 2)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("which", ["q", "keys", "values", "prev_weights", "dout", "dkl"])
def test_lazily_negated_tensors(which):
    # The imaginary part of a conjugate is a view whose memory holds the opposite sign.
    case = make_case()
    x = getattr(case, which)
    negated = [torch._neg_view(-y) for y in x] if isinstance(x, list) else torch._neg_view(-x)
    setattr(case, which, negated)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, one_number], ids=lambda f: f.__name__
)
def test_the_output_keeps_the_memory_format(layout):
    case = make_case((2, 6, 4, 5), 2, 2, makers=layout)
    out = evaluate(case)["out"]
    expected = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=expected)


def test_a_value_used_twice_gets_both_gradients():
    value = torch.randn(2, 6, 4, requires_grad=True)
    q, k = torch.randn(2, 6), torch.randn(2, 6)
    weights = ek.layer_attention(q, [k, q], [value, value], 2)
    (grad,) = torch.autograd.grad(weights.out.sum(), value)
    # The weights of a head sum to 1; two roundings of weights and one of their sum.
    torch.testing.assert_close(
        grad, torch.ones_like(grad), rtol=4 * torch.finfo(torch.float32).eps, atol=0
    )


@pytest.mark.parametrize("depth", [1, 3, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_only_pass(depth, dtype):
    case = make_case((2, 12, 3), depth, 3, dtype, through="")
    case.wanted = []
    found = evaluate(case)
    only = ek.layer_attention_weights(case.q, case.keys, 3, prev_weights=case.prev_weights)
    assert torch.equal(only.weights, found["weights"])
    if depth == 1:
        assert only.kl is None
    else:
        assert torch.equal(only.kl, found["kl"])
    assert_matches(found, case)
