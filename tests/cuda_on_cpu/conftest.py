"""The CUDA kernels run on the CPU here, by the stand-in runtime: with poisoned memory, and on one thread."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def one_thread(settings_restored: None) -> None:
    # Tensors are small here, and waiting threads spin where the machine is busy.
    torch.set_num_threads(1)
