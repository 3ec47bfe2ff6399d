"""The Triton kernels run in Triton's interpreter here, on CPU tensors.

What every backend is tested for is in tests/conformance, which on a machine with a GPU runs them compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import interpreted as interpreter

import ela_kernels as ek

interpreter.import_kernels()


@pytest.fixture(autouse=True)
def interpreted(poisoned_memory: None, settings_restored: None) -> Iterator[None]:
    torch.set_num_threads(1)
    with interpreter.interpreting(), ek.use_backend("triton"):
        yield


@pytest.fixture
def few_programs() -> Iterator[None]:
    with interpreter.few_programs():
        yield
