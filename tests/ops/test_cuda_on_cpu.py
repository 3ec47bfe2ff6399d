"""The CUDA kernels, run on the CPU by the stand-in runtime: outputs and all gradients against a float64 oracle."""

from __future__ import annotations

import itertools
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.cases import HALF_TYPES, Case, Maker, evaluate, make_case
from support.layouts import (
    MAP_LAYOUTS,
    TOKEN_LAYOUTS,
    channel_slice,
    channels_last,
    contiguous,
    last_slice,
)
from support.oracle import assert_matches, oracle
from torch import Tensor

import ela_kernels as ek
from ela_kernels.ops.layer_attention import cuda

DTYPES = (torch.float32, *HALF_TYPES)
FORMS = (contiguous, channels_last)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Any]:
    with cuda_on_cpu.kernels_on_cpu() as module:
        yield module


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


def launched(kernels: Any) -> list[str]:
    """The kernels launched since the last look, without their template arguments."""
    return [re.search(r"(\w+)_kernel", launch[0])[1] for launch in kernels.take_launches()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
def test_layouts_of_maps(layout, dtype):
    for shape, heads in (((3, 12, 5, 7), 3), ((2, 16, 4, 8), 2)):
        case = make_case(shape, 3, heads, dtype, layout)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_layouts_of_tokens(layout, dtype):
    for shape, heads in (((2, 9, 12), 2), ((2, 5, 32), 2)):
        case = make_case(shape, 3, heads, dtype, layout, channels_last=True)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", MAP_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("values", FORMS, ids=name_of)
def test_layouts_of_the_output_gradient(values, layout):
    case = make_case((2, 8, 4, 6), 2, 2, makers=values, dout=layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", TOKEN_LAYOUTS, ids=name_of)
def test_layouts_of_the_output_gradient_of_tokens(layout):
    case = make_case((2, 5, 8), 2, 2, dout=layout, channels_last=True)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("turn", range(4))
def test_each_value_laid_out_otherwise(turn):
    mixed = [contiguous, channels_last, channel_slice, last_slice]
    case = make_case((2, 6, 4, 5), 4, 2, makers=mixed[turn:] + mixed[:turn])
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8, 31, 32, 33, 65, 255, 256])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_depths(depth, layout):
    for dtype in DTYPES if depth in (3, 33) else DTYPES[:1]:
        case = make_case((2, 16, 3, 5), depth, 2, dtype, layout)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("prev_depth", [None, 1, 2, 5])
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_depths_of_the_previous_weights(prev_depth, layout):
    case = make_case(depth=5, prev_depth=prev_depth, makers=layout)
    assert_matches(evaluate(case), case)


def test_previous_weights_that_are_zero():
    case = make_case((2, 12, 5, 3), 4, 3)
    case.prev_weights[:, 0, 1] = 0
    case.prev_weights[1, 2] = 0
    found = evaluate(case)
    assert_matches(found, case)
    assert (found["d prev_weights"][:, 0, 1] == 0).all()
    assert found["kl"][1, 2] == 0


SIZES = [
    ((1, 1, 1, 1), 1),
    ((2, 1, 3, 5), 1),
    ((1, 37, 7, 7), 1),
    ((2, 37, 7, 7), 37),  # channel-wise heads
    ((3, 8, 1, 1), 8),
    ((2, 16, 4, 4), 16),
    ((2, 24, 9, 33), 3),
    ((2, 24, 4, 4), 4),  # six channels to a head: vectors that span heads
    ((2, 40, 4, 4), 8),
    ((2, 10, 1), 5),
    ((2, 4, 123), 2),
    ((2, 6, 2, 3, 5), 3),
    ((1, 66, 1, 3), 2),
    ((1, 192, 2, 4), 3),  # more vectors than a strip is wide
    ((1, 272, 3, 3), 2),
    ((1, 1030, 2, 4), 5),
    ((7, 32, 2, 2), 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(("shape", "heads"), SIZES, ids=str)
def test_sizes(shape, heads, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 6), (2, 123, 1), (1, 1, 1), (2, 3, 5, 8), (2, 2, 3, 2, 8), (2, 50, 64)],
    ids=str,
)
def test_sizes_of_tokens(shape, dtype):
    case = make_case(shape, 3, 1, dtype, channels_last=True)
    assert_matches(evaluate(case), case)


def test_values_without_spatial_dimensions():
    case = make_case((3, 8), 3, 2)
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("shape", [(0, 6, 3, 5), (2, 6, 0, 5)], ids=str)
def test_nothing_in_a_batch_or_a_map(shape, layout):
    case = make_case(shape, 3, 2, makers=layout)
    assert_matches(evaluate(case), case)


def off_by(elements: int, layout: Maker) -> Maker:
    """`layout`, with every address that many elements after a 16-byte boundary."""

    def make(shape: Any, dtype: torch.dtype) -> Tensor:
        x = layout(shape, dtype)
        memory = torch.empty(x.numel() + elements, dtype=dtype)
        assert memory.data_ptr() % 16 == 0
        moved = memory[elements:].as_strided(x.shape, x.stride(), elements)
        return moved.copy_(x)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("elements", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("which", ["values", "dout", "rows", "all"])
def test_addresses_off_the_vectors_boundary(which, elements, layout, dtype):
    maker, row = off_by(elements, layout), off_by(elements, contiguous)
    case = make_case(
        (2, 16, 4, 4),
        3,
        2,
        dtype,
        maker if which in ("values", "all") else layout,
        dout=maker if which in ("dout", "all") else layout,
    )
    if which in ("rows", "all"):
        case.q, *case.keys = (row((2, 16), dtype) for _ in range(4))
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_one_address_of_many_off_the_boundary(layout):
    for odd in range(3):
        makers = [off_by(1, layout) if j == odd else layout for j in range(3)]
        case = make_case((2, 16, 4, 4), 3, 2, makers=makers)
        assert_matches(evaluate(case), case)


@pytest.mark.parametrize("scale", [0.0, 1, -0.7, 3.5])
def test_scales(scale):
    case = make_case(scale=scale)
    assert_matches(evaluate(case), case)


def test_strided_queries_keys_and_previous_weights():
    case = make_case((3, 12, 4), 3, 2)
    case.q = torch.randn(12, 3).t()
    case.keys = [
        torch.randn(3, 24)[:, ::2],
        torch.randn(1, 12).expand(3, 12),
        torch.randn(6, 12)[::2],
    ]
    case.prev_weights = torch.randn(2, 3, 2).softmax(-1).transpose(0, 1)
    case.dweights = torch.randn(3, 3, 2).transpose(1, 2)
    case.dkl = torch.tensor(0.7).expand(3, 2)
    assert_matches(evaluate(case), case)


def test_keys_with_one_batch_stride_of_their_own():
    case = make_case((3, 12, 4), 3, 2)
    memory = torch.randn(3, 3, 12)
    case.keys = [memory[:, j] for j in range(3)]
    assert_matches(evaluate(case), case)


THROUGH = ["", "out", "weights", "kl", "out weights", "out kl", "weights kl", "out weights kl"]


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gradients_that_do_not_arrive(through, layout, kernels):
    case = make_case((2, 12, 5, 4), 4, 3, makers=layout, through=through)
    assert_matches(evaluate(case), case)
    # No value is read where no gradient arrives through `out`.
    backward = ["layer_attention_bwd_dots"] * ("out" in through) + ["layer_attention_bwd_tail"]
    assert launched(kernels) == ["layer_attention_fwd"] + (backward if through else [])


WANTED = [
    ["q"],
    ["keys[1]"],
    ["values[1]"],
    ["prev_weights"],
    ["q", "values[0]", "values[2]"],
    ["keys[0]", "keys[2]", "prev_weights"],
    [f"values[{j}]" for j in range(3)],
]


@pytest.mark.parametrize("wanted", WANTED, ids=" ".join)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_gradients_that_nobody_wants(wanted, layout):
    case = make_case((2, 12, 5, 4), 3, 3, makers=layout)
    case.wanted = wanted
    assert_matches(evaluate(case), case)


@pytest.mark.parametrize("depth", [1, 3, 33, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "heads"), [(12, 3), (7, 7), (300, 1), (37, 1), (1100, 2)], ids=str
)
def test_weights_only_pass(depth, dtype, channels, heads, kernels):
    case = make_case((2, channels, 3), depth, heads, dtype, through="")
    case.wanted = []
    only = ek.layer_attention_weights(case.q, case.keys, heads, prev_weights=case.prev_weights)
    assert launched(kernels) == ["layer_attention_fwd_weights"]
    found = {"weights": only.weights} | ({} if depth == 1 else {"kl": only.kl})
    assert (only.kl is None) == (depth == 1)
    expected = oracle(case)
    del expected["out"]
    assert_matches(found, case, expected)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


# Several blocks to a head, several rows and heads to a block, chunks that end within a vector, strips, heads that a
# block's boundary cuts, and threads with nothing to do.
PLANS = {
    "rows": ((2, 12, 5, 7), 5, 3, contiguous, False),
    "chunks": ((1, 6, 37, 41), 5, 2, contiguous, False),
    "one head": ((1, 3, 61, 53), 3, 1, contiguous, False),
    "gaps": ((2, 12, 23, 20), 3, 3, channel_slice, False),
    "off": ((1, 8, 23, 21), 3, 2, off_by(1, contiguous), False),
    "strips": ((1, 272, 9, 5), 3, 2, channels_last, False),
    "positions": ((1, 16, 33, 31), 4, 1, channels_last, False),
    "channel-wise": ((2, 40, 9, 9), 3, 40, channels_last, False),
    "spanning": ((2, 36, 17, 9), 3, 6, channels_last, False),
    "off, interleaved": ((1, 24, 17, 9), 3, 2, off_by(3, channels_last), False),
    "wide": ((1, 1100, 5, 3), 3, 2, channels_last, False),
    "tokens": ((2, 50, 64), 33, 4, contiguous, True),
}


def plan_case(name: str, dtype: torch.dtype) -> Case:
    shape, depth, heads, layout, last = PLANS[name]
    return make_case(shape, depth, heads, dtype, layout, channels_last=last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_bits_depend_on_no_order_and_no_grid(name, dtype, kernels):
    """Threads and blocks in any order, a grid of two blocks that walk over all the work, and a repeat.

    A missing barrier, a block that reads what another one writes and a partial sum without a place of its own show.
    """
    case = plan_case(name, dtype)
    first = evaluate(case)
    assert_matches(first, case)
    for order, limit in ((0, 0), (1, 0), (2, 0), (3, 0), (1, 2), (4, 2)):
        kernels.set_order(order)
        kernels.limit_grid(limit)
        again = evaluate(case)
        for key, x in first.items():
            assert torch.equal(bits(x), bits(again[key])), (
                f"{key} in order {order} with a limit of {limit}"
            )


def test_the_plans_are_what_they_are_called(kernels):
    """That the shapes above have more than one block to a head, and more than one head to a block."""
    blocks = {}
    for name in PLANS:
        kernels.take_launches()
        evaluate(plan_case(name, torch.float32))
        shape, _, heads, *_ = PLANS[name]
        forward, dots, _tail = kernels.take_launches()
        blocks[name] = [launch[1][0] / (shape[0] * heads) for launch in (forward, dots)]
    for name in ("chunks", "one head", "strips", "positions", "wide"):
        assert min(blocks[name]) > 1, name
    for name in ("rows", "channel-wise"):
        assert max(blocks[name]) < 1, name


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_one_launch_forward_and_two_backward(layout, kernels):
    case = make_case((2, 12, 5, 4), 33, 3, makers=layout)
    evaluate(case)
    assert launched(kernels) == [
        "layer_attention_fwd",
        "layer_attention_bwd_dots",
        "layer_attention_bwd_tail",
    ]


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_widening_and_narrowing_back(dtype):
    """A history of one layer has weight 1 and gives its value back: all 65 536 patterns, in vectors and singly."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.ones(1, 8, dtype=dtype)
    for value in (patterns.view(1, 8, -1), off_by(1, contiguous)((1, 8, 2**13), dtype)):
        value.copy_(patterns.view(1, 8, -1))
        out = ek.layer_attention(ones, [ones], [value], 1).out.view(-1)
        assert torch.equal(out.isnan(), patterns.isnan())
        # A sum that starts at +0 makes -0 a +0.
        assert torch.equal(out[~out.isnan()], patterns[~out.isnan()])


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["q", "keys[1]", "values[0]", "prev_weights", "dout", "dkl"])
def test_what_is_not_finite_goes_through(where, number, layout):
    case = make_case((2, 8, 3, 5), 3, 2, makers=layout)
    target = case.inputs().get(where)
    target = getattr(case, where) if target is None else target
    target[(1, 1, 1)[: target.dim()] if "d" in where else (1,)] = number
    found, expected = evaluate(case), oracle(case)
    assert not all(x.isfinite().all() for x in found.values())
    for name, x in found.items():
        if name == "d prev_weights":
            continue  # dkl (log p + 1 - log a): autograd's product rule makes inf - inf of it, the kernel a factor inf
        assert torch.equal(x.isnan(), expected[name].isnan()), name
        assert torch.equal(x.isinf(), expected[name].isinf()), name
        # What is finite is untouched by it: the other sample and the other head.
        rest = x.isfinite()
        rtol = 64 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(
            x[rest].double(), expected[name][rest], rtol=rtol, atol=64 * rtol
        )


def far_apart(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    """Random numbers with elements beyond 2^31 of each other; only the pages that are touched take memory."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert elements > 2**31
    memory = mmap.mmap(
        -1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )
    return (
        torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides).copy_(torch.randn(shape))
    )


@pytest.mark.skipif(sys.platform != "linux", reason="MAP_NORESERVE by number")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "strides", "last"),
    [
        ((2, 8, 16), (2**31 + 64, 16, 1), False),
        ((2, 8, 16), (8, 2**29, 1), False),
        ((2, 16, 8), (2**31 + 64, 8, 1), True),
        ((2, 16, 8), (8, 2**28 + 8, 1), True),
    ],
    ids=["planar batch", "planar channel", "interleaved batch", "interleaved position"],
)
def test_addresses_beyond_32_bits(shape, strides, last, dtype, monkeypatch):
    torch.use_deterministic_algorithms(False)  # which would fill all of it
    case = make_case(shape, 2, 2, dtype, channels_last=last)
    case.values = [far_apart(shape, strides, dtype) for _ in range(2)]
    case.dout = far_apart(shape, strides, dtype)

    def refuse(*_: object) -> None:
        raise AssertionError("a map was copied: the kernel did not see its strides")

    monkeypatch.setattr("ela_kernels.ops.layer_attention.gpu._compact", refuse)
    assert_matches(evaluate(case), case)


def test_the_device_guard(kernels, monkeypatch):
    case = make_case()
    monkeypatch.setattr(cuda, "_device", lambda tensor: (1, 0))
    assert_matches(evaluate(case), case)
    assert kernels.device_now() == 0
    monkeypatch.setattr(cuda, "_device", lambda tensor: (7, 0))
    with pytest.raises(
        RuntimeError, match=r"error 101 \(cudaErrorInvalidDevice\): invalid device ordinal"
    ):
        evaluate(case)
    assert kernels.device_now() == 0


def test_a_depth_beyond_the_kernels_is_refused_twice(kernels):
    case = make_case((1, 2, 3), 257, 1)
    with pytest.raises(ValueError, match="serves up to 256 layers"):
        evaluate(case)
    assert kernels.cuda_max_depth == 256
    row, weights = torch.zeros(1, 2), torch.full((1, 1, 257), 7.0)
    with pytest.raises(ValueError, match="depth"):
        kernels.cuda_weights(
            *(0, 0, 1, (1, 2, 1, 1, 0), 1.0, row.data_ptr(), 2, [row.data_ptr()] * 257, 2, 0, 0),
            *(weights.data_ptr(), 0),
        )
    assert (weights == 7).all()


SHAPES_OF_INSTANCES = [
    ((1, 16, 4, 4), 2, contiguous),
    ((1, 16, 4, 4), 2, channels_last),
    ((1, 16, 4, 4), 16, channels_last),
    ((1, 9, 3, 3), 3, contiguous),
]


def instances() -> set[str]:
    """Every kernel that the sources instantiate, as the linker knows them."""
    library = cuda_on_cpu.build(cuda_on_cpu.KERNELS, cuda_on_cpu.is_sanitized())
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", library], capture_output=True, text=True, check=True
    )
    return set(re.findall(r" [TWt] (void ela::cuda::\w+_kernel<.*)", symbols.stdout))


def test_every_instance_runs_and_is_right(kernels):
    """Each kernel is a template; none of its instances may be one that never ran."""
    for dtype, depth, (shape, heads, layout) in itertools.product(
        DTYPES, (3, 33), SHAPES_OF_INSTANCES
    ):
        case = make_case(shape, depth, heads, dtype, layout)
        assert_matches(evaluate(case), case)
        case.wanted = ["q"]  # no gradient of a value is written in the same pass
        assert_matches(evaluate(case), case)
        ek.layer_attention_weights(case.q, case.keys, heads)
        like = case.values[0]
        weights = torch.rand(shape[0], heads, depth).softmax(-1)
        retrieved = [cuda.Retrieved(case.q, weights, weights, like, False) for _ in range(depth)]
        dkey, dvalue = cuda.gather(retrieved, depth - 1, heads, False, True, True)
        factor = depth * weights[..., -1].double().repeat_interleave(shape[1] // heads, 1)
        for found, x, c in ((dkey, case.q, factor), (dvalue, like, factor[..., None, None])):
            # A sum of `depth` equal terms in float32, rounded to the type: at most an ulp of it and `depth` of float32.
            tolerance = torch.finfo(dtype).eps + depth * torch.finfo(torch.float32).eps
            torch.testing.assert_close(
                found.double(), c * x.double(), rtol=tolerance, atol=2.0**-24
            )
        alone, nothing = cuda.gather(retrieved, depth - 1, heads, False, True, False)
        assert nothing is None
        assert torch.equal(bits(alone), bits(dkey))
    ran = {launch[0] for launch in kernels.take_launches()}
    assert len(ran) > 10
    assert instances() - ran == set()


@pytest.mark.skipif(cuda_on_cpu.is_sanitized(), reason="is what runs this file sanitized")
def test_nothing_is_out_of_bounds():
    """Every kernel, odd addresses and many blocks on a build with AddressSanitizer and UBSan; `make asan` runs all."""
    selected = "every_instance or (off_the and 3 and float32) or arrive or (plans and are)"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-k",
            selected,
            __file__,
        ],
        env=cuda_on_cpu.sanitized_environment(),
        cwd=cuda_on_cpu.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30
