"""Fixtures of the tests that need a CUDA device: a skip without one, both backends, and proof of which one ran."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.on_gpu import BACKENDS, DEVICE, IS_STAND_IN, serving, synchronize

import ela_kernels as ek
from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import KERNELS

# What a call of the operations' kernels is recorded as; a whole layer in one call counts as its attention's.
_OF_OPERATIONS = {
    "attend": "forward",
    "layer": "forward",
    "attend_backward": "backward",
    "layer_backward": "backward",
    "weights": "weights",
    "gather": "gather",
    "mix": "mix",
    "mix_backward": "mix backward",
    "position_attend": "position forward",
    "position_attend_backward": "position backward",
    "position_gather": "position gather",
}


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
    synchronize()


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
    with _kernels():
        status = ek.backend_status()[name]
        if status != "available":
            pytest.skip(f"{name}: {status}")
        with ek.use_backend(name):
            yield name


def _kernels() -> contextlib.AbstractContextManager[Any]:
    """Those of the device, or in a dry run of CUDA's on the CPU their stand-in."""
    if not IS_STAND_IN:
        return contextlib.nullcontext()
    from support.cuda_on_cpu import kernels_on_cpu

    return kernels_on_cpu()


@pytest.fixture
def light_backend(backend: str) -> Iterator[str]:
    """Each GPU backend in turn, forced; eager PyTorch in place of one that has no kernels of the light form."""
    name = serving(backend, "mrla_light")
    with ek.use_backend(name):
        yield name


@pytest.fixture
def kernels_ran(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[str]:
    """What the calls made so far ran on the kernels of `backend`: `forward`, `backward`, `weights` or `gather`, or

    `mix` and `mix backward`, and the first two and the last of attention at every position. A whole layer in one call
    counts as its attention's.
    """
    spy = Spy(monkeypatch, KERNELS[backend])
    for function, name in _OF_OPERATIONS.items():
        spy.on(function, name)
    return spy.record


@pytest.fixture
def layers_ran(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[str]:
    """The calls of the kernels of a whole layer made so far: `layer` or `layer_backward`."""
    spy = Spy(monkeypatch, KERNELS[backend])
    for function in ("layer", "layer_backward"):
        spy.on(function, function)
    return spy.record


class Spy:
    """Records calls of a backend's kernels, but not those that they make of each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernels: KernelBackend) -> None:
        self.record: list[str] = []
        self._patch, self._kernels = monkeypatch, kernels
        self._is_inside = False

    def on(self, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(self._kernels, function)

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

        # Of the one instance, and gone afterwards: setattr() would leave the bound method there.
        self._patch.setitem(vars(self._kernels), function, recorded)
