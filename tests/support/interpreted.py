"""Triton's interpreter, in which the Triton kernels run on CPU tensors."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import ela_kernels.backends.triton as package
from ela_kernels.backends import dispatch
from ela_kernels.backends.triton.backend import triton_problem


def problem() -> str | None:
    """Why nothing is interpreted here; None where it is."""
    if triton_problem() is not None:
        return triton_problem()
    if torch.cuda.is_available():
        return "Triton compiles its kernels on a machine with a GPU, and tests marked gpu run them"
    return None


def import_kernels() -> None:
    """Triton looks at its variable where a kernel is defined: before any other test imports one."""
    if problem() is not None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


@contextmanager
def interpreting() -> Iterator[None]:
    """Skips where there is no interpreter; the backend is there, and is not forced."""
    reason = problem()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # A test elsewhere may have asked where nothing is interpreted, and one will.
        dispatch._plan.cache_clear()
        yield
    dispatch._plan.cache_clear()


@contextmanager
def few_programs() -> Iterator[None]:
    """Large tiles: the interpreter takes its time for each program, and a small call is cut fine for a GPU's sake."""
    from ela_kernels.backends.triton import plan

    def forget() -> None:
        plan.make_plan.cache_clear()
        plan.make_patch_plan.cache_clear()

    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_ENOUGH_PROGRAMS", 1)
        yield
    forget()
