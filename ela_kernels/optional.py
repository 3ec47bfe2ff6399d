"""Libraries that the package itself does not need: loaded where they are used."""

from __future__ import annotations

import importlib
from typing import Any


class MissingLibraryError(ImportError):
    """A library that is not a requirement of the package, and the extra that brings it."""


def optional(module: str, purpose: str, extra: str = "train") -> Any:
    """Import `module`, or say what it is for and how to get it: by which of the package's extras.

    Raises:
        MissingLibraryError: it is not installed, or cannot be loaded; the reason is kept.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibraryError(
            f"{purpose} needs {module.partition('.')[0]}, which could not be imported ({error}). "
            f"Install it with: pip install 'ela-kernels[{extra}]'"
        ) from error
