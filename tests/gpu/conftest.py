"""Fixtures of the tests that need a CUDA device: a skip without one, both backends, and proof of which one ran."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.on_gpu import BACKENDS, DEVICE

import ela_kernels as ek
from ela_kernels.ops.layer_attention.kernels import kernels_of
from ela_kernels.ops.layer_attention.layer_kernels import layer_kernels_of

_FUNCTIONS = ("forward", "backward", "weights", "gather")
_LAYER_FUNCTIONS = ("layer_forward", "layer_backward")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skips without a device; with one, its faults show in the test that caused them."""
    if DEVICE.type != "cuda":
        torch.set_num_threads(1)
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and PyTorch finds none")
    torch.cuda.manual_seed_all(20230203)
    yield
    torch.cuda.synchronize()


@pytest.fixture
def cuda_only(gpu: None) -> None:
    """For what no CPU has: streams, graphs, the allocator's count."""
    if DEVICE.type != "cuda":
        pytest.skip("a dry run on the CPU, which has nothing of the kind")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, gpu: None) -> Iterator[str]:
    """Each GPU backend in turn, forced; skips one that is not available."""
    name = str(request.param)
    status = ek.backend_status()[name]
    if status != "available":
        pytest.skip(f"{name}: {status}")
    with ek.use_backend(name):
        yield name


@pytest.fixture
def kernels_ran(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[str]:
    """What the calls made so far ran on the kernels of `backend`: `forward`, `backward`, `weights` or `gather`.

    A whole layer in one call counts as its attention's.
    """
    record: list[str] = []

    def spy(module: Any, function: str) -> None:
        original: Callable[..., Any] = getattr(module, function)

        @functools.wraps(original)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            record.append(function.removeprefix("layer_"))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, recorded)

    for function in _FUNCTIONS:
        spy(kernels_of(backend), function)
    layer: Any = layer_kernels_of(backend)
    if layer is not None:
        for function in _LAYER_FUNCTIONS:
            spy(layer, function)
    return record
