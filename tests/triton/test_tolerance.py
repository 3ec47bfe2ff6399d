"""What a tolerance leaves out of the Triton kernels, in the interpreter: it is not read, or counts as zero.

Whatever is left out holds infinities and NaN here, and memory that nothing wrote is NaN.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from support.layouts import channel_slice, channels_last, contiguous
from torch import Tensor

import ela_kernels as ek
from build_tools import triton_launches
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.types import RESIDUAL, Filters, NormAct, Saved

pytestmark = pytest.mark.usefixtures("few_programs")

TOLERANCE = 2.0**-8
DEPTH = 6  # more than one group of values, and not all of the last
SPECIAL = (math.inf, -math.inf, math.nan)

# Shape, heads, layout, dtype.
MAPS = [
    ((2, 12, 5, 3), 3, contiguous, torch.float32),  # several heads to a tile, off 16 bytes
    ((2, 16, 4, 8), 16, contiguous, torch.bfloat16),
    ((1, 4, 40, 40), 2, contiguous, torch.float32),  # several segments to a head
    ((2, 6, 4, 5), 2, channel_slice, torch.float32),  # gaps between channels
    ((1, 160, 3, 3), 2, contiguous, torch.float32),  # scores in a launch of their own
    ((2, 32, 4, 4), 2, channels_last, torch.float32),  # what is read at once is of one head
    ((2, 32, 4, 4), 2, channels_last, torch.bfloat16),
    ((2, 24, 4, 4), 4, channels_last, torch.float32),  # of two heads: 6 channels each, 4 at once
    ((2, 48, 3, 3), 4, channels_last, torch.bfloat16),  # 12 channels each, 8 at once
    ((2, 16, 4, 4), 16, channels_last, torch.bfloat16),  # of eight heads
    ((1, 37, 3, 3), 37, channels_last, torch.float32),  # element by element
    ((1, 8, 40, 40), 2, channels_last, torch.float32),  # several tiles
    ((1, 288, 3, 4), 3, channels_last, torch.float32),
]
SOME_MAPS = [MAPS[0], MAPS[1], MAPS[6], MAPS[7]]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the compiler was told to be constant. The interpreter asks nothing of it; here it has to be true."""
    from triton.runtime.interpreter import TensorHandle

    found: list[tuple[int, ...]] = []
    real = TensorHandle.set_attr

    def checked(self: Any, name: str, values: Any) -> None:
        if name == "tt.constancy":
            rows, run = (getattr(value, "value", value) for value in values)
            assert rows == 1
            runs = self.data.reshape(self.data.shape[0], -1, run)
            assert (runs == runs[..., :1]).all(), "read at once, by several predicates"
            found.append((rows, run))
        real(self, name, values)

    monkeypatch.setattr(TensorHandle, "set_attr", checked)
    return found


def names(maps: Any) -> str:
    shape, heads, maker, dtype = maps
    return f"{'x'.join(map(str, shape))}-{heads}-{maker.__name__}-{str(dtype)[6:]}"


class Call(NamedTuple):
    q: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    heads: int
    scale: float
    weights: Tensor

    def attend(self, tolerance: float) -> tuple[Tensor, Tensor, Tensor | None]:
        return KERNELS["triton"].attend(
            self.q, self.keys, self.values, self.heads, self.scale, None, False, tolerance
        )

    def saved(self, tolerance: float) -> Saved:
        return Saved(
            self.q,
            self.keys,
            self.values,
            self.heads,
            self.scale,
            None,
            self.weights,
            False,
            tolerance,
        )

    def backward(
        self, tolerance: float, dout: Tensor | None, push: bool = False, **given: Any
    ) -> Any:
        wanted = [push] * len(self.keys)
        dweights = given.get("dweights")
        return KERNELS["triton"].attend_backward(
            self.saved(tolerance), dout, dweights, None, True, False, wanted, wanted
        )


def make_call(maps: Any, spread: float = 4.0) -> Call:
    """Scores so far apart that some weights are below the tolerance, and none is near it."""
    shape, heads, maker, dtype = maps
    q = torch.randn(shape[:2]).to(dtype)
    keys = [torch.randn(shape[:2]).to(dtype) for _ in range(DEPTH)]
    values = [maker(shape, dtype) for _ in range(DEPTH)]
    scale = spread * (shape[1] // heads) ** -0.5
    weights, _ = KERNELS["triton"].weights(q, keys, heads, scale, None)
    return Call(q, keys, values, heads, scale, weights)


def left_out(call: Call, tolerance: float = TOLERANCE) -> Tensor:
    """`[B, G, T]`; of both kinds, and nothing that rounding could make of the other kind."""
    below = call.weights < tolerance
    assert below.any()
    assert not below.all()
    assert ((call.weights / tolerance - 1).abs() > 1e-4).all()
    return below


def by_channel(per_head: Tensor, like: Tensor) -> Tensor:
    """`[B, G]` spread over a map."""
    wide = per_head.repeat_interleave(like.shape[1] // per_head.shape[1], 1)
    return wide.reshape(*wide.shape, *[1] * (like.dim() - 2)).expand_as(like)


def spoil(maps: Tensor, below: Tensor) -> None:
    """Every element of the heads that are left out becomes an infinity or a NaN, in turn."""
    where = by_channel(below, maps)
    special = torch.tensor(SPECIAL, dtype=maps.dtype)
    maps[where] = special[torch.arange(int(where.sum())) % len(SPECIAL)]


def product(weights: Tensor, below: Tensor, maps: Tensor) -> Tensor:
    """`weights * maps` in float64, zero where it is left out."""
    return (by_channel(weights, maps).double() * maps.double()).masked_fill(
        by_channel(below, maps), 0.0
    )


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert not expected.isnan().any()
    # The interpreter cuts float32 to bfloat16 where a GPU rounds: an ulp.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-5)


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


@pytest.mark.parametrize("epilogue", ["none", "residual", "norm"])
@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_a_whole_layer(maps, epilogue):
    """Forward and backward, with an earlier layer's values spoilt where they are left out."""
    (_, channels, *_), heads, maker, dtype = maps
    kernels, call = KERNELS["triton"], make_call(maps)
    x = maker(maps[0], dtype)
    row = torch.randn(1, 1, 3).to(dtype)
    filters = Filters(row, row, torch.randn(channels, 1, 3, 3).to(dtype))
    gamma = torch.ones(channels, dtype=dtype)
    following = {
        "none": None,
        "residual": RESIDUAL,
        "norm": NormAct(gamma, gamma, None, None, 1e-5, False),
    }[epilogue]
    of_call = x, filters, call.keys, call.values, heads, 4 * call.scale, None, following
    weights = kernels.layer(*of_call).weights
    assert weights is not None
    below = left_out(call._replace(weights=weights))
    for j, value in enumerate(call.values):
        spoil(value, below[..., j])
    made = kernels.layer(*of_call, tolerance=TOLERANCE)
    assert made.q is not None
    values = [*call.values, made.v]
    retrieved = torch.stack(
        [product(weights[..., j], below[..., j], v) for j, v in enumerate(values)]
    ).sum(0)
    if epilogue == "none":
        assert_near(made.out, retrieved)
    elif epilogue == "residual":
        assert_near(made.out, retrieved + x.double())
    else:
        assert_near(made.retrieved, retrieved)
        kept = made.retrieved.double()
        mean, variance = kept.mean((0, 2, 3)), kept.var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(
            made.statistics.double(), torch.stack([mean, variance]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("maps", SOME_MAPS, ids=names)
def test_layers_of_several_tolerances_in_a_history(maps):
    """Gradients of the pull form against eager PyTorch: each layer's own tolerance, also in the sum of a value's."""
    shape, heads, maker, dtype = maps
    inputs = [torch.randn(shape[:2]).to(dtype) for _ in range(8)]
    inputs += [maker(shape, dtype) for _ in range(4)]
    douts = [maker(shape, dtype) for _ in range(4)]

    def run(backend: str, tolerances: tuple[float | None, ...]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with ek.use_backend(backend):
            history = ek.LayerHistory(tolerance=0.01)
            outs = [
                history.attend(
                    leaves[t], leaves[4 + t], leaves[8 + t], heads=heads, scale=2.0, tolerance=one
                )
                for t, one in enumerate(tolerances)
            ]
            torch.autograd.backward(outs, douts)
        return [*outs, *(x.grad for x in leaves if x.grad is not None)]

    tolerances = (None, 0.2, 0.0, 0.4)
    found, expected = run("triton", tolerances), run("eager", tolerances)
    other = run("eager", (0.0,) * 4)
    assert len(found) == len(expected) == 16
    bounds = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **bounds)
    assert any(
        not torch.allclose(a, b, **bounds) for a, b in zip(expected, other, strict=True)
    )  # something was left out


@pytest.mark.parametrize("tolerance", [0.0, 0.25])
def test_warming_compiles_the_kernels_of_its_tolerance(tolerance):
    with triton_launches.recorded() as launches:
        ek.warmup([(1, 4, 2, 3)], 2, 2, device="cpu", tolerance=tolerance)
    asked = {
        (launch.kernel.fn.__name__.split("_", 2)[2], launch.options["LEAVES_OUT"])
        for launch in launches
        if "LEAVES_OUT" in launch.options
    }
    of_pairs = {
        (name, tolerance > 0) for name in ("fwd_kernel", "bwd_dots_kernel", "bwd_gather_kernel")
    }
    # A mix takes two of the kernels too, and knows no tolerance.
    of_mix = {("fwd_kernel", False), ("bwd_dots_kernel", False)}
    assert asked == of_pairs | of_mix
