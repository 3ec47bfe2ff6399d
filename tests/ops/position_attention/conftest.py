"""Fixtures of the tests of position_attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import ela_kernels as ek


@pytest.fixture
def cpp(kernels: Any) -> Iterator[None]:
    """The CPU kernels, forced; skips where there are none."""
    with ek.use_backend("cpp"):
        yield
