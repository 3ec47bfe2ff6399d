"""The end of a residual block, `x + mask * act(norm(o))`, on the CPU by the stand-in runtime, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import cuda_on_cpu
from support.cases import Maker
from support.cuda_on_cpu import DTYPES, FORMS, UNIT, launched, name_of, off_by
from support.layouts import MAP_LAYOUTS, channels_last, contiguous
from support.left_out import bits
from torch import Tensor

from ela_kernels.backends.cuda.norm import Moments, norm_backward, norm_forward, statistics_of
from ela_kernels.backends.types import NormAct

EPS = 1e-5

pytestmark = pytest.mark.usefixtures("kernels")


def per_channel(x: Tensor) -> Tensor:
    return x.double()[:, None, None]


def exact_statistics(o: Tensor) -> Tensor:
    o = o.double()
    return torch.stack([o.mean((0, 2, 3)), o.var((0, 2, 3), unbiased=False)]).float()


def make_epilogue(
    o: Tensor,
    *,
    affine: bool = True,
    given: bool = False,
    mask: bool = True,
    relu: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[NormAct, Tensor]:
    """An epilogue, and the statistics to norm with."""
    batch, channels = o.shape[:2]
    gamma, beta = torch.randn(2, channels).to(dtype)
    statistics = exact_statistics(o)
    if given:
        statistics = torch.stack([torch.randn(channels), torch.rand(channels) + 0.5])
    factors = (torch.arange(batch) % 3).to(dtype) * 0.75  # drop-path: some are zero
    epilogue = NormAct(
        gamma if affine else None,
        beta if affine else None,
        statistics if given else None,
        factors if mask else None,
        EPS,
        relu,
    )
    return epilogue, statistics


class Exact:
    """Everything in float64 from the formulas, with the sums of absolute values that rounding errors grow with."""

    def __init__(self, o: Tensor, statistics: Tensor, epilogue: NormAct) -> None:
        channels = o.shape[1]
        gamma, beta, moved = epilogue.gamma, epilogue.beta, epilogue.statistics is None
        self.count = o.numel() // channels if moved else None
        mean, variance = statistics.double()
        self.inverse = (variance + EPS).rsqrt()
        self.scale = per_channel(self.inverse * (1 if gamma is None else gamma.double()))
        self.shift = per_channel(torch.zeros(channels) if beta is None else beta)
        mask = torch.ones(o.shape[0]) if epilogue.mask is None else epilogue.mask
        self.factor = mask.double()[:, None, None, None]
        self.distance = o.double() - per_channel(mean)
        self.z = self.distance * self.scale + self.shift
        # Where a number is nearly at the bend of the ReLU, rounding decides.
        terms = (o.double().abs() + per_channel(mean.abs())) * self.scale.abs() + self.shift.abs()
        self.z_error = 4 * UNIT * terms
        self.relu = epilogue.relu

    def out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and how far rounding may move it before it is rounded to its type."""
        out = x.double() + self.factor * (self.z.relu() if self.relu else self.z)
        return out, self.factor * self.z_error + 2 * UNIT * (x.double().abs() + out.abs())

    def gradients(
        self, dout: Tensor, also: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of o, gamma and beta, and how far rounding may move each."""
        g = self.factor * dout.double()
        if self.relu:
            # dout is zero where rounding would decide: see `away_from_the_bend`.
            g = torch.where(self.z <= 0, 0, g)
        products = g * self.distance
        total, product = g.sum((0, 2, 3)), products.sum((0, 2, 3))
        # Added up in blocks of at most a few hundred terms, a fixed depth of them.
        steps = 256 * UNIT
        far = self.z_error / self.scale.abs().clamp_min(1e-30)
        total_error = steps * g.abs().sum((0, 2, 3))
        product_error = steps * products.abs().sum((0, 2, 3)) + (g.abs() * far).sum((0, 2, 3))
        do = g
        do_error = 4 * UNIT * g.abs()
        if self.count is not None:
            by_value = product * self.inverse**2 / self.count
            do = g - per_channel(total / self.count) - self.distance * per_channel(by_value)
            do_error = do_error + per_channel(total_error / self.count)
            moved = per_channel(product_error * self.inverse**2 / self.count)
            do_error = do_error + self.distance.abs() * moved + far * per_channel(by_value.abs())
            do_error = do_error + 4 * UNIT * (self.distance * per_channel(by_value)).abs()
        do, do_error = self.scale * do, self.scale.abs() * do_error
        if also is not None:
            do = do + also.double()
            do_error = do_error + 2 * UNIT * do.abs()
        found = (do, product * self.inverse, total)
        return found, (do_error, product_error * self.inverse, total_error)


def assert_within(found: Tensor, expected: Tensor, allowed: Tensor, name: str) -> None:
    info = torch.finfo(found.dtype)
    allowed = allowed + info.eps * expected.abs() + info.smallest_normal
    excess = (found.double() - expected).abs() - allowed
    assert (excess <= 0).all(), f"{name}: {excess.max().item()} beyond what rounding explains"


def away_from_the_bend(dout: Tensor, exact: Exact) -> Tensor:
    return dout.masked_fill_(exact.z.abs() <= exact.z_error, 0) if exact.relu else dout


def check(
    o: Tensor, x: Tensor, dout: Tensor, epilogue: NormAct, statistics: Tensor, also=None
) -> None:
    exact = Exact(o, statistics, epilogue)
    out = norm_forward(o, x, statistics, epilogue)
    assert out.dtype == o.dtype
    assert_within(out, *exact.out(x), "out")
    if min(dout.stride()) > 0:
        dout = away_from_the_bend(dout, exact)
    found = norm_backward(o, dout, statistics, epilogue, also)
    expected, allowed = exact.gradients(dout, also)
    assert_within(found.o, expected[0], allowed[0], "do")
    for name, of, w, e, a in zip(
        ("dgamma", "dbeta"),
        (found.gamma, found.beta),
        (epilogue.gamma, epilogue.beta),
        expected[1:],
        allowed[1:],
        strict=True,
    ):
        if w is None:
            assert of is None
        else:
            assert_within(of, e, a, name)


SIZES = [
    (1, 1, 1, 1),
    (2, 1, 3, 5),
    (1, 37, 7, 7),
    (3, 8, 1, 1),
    (2, 24, 9, 33),
    (2, 40, 4, 4),
    (1, 6, 56, 56),
    (1, 272, 3, 3),
    (2, 264, 2, 8),
    (7, 32, 2, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_sizes(shape, layout, dtype):
    for given in (False, True):
        o, x, dout = (layout(shape, dtype) for _ in range(3))
        check(o, x, dout, *make_epilogue(o, given=given))


@pytest.mark.parametrize(("affine", "given"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_what_the_epilogue_has(layout, relu, mask, affine, given, kernels):
    o, x, dout = (layout((4, 8, 4, 6), torch.float32) for _ in range(3))
    check(o, x, dout, *make_epilogue(o, affine=affine, given=given, mask=mask, relu=relu))
    backward = {
        (False, False): ["bwd", "sums", "bwd"],
        (True, False): ["bwd", "sums", "bwd"],
        (True, True): ["bwd", "sums"],
        (False, True): ["bwd"],
    }[affine, given]
    assert launched(kernels) == [f"layer_norm_{name}" for name in ("fwd", *backward)]


def test_one_parameter_without_the_other():
    o, x, dout = (contiguous((2, 8, 4, 6), torch.float32) for _ in range(3))
    for given, name in itertools.product((False, True), ("gamma", "beta")):
        epilogue, statistics = make_epilogue(o, given=given)
        check(o, x, dout, epilogue._replace(**{name: None}), statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [*MAP_LAYOUTS, off_by(1, contiguous), off_by(3, channels_last)])
@pytest.mark.parametrize("which", ["o", "x", "dout"])
def test_layouts(which, layout, dtype):
    shape = (2, 16, 4, 8)
    for form in FORMS:
        o, x, dout = ((layout if n == which else form)(shape, dtype) for n in ("o", "x", "dout"))
        check(o, x, dout, *make_epilogue(o, relu=which != "dout"))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_parameters_of_another_dtype(dtype):
    o, x, dout = (channels_last((2, 16, 4, 4), torch.bfloat16) for _ in range(3))
    epilogue, statistics = make_epilogue(o, dtype=dtype)
    check(o, x, dout, epilogue, statistics)
    found = norm_backward(o, dout, statistics, epilogue)
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert found.gamma.dtype == found.beta.dtype == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("also", FORMS, ids=name_of)
def test_a_gradient_to_be_added(also, layout, dtype):
    for shape, given in itertools.product(((2, 16, 4, 4), (2, 5, 3, 3)), (False, True)):
        o, x, dout = (layout(shape, dtype) for _ in range(3))
        check(o, x, dout, *make_epilogue(o, given=given), also(shape, dtype))


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_no_positions(layout):
    epilogue, statistics = make_epilogue(layout((2, 6, 1, 5), torch.float32))
    o = layout((2, 6, 0, 5), torch.float32)
    assert norm_forward(o, o, statistics, epilogue).shape == o.shape
    found = norm_backward(o, o, statistics, epilogue)
    assert found.o.shape == o.shape
    assert (found.gamma == 0).all()
    assert (found.beta == 0).all()


@pytest.mark.parametrize(
    ("shape", "chunks", "span"),
    [
        ((1, 1, 1), 1, 1),
        ((2, 5, 100), 4, 32),
        ((3, 8, 49), 1, 64),
        ((7, 9, 1000), 125, 8),
        ((300, 17, 3), 3, 1),
    ],
    ids=str,
)
def test_statistics_of_parts(shape, chunks, span):
    """As any launch cuts them: the last part of a sample may be shorter."""
    batch, channels, positions = shape
    center = torch.randn(channels, 1) * 1000
    o = (torch.randn(shape) + center).double()
    parts = [p for sample in o for p in sample.split(span, -1)]
    assert len(parts) == batch * chunks
    means = torch.stack([p.mean(-1) for p in parts])
    squares = torch.stack([(p - p.mean(-1, keepdim=True)).square().sum(-1) for p in parts])
    partial = torch.stack([means, squares]).float()
    found = statistics_of(Moments(partial, (batch, channels, 1, positions, 0), chunks, span))
    flat = o.transpose(0, 1).reshape(channels, -1)
    # The means come rounded, each by UNIT of it, which is all that the variance of a thousand times it could lose.
    largest = flat.abs().max().item()
    torch.testing.assert_close(found[0].double(), flat.mean(1), rtol=0, atol=16 * UNIT * largest)
    torch.testing.assert_close(
        found[1].double(),
        flat.var(1, unbiased=False),
        rtol=64 * UNIT,
        atol=16 * UNIT * largest,
    )


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_what_is_not_finite_goes_through(layout):
    o, x, dout = (layout((2, 4, 3, 5), torch.float32) for _ in range(3))
    epilogue, statistics = make_epilogue(o, mask=False, given=True)
    o[1, 2, 1, 1] = float("nan")
    out = norm_forward(o, x, statistics, epilogue)
    assert out.isnan().sum() == 1
    assert out[1, 2, 1, 1].isnan()
    found = norm_backward(o, dout, statistics, epilogue)
    assert found.gamma.isnan().tolist() == [False, False, True, False]
    assert found.beta.isfinite().all()
    found = norm_backward(o, dout, statistics, epilogue._replace(statistics=None))
    assert found.o[:, 2].isnan().all()
    assert found.o[:, [0, 1, 3]].isfinite().all()


PLANS: dict[str, tuple[tuple[int, ...], Maker]] = {
    "rows": ((2, 12, 5, 7), contiguous),
    "chunks": ((1, 2, 67, 41), contiguous),
    "vectors": ((1, 5, 16, 40), contiguous),
    "strips": ((3, 272, 9, 5), channels_last),
    "positions": ((1, 16, 33, 31), channels_last),
    "off": ((2, 24, 17, 9), off_by(3, channels_last)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_bits_depend_on_no_order_and_no_grid(name, dtype, kernels):
    shape, layout = PLANS[name]
    o, x, dout = (layout(shape, dtype) for _ in range(3))
    for given in (False, True):
        epilogue, statistics = make_epilogue(o, given=given)
        check(o, x, dout, epilogue, statistics)

        def everything(epilogue=epilogue, statistics=statistics) -> list[Tensor]:
            found = norm_backward(o, dout, statistics, epilogue)
            return [norm_forward(o, x, statistics, epilogue), *found]

        kernels.set_order(0)
        kernels.limit_grid(0)
        first = everything()
        for order, limit in ((1, 0), (2, 0), (3, 0), (1, 2), (4, 2)):
            kernels.set_order(order)
            kernels.limit_grid(limit)
            for a, b in zip(first, everything(), strict=True):
                assert torch.equal(bits(a), bits(b)), (order, limit)


def test_bad_calls_are_refused(kernels):
    o = torch.randn(2, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"error 1 \(cudaErrorInvalidValue\)"):
        statistics_of(Moments(torch.ones(2, 6, 4), (2, 4, 1, 9, 0), 3, 9))
    address = o.data_ptr()
    none = (0, 1)
    view = (address, 36, 9)
    sizes = (2, 4, 4, 9, 0)
    rest = {"gamma": none, "beta": none, "mask": none, "eps": 1e-5, "relu": False}
    without = kernels.cuda_norm(statistics=0, **rest)
    with pytest.raises(ValueError, match="statistics"):
        kernels.cuda_norm_forward((0, 0), 1, sizes=sizes, norm=without, o=view, x=view, out=view)
    norm = kernels.cuda_norm(statistics=address, **rest)
    maps = {"o": view, "dout": view, "also": (0, 0, 0), "gradient": view}
    with pytest.raises(ValueError, match="partial"):
        kernels.cuda_norm_backward(
            *((0, 0), 1),
            sizes=sizes,
            norm=norm,
            **maps,
            dgamma=0,
            dbeta=0,
            partial=0,
            moved=address,
        )


def test_every_instance_runs_and_is_right(kernels):
    for dtype, shape, affine, given in itertools.product(
        DTYPES, ((1, 16, 4, 4), (1, 5, 3, 3)), (False, True), (False, True)
    ):
        o, x, dout = (contiguous(shape, dtype) for _ in range(3))
        check(o, x, dout, *make_epilogue(o, affine=affine, given=given))
    ran = {launch[0] for launch in kernels.take_launches()}
    built = cuda_on_cpu.instances("layer_norm_")
    assert len(built) == len(DTYPES) * 2 * (1 + 3)
    assert built - ran == set()
