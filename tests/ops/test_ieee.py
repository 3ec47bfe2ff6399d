"""NaN, infinities, subnormals and overflow go through as IEEE 754 says, the same on every backend."""

from __future__ import annotations

import pytest
import torch
from support.cases import DTYPES, evaluate, make_case
from support.layouts import channels_last, contiguous
from support.oracle import oracle

import ela_kernels as ek
from ela_kernels.backends.extension import extension

SPECIAL = [float("nan"), float("inf"), float("-inf")]


def kinds(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 and -1 infinite, 2 NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0)).to(torch.int8)


def assert_same_kinds(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, x in found.items():
        a, b = kinds(x), kinds(expected[name])
        if name == "d prev_weights":
            # dkl (log p + 1 - log a): autograd's product rule makes inf - inf of it, the kernel a factor inf.
            a, b = a != 0, b != 0
        assert torch.equal(a, b), name


def planted(where: str, number: float, dtype: torch.dtype, layout=contiguous):
    case = make_case((2, 8, 3, 5), 3, 2, dtype, layout)
    target = case.inputs()[where]
    index = (1, 1, 1) if where == "prev_weights" else (1, 3, *[2] * (target.dim() - 2))
    target[index] = number
    return case


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("number", SPECIAL, ids=str)
@pytest.mark.parametrize("where", ["q", "keys[1]", "values[0]", "prev_weights"])
def test_what_is_not_finite_goes_through(where, number, layout, dtype):
    case = planted(where, number, dtype, layout)
    found, expected = evaluate(case), oracle(case)
    assert_same_kinds(found, expected)
    assert not all(x.isfinite().all() for x in found.values())
    for name, x in found.items():
        # What is finite is untouched by it: the other sample and the other head.
        rest = x.isfinite()
        rtol = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            x[rest].double(), expected[name][rest], rtol=rtol, atol=64 * rtol
        )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("where", ["dout", "dweights", "dkl"])
@pytest.mark.parametrize("number", SPECIAL, ids=str)
def test_gradients_that_are_not_finite_go_through(where, number):
    case = make_case((2, 8, 3, 5), 3, 2)
    getattr(case, where)[1, 0] = number
    found, expected = evaluate(case), oracle(case)
    assert_same_kinds(found, expected)
    assert not found["d q"].isfinite().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("number", SPECIAL, ids=str)
def test_everything_not_finite(number):
    case = make_case((2, 8, 3), 3, 2)
    for x in case.inputs().values():
        x.fill_(number)
    for name, x in evaluate(case).items():
        assert not x.isfinite().any() or name == "d prev_weights", name


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_scores_do_not_overflow(dtype):
    # exp(1e30) is infinite; softmax subtracts the largest score first.
    q = torch.tensor([[1e15]], dtype=dtype)
    keys = [torch.tensor([[x]], dtype=dtype) for x in (1e15, 0.0, -1e15)]
    values = [torch.full((1, 1, 2), x, dtype=dtype) for x in (3.0, 5.0, 7.0)]
    r = ek.layer_attention(q, keys, values, 1)
    assert r.weights.tolist() == [[[1.0, 0.0, 0.0]]]
    assert r.out.tolist() == [[[3.0, 3.0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_values_are_kept(dtype, backend):
    tiny = torch.finfo(dtype).smallest_normal * torch.tensor(
        [0.5, -0.25, 0.75, 1.0], dtype=torch.float64
    )
    value = tiny.to(dtype).view(1, 1, 4)
    ones = torch.ones(1, 1, dtype=dtype)
    out = ek.layer_attention(ones, [ones], [value], 1).out
    if (dtype, backend) == (torch.bfloat16, "cpp") and extension().simd_level() == "avx512_bf16":
        # Processors that convert to bfloat16 themselves take them for zero.
        assert out.flatten().tolist() == [0.0, 0.0, 0.0, torch.finfo(dtype).smallest_normal]
        return
    assert torch.equal(out, value)
    assert (out != 0).all()


@pytest.mark.usefixtures("backend")
def test_a_gradient_beyond_float16_becomes_infinite():
    case = make_case((2, 8, 3), 3, 2, torch.float16)
    case.dweights = torch.full_like(case.dweights, 1e6) * torch.tensor([1.0, -1.0, 0.0])
    found, expected = evaluate(case), oracle(case)
    limit = torch.finfo(torch.float16).max
    assert found["d q"].isinf().any()
    for name in ("d q", "d keys[0]"):
        clearly = expected[name].abs() > 1.01 * limit
        assert torch.equal(
            kinds(found[name])[clearly], expected[name][clearly].sign().to(torch.int8)
        )
        assert found[name][expected[name].abs() < 0.99 * limit].isfinite().all()


@pytest.mark.usefixtures("backend")
def test_sums_beyond_float16_stay_finite_inside():
    # The terms of the score overflow float16, the accumulation type does not.
    q = torch.full((1, 4), 600.0, dtype=torch.float16)
    keys = [q, q - 1]
    r = ek.layer_attention(q, keys, [torch.ones(1, 4, 2).half()] * 2, 1, scale=1e-6)
    assert r.weights.isfinite().all()
    assert (r.weights[..., 0] > r.weights[..., 1]).all()
