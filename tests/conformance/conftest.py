"""Each test here runs on every backend, forced, unless it names those it is for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import backends, interpreted
from support.backends import Backend

interpreted.import_kernels()


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def one_thread(settings_restored: None) -> None:
    # Tensors are small here, and waiting threads spin where the machine is busy. That results do not depend on the
    # number of threads is what tests/ops/test_determinism.py shows.
    torch.set_num_threads(1)


@pytest.fixture(params=[backends.parameter(b) for b in backends.ALL])
def backend(request: pytest.FixtureRequest, poisoned: None, one_thread: None) -> Iterator[Backend]:
    """Each backend in turn, forced."""
    with request.param.forced():
        yield request.param


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> list[str]:
    """What the kernels of the backend were called for, in order; see :meth:`Backend.spied`."""
    return backend.spied(monkeypatch)
