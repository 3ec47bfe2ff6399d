"""The same call gives the same bits: on any number of threads, and every time."""

from __future__ import annotations

import pytest
import torch
from support.cases import DTYPES, evaluate, make_case
from support.layouts import channel_slice, channels_last, contiguous
from support.mixes import evaluate as evaluate_mix
from support.mixes import make_mix

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("kernels")

# More work items than threads, fewer than threads (batch 1, one head), and items that end within a chunk.
CALLS = {
    "planar": ((3, 12, 37, 41), 5, 3, contiguous),
    "one head": ((1, 3, 149, 131), 3, 1, contiguous),
    "gaps": ((2, 12, 37, 41), 3, 3, channel_slice),
    "interleaved": ((2, 37, 33, 31), 5, 37, channels_last),
    "wide": ((1, 2100, 9, 5), 3, 3, channels_last),
    "small": ((2, 6, 3), 4, 2, contiguous),
}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_bits_do_not_depend_on_threads_or_repeats(name, dtype):
    shape, depth, heads, layout = CALLS[name]
    case = make_case(shape, depth, heads, dtype, layout)
    with ek.use_backend("cpp"):
        torch.set_num_threads(1)
        first = evaluate(case)
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            again = evaluate(case)
            for key, x in first.items():
                assert not x.isnan().any(), key
                assert same_bits(x, again[key]), f"{key} differs on {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_bits_of_a_mix_do_not_depend_on_threads_or_repeats(name, dtype):
    shape, depth, heads, layout = CALLS[name]
    mix = make_mix(shape, depth, heads, dtype, layout)
    with ek.use_backend("cpp"):
        torch.set_num_threads(1)
        first = evaluate_mix(mix)
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            again = evaluate_mix(mix)
            for key, x in first.items():
                assert not x.isnan().any(), key
                assert same_bits(x, again[key]), f"{key} differs on {threads} threads"


def test_the_thread_count_follows_torch(kernels, monkeypatch):
    seen = []

    class Recording:
        def __getattr__(self, name):
            return getattr(kernels, name)

        def forward(self, *places, **named):
            seen.append(named["threads"])
            return kernels.forward(*places, **named)

    monkeypatch.setattr("ela_kernels.backends.cpp.attention.kernels", Recording)
    case = make_case((2, 12, 64, 64), through="")  # enough work for more than one thread
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with ek.use_backend("cpp"):
            evaluate(case)
    assert seen == [1, 3]
