"""Fixtures of the tests of the training program."""

from __future__ import annotations

import pytest

from ela_kernels.training.data import Task, load_task


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", side=8)
