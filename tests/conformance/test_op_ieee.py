"""NaN, infinities, subnormals and overflow go through as IEEE 754 says, the same on every backend."""

from __future__ import annotations

import pytest
import torch
from support.backends import Backend, over, words
from support.cases import make_case
from support.layouts import channels_last, contiguous
from support.oracle import oracle
from support.pairs import pairs

import ela_kernels as ek

SPECIAL = [float("nan"), float("inf"), float("-inf")]


def kinds(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 and -1 infinite, 2 NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0)).to(torch.int8)


def assert_same_kinds(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    only_finite: tuple[str, ...] = (),
) -> None:
    """Of `only_finite` alone what is finite is."""
    for name, x in found.items():
        a, b = kinds(x), kinds(expected[name])
        # dkl (log p + 1 - log a): autograd's product rule makes inf - inf of it, the kernel a factor inf.
        if name.startswith(("d prev_weights", *only_finite)):
            a, b = a != 0, b != 0
        assert torch.equal(a, b), name


def planted(where: str, number: float, dtype: torch.dtype, layout=contiguous):
    case = make_case((2, 8, 3, 5), 3, 2, dtype, layout)
    target = case.inputs()[where]
    index = (1, 1, 1) if where == "prev_weights" else (1, 3, *[2] * (target.dim() - 2))
    target[index] = number
    return case


def places(backend: Backend) -> list[dict]:
    factors = {
        "where": ["q", "keys[1]", "values[0]", "prev_weights"],
        "number": SPECIAL,
        "layout": [contiguous, channels_last],
        "dtype": [d for d in backend.dtypes if d != torch.float16],
    }
    return pairs(factors)


@over("pair", places, ids=words)
def test_what_is_not_finite_goes_through(backend, pair):
    dtype = pair["dtype"]
    case = planted(pair["where"], pair["number"], dtype, pair["layout"])
    found, expected = backend.evaluate(case), oracle(case)
    assert_same_kinds(found, expected)
    assert not all(x.isfinite().all() for x in found.values())
    for name, x in found.items():
        # What is finite is untouched by it: the other sample and the other head.
        rest = x.isfinite()
        rtol = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            x[rest].double(), expected[name][rest], rtol=rtol, atol=64 * rtol
        )


@pytest.mark.parametrize("where", ["dout", "dweights", "dkl"])
@pytest.mark.parametrize("number", SPECIAL, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=words)
def test_gradients_that_are_not_finite_go_through(backend, layout, number, where):
    case = make_case((2, 8, 3, 5), 3, 2, makers=layout)
    getattr(case, where)[1, 0] = number
    found, expected = backend.evaluate(case), oracle(case)
    # In Triton an infinite dkl is a factor of the differences of weights, where autograd has inf - inf.
    has_factor = backend.name == "triton" and where == "dkl"
    assert_same_kinds(found, expected, ("d q", "d keys") if has_factor else ())
    assert not found["d q"].isfinite().all()


@pytest.mark.parametrize("number", SPECIAL, ids=str)
def test_everything_not_finite(backend, number):
    case = make_case((2, 8, 3), 3, 2)
    for x in case.inputs().values():
        x.fill_(number)
    for name, x in backend.evaluate(case).items():
        assert not x.isfinite().any() or name == "d prev_weights", name


@over("dtype", lambda backend: [d for d in backend.dtypes if d.itemsize >= 4])
def test_huge_scores_do_not_overflow(backend, dtype):
    # exp(1e30) is infinite; softmax subtracts the largest score first.
    def full(x, *shape):
        return torch.full(shape, x, dtype=dtype, device=backend.device)

    q = full(1e15, 1, 1)
    keys = [full(x, 1, 1) for x in (1e15, 0.0, -1e15)]
    values = [full(x, 1, 1, 2) for x in (3.0, 5.0, 7.0)]
    r = ek.layer_attention(q, keys, values, 1)
    assert r.weights.tolist() == [[[1.0, 0.0, 0.0]]]
    assert r.out.tolist() == [[[3.0, 3.0]]]


@over("dtype", lambda backend: backend.dtypes)
def test_subnormal_values_are_kept(backend, dtype):
    smallest = torch.finfo(dtype).smallest_normal
    tiny = smallest * torch.tensor([0.5, -0.25, 0.75, 1.0], dtype=torch.float64)
    value = tiny.to(dtype).view(1, 1, 4).to(backend.device)
    ones = torch.ones(1, 1, dtype=dtype, device=backend.device)
    out = ek.layer_attention(ones, [ones], [value], 1).out
    if not backend.keeps_subnormals(dtype):
        assert out.flatten().tolist() == [0.0, 0.0, 0.0, smallest]
        return
    assert torch.equal(out, value)
    assert (out != 0).all()


def test_a_gradient_beyond_float16_becomes_infinite(backend):
    case = make_case((2, 8, 3), 3, 2, torch.float16)
    case.dweights = torch.full_like(case.dweights, 1e6) * torch.tensor([1.0, -1.0, 0.0])
    found, expected = backend.evaluate(case), oracle(case)
    limit = torch.finfo(torch.float16).max
    assert found["d q"].isinf().any()
    for name in ("d q", "d keys[0]"):
        clearly = expected[name].abs() > 1.01 * limit
        assert torch.equal(
            kinds(found[name])[clearly], expected[name][clearly].sign().to(torch.int8)
        )
        assert found[name][expected[name].abs() < 0.99 * limit].isfinite().all()


def test_sums_beyond_float16_stay_finite_inside(backend):
    # The terms of the score overflow float16, the accumulation type does not.
    q = torch.full((1, 4), 600.0, dtype=torch.float16, device=backend.device)
    ones = torch.ones(1, 4, 2, dtype=torch.float16, device=backend.device)
    r = ek.layer_attention(q, [q, q - 1], [ones] * 2, 1, scale=1e-6)
    assert r.weights.isfinite().all()
    assert (r.weights[..., 0] > r.weights[..., 1]).all()
