"""The Triton kernels run in Triton's interpreter here, on CPU tensors. On a machine with a GPU tests/gpu runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import ela_kernels as ek
from ela_kernels.backends import dispatch
from ela_kernels.backends.triton.backend import triton_problem

COMPILES = torch.cuda.is_available()

if triton_problem() is None and not COMPILES:
    # Triton reads the variable where a kernel is defined, and the backend where it is asked.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import ela_kernels.backends.triton.attention_backward
    import ela_kernels.backends.triton.layer
    import ela_kernels.backends.triton.light

    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[None]:
    if triton_problem() is not None:
        pytest.skip(triton_problem())
    if COMPILES:
        pytest.skip("kernels are compiled on a machine with a GPU: tests/gpu runs them")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    dispatch._plan.cache_clear()  # a test elsewhere may have asked where nothing is interpreted
    with ek.use_backend("triton"):
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Large tiles: the interpreter takes its time for each program, and a small call is cut fine for a GPU's sake."""
    from ela_kernels.backends.triton import plan

    caches = (plan.make_plan, plan.make_patch_plan)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(plan, "_ENOUGH_PROGRAMS", 1)
    yield
    for cached in caches:
        cached.cache_clear()
