"""What a tolerance leaves out of the Triton kernels, in the interpreter: it is not read, or counts as zero.

Whatever is left out holds infinities and NaN here, and memory that nothing wrote is NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.layouts import channels_last
from support.triton_tolerance import (
    DEPTH,
    MAPS,
    SOME_MAPS,
    TOLERANCE,
    assert_near,
    by_channel,
    left_out,
    make_call,
    names,
    product,
    spoil,
)

from build_tools import triton_launches
from ela_kernels.backends.dispatch import KERNELS

pytestmark = pytest.mark.usefixtures("few_programs", "told")


@pytest.mark.parametrize("maps", MAPS, ids=names)
def test_the_sum(maps, told):
    shape, _, maker, dtype = maps
    call = make_call(maps)
    below = left_out(call)
    for j, value in enumerate(call.values):
        spoil(value, below[..., j])
    out, weights, _ = call.attend(TOLERANCE)
    assert_near(weights, call.weights.double())  # not left out themselves
    terms = [product(weights[..., j], below[..., j], v) for j, v in enumerate(call.values)]
    assert_near(out, torch.stack(terms).sum(0))
    unit = 16 // dtype.itemsize
    assert set(told) == ({(1, unit)} if maker is channels_last and shape[1] % unit == 0 else set())


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize("maps", MAPS, ids=names)
def test_the_dot_products(maps, push):
    call = make_call(maps)
    below = left_out(call)
    for j, value in enumerate(call.values):
        spoil(value, below[..., j])
    dout = maps[2](maps[0], maps[3])
    dweights = torch.randn_like(call.weights)
    found = call.backward(TOLERANCE, dout, push, dweights=dweights)

    w = call.weights.double()
    ones = torch.ones_like(call.weights[..., 0])
    dots = [
        (product(ones, below[..., j], v) * dout.double()).flatten(1).unflatten(1, (call.heads, -1))
        for j, v in enumerate(call.values)
    ]
    total = torch.stack([d.sum(-1) for d in dots], -1) + dweights.double()
    dscores = call.scale * w * (total - (w * total).sum(-1, keepdim=True))
    torch.testing.assert_close(found.dscores.double(), dscores, rtol=1e-4, atol=1e-4)
    k = torch.stack([k.double().unflatten(1, (call.heads, -1)) for k in call.keys], 2)
    dq = (dscores.unsqueeze(-1) * k).sum(2).flatten(1)
    rtol = 1e-4 if found.dq.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.dq.double(), dq, rtol=rtol, atol=2e-3)
    assert len(found.dvalues) == DEPTH
    for j, dvalue in enumerate(found.dvalues):
        assert (dvalue is not None) == push
        if dvalue is None:
            continue
        assert_near(dvalue, product(call.weights[..., j], below[..., j], dout))
        assert (dvalue[by_channel(below[..., j], dvalue)] == 0).all()


@pytest.mark.parametrize("maps", MAPS, ids=names)
def test_an_infinite_gradient_of_what_is_left_out(maps):
    """A head of which all is left out: nothing of its gradient or values reaches a dot product or a value."""
    call = make_call(maps, 0.0)  # each weight is 1 / DEPTH
    torch.testing.assert_close(call.weights, torch.full_like(call.weights, 1 / DEPTH))
    every = torch.ones_like(call.weights[..., 0], dtype=torch.bool)
    dout = maps[2](maps[0], maps[3])
    for x in (dout, *call.values):
        spoil(x, every)
    found = call.backward(0.5, dout, True)
    assert (found.dscores == 0).all()
    for dvalue in found.dvalues:
        assert (dvalue == 0).all()
    assert (call.backward(0.5, dout).dscores == 0).all()
    assert (call.attend(0.5)[0] == 0).all()


@pytest.mark.parametrize("maps", MAPS, ids=names)
def test_the_gather(maps):
    shape, heads, maker, dtype = maps
    kernels, tolerances = KERNELS["triton"], (0.0, 2.0**-8, 2.0**-2, 1e-3, 0.9)
    left, dkey, terms = [], torch.zeros(shape[:2]).double(), []
    count = 0
    for m, tolerance in enumerate(tolerances):
        q, weights = torch.randn(shape[:2]).to(dtype), torch.empty(shape[0], heads, m + 2)
        weights.copy_(torch.randn_like(weights).mul(4).softmax(-1))
        dscores, dout = torch.randn_like(weights), maker(shape, dtype)
        below = weights[..., 1] < tolerance
        count += int(below.sum())
        spoil(dout, below)
        left.append(kernels.contribution(q, weights, dscores, dout, False, tolerance))
        terms.append(product(weights[..., 1], below, dout))
        dkey += dscores[..., 1].repeat_interleave(shape[1] // heads, 1).double() * q.double()
    assert count > 0
    left.insert(2, kernels.contribution(q, weights, torch.zeros_like(dscores), None, False, 0.5))
    found_key, found = kernels.gather(left, 1, heads, False, True, True)
    assert_near(found, torch.stack(terms).sum(0))
    assert_near(found_key, dkey)


@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_a_gather_of_nothing(maps):
    """Each source left out, and sources without an output gradient."""
    shape, heads, maker, dtype = maps
    kernels = KERNELS["triton"]
    q, weights = torch.zeros(shape[:2], dtype=dtype), torch.full((shape[0], heads, 4), 0.25)
    dout = maker(shape, dtype)
    spoil(dout, torch.ones(shape[0], heads, dtype=torch.bool))
    left = [kernels.contribution(q, weights, weights, d, False, 0.5) for d in (dout, None, dout)]
    _, dvalue = kernels.gather(left, 2, heads, False, False, True)
    assert (dvalue == 0).all()
    assert kernels.gather(left[1:2], 2, heads, False, False, True) == (None, None)


@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_nothing_below_gives_the_same_bits(maps):
    call = make_call(maps)
    least = call.weights.min().item()
    assert least > 0
    for j, value in enumerate(call.values):  # as IEEE has it, and not as if it were left out
        value[by_channel(call.weights[..., j] == least, value)] = math.inf
    dout = maps[2](maps[0], maps[3])
    kernels = KERNELS["triton"]
    found = []
    for tolerance in (0.0, least):
        pull, push = (call.backward(tolerance, dout, form) for form in (False, True))
        left = [
            kernels.contribution(call.q, call.weights, push.dscores, dout, False, tolerance)
        ] * 3
        gathered = kernels.gather(left, 2, call.heads, False, True, True)
        found.append(
            [call.attend(tolerance)[0], pull.dscores, push.dscores, *push.dvalues, *gathered]
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert found[0][0].isinf().any()
    assert call.attend(least + 2.0**-20)[0].isfinite().all()  # and now it is left out


@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_infinities_that_are_retained_reach_the_result(maps):
    call = make_call(maps)
    below = left_out(call)
    largest = call.weights.argmax(-1)
    dout = maps[2](maps[0], maps[3])
    for j, value in enumerate(call.values):
        at = by_channel(largest == j, value)
        value[at] = math.inf
        spoil(value, below[..., j])
    assert (call.attend(TOLERANCE)[0] == math.inf).all()
    dout[...] = math.inf
    found = call.backward(TOLERANCE, dout, True)
    for j, dvalue in enumerate(found.dvalues):
        expected = torch.where(by_channel(below[..., j], dvalue), 0.0, math.inf)
        assert torch.equal(dvalue.float(), expected)
    assert not found.dscores.isfinite().any()


@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_a_nan_is_no_small_weight(maps):
    call = make_call(maps)
    call.q[0, 0] = math.nan  # of the first head
    call = call._replace(
        weights=KERNELS["triton"].weights(call.q, call.keys, call.heads, call.scale, None)[0]
    )
    is_nan = call.weights.isnan()
    assert is_nan[0, 0].all()
    assert not is_nan[1].any()
    out, _, _ = call.attend(0.99)
    assert torch.equal(out.isnan(), by_channel(is_nan[..., 0], out))
    dout = maps[2](maps[0], maps[3])
    found = call.backward(0.99, dout, True)
    assert torch.equal(found.dscores.isnan(), is_nan)
    for j, dvalue in enumerate(found.dvalues):
        assert torch.equal(dvalue.isnan(), by_channel(is_nan[..., j], dvalue))


@pytest.mark.parametrize("tolerance", [1e-60, 2.0**-149, 2.0**-126])
def test_a_tolerance_that_float32_hardly_holds(tolerance):
    """Weights that underflowed are left out, and nothing is read beyond the depth."""
    call = make_call(MAPS[0], 400.0)
    assert (call.weights == 0).any()
    below = call.weights.double() < tolerance
    assert not below.all()
    for j, value in enumerate(call.values):
        spoil(value, below[..., j])
    out, _, _ = call.attend(tolerance)
    # A GPU compares in float32, the interpreter in Python's numbers.
    with triton_launches.recorded() as launches:
        call.attend(tolerance)
        call.backward(tolerance, torch.zeros_like(out))
        left = KERNELS["triton"].contribution(
            call.q, call.weights, call.weights, torch.zeros_like(out), False, tolerance
        )
        KERNELS["triton"].gather([left], 0, call.heads, False, True, True)
    passed = [
        dict(zip(launch.kernel.arg_names, launch.args, strict=False))
        for launch in launches
        if launch.options.get("LEAVES_OUT")
    ]
    assert len(passed) == 3
    for arguments in passed:
        (given,) = arguments.get("tolerances", (arguments.get("tolerance"),))
        assert torch.tensor(given, dtype=torch.float32) > 0
    terms = [product(call.weights[..., j], below[..., j], v) for j, v in enumerate(call.values)]
    assert_near(out, torch.stack(terms).sum(0))
