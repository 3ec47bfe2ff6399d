"""position_attention under autocast and torch.func, and values that change or lie otherwise in memory."""

from __future__ import annotations

import pytest
import torch
from support.position import (
    assert_position_matches,
    evaluate_position,
    make_position_case,
)
from torch.autograd import forward_ad

import ela_kernels as ek


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


@pytest.mark.usefixtures("kernels")
def test_transforms_are_refused_by_a_forced_backend():
    values = [torch.randn(2, 5, 6)]
    with ek.use_backend("cpp"), pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(lambda q: ek.position_attention(q, values).out.sum())(torch.randn(6))


@pytest.mark.usefixtures("kernels")
def test_values_changed_in_place_are_noticed():
    values = [torch.randn(2, 5, 6, requires_grad=True) * 1 for _ in range(2)]
    with ek.use_backend("cpp"):
        out = ek.position_attention(torch.randn(6, requires_grad=True), values).out
    values[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.usefixtures("kernels")
def test_a_negated_view_is_read_with_its_signs():
    complex_values = torch.randn(2, 5, 6, dtype=torch.complex64)
    value = complex_values.conj().imag
    assert value.is_neg()
    with ek.use_backend("cpp"):
        found = ek.position_attention(torch.randn(6), [value, value.clone()])
    torch.testing.assert_close(found.out, value.clone())
