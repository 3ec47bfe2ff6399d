"""position_attention: refusals, forms, autocast, graphs, transforms, freed memory, threads, and who serves a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.freed import empty, free, shorten
from support.layouts import batch_slice, channels_last, contiguous, last_slice
from support.position import (
    assert_position_matches,
    evaluate_position,
    make_position_case,
)
from support.refusals import assert_refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import ela_kernels as ek
from ela_kernels.backends.extension import extension

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "position_attention.npz"
SPARSE = torch.eye(12).to_sparse()
needs_kernels = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


@pytest.fixture(params=["eager", pytest.param("cpp", marks=needs_kernels)])
def backend(request):
    with ek.use_backend(request.param):
        yield request.param


def good() -> dict[str, Any]:
    return {
        "query": torch.randn(12),
        "values": [torch.randn(2, 12, 5, 7) for _ in range(3)],
        "keys": [torch.randn(2, 12, 5, 7) for _ in range(3)],
        "norm_weight": torch.randn(12),
        "prev_weights": torch.full((2, 2, 5, 7), 0.5),
    }


def second(name: str, tensor: Any) -> dict[str, Any]:
    return {name: [good()[name][0], tensor, good()[name][2]]}


def odd(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, **options)


HALF = torch.bfloat16
BAD = {
    "values stacked": (
        {"values": odd(3, 2, 12, 5, 7)},
        TypeError,
        "values",
        "one tensor",
        "unbind",
    ),
    "values a dict": ({"values": {}}, TypeError, "values", "dict", "list"),
    "values None": ({"values": None}, TypeError, "values", "NoneType", "list"),
    "values empty": ({"values": []}, ValueError, "values", "empty", "T >= 1"),
    "values numbers": ({"values": [1.0]}, TypeError, "values[0]", "float", "torch.Tensor"),
    "value integer": (second("values", odd(2, 12, 5, 7).long()), TypeError, "values[1]", "int64"),
    "value sparse": (second("values", SPARSE), TypeError, "values[1]", "sparse", "to_dense"),
    "value of other shape": (
        second("values", odd(2, 12, 5, 6)),
        ValueError,
        "values[1]",
        "[2, 12, 5, 6]",
    ),
    "value of other dtype": (
        second("values", odd(2, 12, 5, 7, dtype=HALF)),
        TypeError,
        "values[1]",
        "bfloat16",
    ),
    "value elsewhere": (
        second("values", odd(2, 12, 5, 7, device="meta")),
        ValueError,
        "values[1]",
        "meta",
    ),
    "values of one dimension": (
        {"values": [odd(12)], "keys": None},
        ValueError,
        "values[0]",
        "[12]",
    ),
    "values without channels": (
        {"values": [odd(2, 0, 5, 7)], "keys": None},
        ValueError,
        "values[0]",
        "no channel",
    ),
    "keys too few": ({"keys": good()["keys"][:2]}, ValueError, "keys", "2 tensors", "3 values"),
    "keys of other shape": (
        {"keys": [odd(2, 12, 5, 6)] * 3},
        ValueError,
        "keys[0]",
        "[2, 12, 5, 6]",
    ),
    "keys of other dtype": (
        {"keys": [odd(2, 12, 5, 7).double()] * 3},
        TypeError,
        "keys[0]",
        "float64",
    ),
    "key of other shape": (
        second("keys", odd(2, 12, 5, 6)),
        ValueError,
        "keys[1]",
        "[2, 12, 5, 6]",
    ),
    "keys stacked": ({"keys": odd(3, 2, 12, 5, 7)}, TypeError, "keys", "one tensor", "unbind"),
    "query None": ({"query": None}, TypeError, "query", "NoneType", "torch.Tensor"),
    "query of other size": ({"query": odd(11)}, ValueError, "query", "[11]", "[12]"),
    "query of rank 2": ({"query": odd(2, 12)}, ValueError, "query", "[2, 12]", "[12]"),
    "query map of other shape": ({"query": odd(2, 12, 5, 6)}, ValueError, "query", "[2, 12, 5, 6]"),
    "query map of other dtype": (
        {"query": odd(2, 12, 5, 7, dtype=HALF)},
        TypeError,
        "query",
        "bfloat16",
    ),
    "query of other dtype": ({"query": odd(12, dtype=HALF)}, TypeError, "query", "bfloat16"),
    "query elsewhere": ({"query": odd(12, device="meta")}, ValueError, "query", "meta"),
    "query integer": ({"query": odd(12).long()}, TypeError, "query", "int64"),
    "norm_weight a number": ({"norm_weight": 1.0}, TypeError, "norm_weight", "float"),
    "norm_weight of other size": (
        {"norm_weight": odd(1)},
        ValueError,
        "norm_weight",
        "[1]",
        "[12]",
    ),
    "norm_weight of other dtype": (
        {"norm_weight": odd(12).double()},
        TypeError,
        "norm_weight",
        "float64",
    ),
    "eps negative": ({"eps": -1e-6}, ValueError, "eps", "-1e-06"),
    "eps infinite": ({"eps": float("inf")}, ValueError, "eps", "inf"),
    "eps NaN": ({"eps": float("nan")}, ValueError, "eps", "nan"),
    "eps a word": ({"eps": "1e-6"}, TypeError, "eps", "str"),
    "eps a bool": ({"eps": True}, TypeError, "eps", "bool"),
    "scale a word": ({"scale": "1"}, TypeError, "scale", "str"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "scale", "inf", "finite number"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale", "nan", "finite number"),
    "prev_weights a list": ({"prev_weights": [1.0]}, TypeError, "prev_weights", "list"),
    "prev_weights of other dtype": (
        {"prev_weights": odd(2, 2, 5, 7, dtype=HALF)},
        TypeError,
        "prev_weights",
        "bfloat16",
        "float32",
    ),
    "prev_weights too deep": (
        {"prev_weights": odd(2, 4, 5, 7)},
        ValueError,
        "prev_weights",
        "[2, 4, 5, 7]",
        "3",
    ),
    "prev_weights with depth last": (
        {"prev_weights": odd(2, 5, 7, 2)},
        ValueError,
        "prev_weights",
        "[B, t",
    ),
    "prev_weights elsewhere": (
        {"prev_weights": odd(2, 2, 5, 7, device="meta")},
        ValueError,
        "prev_weights",
        "meta",
    ),
    "channels_last a word": ({"channels_last": "yes"}, TypeError, "channels_last", "str"),
    "channels_last of maps": ({"channels_last": True}, ValueError, "query", "[12]", "[7]"),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_refused(case):
    changed, error, name, *words = case
    assert_refused(ek.position_attention, good() | changed, error, name, *words)


@pytest.mark.usefixtures("backend")
def test_the_good_call_is_served():
    r = ek.position_attention(**good())
    assert r.weights.shape == (2, 3, 5, 7)
    assert r.kl.shape == (2, 5, 7)
    assert r.kl_mean.shape == (2,)


@pytest.mark.usefixtures("backend")
def test_golden_numbers():
    """Of a float64 form in NumPy that shares no code with the package, gradients by its own chain rule."""
    with np.load(GOLDEN) as data:
        of = {name: torch.from_numpy(data[name]) for name in data.files}
    depth = int(of["depth"])
    for kind in ("own", "given"):
        leaves = {
            n: of[n].clone().requires_grad_()
            for n in ("query", "norm_weight", *(f"v{t}" for t in range(depth)))
        }
        keys = None
        if kind == "given":
            keys = [of[f"k{t}"].clone().requires_grad_() for t in range(depth)]
        r = ek.position_attention(
            leaves["query"],
            [leaves[f"v{t}"] for t in range(depth)],
            keys,
            leaves["norm_weight"] if kind == "own" else None,
            eps=float(of["eps"]),
            scale=float(of["scale"]),
            prev_weights=of["prev"],
        )
        for name in ("out", "weights", "kl"):
            assert_near(getattr(r, name), of[f"{kind}_{name}"])
        wanted = [leaves["query"], *(leaves[f"v{t}"] for t in range(depth)), *(keys or ())]
        grads = torch.autograd.grad(
            [r.out, r.weights, r.kl], wanted, [of["dout"], of["dweights"], of["dkl"]]
        )
        names = ["query", *(f"v{t}" for t in range(depth))]
        names += [f"k{t}" for t in range(depth)] if keys else []
        for name, g in zip(names, grads, strict=True):
            assert_near(g, of[f"{kind}_d_{name}"])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    # Relative to the largest number of the tensor: an element near zero is a difference of such numbers.
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.usefixtures("backend")
def test_the_docstrings_form_is_equivalent():
    B, T, N, C = 2, 3, 5, 8
    values = [torch.randn(B, N, C, dtype=torch.float64) for _ in range(T)]
    norm_weight, eps, scale = torch.rand(C, dtype=torch.float64), 1e-6, 0.7
    prev_weights = torch.randn(B, T - 1, N, dtype=torch.float64).softmax(1)
    for query in (torch.randn(C, dtype=torch.float64), torch.randn(B, N, C, dtype=torch.float64)):
        v = torch.stack(values, 1)
        k = F.rms_norm(v, (C,), norm_weight, eps)
        s = scale * (query.unsqueeze(1) * k).sum(-1) if query.dim() > 1 else scale * (k @ query)
        weights = s.softmax(1)
        p = F.pad(prev_weights, (0, 0, 0, T - prev_weights.shape[1]))
        kl = torch.where(p > 0, p * (p.log() - s.log_softmax(1)), 0).sum(1)
        r = ek.position_attention(query, values, None, norm_weight, eps, scale, prev_weights)
        torch.testing.assert_close(r.weights, weights)
        torch.testing.assert_close(r.out, torch.einsum("btn,btnc->bnc", weights, v))
        torch.testing.assert_close(r.kl, kl)
        torch.testing.assert_close(r.kl_mean, kl.mean(1))


@pytest.mark.usefixtures("backend")
def test_three_dimensions_are_tokens_unless_said_otherwise():
    values = [torch.randn(2, 6, 6) for _ in range(2)]
    query = torch.randn(6)
    tokens = ek.position_attention(query, values)
    rows = ek.position_attention(query, values, channels_last=False)
    turned = ek.position_attention(query, [v.transpose(1, 2) for v in values], channels_last=False)
    torch.testing.assert_close(tokens.out, turned.out.transpose(1, 2))
    torch.testing.assert_close(tokens.weights, turned.weights)
    assert not torch.allclose(tokens.weights, rows.weights)


@pytest.mark.usefixtures("backend")
def test_given_keys_are_normalised_with_a_norm_weight_and_only_then():
    values = [torch.randn(2, 5, 6) for _ in range(3)]
    query, weight = torch.randn(6), torch.rand(6)
    own = ek.position_attention(query, values, norm_weight=weight)
    same = ek.position_attention(query, values, values, norm_weight=weight)
    torch.testing.assert_close(own.out, same.out)
    plain = ek.position_attention(query, values, values)
    expected = torch.stack([v @ query for v in values], 1).softmax(1)
    torch.testing.assert_close(plain.weights, expected)


@pytest.mark.usefixtures("backend")
def test_a_query_of_zeros_weighs_all_values_alike():
    values = [torch.randn(2, 5, 6) for _ in range(4)]
    r = ek.position_attention(torch.zeros(6), values, prev_weights=torch.full((2, 3, 5), 1 / 3))
    torch.testing.assert_close(r.weights, torch.full((2, 4, 5), 0.25))
    torch.testing.assert_close(r.out, torch.stack(values).mean(0))
    # KL(1/3 on three || 1/4 each) is log(4/3).
    torch.testing.assert_close(r.kl, torch.full((2, 5), 4 / 3).log())


@pytest.mark.usefixtures("backend")
def test_large_scores_and_values_of_zeros():
    values = [torch.randn(2, 5, 6), torch.zeros(2, 5, 6), 1e4 * torch.randn(2, 5, 6)]
    case = make_position_case((2, 5, 6), 3, channels_last=True, prev_depth=None)
    case.values, case.query = values, torch.full((6,), 300.0)
    found = evaluate_position(case)
    assert all(x.isfinite().all() for x in found.values())
    assert_position_matches(
        {n: found[n] for n in ("out", "weights")},
        case,
        {n: x for n, x in _oracle(case).items() if n in ("out", "weights")},
    )


def _oracle(case):
    from support.position import position_oracle

    return position_oracle(case)


@pytest.mark.usefixtures("backend")
def test_a_nan_stays_where_it_is():
    values = [torch.randn(2, 5, 6) for _ in range(3)]
    values[1][0, 2, 3] = float("nan")
    r = ek.position_attention(torch.randn(6), values)
    bad = r.weights.isnan().any(1)
    assert bad[0, 2]
    assert bad.sum() == 1
    assert r.out.isnan().all(-1).sum() == 1


@needs_kernels
@pytest.mark.parametrize("tokens", [False, True])
def test_threads_change_no_bit(tokens):
    shape = (3, 70, 96) if tokens else (3, 24, 33, 17)
    case = make_position_case(shape, 3, channels_last=tokens)
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        with ek.use_backend("cpp"):
            found.append(evaluate_position(case))
    torch.set_num_threads(1)
    for other in found[1:]:
        for name, x in other.items():
            assert torch.equal(x, found[0][name]), name


# Graphs


def compiled(backend: str, **options):
    def function(query, values, keys=None, **arguments):
        r = ek.position_attention(query * 1.0, [v * 1.0 for v in values], keys, **arguments)
        return ek.PositionAttentionOutput(r.out * 1.0, *r[1:])

    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("backend", "fresh_compiler")
@pytest.mark.parametrize("keys", [False, True], ids=["own keys", "keys"])
@pytest.mark.parametrize(
    "layout", [contiguous, channels_last, batch_slice, last_slice], ids=lambda f: f.__name__
)
def test_traced_without_a_break(layout, keys):
    case = make_position_case(makers=layout, keys=keys, map_query=keys)
    assert_position_matches(evaluate_position(case, compiled("aot_eager")), case)


@pytest.mark.usefixtures("backend", "fresh_compiler")
def test_traced_again_with_changed_shapes():
    function = compiled("aot_eager", dynamic=None)
    for shape in ((2, 12, 5, 3), (3, 12, 7, 4), (5, 12, 2, 9)):
        case = make_position_case(shape)
        assert_position_matches(evaluate_position(case, function), case)


@pytest.mark.slow
@needs_kernels
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor():
    case = make_position_case((2, 7, 12), channels_last=True)
    assert_position_matches(evaluate_position(case, compiled("inductor")), case)


def op_arguments(case, requires_grad: bool):
    def leaf(x):
        return None if x is None else x.detach().requires_grad_(requires_grad)

    is_map = case.query.dim() > 1
    row = case.norm_weight if is_map else case.query
    return (
        leaf(row),
        leaf(case.query) if is_map else None,
        [leaf(v) for v in case.values],
        [leaf(k) for k in case.keys or ()],
        True,
        1e-6,
        leaf(case.prev_weights),
        case.channels_last,
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("shape", "layout", "options"),
    [
        ((2, 6, 4, 3), contiguous, {}),
        ((2, 6, 4, 3), channels_last, {"prev_depth": None, "map_query": True}),
        ((2, 6, 4, 3), last_slice, {"keys": True}),
        ((2, 5, 6), contiguous, {"channels_last": True}),
    ],
    ids=["planar", "interleaved", "sliced", "tokens"],
)
def test_the_operators_are_registered_rightly(shape, layout, options):
    case = make_position_case(shape, 2, torch.float64, layout, **options)
    op = torch.ops.ela_kernels.position_attention.default
    torch.library.opcheck(op, op_arguments(case, requires_grad=True))
    arguments = op_arguments(case, requires_grad=False)
    _, weights, _ = op(*arguments)
    gradients = [case.arriving.get(n) for n in ("out", "weights", "kl")]
    for some in (gradients, [gradients[0], None, None], [None, *gradients[1:]]):
        torch.library.opcheck(
            torch.ops.ela_kernels.position_attention_backward.default, (*arguments, weights, *some)
        )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_fake_tensors_carry_shapes_and_strides(layout):
    case = make_position_case((2, 6, 4, 3), 3, torch.bfloat16, layout)
    real = ek.position_attention(case.query, case.values, prev_weights=case.prev_weights)
    with FakeTensorMode() as mode:
        fake = ek.position_attention(
            mode.from_tensor(case.query),
            [mode.from_tensor(v) for v in case.values],
            prev_weights=mode.from_tensor(case.prev_weights),
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@needs_kernels
def test_a_second_derivative_of_the_operator_is_refused():
    case = make_position_case((1, 6, 2, 3), 2)
    row, query, values, *rest = op_arguments(case, requires_grad=True)
    out, *_ = torch.ops.ela_kernels.position_attention(row, query, values, *rest)
    (g,) = torch.autograd.grad(out.square().sum(), [values[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="the operator has none"):
        g.sum().backward()


# Autocast, transforms, memory


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_maps_and_keeps_vectors(dtype):
    case = make_position_case(keys=True)
    with torch.autocast("cpu", dtype=dtype):
        r = ek.position_attention(
            case.query, case.values, case.keys, case.norm_weight, prev_weights=case.prev_weights
        )
    assert r.out.dtype == dtype
    assert r.weights.dtype == r.kl.dtype == torch.float32
    half = [v.to(dtype) for v in case.values], [k.to(dtype) for k in case.keys]
    expected = ek.position_attention(
        case.query, *half, case.norm_weight, prev_weights=case.prev_weights
    )
    assert torch.equal(r.out, expected.out)
    # A residual stream in float32 beside layers in half precision.
    mixed = [case.values[0], *(v.to(dtype) for v in case.values[1:])]
    with torch.autocast("cpu", dtype=dtype):
        found = ek.position_attention(case.query, mixed, case.keys, case.norm_weight)
    assert torch.equal(found.out, r.out)


@pytest.mark.usefixtures("backend")
def test_autocast_leaves_float64_alone():
    case = make_position_case(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate_position(case)
    assert_position_matches(found, case)


def test_transforms_are_served_by_eager_pytorch_under_auto():
    case = make_position_case((2, 5, 6), 2, torch.float64, channels_last=True)

    def total(query):
        return ek.position_attention(query, case.values).out.sin().sum()

    query = case.query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(query), query)
    torch.testing.assert_close(torch.func.grad(total)(case.query), expected)
    (tangent,) = (torch.ones_like(case.query),)
    with forward_ad.dual_level():
        out = total(forward_ad.make_dual(case.query, tangent))
        found = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, expected.sum())
    batch = torch.func.vmap(total)(torch.stack([case.query, 2 * case.query]))
    torch.testing.assert_close(batch[1], total(2 * case.query))


@needs_kernels
def test_transforms_are_refused_by_a_forced_backend():
    values = [torch.randn(2, 5, 6)]
    with ek.use_backend("cpp"), pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(lambda q: ek.position_attention(q, values).out.sum())(torch.randn(6))


@pytest.mark.parametrize("how", [free, empty, shorten])
@pytest.mark.parametrize(
    "name", ["query", "query map", "values", "keys", "norm_weight", "prev_weights"]
)
def test_freed_storages_are_refused(backend, how, name):
    arguments = good()
    if name == "query map":
        arguments["query"] = torch.randn(2, 12, 5, 7)
    found = arguments[name.removesuffix(" map")]
    how(found[1] if isinstance(found, list) else found)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        ek.position_attention(**arguments)
    assert re_name(name) in str(caught.value)


def re_name(name: str) -> str:
    return name.removesuffix(" map")


@needs_kernels
def test_values_changed_in_place_are_noticed():
    values = [torch.randn(2, 5, 6, requires_grad=True) * 1 for _ in range(2)]
    with ek.use_backend("cpp"):
        out = ek.position_attention(torch.randn(6, requires_grad=True), values).out
    values[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_kernels
def test_a_negated_view_is_read_with_its_signs():
    complex_values = torch.randn(2, 5, 6, dtype=torch.complex64)
    value = complex_values.conj().imag
    assert value.is_neg()
    with ek.use_backend("cpp"):
        found = ek.position_attention(torch.randn(6), [value, value.clone()])
    torch.testing.assert_close(found.out, value.clone())


# Who serves


class Retrieves(torch.nn.Module):
    def forward(self, query, values):
        return ek.position_attention(query, values).out


@needs_kernels
def test_explain_says_who_serves():
    values = [torch.randn(2, 5, 6) for _ in range(2)]
    (found,) = ek.explain(Retrieves(), torch.randn(6), values)
    assert (found.form, found.backend, found.reasons) == ("op", "cpp", {})
    with ek.use_backend("eager"):
        (found,) = ek.explain(Retrieves(), torch.randn(6), values)
    assert (found.form, found.backend) == ("eager", "eager")
    assert found.reasons == {"op": ("use_backend('eager') is in force",)}


@needs_kernels
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_serve_says_why(backend):
    values = [torch.randn(2, 5, 6) for _ in range(2)]
    with ek.use_backend(backend), pytest.raises(ValueError, match=f"{backend}.*position_attention"):
        ek.position_attention(torch.randn(6), values)


@needs_kernels
def test_an_unknown_device_runs_in_eager_pytorch():
    values = [torch.empty(2, 5, 6, device="meta") for _ in range(2)]
    r = ek.position_attention(torch.empty(6, device="meta"), values)
    assert r.out.is_meta
    assert r.weights.shape == (2, 2, 5)
