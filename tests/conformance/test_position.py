"""Attention over depth at every position against a float64 oracle: layouts, sizes, depths, and what is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backends import WITH_POSITIONS, Backend, on, over, words
from support.factors import FORMS, one_is_usual
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
    one_number,
)
from support.pairs import pairs
from support.position import (
    PositionCase,
    assert_position_matches,
    evaluate_position,
    make_position_case,
)
from torch.autograd import gradcheck

import ela_kernels as ek


def check(backend: Backend, case: PositionCase) -> dict[str, torch.Tensor]:
    found = evaluate_position(case, put=backend.put)
    assert_position_matches(found, case)
    return found


def map_cases(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "layout": MAP_LAYOUTS,
        "dout": MAP_LAYOUTS,
        "dtype": backend.dtypes,
        "shape": [(3, 12, 5, 7), (2, 16, 4, 8)],
        "map_query": [False, True],
        "keys": [False, True],
        "norm_weight": [False, True],
    }
    return backend.some(pairs(factors, one_is_usual))


@over("pair", map_cases, WITH_POSITIONS, ids=words)
def test_layouts_of_maps(backend, pair):
    pair = dict(pair)
    case = make_position_case(pair.pop("shape"), 3, pair.pop("dtype"), pair.pop("layout"), **pair)
    check(backend, case)


def token_cases(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "layout": TOKEN_LAYOUTS,
        "dout": TOKEN_LAYOUTS,
        "dtype": backend.dtypes,
        "shape": [(2, 9, 12), (2, 5, 32), (2, 5, 6)],
        "map_query": [False, True],
        "keys": [False, True],
        "norm_weight": [False, True],
    }
    return backend.some(pairs(factors, one_is_usual))


@over("pair", token_cases, WITH_POSITIONS, ids=words)
def test_layouts_of_tokens(backend, pair):
    pair = dict(pair)
    shape, dtype, layout = pair.pop("shape"), pair.pop("dtype"), pair.pop("layout")
    check(backend, make_position_case(shape, 3, dtype, layout, channels_last=True, **pair))


SIZES = [
    ((1, 1, 1, 1), False),
    ((2, 1, 3, 5), False),
    ((1, 37, 7, 7), False),
    ((3, 8), False),
    ((2, 24, 9, 33), False),
    ((2, 3, 41, 13), False),
    ((0, 6, 3, 5), False),
    ((2, 6, 0, 5), False),
    ((2, 6, 2, 3, 5), False),
    ((1, 1, 1), True),
    ((2, 1, 70), True),
    ((1, 123, 1), True),
    ((2, 3, 5, 8), True),
    ((1, 3, 1030), True),
    ((2, 0, 6), True),
]
# More positions than one piece of work, and more channels than are summed at a time.
LARGE_SIZES = [
    ((2, 70, 33, 31), False),
    ((1, 130, 40, 40), False),
    ((2, 1100, 66), True),
    ((1, 9, 33000), True),
]


@over("size", lambda b: b.some(SIZES), WITH_POSITIONS, ids=words)
@pytest.mark.parametrize("layout", FORMS, ids=lambda f: f.__name__)
def test_sizes(backend, size, layout):
    shape, is_last = size
    if is_last and layout is channels_last:
        pytest.skip("tokens lie one way here")
    for map_query in (False, True):
        check(
            backend,
            make_position_case(shape, 3, makers=layout, channels_last=is_last, map_query=map_query),
        )


@over("size", lambda b: [] if b.is_slow else LARGE_SIZES, WITH_POSITIONS, ids=words)
@pytest.mark.parametrize("layout", FORMS, ids=lambda f: f.__name__)
def test_sizes_beyond_one_piece(backend, size, layout):
    shape, is_last = size
    if is_last and layout is channels_last:
        pytest.skip("tokens lie one way here")
    check(backend, make_position_case(shape, 2, makers=layout, channels_last=is_last))


@over(
    "depth", lambda b: [1, 2, 33, 130] if b.is_slow else [1, 2, 3, 31, 32, 33, 130], WITH_POSITIONS
)
@pytest.mark.parametrize("tokens", [False, True], ids=["map", "tokens"])
def test_any_depth(backend, depth, tokens):
    shape = (1, 5, 6) if tokens else (1, 6, 2, 3)
    found = check(backend, make_position_case(shape, depth, channels_last=tokens))
    assert found["weights"].shape[1] == depth
    # None of them is dropped.
    assert (found["weights"] > 0).all()
    assert all((found[f"d values[{t}]"] != 0).any() for t in range(depth))


@on(WITH_POSITIONS)
@pytest.mark.parametrize("prev_depth", [1, 2, 4])
def test_shorter_previous_weights_are_padded_by_zeros(backend, prev_depth):
    check(backend, make_position_case((2, 6, 3, 3), 4, prev_depth=prev_depth))


@on(WITH_POSITIONS)
def test_zeros_among_previous_weights(backend):
    case = make_position_case((2, 6, 3, 3), 3, prev_depth=3)
    case.prev_weights[:, 1] = 0.0
    check(backend, case)


@on(WITH_POSITIONS)
@pytest.mark.parametrize("through", ["out", "weights", "kl", "kl_mean", "out kl"])
@pytest.mark.parametrize("keys", [False, True], ids=["own keys", "keys"])
def test_gradients_through_one_output(backend, through, keys):
    for tokens in (False, True):
        shape = (2, 7, 6) if tokens else (2, 6, 3, 5)
        check(
            backend, make_position_case(shape, 3, through=through, keys=keys, channels_last=tokens)
        )


@on(WITH_POSITIONS)
def test_a_summed_output(backend):
    check(backend, make_position_case(dout=one_number))


@on(WITH_POSITIONS)
def test_each_value_laid_out_otherwise(backend):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    for turn in range(len(mixed)):
        makers = mixed[turn:] + mixed[:turn]
        check(backend, make_position_case((2, 6, 4, 5), 4, makers=makers, keys=turn % 2 == 0))


@over("dtype", lambda b: [d for d in b.dtypes if d.itemsize == 2], WITH_POSITIONS)
def test_vectors_in_float32_beside_half_precision(backend, dtype):
    for tokens in (False, True):
        shape = (2, 7, 20) if tokens else (2, 20, 3, 5)
        case = make_position_case(shape, 3, dtype, vector_dtype=torch.float32, channels_last=tokens)
        found = check(backend, case)
        assert found["d query"].dtype == torch.float32


@on(WITH_POSITIONS)
@pytest.mark.parametrize(
    "wanted", [[], ["query"], ["norm_weight"], ["values[1]"], ["prev_weights"]]
)
def test_only_what_is_wanted(backend, wanted):
    for tokens in (False, True):
        case = make_position_case((2, 7, 6) if tokens else (2, 6, 3, 5), channels_last=tokens)
        case.wanted = wanted
        check(backend, case)


@on(WITH_POSITIONS)
def test_a_scale_and_an_eps(backend):
    case = make_position_case((2, 6, 3, 5), scale=-0.75)
    case.eps = 0.25
    check(backend, case)


@on([b for b in WITH_POSITIONS if torch.float64 in b.dtypes])
@pytest.mark.parametrize("map_query", [False, True], ids=["vector", "map"])
@pytest.mark.parametrize("keys", [False, True], ids=["own keys", "keys"])
@pytest.mark.parametrize("tokens", [False, True], ids=["map", "tokens"])
def test_gradcheck(backend, map_query, keys, tokens):
    case = make_position_case(
        (1, 3, 4) if tokens else (1, 4, 1, 3),
        2,
        torch.float64,
        map_query=map_query,
        keys=keys,
        prev_depth=2,
        channels_last=tokens,
    )
    names = [*case.inputs()]

    def call(*tensors: torch.Tensor) -> Any:
        of = dict(zip(names, tensors, strict=True))
        return tuple(
            ek.position_attention(
                of["query"],
                [of["values[0]"], of["values[1]"]],
                [of["keys[0]"], of["keys[1]"]] if keys else None,
                of["norm_weight"],
                prev_weights=of["prev_weights"],
                channels_last=tokens,
            )
        )

    inputs = [x.detach().clone().requires_grad_() for x in case.inputs().values()]
    assert gradcheck(call, inputs)


@on(WITH_POSITIONS)
def test_second_derivatives_are_those_of_eager_pytorch(backend):
    case = make_position_case((1, 6, 2, 3), 2, dtype=backend.exact)

    def penalty() -> list[torch.Tensor]:
        inputs = {n: x.detach().clone().requires_grad_() for n, x in case.inputs().items()}
        r = ek.position_attention(
            backend.put(inputs["query"]),
            [backend.put(inputs[f"values[{t}]"]) for t in range(2)],
            norm_weight=backend.put(inputs["norm_weight"]),
        )
        (g,) = torch.autograd.grad(r.out.square().sum(), [inputs["values[0]"]], create_graph=True)
        return list(
            torch.autograd.grad(
                g.square().sum(), [inputs[n] for n in ("query", "values[1]", "norm_weight")]
            )
        )

    found = penalty()
    with ek.use_backend("eager"):
        expected = penalty()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **backend.tolerance)


@on(WITH_POSITIONS)
def test_the_same_call_gives_the_same_bits(backend):
    case = make_position_case((2, 12, 9, 7))
    first, second = (evaluate_position(case, put=backend.put) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@on(WITH_POSITIONS)
def test_the_kernels_are_called(backend, made):
    evaluate_position(make_position_case(), put=backend.put)
    if backend.has_kernels:
        assert made == ["position_attend", "position_attend_backward"]


@on(WITH_POSITIONS)
@pytest.mark.parametrize("tokens", [False, True], ids=["map", "tokens"])
@pytest.mark.parametrize("queries", ["vectors", "maps", "both"])
def test_the_pull_form_gives_the_same_gradients(backend, queries, tokens, made):
    """Values are made of what was retrieved before; of the last retrieval the weights alone have a gradient."""
    shape, depth = ((2, 5, 12), 3) if tokens else ((2, 12, 3, 5), 3)
    dim, dtype = (-1 if tokens else 1), backend.exact
    is_map = {"vectors": [False] * 3, "maps": [True] * 3, "both": [True, False, True]}[queries]
    x = contiguous(shape, dtype)
    given = [
        (contiguous(shape, dtype) if m else torch.randn(shape[dim]).to(dtype)) / 3 for m in is_map
    ]
    norm = torch.rand(shape[dim], dtype=dtype) + 0.5

    def run(pull: bool) -> list[torch.Tensor]:
        leaves = [backend.put(t.clone()).requires_grad_() for t in (x, norm, *given)]
        history, values, prev, total = ek.PositionHistory(), [], None, 0
        value = leaves[0] * 1
        for t, query in enumerate(leaves[2:]):
            values.append(value)
            if pull:
                history.append(value)
                out = history.attend(query, leaves[1])
                weights, kl = history.weights, history.kl
            else:
                found = ek.position_attention(
                    query, values, norm_weight=leaves[1], prev_weights=prev
                )
                out, weights, kl, _ = found
                prev = weights
            if t == depth - 1:
                total = total + weights.square().sum() + kl.sum()
            else:
                value = out.sin()
                total = total + out.square().sum()
        found = torch.autograd.grad(total, leaves)
        return [g.cpu() for g in found]

    pulled = run(True)
    if backend.has_kernels:
        assert made.count("position_gather") == depth
    for found, expected in zip(pulled, run(False), strict=True):
        torch.testing.assert_close(found, expected, **backend.tolerance)


@on(WITH_POSITIONS)
@pytest.mark.parametrize("vector", ["query", "norm_weight"])
def test_vectors_with_a_stride_in_the_pull_form(backend, vector):
    """A column of a matrix is read as it lies, also where a value's gradient is gathered long after the call."""
    x = contiguous((2, 5, 12), backend.exact)
    column = backend.put(torch.randn(12, 3).to(backend.exact)[:, 1])
    assert not column.is_contiguous()

    def gradient(by: torch.Tensor) -> torch.Tensor:
        leaf = backend.put(x.clone()).requires_grad_()
        history = ek.PositionHistory()
        for factor in (1, 2, 3):
            history.append(leaf * factor)
        if vector == "query":
            out = history.attend(by)
        else:
            out = history.attend(leaf.detach().cos(), by)
        (found,) = torch.autograd.grad(out.square().sum() + history.weights.square().sum(), leaf)
        return found.cpu()

    torch.testing.assert_close(gradient(column), gradient(column.contiguous()))
