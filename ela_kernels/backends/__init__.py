"""Backends: which exist, which can run here, and how one is chosen for a call."""

from ela_kernels.backends.dispatch import backend_status
from ela_kernels.backends.setting import use_backend

__all__ = ["backend_status", "use_backend"]


def __dir__() -> list[str]:
    return sorted(__all__)
