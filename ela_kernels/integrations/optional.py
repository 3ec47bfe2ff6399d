"""Libraries whose networks get layers: loaded by the module that is for them."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, extra: str) -> Any:
    """Import `module`, or say in a sentence what brings it.

    Raises:
        ImportError: it is not installed, or cannot be loaded; the reason is kept.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"ela_kernels.integrations.{library} needs {library}, which could not be imported ({error}). Install it "
            f"with: pip install 'ela-kernels[{extra}]'"
        ) from error
