"""What layer attention promises of one call: gradients of what is asked for, limits, bits, and what it leaves alone."""

from __future__ import annotations

import functools

import pytest
import torch
from support.backends import WITH_FLOAT64, WITH_KERNELS, Backend, on, over, words
from support.cases import HALF_TYPES, evaluate, make_case
from support.cuda_on_cpu import off_by
from support.layouts import channel_slice, channels_last, contiguous, one_number
from support.on_gpu import same_bits
from support.oracle import assert_matches, oracle
from support.pairs import pairs

import ela_kernels as ek

FORMS = (contiguous, channels_last)
forms = pytest.mark.parametrize("layout", FORMS, ids=words)


def leaves(backend: Backend, *shapes: tuple[int, ...], dtype=torch.float32) -> list[torch.Tensor]:
    return [torch.randn(s, dtype=dtype, device=backend.device).requires_grad_() for s in shapes]


@pytest.mark.parametrize("tokens", [False, True])
def test_stacked_tensors_equal_separate_ones(backend, tokens):
    keys, values, q = leaves(backend, (2, 4, 6), (2, 4, 6, 6), (2, 6))
    stacked = ek.layer_attention(q, keys, values, 2, channels_last=tokens)
    single = ek.layer_attention(
        q, list(keys.unbind(1)), tuple(values.unbind(1)), 2, channels_last=tokens
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


@pytest.mark.parametrize("layout", [*FORMS, one_number], ids=words)
def test_the_output_keeps_the_memory_format(backend, layout):
    case = backend.case(make_case((2, 6, 4, 5), 2, 2, makers=layout))
    out = ek.layer_attention(case.q, case.keys, case.values, 2).out
    expected = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=expected)


def test_a_value_used_twice_gets_both_gradients(backend):
    q, k, value = leaves(backend, (2, 6), (2, 6), (2, 6, 4))
    weights = ek.layer_attention(q, [k, q], [value, value], 2)
    (grad,) = torch.autograd.grad(weights.out.sum(), value)
    # The weights of a head sum to 1; two roundings of weights and one of their sum.
    torch.testing.assert_close(
        grad, torch.ones_like(grad), rtol=4 * torch.finfo(torch.float32).eps, atol=0
    )


def test_an_input_that_needs_none_gets_none(backend):
    q, k, *values = leaves(backend, (2, 6), (2, 6), (2, 6, 4), (2, 6, 4))
    k, values[0] = k.detach(), values[0].detach()
    ek.layer_attention(q, [k, k], values, 2).out.sum().backward()
    assert q.grad is not None
    assert values[1].grad is not None
    assert k.grad is None
    assert values[0].grad is None


@forms
def test_zeros_in_the_previous_weights(backend, layout):
    """A zero contributes zero to the divergence and to both gradients, also where this layer's weight is zero too."""
    case = make_case((2, 8, 3), 3, 2, makers=layout, prev_depth=2)
    case.prev_weights = torch.tensor([[[0.0, 1.0], [0.3, 0.7]], [[1.0, 0.0], [0.0, 0.0]]])
    found = backend.evaluate(case)
    assert_matches(found, case)
    assert found["d prev_weights"][0, 0, 0] == 0
    assert found["kl"][1, 1] == 0
    deeper = make_case((2, 12, 5, 3), 4, 3, makers=layout)
    deeper.prev_weights[:, 0, 1] = 0
    deeper.prev_weights[1, 2] = 0
    found = backend.evaluate(deeper)
    assert_matches(found, deeper)
    assert (found["d prev_weights"][:, 0, 1] == 0).all()
    assert found["kl"][1, 2] == 0
    one_of_two = make_case((2, 6, 4), 3, 2, makers=layout)
    one_of_two.prev_weights = torch.tensor([0.0, 1.0]).expand(2, 2, 2)
    assert_matches(backend.evaluate(one_of_two), one_of_two)


def unnormed_case(dtype):
    case = make_case((2, 8, 3), 4, 2, dtype)
    case.prev_weights = 1.5 * torch.rand(2, 2, 3, dtype=case.prev_weights.dtype)
    return case


def test_previous_weights_that_do_not_sum_to_one(backend):
    case = unnormed_case(torch.float32)
    assert_matches(backend.evaluate(case), case)


@on(WITH_FLOAT64)
def test_gradients_that_can_be_differentiated(backend, monkeypatch):
    """They come from other formulas, which a numerical derivative of themselves would not find wrong."""
    case = unnormed_case(torch.float64)
    expected = oracle(case)
    differentiable = functools.partial(torch.autograd.grad, create_graph=True)
    monkeypatch.setattr(torch.autograd, "grad", differentiable)
    found = {name: x.detach() for name, x in backend.evaluate(case).items()}
    assert_matches(found, case, expected)


def test_one_hot_weights_keep_a_finite_divergence(backend):
    # exp(-300) is zero in float32: the divergence has to come from the scores, not from the rounded weight.
    def on_it(values):
        return torch.tensor(values, device=backend.device)

    q = on_it([[300.0]]).requires_grad_()
    keys = [on_it([[0.0]]), on_it([[1.0]])]
    values = [on_it([[[0.0, 0.0]]]), on_it([[[1.0, 1.0]]])]
    r = ek.layer_attention(q, keys, values, 1, prev_weights=on_it([[[1.0]]]))
    assert r.weights.tolist() == [[[0.0, 1.0]]]
    assert r.kl.tolist() == [[300.0]]
    assert torch.autograd.grad(r.kl.sum(), q)[0].tolist() == [[1.0]]


@over(
    "pair",
    lambda backend: pairs(
        {
            "rows": [(12, 3), (7, 7), (300, 1), (37, 1), (1100, 2)],
            "depth": [d for d in (1, 3, 33, 65, 256) if d <= max(backend.depths)],
            "dtype": backend.dtypes,
        }
    ),
    ids=words,
)
def test_weights_only(backend, pair, made):
    """No value is read, and nothing differs but by a rounding: sums may be cut otherwise."""
    (channels, heads), depth = pair["rows"], pair["depth"]
    if depth > (backend.max_depth or depth):
        pytest.skip(f"{backend} serves fewer layers, and refuses more")
    case = make_case((2, channels, 3), depth, heads, pair["dtype"], through="")
    case.wanted = []
    there = backend.case(case)
    only = ek.layer_attention_weights(there.q, there.keys, heads, prev_weights=there.prev_weights)
    assert made == (["weights"] if backend.has_kernels else [])
    assert (only.kl is None) == (depth == 1)
    found = {"weights": only.weights.cpu()} | ({} if depth == 1 else {"kl": only.kl.cpu()})
    expected = oracle(case)
    del expected["out"]
    assert_matches(found, case, expected)


def test_weights_only_are_those_of_the_whole_call(backend):
    for depth in (1, 3, 65):
        for dtype in backend.dtypes:
            case = backend.case(make_case((2, 12, 3), depth, 3, dtype, through=""))
            whole = ek.layer_attention(
                case.q, case.keys, case.values, 3, prev_weights=case.prev_weights
            )
            only = ek.layer_attention_weights(case.q, case.keys, 3, prev_weights=case.prev_weights)
            assert torch.equal(only.weights, whole.weights)
            assert only.kl is whole.kl is None or torch.equal(only.kl, whole.kl)


@over("dtype", lambda backend: [d for d in backend.dtypes if d in HALF_TYPES])
def test_widening_and_narrowing_back(backend, dtype):
    """A history of one layer has weight 1 and gives its value back: all 65 536 patterns, in vectors and singly."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.ones(1, 8, dtype=dtype, device=backend.device)
    for value in (patterns.view(1, 8, -1), off_by(1, contiguous)((1, 8, 2**13), dtype)):
        value.copy_(patterns.view(1, 8, -1))
        out = ek.layer_attention(ones, [ones], [backend.put(value)], 1).out.view(-1).cpu()
        assert torch.equal(out.isnan(), patterns.isnan())
        same = ~patterns.isnan()
        if not backend.keeps_subnormals(dtype):
            same &= patterns.abs() >= torch.finfo(dtype).smallest_normal
        # A sum that starts at +0 makes -0 a +0.
        assert torch.equal(out[same], patterns[same])


@over(
    "pair",
    lambda backend: pairs(
        {
            "call": backend.some(
                [
                    ((2, 12, 9, 7), 5, 3, contiguous),
                    ((2, 6, 3), 4, 2, contiguous),
                    ((3, 12, 37, 41), 5, 3, contiguous),
                    ((1, 3, 149, 131), 3, 1, contiguous),
                    ((1, 2100, 9, 5), 3, 3, channels_last),
                    ((2, 37, 33, 31), 5, 37, channels_last),
                    ((2, 12, 37, 41), 3, 3, channel_slice),
                    ((2, 12, 9, 7), 5, 3, channels_last),
                    *[((32, 64, 14, 14), 5, 4, contiguous)] * (backend.device.type == "cuda"),
                ]
            ),
            "dtype": backend.dtypes,
        }
    ),
    ids=words,
)
def test_the_same_call_gives_the_same_bits(backend, pair):
    shape, depth, heads, layout = pair["call"]
    case = backend.case(make_case(shape, depth, heads, pair["dtype"], layout))
    first = evaluate(case)
    for _ in range(4 if backend.device.type == "cuda" else 1):
        again = evaluate(case)
        for name, x in first.items():
            assert not x.isnan().any(), name
            assert same_bits(x, again[name]), name


@forms
def test_inputs_and_what_lies_beside_them_stay_as_they_are(backend, layout):
    for makers in (channel_slice, layout):
        case = backend.case(make_case((2, 12, 5, 7), 3, 3, torch.float32, makers, dout=makers))
        inputs = [case.q, *case.keys, *case.values, case.prev_weights]
        inputs += [case.dout, case.dweights, case.dkl]

        def everything(inputs=inputs):
            sizes = [x.untyped_storage().nbytes() // x.element_size() for x in inputs]
            return [x.as_strided((n,), (1,), 0).clone() for x, n in zip(inputs, sizes, strict=True)]

        before = everything()
        evaluate(case)
        for after, x in zip(everything(), before, strict=True):
            assert same_bits(after, x)


@on(WITH_KERNELS)
def test_the_forced_backend_runs(backend, made):
    case = make_case()
    backend.evaluate(case)
    assert made == ["attend", "attend_backward"]
    there = backend.case(case)
    ek.layer_attention_weights(there.q, there.keys, 3)
    assert made[2:] == ["weights"]


def test_what_it_does_not_serve_is_refused(backend):
    unserved = {torch.float64, torch.float32, *HALF_TYPES} - {*backend.dtypes}
    for dtype in unserved:
        with pytest.raises(ValueError, match=r"it serves bfloat16, float16, float32"):
            backend.evaluate(make_case(dtype=dtype))
    most = backend.max_depth
    if most is not None:
        case = backend.case(make_case((1, 2, 3), most + 1, 1, prev_depth=None))
        with pytest.raises(ValueError, match=f"'{backend.name}' was forced.* up to {most} layers"):
            ek.layer_attention(case.q, case.keys, case.values, 1)
    assert unserved or torch.float64 in backend.dtypes


def test_second_backward_over_a_retained_graph(backend):
    case = make_case()
    expected = oracle(case)["d q"]
    case = backend.case(case)
    q = case.q.requires_grad_()
    r = ek.layer_attention(q, case.keys, case.values, 3, prev_weights=case.prev_weights)
    for _ in range(2):
        r.out.backward(case.dout, retain_graph=True)
        r.weights.backward(case.dweights, retain_graph=True)
        r.kl.backward(case.dkl, retain_graph=True)
    torch.testing.assert_close(q.grad.cpu().double(), 2 * expected, rtol=1e-4, atol=1e-3)


def test_an_input_changed_in_place_is_noticed(backend):
    q, k, v = leaves(backend, (2, 6), (2, 6), (2, 6))
    value = v * 1.0
    out = ek.layer_attention(q, [k], [value], 2).out
    value.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def gradcheck_inputs(batch: int, channels_last: bool):
    shape = (batch, 2, 4) if channels_last else (batch, 4, 2)
    case = make_case(shape, 2, 2, torch.float64, prev_depth=1, channels_last=channels_last)
    inputs = [case.q, *case.keys, *case.values, case.prev_weights]

    def function(q, k0, k1, v0, v1, prev):
        return ek.layer_attention(
            q, (k0, k1), (v0, v1), 2, prev_weights=prev, channels_last=channels_last
        )

    return function, [x.detach().requires_grad_() for x in inputs]


@on(WITH_FLOAT64)
@pytest.mark.parametrize("channels_last", [False, True])
def test_numerical_first_derivatives(backend, channels_last):
    function, inputs = gradcheck_inputs(2, channels_last)
    assert torch.autograd.gradcheck(lambda *x: tuple(function(*x)), inputs)


@on(WITH_FLOAT64)
@pytest.mark.parametrize("output", range(3), ids=["out", "weights", "kl"])
def test_numerical_second_derivatives(backend, output):
    function, inputs = gradcheck_inputs(1, False)
    assert torch.autograd.gradgradcheck(lambda *x: function(*x)[output], inputs)


@on(WITH_FLOAT64)
def test_second_derivatives_of_a_parameter(backend):
    # A learned query that no layer computes: nn.Parameter is a subclass of Tensor.
    q = torch.nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
    keys = torch.randn(2, 2, 4, dtype=torch.float64)
    values = torch.randn(2, 2, 4, 3, dtype=torch.float64)

    def function(q):
        return ek.layer_attention(q, keys, values, 2).out

    assert torch.autograd.gradgradcheck(function, [q])
