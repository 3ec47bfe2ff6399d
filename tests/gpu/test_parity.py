"""Outputs and all gradients of layer attention on the device, on both backends, against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from support.cases import evaluate, make_case
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    batch_slice,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
)
from support.on_gpu import GPU_DTYPES, case_on, evaluate_on, same_bits
from support.oracle import assert_matches

import ela_kernels as ek
from ela_kernels.backends.dispatch import BACKENDS as DISPATCHED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("backend", "poisoned_memory")]


def name_of(function):
    return function.__name__


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
def test_layouts_of_maps(layout, dtype):
    case = make_case((3, 12, 5, 7), 3, 3, dtype, layout)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_layouts_of_tokens(layout, dtype):
    case = make_case((2, 9, 12), 3, 2, dtype, layout, channels_last=True)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("values", [contiguous, channels_last], ids=name_of)
def test_layouts_of_the_output_gradient(values, layout):
    case = make_case((2, 6, 4, 5), 2, 2, makers=values, dout=layout)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    case = make_case((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn])
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 31, 33, 65, 256])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_depths(depth, layout, backend):
    if depth > (DISPATCHED[backend].max_depth or depth):
        pytest.skip(f"{backend} serves fewer layers, and refuses more: see below")
    case = make_case((2, 6, 3, 5), depth, 2, makers=layout)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [1, 31, 65])
def test_depths_of_half_types(depth, dtype):
    case = make_case((2, 16, 4, 8), depth, 2, dtype)
    assert_matches(evaluate_on(case), case)


@pytest.mark.usefixtures("cuda_only")
def test_one_layer_too_many_is_refused(backend):
    most = DISPATCHED[backend].max_depth
    case = case_on(make_case((1, 2, 3), most + 1, 1, prev_depth=None))
    with pytest.raises(ValueError, match=f"'{backend}' was forced.* up to {most} layers"):
        ek.layer_attention(case.q, case.keys, case.values, 1)


@pytest.mark.parametrize("prev_depth", [None, 1, 2, 5])
def test_depths_of_the_previous_weights(prev_depth):
    case = make_case(depth=5, prev_depth=prev_depth)
    assert_matches(evaluate_on(case), case)


def test_zeros_in_the_previous_weights():
    case = make_case((2, 6, 4), 3, 2)
    case.prev_weights = torch.tensor([0.0, 1.0]).expand(2, 2, 2).contiguous()
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("through", ["out", "weights", "kl", "out weights", "weights kl", ""])
def test_missing_gradients(through):
    case = make_case((2, 12, 5, 3), 4, 3, through=through)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize(
    "wanted", [["q"], ["keys[1]"], ["values[0]", "values[2]"], ["prev_weights"], ["keys[0]", "q"]]
)
def test_only_some_inputs_want_a_gradient(wanted):
    case = make_case((2, 12, 5, 3), 3, 3)
    case.wanted = wanted
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
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
        ((3, 8), 2),
    ],
    ids=str,
)
def test_sizes(shape, heads, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5)], ids=str)
def test_nothing_in_a_batch_or_a_map(shape, layout):
    case = make_case(shape, 3, 2, makers=layout)
    assert_matches(evaluate_on(case), case)


# Beyond any block: several blocks to a head, a last one that is not full, heads of many channels, and more samples and
# heads than a grid's second and third dimension hold (65 535).
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "heads", "layout"),
    [
        ((1, 2, 149, 131), 1, contiguous),
        ((2, 64, 56, 56), 4, contiguous),
        ((2, 64, 56, 56), 4, channels_last),
        ((1, 18, 33, 67), 2, channel_slice),
        ((3, 18, 33, 67), 2, batch_slice),
        ((2, 37, 33, 31), 37, channels_last),
        ((1, 1030, 6, 7), 5, channels_last),
        ((1, 2100, 3, 3), 3, channels_last),
        ((1, 33000, 1, 2), 2, channels_last),
        ((66000, 2, 1, 3), 1, contiguous),
        ((700, 100, 1, 2), 100, contiguous),
        ((700, 100, 1, 2), 100, channels_last),
    ],
    ids=str,
)
def test_beyond_blocks_and_grids(shape, heads, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_that_begin_anywhere(offset, dtype):
    """Addresses that 16-byte accesses do not divide, on maps that are otherwise made for them."""

    def shifted(shape, dtype):
        elements = torch.Size(shape).numel()
        return contiguous((elements + 16,), dtype)[offset : offset + elements].view(tuple(shape))

    case = make_case((2, 8, 8, 8), 3, 2, dtype, shifted, dout=shifted)
    assert_matches(evaluate_on(case), case)
    mixed = make_case((2, 8, 8, 8), 3, 2, dtype, [contiguous, shifted])
    assert_matches(evaluate_on(mixed), mixed)


@pytest.mark.parametrize("scale", [0.0, 1, -0.7, 3.5, 40.0])
def test_scales(scale):
    case = make_case(scale=scale)
    assert_matches(evaluate_on(case), case)


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
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("which", ["q", "keys", "values", "prev_weights", "dout", "dkl"])
def test_lazily_negated_tensors(which):
    case = make_case()
    x = getattr(case, which)
    negated = [torch._neg_view(-y) for y in x] if isinstance(x, list) else torch._neg_view(-x)
    setattr(case, which, negated)
    assert_matches(evaluate_on(case), case)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_spread_as_in_pytorch(bad):
    case = make_case((2, 8, 3, 4), 3, 2, through="out")
    case.q[0, 1], case.keys[1][0, 1] = 0.5, bad  # the first head of the first sample
    case.values[2][1, 5, 2, 3] = bad
    found = evaluate_on(case)
    with ek.use_backend("eager"):
        expected = evaluate(case)
    for name, x in expected.items():
        assert torch.equal(found[name].isnan(), x.isnan()), name
    assert found["weights"][0, 0].isnan().all()
    assert not found["weights"][1].isnan().any()


@pytest.mark.parametrize("depth", [1, 3, 65])
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_weights_only_pass(depth, dtype):
    case = make_case((2, 12, 3), depth, 3, dtype, through="")
    case.wanted = []
    found = evaluate_on(case)
    there = case_on(case)
    only = ek.layer_attention_weights(there.q, there.keys, 3, prev_weights=there.prev_weights)
    assert torch.equal(only.weights.cpu(), found["weights"])
    assert (only.kl is None) == (depth == 1)
    if only.kl is not None:
        assert torch.equal(only.kl.cpu(), found["kl"])
    assert_matches(found, case)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_the_output_keeps_the_memory_format(layout):
    case = case_on(make_case((2, 6, 4, 5), 2, 2, makers=layout))
    out = ek.layer_attention(case.q, case.keys, case.values, 2).out
    expected = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "heads", "layout"),
    [
        ((3, 12, 37, 41), 3, contiguous),
        ((1, 3, 149, 131), 1, contiguous),
        ((2, 37, 33, 31), 37, channels_last),
        ((1, 2100, 9, 5), 3, channels_last),
        ((32, 64, 14, 14), 4, contiguous),
    ],
    ids=str,
)
def test_the_same_call_gives_the_same_bits(shape, heads, layout, dtype):
    case = case_on(make_case(shape, 5, heads, dtype, layout))
    first = evaluate(case)
    for _ in range(4):
        again = evaluate(case)
        for key, x in first.items():
            assert not x.isnan().any(), key
            assert same_bits(x, again[key]), key


def test_the_named_backend_runs(kernels_ran):
    case = make_case()
    evaluate_on(case)
    assert kernels_ran == ["forward", "backward"]
    there = case_on(case)
    ek.layer_attention_weights(there.q, there.keys, 3)
    assert kernels_ran[2:] == ["weights"]


def test_inputs_and_what_lies_beside_them_stay_as_they_are():
    case = case_on(make_case((2, 12, 5, 7), 3, 3, torch.float32, channel_slice))

    def everything():
        inputs = (case.q, *case.keys, *case.values, case.prev_weights, case.dout)
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in inputs]
        return [x.as_strided((n,), (1,), 0).clone() for x, n in zip(inputs, sizes, strict=True)]

    before = everything()
    evaluate(case)
    for after, x in zip(everything(), before, strict=True):
        assert same_bits(after, x)
