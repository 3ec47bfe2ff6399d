"""What the CUDA kernels' gather leaves out by a tolerance, on the CPU by the stand-in runtime."""

from __future__ import annotations

import pytest
import torch
from support.cuda_on_cpu import DTYPES, FORMS, UNIT, launched, name_of
from support.cuda_tolerance import PLANS, contributions, gather_all
from support.left_out import (
    NUMBERS,
    assert_near,
    assert_same_bits,
    bits,
    poison,
)
from support.oracle import largest

from ela_kernels.ops.layer_attention.reference import (
    aggregate_reference,
)

pytestmark = pytest.mark.usefixtures("kernels")


MIXED = (0.125, 0.0, 0.0625, 0.25, 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("count", [1, 3, 8, 35])
def test_gather_of_mixed_tolerances(count, name, dtype, kernels):
    shape, _, heads, layout, last = PLANS[name]
    depths = range(2, count + 2)
    left = contributions(shape, depths, heads, dtype, layout, last, MIXED)
    clean = gather_all(left, 1, heads, last)
    assert launched(kernels) == ["layer_attention_bwd_gather"]
    dvalue, dkey, seen, most = 0.0, 0.0, 0.0, 0.0
    for r in left:
        weights, dscores = (x[..., 1:2].double() for x in (r.weights, r.dscores))
        dout = r.dout.double()
        dvalue = dvalue + aggregate_reference(weights, [dout], last, r.tolerance)
        dkey = dkey + aggregate_reference(dscores, [r.q.double()[..., None]], False)[..., 0]
        seen += largest([dout]) * weights.max().item()
        most += largest([r.q]) * largest([dscores])
    # Sums of `count` terms, each rounded and added with a rounding of what is there by then.
    assert_near("dvalue", clean["dvalue"], dvalue, (count + 1) * UNIT * seen)
    assert_near("dkey", clean["dkey"], dkey, (count + 1) * UNIT * most)
    for m, r in enumerate(left):
        poison(r.dout, r.weights[..., 1] < r.tolerance, last, NUMBERS[m % len(NUMBERS)])
    assert_same_bits(gather_all(left, 1, heads, last), clean, "with something else unread")


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gather_of_nothing_and_of_everything(layout):
    left = contributions((2, 16, 3, 5), range(1, 9), 4, torch.float32, layout, False, [2.0**-100])
    least = min(r.weights.min().item() for r in left)
    assert least > 2.0**-100
    found = gather_all(left, 0, 4, False)
    for r in left:
        r.tolerance = 0.0
    assert_same_bits(found, gather_all(left, 0, 4, False))
    for r in left:
        r.weights.fill_(0.25)
        r.tolerance = 0.5
        r.dout.fill_(torch.nan)
    assert not bits(gather_all(left, 0, 4, False)["dvalue"]).any()
    left[3].tolerance = 0.0  # IEEE's rules for this one
    assert gather_all(left, 0, 4, False)["dvalue"].isnan().all()


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("count", [5, 33, 256])
def test_bits_of_gather_depend_on_no_order_and_no_grid(count, layout, kernels):
    left = contributions((2, 16, 3, 5), range(1, count + 1), 4, torch.float32, layout, False, MIXED)
    first = gather_all(left, 0, 4, False)
    for order, limit in ((1, 0), (2, 0), (3, 1)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        assert_same_bits(gather_all(left, 0, 4, False), first, f"in order {order}")
