"""The stand-in for the CUDA runtime, on kernels of its own: what it computes, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import cuda_on_cpu
from torch import Tensor

ORDERS = (0, 1, 2, 3)
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9


@pytest.fixture(scope="module")
def module() -> Any:
    return cuda_on_cpu.load_or_skip(cuda_on_cpu.SELFTEST)


@pytest.fixture(params=ORDERS)
def runtime(request: pytest.FixtureRequest, module: Any) -> Any:
    """The module in each order of threads and blocks."""
    module.set_order(request.param)
    module.take_launches()
    yield module
    module.set_order(0)


def reverse(runtime: Any, x: Tensor, blocks: int, with_barrier: bool) -> Tensor:
    y, threads = torch.empty_like(x), x.numel() // blocks
    assert (
        runtime.reverse(x.data_ptr(), y.data_ptr(), blocks, threads, 4 * threads, with_barrier) == 0
    )
    return y


@pytest.mark.parametrize(("blocks", "threads"), [(1, 1), (3, 64), (2, 100), (1, 1024)])
def test_shared_memory_behind_a_barrier(runtime, blocks, threads):
    x = torch.randn(blocks * threads)
    y = reverse(runtime, x, blocks, with_barrier=True)
    assert torch.equal(y, x.view(blocks, threads).flip(1).view(-1))
    ((kernel, grid, block, shared),) = runtime.take_launches()
    assert kernel.startswith("selftest::reverse_kernel(")
    assert (grid, block, shared) == ((blocks, 1, 1), (threads, 1, 1), 4 * threads)


def test_a_missing_barrier_shows(runtime):
    # Half of the threads, whichever come first, read what is not written yet: poison, and another half in each order.
    x = torch.randn(64)
    y = reverse(runtime, x, 1, with_barrier=False)
    missing = y.isnan()
    assert missing.sum() == 32
    assert torch.equal(y[~missing], x.flip(0)[~missing])


def test_orders_differ(module):
    seen = set()
    for order in (0, 1, 3, 5):
        module.set_order(order)
        missing = reverse(module, torch.randn(64), 1, with_barrier=False).isnan()
        seen.add(tuple(missing.tolist()))
    module.set_order(0)
    assert len(seen) == 4


@pytest.mark.parametrize("with_barrier", [True, False])
def test_a_warp_that_runs_ahead(module, with_barrier):
    """Into the next round, where it overwrites what another warp has not read yet, unless a barrier stops it."""
    x = torch.randint(100, (3, 128)).float()  # sums of whole numbers are exact in any order
    right = []
    for order in ORDERS:
        y = torch.empty_like(x)
        module.set_order(order)
        assert module.rounds(x.data_ptr(), y.data_ptr(), 128, 3, with_barrier) == 0
        right.append(torch.equal(y, x.sum(1, keepdim=True).expand_as(x)))
    module.set_order(0)
    assert all(right) if with_barrier else not any(right[:3])


def test_shuffles_and_votes(runtime):
    x = torch.randn(32)
    found = torch.empty(11, 32)
    assert runtime.lanes(x.data_ptr(), found.data_ptr()) == 0
    lane = torch.arange(32)
    group = lane // 8 * 8
    sources = [
        torch.full((32,), 3),
        group + (lane + 1) % 8,
        lane ^ 5,
        torch.where(lane ^ 5 < lane // 4 * 4 + 4, lane ^ 5, lane),
        torch.where(lane >= 3, lane - 3, lane),
        torch.where(lane - 3 >= group, lane - 3, lane),
        torch.where(lane + 3 < 32, lane + 3, lane),
        torch.where(lane + 3 < group + 8, lane + 3, lane),
    ]
    for row, source in zip(found, sources, strict=False):
        assert torch.equal(row, x[source])
    assert (found[8] == (1 << 4 | 1 << 9)).all()
    assert (found[9] == 1).all()
    assert torch.equal(found[10], x[torch.where(lane < 16, lane ^ 1, lane ^ 2)])


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (
            0,
            r"no thread can go on: threads 0-39 in __syncthreads at .*; threads 40-63 left the kernel",
        ),
        (
            1,
            r"no thread can go on: threads 0, 2, 4, 6, \.\.\. in __syncthreads .*; threads 1, 3, 5, 7, \.\.\. in",
        ),
        (
            2,
            r"threads 0-19 in __shfl_xor_sync at .* for the lanes ffffffff; threads 20-31 in __shfl_xor_sync",
        ),
        (
            3,
            r"threads 0-4, 6-31 in __shfl_xor_sync at .* for the lanes ffffffff; threads 5, 32-63 left",
        ),
        (4, r"__shfl_xor_sync at selftest.cu:\d+: the mask does not name the lane itself"),
        (5, r"__shfl_xor_sync at .*: a lane takes the value of one that the mask does not name"),
        (6, r"__ldg at .*: the address is not aligned to the type's size"),
    ],
    ids=[
        "leaving before a barrier",
        "two barriers",
        "two shuffles",
        "a shuffle without a lane",
        "lane not in mask",
        "source not in mask",
        "misaligned vector",
    ],
)
def test_misuse_is_an_error_and_not_a_hang(runtime, which, said):
    y = torch.zeros(64)
    with pytest.raises(RuntimeError) as caught:
        runtime.misuse(which, y.data_ptr(), 64)
    message = str(caught.value)
    assert message.startswith("selftest::misuse_kernel(int, float*), block (0, 0, 0)")
    assert re.search(said, message), message
    x = torch.randn(96)
    assert torch.equal(
        reverse(runtime, x, 1, with_barrier=True), x.flip(0)
    )  # and the next launch is as good as any


@pytest.mark.parametrize(
    ("blocks", "threads", "shared", "code"),
    [
        (1, 32, 48 * 1024, 0),
        (1, 32, 48 * 1024 + 1, INVALID_VALUE),
        (0, 32, 128, INVALID_CONFIGURATION),
        (1, 0, 128, INVALID_CONFIGURATION),
        (1, 1025, 5000, INVALID_CONFIGURATION),
        (2**31, 32, 128, INVALID_CONFIGURATION),
    ],
)
def test_launches_that_a_device_refuses(module, blocks, threads, shared, code):
    x, y = torch.randn(32), torch.empty(32)
    module.take_launches()
    assert module.reverse(x.data_ptr(), y.data_ptr(), blocks, threads, shared, True) == code
    assert module.last_error() == code
    assert module.last_error() == 0
    assert len(module.take_launches()) == (code == 0)
    assert y.isnan().all() == (code != 0)


def test_shared_memory_that_was_asked_for(module):
    x, y = torch.randn(32), torch.empty(32)
    assert module.raise_shared(64 * 1024 + 1) == INVALID_VALUE
    assert module.last_error() == INVALID_VALUE
    assert module.raise_shared(50000) == 0
    try:
        assert module.reverse(x.data_ptr(), y.data_ptr(), 1, 32, 50000, True) == 0
        assert module.reverse(x.data_ptr(), y.data_ptr(), 1, 32, 50001, True) == INVALID_VALUE
    finally:
        assert module.raise_shared(0) == 0
        module.last_error()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_bytes_widen_exactly(module, dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = torch.empty(patterns.numel())
    widen = module.widen_bfloat16 if dtype == torch.bfloat16 else module.widen_half
    widen(patterns.data_ptr(), found.data_ptr(), patterns.numel())
    assert torch.equal(found.isnan(), patterns.isnan())
    number = ~patterns.isnan()
    assert torch.equal(found.view(torch.int32)[number], patterns.float().view(torch.int32)[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_narrows_as_in_pytorch(module, dtype):
    """Every representable number, what lies in the middle of two and just beside it, and random bits."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].float().sort().values
    middle = (
        (numbers[1:].double() + numbers[:-1].double()) / 2
    ).float()  # exact: one bit more than two bytes hold
    above, below = (torch.nextafter(middle, torch.tensor(x)) for x in (torch.inf, -torch.inf))
    bits = (
        torch.randint(-(2**31), 2**31, (2**18,), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    special = torch.tensor(
        [torch.inf, torch.nan, 65519.996, 65520.0, 3.4028235e38, 1e-45, 2.0**-25, 2.0**-24]
    )
    floats = torch.cat([numbers, middle, above, below, bits, special, -special])
    found = torch.empty(floats.numel(), dtype=dtype)
    narrow = module.narrow_to_bfloat16 if dtype == torch.bfloat16 else module.narrow_to_half
    narrow(floats.data_ptr(), found.data_ptr(), floats.numel())
    expected = floats.to(dtype)
    assert torch.equal(found.isnan(), floats.isnan())
    number = ~floats.isnan()
    assert torch.equal(found.view(torch.int16)[number], expected.view(torch.int16)[number])


# Without PyTorch, which takes seconds to load under a sanitizer.
_SANITIZED = """
import importlib.util, array
spec = importlib.util.spec_from_file_location({name!r}, {library!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
x, y = array.array("f", range(192)), array.array("f", [0] * 192)
expected = [*reversed(x[:96]), *reversed(x[96:])]
for order in (0, 1, 2):
    module.set_order(order)
    assert module.reverse(x.buffer_info()[0], y.buffer_info()[0], 2, 96, 384, True) == 0
    assert list(y) == expected
    try:
        module.misuse(0, y.buffer_info()[0], 64)
        raise SystemExit("the misuse was not seen")
    except RuntimeError as error:
        assert "no thread can go on" in str(error)
print("in bounds", flush=True)
module.misuse({which}, array.array("f", [0] * 64).buffer_info()[0], 64)
"""


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (7, "AddressSanitizer: heap-buffer-overflow"),
        (8, "AddressSanitizer: heap-buffer-overflow"),
        (9, "store to misaligned address"),
    ],
    ids=["shared memory", "global memory", "misaligned store"],
)
def test_the_sanitizers_see_what_a_kernel_does_wrong(module, which, said):
    library = cuda_on_cpu.build(cuda_on_cpu.SELFTEST, sanitized=True)
    program = _SANITIZED.format(name=cuda_on_cpu.SELFTEST, library=str(library), which=which)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=cuda_on_cpu.sanitized_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "in bounds" in done.stdout, done.stderr
    assert done.returncode != 0
    assert said in done.stderr
    assert "selftest.cu" in done.stderr


@pytest.mark.slow
def test_the_portable_switch_of_stacks(module):
    """Machines other than x86-64 take ucontext."""
    library = cuda_on_cpu.build(cuda_on_cpu.SELFTEST, defines=("CUDA_ON_CPU_UCONTEXT",))
    portable = cuda_on_cpu.load(cuda_on_cpu.SELFTEST, library)
    x = torch.randn(3 * 100)
    for order in ORDERS:
        portable.set_order(order)
        assert torch.equal(reverse(portable, x, 3, True), reverse(module, x, 3, True))
        with pytest.raises(RuntimeError, match="no thread can go on"):
            portable.misuse(0, x.data_ptr(), 64)
