"""Loads the compiled extension once, and keeps the reason where there is none."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  its OpenMP runtime has to be in the process before the extension asks for one

MODULE = "ela_kernels._C"
BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(MODULE) is None:
        return None, f"the compiled extension was not built: {_not_built_reason()}"
    try:
        return importlib.import_module(MODULE), None
    except (
        Exception
    ) as error:  # a broken binary can raise anything, and eager still works without it
        return None, (
            f"the compiled extension was built but failed to load: {type(error).__name__}: {error}; "
            "reinstalling ela_kernels on this machine builds it anew"
        )


def _not_built_reason() -> str:
    info = build_info()
    if info.get("problem"):
        return str(info["problem"])
    if info.get("built"):
        return f"it was built for {info.get('python', 'another Python')}, not for this one; reinstall ela_kernels"
    return "ela_kernels runs from a source folder that was not installed; run `pip install .` or `pip install -e .`"


def extension() -> ModuleType | None:
    """The module `ela_kernels._C`, or None where it was not built or does not load."""
    return _load()[0]


def extension_problem() -> str | None:
    """Why there is no extension, in one sentence; None where there is one."""
    return _load()[1]


@functools.cache
def build_info() -> dict[str, Any]:
    """How the extension was built (compiler, flags, architectures, what was left out and why).

    Returns:
        The record that the build wrote, empty if there is none or it cannot be read.
    """
    try:
        record = json.loads(BUILD_INFO.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
