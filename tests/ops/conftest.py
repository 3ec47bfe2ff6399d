"""Every test of the operations runs with poisoned memory, and on one thread unless it asks for more."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def one_thread(settings_restored: None) -> None:
    # Tensors are small here, and waiting threads spin where the machine is busy. That results do not depend on the
    # number of threads is what test_determinism.py shows.
    torch.set_num_threads(1)
