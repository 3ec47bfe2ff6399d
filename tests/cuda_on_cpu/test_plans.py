"""How the CUDA kernels cut their work, run on the CPU: no order of threads, no grid and no address may matter."""

from __future__ import annotations

import itertools
import mmap
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from support.cases import Case, evaluate, make_case
from support.cuda_on_cpu import (
    DTYPES,
    FORMS,
    SHAPES_OF_INSTANCES,
    launched,
    name_of,
    odd_rows,
    off_by,
    padded,
)
from support.layouts import channel_slice, channels_last, contiguous
from support.left_out import bits
from support.oracle import assert_matches
from torch import Tensor

import ela_kernels as ek
from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import GpuContribution

pytestmark = pytest.mark.usefixtures("kernels")


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


def odd_batches(shape: Any, dtype: torch.dtype) -> Tensor:
    """Compact samples, one element further apart than they are long."""
    x = contiguous(shape, dtype)
    per_sample = x[0].numel()
    memory = torch.full((shape[0] * (per_sample + 1),), torch.nan, dtype=dtype)
    return memory.as_strided(x.shape, (per_sample + 1, *x.stride()[1:])).copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [padded, odd_rows, odd_batches], ids=name_of)
@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize(
    ("shape", "heads", "last"),
    [
        ((2, 8, 13), 2, False),
        ((2, 8, 16), 2, False),
        ((1, 8, 13), 8, False),
        ((2, 9, 12), 3, True),
        ((2, 9, 32), 2, True),
        ((1, 5, 13), 1, True),
        ((1, 1, 12), 1, True),
        ((1, 1, 13), 1, True),
    ],
    ids=str,
)
def test_strides_that_only_some_vectors_fit(shape, heads, last, pull, layout, dtype):
    case = make_case(shape, 3, heads, dtype, layout, channels_last=last, dout=layout)
    if pull:  # without gradients of values, whose compact rows forbid vectors where the rows read here do not
        case.wanted = ["q", *(f"keys[{j}]" for j in range(3)), "prev_weights"]
    assert_matches(evaluate(case), case)


# As large as a stage of a network: enough blocks that one does several rounds of work.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMS, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "depth", "heads"),
    [
        ((64, 64, 32, 32), 3, 4),
        ((32, 1024, 7, 7), 3, 64),
        ((1, 2048, 28, 28), 3, 2),
        ((2, 64, 12, 12), 256, 1),
        ((4, 33, 61, 67), 3, 11),
        ((300, 96, 9, 9), 2, 96),
    ],
    ids=str,
)
def test_stages_of_networks(shape, depth, heads, layout, dtype, kernels):
    case = make_case(shape, depth, heads, dtype, layout)
    found = evaluate(case)
    assert_matches(found, case)
    kernels.set_order(5)
    again = evaluate(case)
    assert all(torch.equal(bits(x), bits(again[name])) for name, x in found.items())


@pytest.mark.parametrize("layout", FORMS, ids=name_of)
def test_one_launch_forward_and_two_backward(layout, kernels):
    case = make_case((2, 12, 5, 4), 33, 3, makers=layout)
    evaluate(case)
    assert launched(kernels) == [
        "layer_attention_fwd",
        "layer_attention_bwd_dots",
        "layer_attention_bwd_tail",
    ]


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

    monkeypatch.setattr("ela_kernels.backends.gpu_tables._compact", refuse)
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
            *((0, 0), 1),
            sizes=(1, 2, 1, 1, 0),
            attention=kernels.cuda_attention(
                scale=1.0,
                tolerance=0.0,
                query=row.data_ptr(),
                query_stride=2,
                keys=[row.data_ptr()] * 257,
                key_stride=2,
                values=[],
                value_strides=(0, 0),
                prev=0,
                prev_depth=0,
                weights=weights.data_ptr(),
            ),
            kl=0,
        )
    assert (weights == 7).all()


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
        retrieved = [
            GpuContribution(case.q, weights, weights, like, False, 0.0) for _ in range(depth)
        ]
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
    built = cuda_on_cpu.instances("layer_attention_")
    built -= cuda_on_cpu.leaving_out(built)
    assert (
        len(built) >= len(DTYPES) * 8
    )  # each kernel with and without vectors, and for few and for many layers
    assert built - ran == set()


# Its build alone takes minutes; `make asan`, which is for a change in csrc/, runs all of this folder so.
@pytest.mark.exhaustive
@pytest.mark.skipif(cuda_on_cpu.is_sanitized(), reason="is what runs this file sanitized")
def test_nothing_is_out_of_bounds():
    """Every kernel, odd addresses and many blocks on a build with AddressSanitizer and UBSan."""
    selected = "every_instance or (off_the and 3 and float32) or arrive or (plans and are) or of_a_part or only_some"
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
            *map(str, Path(__file__).parent.glob("test_*.py")),
        ],
        env=cuda_on_cpu.sanitized_environment(),
        cwd=cuda_on_cpu.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 30
