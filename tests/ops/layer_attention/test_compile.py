"""torch.compile, the operator's registration, fake tensors and autocast."""

from __future__ import annotations

import pytest
import torch
from support.cases import evaluate, make_case
from support.layouts import batch_slice, channels_last, contiguous, last_slice, one_number
from support.oracle import assert_matches
from torch._subclasses.fake_tensor import FakeTensorMode

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(backend: str, **options):
    def function(q, keys, values, **arguments):
        r = ek.layer_attention(q * 1.0, keys, [v * 1.0 for v in values], **arguments)
        return ek.LayerAttentionOutput(r.out * 1.0, r.weights, r.kl)

    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, batch_slice, last_slice], ids=lambda f: f.__name__
)
def test_traced_without_a_break(layout):
    case = make_case(makers=layout)
    assert_matches(evaluate(case, compiled("aot_eager")), case)


@pytest.mark.parametrize("through", ["out", "kl", "weights"])
def test_traced_gradients_through_one_output(through):
    case = make_case(through=through)
    assert_matches(evaluate(case, compiled("aot_eager")), case)


def test_traced_without_previous_weights_and_with_a_summed_output():
    case = make_case(prev_depth=None, dout=one_number)
    assert_matches(evaluate(case, compiled("aot_eager")), case)


@pytest.mark.usefixtures("backend")
def test_traced_maps_without_a_position():
    case = make_case((3, 8), 2, 2)
    assert_matches(evaluate(case, compiled("aot_eager")), case)


def test_traced_again_with_changed_shapes():
    function = compiled("aot_eager", dynamic=None)
    for shape in ((2, 12, 5, 3), (3, 12, 7, 4), (5, 12, 2, 9)):
        case = make_case(shape)
        assert_matches(evaluate(case, function), case)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_compiled_by_inductor(layout):
    case = make_case(makers=layout)
    assert_matches(evaluate(case, compiled("inductor")), case)


@pytest.mark.usefixtures("kernels")
def test_the_compiled_graph_runs_the_kernels(ran):
    evaluate(make_case(), compiled("aot_eager"))
    assert ran == ["cpp forward", "cpp backward"]


def op_arguments(case, requires_grad: bool):
    def leaf(x):
        return None if x is None else x.detach().requires_grad_(requires_grad)

    return (
        leaf(case.q),
        [leaf(k) for k in case.keys],
        [leaf(v) for v in case.values],
        case.heads,
        0.5,
        leaf(case.prev_weights),
        case.channels_last,
        case.tolerance,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("shape", "layout", "prev_depth", "tokens"),
    [
        ((2, 6, 4, 3), contiguous, 1, False),
        ((2, 6, 4, 3), channels_last, None, False),
        ((2, 6, 4, 3), last_slice, 1, False),
        ((2, 5, 6), contiguous, 1, True),
    ],
    ids=["planar", "interleaved", "sliced", "tokens"],
)
def test_the_operator_is_registered_rightly(shape, layout, prev_depth, tokens):
    case = make_case(
        shape, 2, 2, torch.float64, layout, prev_depth=prev_depth, channels_last=tokens
    )
    op = torch.ops.ela_kernels.layer_attention.default
    torch.library.opcheck(op, op_arguments(case, requires_grad=True))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dout_layout", [contiguous, channels_last, one_number, None])
def test_the_backward_operator_is_registered_rightly(layout, dout_layout):
    case = make_case((2, 6, 4, 3), 2, 2, torch.float64, layout, dout=dout_layout)
    q, keys, values, heads, scale, prev, *options = op_arguments(case, requires_grad=False)
    weights = ek.layer_attention(q, keys, values, heads, scale).weights
    gradients = (case.dout, case.dweights, case.dkl)
    op = torch.ops.ela_kernels.layer_attention_backward.default
    torch.library.opcheck(op, (q, keys, values, heads, scale, prev, weights, *gradients, *options))


@pytest.mark.usefixtures("backend")
def test_the_operator_called_directly():
    case = make_case(prev_depth=2)

    def direct(q, keys, values, heads, scale, prev_weights, channels_last):
        scale = (q.shape[1] // heads) ** -0.5
        return ek.LayerAttentionOutput(
            *torch.ops.ela_kernels.layer_attention(
                q, keys, values, heads, scale, prev_weights, channels_last, 0.0
            )
        )

    assert_matches(evaluate(case, direct), case)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_fake_tensors_carry_shapes_and_strides(layout):
    case = make_case((2, 6, 4, 3), 3, 2, torch.bfloat16, layout)
    real = evaluate(case)
    with FakeTensorMode() as mode:
        fake = make_case((2, 6, 4, 3), 3, 2, torch.bfloat16)
        fake.q, fake.prev_weights = mode.from_tensor(case.q), mode.from_tensor(case.prev_weights)
        fake.keys, fake.values = (
            [mode.from_tensor(x) for x in xs] for xs in (case.keys, case.values)
        )
        found = evaluate(fake)
    assert found.keys() == real.keys()
    for name, x in found.items():
        assert (x.shape, x.dtype) == (real[name].shape, real[name].dtype), name
    assert found["out"].stride() == real["out"].stride()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(dtype):
    case = make_case(depth=3)
    inputs = {n: x.detach().requires_grad_() for n, x in case.inputs().items()}
    keys, values = ([inputs[f"{kind}[{j}]"] for j in range(3)] for kind in ("keys", "values"))
    with torch.autocast("cpu", dtype=dtype):
        r = ek.layer_attention(inputs["q"], keys, values, 3, prev_weights=inputs["prev_weights"])
        only = ek.layer_attention_weights(inputs["q"].detach(), [k.detach() for k in keys], 3)
    assert r.out.dtype == dtype
    assert r.weights.dtype == r.kl.dtype == only.weights.dtype == torch.float32
    assert torch.equal(only.weights, r.weights)
    # What autocast does by hand: the same call on rounded inputs.
    half = make_case(depth=3, dtype=dtype)
    half.q, half.prev_weights = case.q.to(dtype), case.prev_weights
    half.keys, half.values = ([x.to(dtype) for x in xs] for xs in (case.keys, case.values))
    half.dout, half.dweights, half.dkl = case.dout.to(dtype), case.dweights, case.dkl
    expected = evaluate(half)
    assert torch.equal(r.out, expected["out"])
    grads = torch.autograd.grad(
        list(r), list(inputs.values()), [half.dout, half.dweights, half.dkl]
    )
    for (name, x), g in zip(inputs.items(), grads, strict=True):
        assert g.dtype == x.dtype == torch.float32
        assert torch.equal(g, expected["d " + name].float()), name


@pytest.mark.usefixtures("backend")
def test_autocast_leaves_float64_alone():
    case = make_case(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(case)
    assert found["out"].dtype == torch.float64
    assert_matches(found, case)


@pytest.mark.usefixtures("backend")
def test_autocast_mixes_dtypes_as_a_network_does():
    # Under autocast a convolution gives bfloat16 and a pooled vector stays float32.
    q, k, v = torch.randn(2, 6), torch.randn(2, 6).bfloat16(), torch.randn(2, 6, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ek.layer_attention(q, [k], [v], 2).out.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"keys\[0\]: got dtype"):
        ek.layer_attention(q, [k], [v], 2)


@pytest.mark.usefixtures("backend")
def test_inference_mode():
    case = make_case()
    expected = evaluate(case)
    with torch.inference_mode():
        r = ek.layer_attention(case.q, case.keys, case.values, 3, prev_weights=case.prev_weights)
        assert torch.equal(r.out, expected["out"])
        assert torch.equal(r.kl, expected["kl"])
