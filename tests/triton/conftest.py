"""The Triton kernels run in Triton's interpreter here, on CPU tensors.

What every backend is tested for is in tests/conformance, which on a machine with a GPU runs them compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What the compiler was told to be constant. The interpreter asks nothing of it; here it has to be true."""
    from triton.runtime.interpreter import TensorHandle

    found: list[tuple[int, ...]] = []
    real = TensorHandle.set_attr

    def checked(self: Any, name: str, values: Any) -> None:
        if name == "tt.constancy":
            rows, run = (getattr(value, "value", value) for value in values)
            assert rows == 1
            runs = self.data.reshape(self.data.shape[0], -1, run)
            assert (runs == runs[..., :1]).all(), "read at once, by several predicates"
            found.append((rows, run))
        real(self, name, values)

    monkeypatch.setattr(TensorHandle, "set_attr", checked)
    return found
