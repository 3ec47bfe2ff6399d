"""What the CUDA kernels leave out by a tolerance, on the CPU by the stand-in runtime.

Expected is what the formulas give in float64 for the weights that the kernels gave, which know no tolerance: so no
weight is on one side of it here and on the other there. Whatever is left out holds NaN or an infinity.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import mmap
import os
import sys
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.cases import Case
from support.cuda_on_cpu import DTYPES, FORMS, SHAPES_OF_INSTANCES, launched, name_of
from support.cuda_tolerance import (
    PLANS,
    attend,
    backward,
    check_backward,
    check_forward,
    contributions,
    gather_all,
    named,
    plan_case,
    varied_case,
)
from support.layouts import contiguous
from support.left_out import (
    NUMBERS,
    assert_same_bits,
    bits,
    by_channel,
    middle,
)
from torch import Tensor

from ela_kernels.backends.gpu_tables import GpuContribution

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_forward(name, dtype, share, kernels):
    case = plan_case(name, dtype)
    tolerance = middle(attend(case, 0.0)["weights"], share)
    kernels.take_launches()
    check_forward(case, tolerance)
    assert launched(kernels) == ["layer_attention_fwd"] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("form", ["pull", "push", "push of some"])
def test_backward(name, dtype, form, kernels):
    case = plan_case(name, dtype)
    weights = attend(case, 0.0)["weights"]
    depth = len(case.keys)
    need_values = {"pull": [], "push": [True] * depth}.get(form, [j % 2 == 1 for j in range(depth)])
    kernels.take_launches()
    check_backward(case, weights, middle(weights), need_values)
    assert launched(kernels) == ["layer_attention_bwd_dots", "layer_attention_bwd_tail"] * 2


def test_heads_of_a_block_leave_out_different_maps():
    """That in the plans above what one head leaves out another one of its block retains, and nothing retains some."""
    for name in ("rows", "many rows", "channel-wise", "spanning", "tokens"):
        weights = attend(plan_case(name, torch.float32), 0.0)["weights"]
        left_out = weights < middle(weights, 0.75)
        of_neighbours = left_out.unfold(1, 2, 1)  # [B, G - 1, T, 2]
        assert (of_neighbours[..., 0] != of_neighbours[..., 1]).any(), name
    weights = attend(plan_case("one head", torch.float32), 0.0)["weights"]
    assert (weights < middle(weights, 0.75)).any()


@pytest.mark.parametrize("depth", [2, 4, 5, 31, 32, 33, 64, 255, 256])
@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_depths(depth, heads, layout):
    case = varied_case((2, 16, 3, 8), depth, heads, torch.float32, layout)
    weights = attend(case, 0.0)["weights"]
    tolerance = middle(weights, 0.7)
    check_backward(case, weights, tolerance, [True] * depth)
    case = varied_case((2, 16, 3, 8), depth, heads, torch.float32, layout)
    check_forward(case, middle(attend(case, 0.0)["weights"], 0.7))


@pytest.mark.parametrize("retained", [0, 1, 3, 4, 5, 8, 9, 32, 33])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_lists_of_every_length(retained, layout):
    """Which maps are retained is chosen by their keys: the last ones, or with the others between them."""
    for chosen in (range(40 - retained, 40), range(retained)):
        case = varied_case((2, 8, 4, 4), 40, 2, layout=layout)
        case.q.fill_(1.0)
        for j, key in enumerate(case.keys):
            key.fill_(0.0 if j in chosen else -4.0)
        case.scale = (
            1.0  # a weight is 1 / retained, or exp(-16) of that, and 1 / 40 where none is chosen
        )
        tolerance = 0.5 / max(retained, 1) if retained else 0.5
        weights = attend(case, tolerance)["weights"]
        assert ((weights >= tolerance).sum(-1) == retained).all()
        check_backward(case, weights, tolerance, [True] * 40)
        case.values = [layout((2, 8, 4, 4), torch.float32) for _ in range(40)]
        check_forward(case, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_all_left_out(name, dtype):
    case = plan_case(name, dtype)
    case.q = torch.zeros_like(case.q)  # every weight is 1 / depth
    tolerance = 0.75
    found = attend(case, tolerance)
    assert not bits(found["out"]).any()
    for value in case.values:
        value.fill_(torch.nan)
    assert case.dout is not None
    case.dout.fill_(torch.inf)
    assert not bits(attend(case, tolerance)["out"]).any()
    pushed = backward(case, found["weights"], tolerance, [True] * len(case.keys))
    for dvalue in pushed.dvalues:
        assert dvalue is not None
        assert not bits(dvalue).any()
    case.dout = None  # the gradients of the scores are as if none arrived through the output
    assert torch.equal(pushed.dscores, backward(case, found["weights"], tolerance, []).dscores)


def all_results(case: Case, tolerance: float) -> dict[str, Tensor]:
    found = attend(case, tolerance)
    push = backward(case, found["weights"], tolerance, [True] * len(case.keys))
    pull = backward(case, found["weights"], tolerance, [])
    return found | named(push) | {f"pull {n}": x for n, x in named(pull).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_the_same_bits_where_nothing_is_below(name, dtype):
    case = plan_case(name, dtype)
    every = all_results(case, 0.0)
    assert every["weights"].min() > 2.0**-100
    assert_same_bits(all_results(case, 2.0**-100), every)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["rows", "many rows", "strips", "channel-wise", "spanning", "off", "tokens"]
)
def test_bits_depend_on_no_order_and_no_grid(name, dtype, kernels):
    case = plan_case(name, dtype)
    tolerance = middle(attend(case, 0.0)["weights"])
    first = all_results(case, tolerance)
    for order, limit in ((1, 0), (2, 0), (3, 0), (1, 2), (4, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        note = f"in order {order} with a limit of {limit}"
        assert_same_bits(all_results(case, tolerance), first, note)


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_what_is_retained_is_multiplied_whatever_it_is(name, number):
    case = plan_case(name, torch.float32)
    weights = attend(case, 0.0)["weights"]
    tolerance = middle(weights)
    j, (b, g) = 0, (0, 0)
    for j in range(len(case.keys)):  # the first retrieval that is retained
        at = (weights[..., j] >= tolerance).nonzero()
        if len(at):
            b, g = at[0].tolist()
            break
    channel = g * (case.q.shape[1] // case.heads)
    element = (
        (b, 1, channel) if case.channels_last else (b, channel, *[1] * (case.values[0].dim() - 2))
    )
    case.values[j][element] = number
    out = attend(case, tolerance)["out"]
    expected = torch.tensor(number)
    torch.testing.assert_close(out[element], expected, equal_nan=True)
    assert (~out.isfinite()).sum() == 1
    found = backward(case, weights, tolerance, [])
    assert not found.dscores[b, g].isfinite().any()
    rest = torch.ones(weights.shape[:2], dtype=torch.bool)
    rest[b, g] = False
    assert found.dscores[rest].isfinite().all()


def test_an_output_gradient_reaches_what_is_retained_alone():
    case = plan_case("channel-wise", torch.float32)
    weights = attend(case, 0.0)["weights"]
    tolerance = middle(weights)
    assert case.dout is not None
    case.dout.fill_(torch.inf)
    found = backward(case, weights, tolerance, [True] * len(case.keys))
    for j, dvalue in enumerate(found.dvalues):
        assert dvalue is not None
        left_out = by_channel(weights[..., j] < tolerance, dvalue, False)
        assert torch.equal(dvalue, torch.where(left_out, 0.0, case.dout))


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_no_product_with_zero_is_left_out_by_no_tolerance(layout):
    """IEEE's 0 * inf, which the smallest of tolerances leaves out."""
    case = varied_case((2, 12, 3, 5), 4, 3, layout=layout)
    case.q.fill_(1.0)
    for j, key in enumerate(case.keys):
        key.fill_(-300.0 if j == 1 else 0.0)
    case.values[1].fill_(torch.inf)
    found = attend(case, 0.0)
    assert not found["weights"][..., 1].any()
    assert found["out"].isnan().all()
    tolerance = torch.finfo(torch.float32).smallest_normal
    assert attend(case, tolerance)["out"].isfinite().all()
    assert backward(case, found["weights"], 0.0, []).dscores.isnan().all()
    assert backward(case, found["weights"], tolerance, []).dscores.isfinite().all()


@pytest.mark.parametrize("name", PLANS)
def test_a_weight_that_is_nan_is_not_small(name):
    case = plan_case(name, torch.float32)
    case.q[0] = torch.nan
    found = attend(case, 0.5)
    assert found["weights"][0].isnan().all()
    assert found["out"][0].isnan().all()
    assert found["out"][1:].isfinite().all()
    gradients = backward(case, found["weights"], 0.5, [True] * len(case.keys))
    for dvalue in gradients.dvalues:
        assert dvalue is not None
        assert dvalue[0].isnan().all()
    assert gradients.dscores[0].isnan().all()
    assert gradients.dscores[1:].isfinite().all()


def unreadable(like: Tensor) -> Tensor:
    """A map of that form in memory that nobody may read."""
    size = like.untyped_storage().nbytes() // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
    memory = mmap.mmap(-1, size)
    x = torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(x.data_ptr()), ctypes.c_size_t(size), 0) == 0
    return x


def ends_well(body: Any) -> bool:
    """Whether `body` returns in a process of its own, where a read of what may not be read is the end."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # it is no news
        try:
            body()
            os._exit(0)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("channels", [16, 6], ids=["vectors", "single elements"])
def test_what_every_head_leaves_out_is_not_read(channels, layout):
    case = varied_case((2, channels, 3, 3), 4, 2, layout=layout)
    case.q.fill_(1.0)
    for j, key in enumerate(case.keys):
        key.fill_(-9.0 if j in (0, 2) else 0.0)
    weights = attend(case, 0.25)["weights"]
    assert ((weights < 0.25).sum(-1) == 2).all()
    retained = case.values[1]
    left = [
        GpuContribution(case.q, weights, weights, case.values[m], False, 0.25) for m in range(4)
    ]
    for m in (0, 2):
        case.values[m] = unreadable(retained)
        left[m].weights = torch.full_like(weights, 0.125)
        left[m].dout = case.values[m]

    assert ends_well(lambda: attend(case, 0.25))
    assert ends_well(lambda: backward(case, weights, 0.25, []))
    assert ends_well(lambda: backward(case, weights, 0.25, [True] * 4))
    assert ends_well(lambda: gather_all(left, 1, 2, False))
    assert not ends_well(lambda: attend(case, 0.0))  # that this is seen


def test_every_instance_runs_and_is_right(kernels):
    for dtype, depth, (shape, heads, layout) in itertools.product(
        DTYPES, (3, 33), SHAPES_OF_INSTANCES
    ):
        case = varied_case(shape, depth, heads, dtype, layout)
        weights = check_forward(case, 0.25)["weights"]
        for need_values in ([], [True] * depth):
            case.values = [layout(shape, dtype) for _ in range(depth)]
            check_backward(case, weights, 0.25, need_values)
        left = contributions(shape, range(1, depth + 1), heads, dtype, layout, False, [0.25])
        gather_all(left, 0, heads, False)
    ran = {launch[0] for launch in kernels.take_launches()}
    built = cuda_on_cpu.leaving_out(cuda_on_cpu.instances("layer_attention_"))
    assert len(built) == len(DTYPES) * (3 + 4 + 3)
    assert built - ran == set()


def test_tolerances_that_are_no_weights_are_refused():
    case = varied_case((1, 4, 2, 2), 2, 2)
    for tolerance in (-0.5, 1.5, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="tolerance: no weight"):
            attend(case, tolerance)
        left = contributions((1, 4, 2, 2), [1], 2, torch.float32, contiguous, False, [tolerance])
        with pytest.raises(ValueError, match="tolerance: no weight"):
            gather_all(left, 0, 2, False)
