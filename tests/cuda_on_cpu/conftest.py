"""The CUDA kernels run on the CPU here, by the stand-in runtime: with poisoned memory, and on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import cuda_on_cpu


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def one_thread(settings_restored: None) -> None:
    # Tensors are small here, and waiting threads spin where the machine is busy.
    torch.set_num_threads(1)


@pytest.fixture
def kernels() -> Iterator[Any]:
    """The module that runs the CUDA kernels on the CPU, which the forced backend calls."""
    with cuda_on_cpu.kernels_on_cpu() as kernels:
        yield kernels
