"""How the CUDA kernels of position_attention cut their work, run on the CPU: no order of threads or blocks may matter.

What they compute is tested in tests/conformance.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.cuda_on_cpu import DTYPES, launched, name_of, odd_rows, off_by, padded
from support.layouts import channel_slice, channels_last, contiguous
from support.left_out import bits
from support.position import (
    PositionCase,
    assert_position_matches,
    evaluate_position,
    make_position_case,
)
from torch import Tensor

import ela_kernels as ek
from ela_kernels.backends.contract import Request
from ela_kernels.backends.cuda import position as cuda_position
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.position import PositionLeft

pytestmark = pytest.mark.usefixtures("kernels")


# Teams that are a part of a warp, a warp and several; channels in one round and in more; rows of several tiles and a
# tile that no row fills; single elements.
PLANS: dict[str, tuple[tuple[int, ...], Any, bool]] = {
    "part of a warp": ((2, 19, 32), contiguous, True),
    "a warp": ((2, 9, 512), contiguous, True),
    "warps": ((1, 5, 1024), contiguous, True),
    "rounds": ((1, 3, 4104), contiguous, True),
    "single": ((2, 9, 21), contiguous, True),
    "single, rounds": ((1, 3, 1030), off_by(1, contiguous), True),
    "planar": ((2, 24, 12, 16), contiguous, False),
    "planar, gaps": ((2, 24, 12, 16), channel_slice, False),
    "planar, few channels": ((1, 3, 48, 32), contiguous, False),
    "planar, rounds": ((1, 600, 5, 8), contiguous, False),
    "planar, single": ((2, 24, 7, 7), contiguous, False),
    "planar, single, rounds": ((1, 530, 7, 7), contiguous, False),
    "interleaved": ((2, 24, 7, 7), channels_last, False),
    "one position": ((3, 40), contiguous, False),
}


def plan_case(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> PositionCase:
    shape, layout, tokens = PLANS[name]
    options = {"depth": 5, "channels_last": tokens, "dout": layout, **options}
    return make_position_case(shape, dtype=dtype, makers=layout, **options)


@pytest.mark.parametrize("keys", [False, True], ids=["own keys", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_bits_depend_on_no_order_and_no_grid(name, dtype, keys, kernels):
    """Threads and blocks in any order, a grid of two blocks that walk over all the work, and a repeat.

    A missing barrier, and a block that reads what another one writes, show.
    """
    case = plan_case(name, dtype, keys=keys, map_query=keys)
    first = evaluate_position(case)
    assert_position_matches(first, case)
    for order, limit in ((1, 0), (2, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        again = evaluate_position(case)
        for key, x in first.items():
            assert torch.equal(bits(x), bits(again[key])), f"{key} in order {order}"


def test_one_launch_for_each_call(kernels):
    case = make_position_case()
    evaluate_position(case)
    assert launched(kernels) == ["position_fwd", "position_bwd"]
    history = ek.PositionHistory()
    for _ in range(3):
        history.append(torch.randn(2, 5, 8, requires_grad=True))
        out = history.attend(torch.randn(8))
    out.sum().backward()
    assert launched(kernels) == ["position_fwd"] * 3 + ["position_bwd"] + ["position_gather"] * 3


def left_of(case: PositionCase, planes: Tensor, has_dout: bool) -> PositionLeft:
    """What a layer with these weights would leave."""
    dim = -1 if case.channels_last else 1
    row = torch.randn(case.values[0].shape[dim])
    query = case.query if case.query.dim() > 1 else None
    dout = case.arriving["out"] if has_dout else None
    return PositionLeft(row, query, planes.softmax(1), torch.stack([planes, -planes]), dout, 0)


def expected_gather(value: Tensor, left: list[PositionLeft], index: int, last: bool) -> Tensor:
    dim, shape = (-1 if last else 1), [1] * value.dim()
    shape[dim] = -1
    total = torch.zeros_like(value, dtype=torch.float64)
    for m in left:
        w, alpha, beta = (
            x[:, index].unsqueeze(dim).double() for x in (m.weights, *m.coefficients[:2])
        )
        u = m.row.double().reshape(shape)
        u = u if m.query is None else u * m.query.double()
        total += alpha * u - beta * value.double()
        if m.dout is not None:
            total += w * m.dout.double()
    return total


def check_gather(case: PositionCase, sources: int, mixed: bool = False) -> None:
    value, last = case.values[0], case.channels_last
    places = list(value.shape)
    del places[-1 if last else 1]
    planes = [torch.randn(places[0], 2 + m % 3, *places[1:]) / 4 for m in range(sources)]
    left = [left_of(case, p, not (mixed and m % 3 == 1)) for m, p in enumerate(planes)]
    if mixed:
        left = [m._replace(query=None) if i % 2 else m for i, m in enumerate(left)]
    found = cuda_position.position_gather(value, left, 1, last)
    expected = expected_gather(value, left, 1, last)
    # A sum of three products for each source in float32, each of a few roundings, rounded to the type once.
    info = torch.finfo(value.dtype)
    torch.testing.assert_close(
        found.double(), expected, rtol=info.eps, atol=12 * sources * torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["part of a warp", "planar", "planar, single", "interleaved"])
def test_a_gather_of_layers_that_left_different_things(name, dtype):
    """Some without a gradient of the output, some with a query for each position, some with one for all."""
    check_gather(plan_case(name, dtype, map_query=True), 7, mixed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_retrievals_than_a_launch_gathers_from(dtype, kernels):
    check_gather(make_position_case((1, 2, 16), 2, dtype, channels_last=True), 600)
    assert launched(kernels) == ["position_gather"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [padded, odd_rows, off_by(1, contiguous)], ids=name_of)
@pytest.mark.parametrize("keys", [False, True], ids=["own keys", "keys"])
@pytest.mark.parametrize(
    ("shape", "last"),
    [((2, 8, 13), False), ((2, 8, 16), False), ((2, 9, 12), True), ((2, 9, 32), True)],
    ids=str,
)
def test_strides_that_only_some_vectors_fit(shape, last, keys, layout, dtype):
    case = make_position_case(
        shape, 3, dtype, layout, keys=keys, map_query=keys, channels_last=last, dout=layout
    )
    assert_position_matches(evaluate_position(case), case)


def test_a_depth_beyond_the_kernels_is_refused_and_another_backend_goes_on(kernels):
    deep = make_position_case((1, 2, 3), 256, channels_last=True)
    assert_position_matches(evaluate_position(deep), deep)
    case = make_position_case((1, 2, 3), 257, channels_last=True)
    with pytest.raises(
        ValueError, match="serves up to 256 layers in one history, and these are 257"
    ):
        evaluate_position(case)
    # On a GPU Triton is asked next.
    request = Request("position_attention", torch.device("cuda"), torch.float32, 257)
    assert KERNELS["triton"].call_reasons(request) == []
    # The list that goes to a kernel is never cut short.
    x = torch.full((1, 1, 4), 7.0)
    call = kernels.cuda_position(
        sizes=(1, 4, 1, 1, 1),
        normed=True,
        eps=0.0,
        row=x.data_ptr(),
        query=(0, 0, 0),
        values=[x.data_ptr()] * 257,
        value_strides=(4, 4),
        keys=[],
        key_strides=(0, 0),
        prev=0,
        prev_depth=0,
        weights=x.data_ptr(),
    )
    with pytest.raises(ValueError, match="depth"):
        kernels.cuda_position_forward((0, 0), 1, call=call, out=(x.data_ptr(), 4, 4), kl=0)
    assert (x == 7).all()


def test_every_instance_runs_and_is_right(kernels):
    """Each kernel is a template; none of its instances may be one that never ran."""
    names = [
        "part of a warp",
        "rounds",
        "single",
        "single, rounds",
        "planar",
        "planar, rounds",
        "planar, single",
        "planar, single, rounds",
    ]
    for dtype, depth, name in itertools.product(DTYPES, (3, 33), names):
        if depth == 33 and "rounds" in name:
            continue
        for keys in (False, True):
            case = plan_case(name, dtype, depth=depth, keys=keys)
            assert_position_matches(evaluate_position(case), case)
        check_gather(plan_case(name, dtype, map_query=True), depth)
    ran = {launch[0] for launch in kernels.take_launches()}
    built = cuda_on_cpu.instances("position_")
    assert len(built) >= len(DTYPES) * 24
    assert built - ran == set()


@pytest.mark.slow
def test_a_block_that_adds_up_several_tiles(kernels):
    """More tiles than twice the blocks that are enough: each block then takes two, and their part of the row's sum."""
    case = make_position_case((1, 8199, 515), 1, prev_depth=None, channels_last=True)
    found = evaluate_position(case)
    (_, forward, *_), (_, backward, *_) = kernels.take_launches()
    assert (forward[0], backward[0]) == (8199, 4100)
    assert_position_matches(found, case)
