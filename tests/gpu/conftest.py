"""Fixtures of the tests that need a CUDA device: a skip without one, both backends, and proof of which one ran."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.on_gpu import BACKENDS, DEVICE

import ela_kernels as ek
from ela_kernels.backends.dispatch import kernels_of, layer_kernels_of

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


@pytest.fixture
def exact_convolutions() -> Iterator[None]:
    """Convolutions and products in float32 proper, by the same algorithm every time."""
    settings: list[tuple[Any, str, bool]] = [
        (torch.backends.cudnn, "allow_tf32", False),
        (torch.backends.cuda.matmul, "allow_tf32", False),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
    ]
    before = [getattr(owner, name) for owner, name, _ in settings]
    for owner, name, value in settings:
        setattr(owner, name, value)
    yield
    for (owner, name, _), value in zip(settings, before, strict=True):
        setattr(owner, name, value)


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
    spy = Spy(monkeypatch)
    for function in _FUNCTIONS:
        spy.on(kernels_of(backend), function, function)
    layer: Any = layer_kernels_of(backend)
    if layer is not None:
        for function in _LAYER_FUNCTIONS:
            spy.on(layer, function, function.removeprefix("layer_"))
    return spy.record


@pytest.fixture
def layer_backend(backend: str) -> str:
    """Each GPU backend in turn, of those that have kernels of a whole layer."""
    if layer_kernels_of(backend) is None:
        pytest.skip(
            f"{backend} has no kernels of a whole layer; its modules run on those of the op"
        )
    return backend


@pytest.fixture
def layers_ran(monkeypatch: pytest.MonkeyPatch, layer_backend: str) -> list[str]:
    """The calls of the kernels of a whole layer made so far: `layer_forward` or `layer_backward`."""
    spy = Spy(monkeypatch)
    for function in _LAYER_FUNCTIONS:
        spy.on(layer_kernels_of(layer_backend), function, function)
    return spy.record


class Spy:
    """Records calls of a module's functions, but not those that they make of each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.record: list[str] = []
        self._patch = monkeypatch
        self._is_inside = False

    def on(self, module: Any, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(module, function)

        @functools.wraps(original)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return original(*args, **kwargs)
            self.record.append(name)
            self._is_inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._is_inside = False

        self._patch.setattr(module, function, recorded)
