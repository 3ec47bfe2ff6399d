"""The setting that forces a backend."""

from __future__ import annotations

import os
import threading
from types import TracebackType

# In the order in which `auto` asks them; eager serves everything and therefore stands last. CUDA before Triton: it has
# no compile time and the cheaper launch.
NAMES = ("cuda", "triton", "cpp", "eager")
SETTINGS = (*NAMES, "auto")


def checked(name: str, source: str) -> str:
    if name not in SETTINGS:
        raise ValueError(f"{source}: got {name!r}; allowed are {', '.join(sorted(SETTINGS))}")
    return name


# Checked at the first call, not here: a wrong value must not keep `info` from reporting it.
_initial = _setting = os.environ.get("ELA_KERNELS_BACKEND") or "auto"
# The calls of use_backend that hold, the latest last. Blocks of several threads may be left in any order, so that what
# was in force when a block began need not be what is to be in force when it ends.
_calls: list[use_backend] = []
_lock = threading.RLock()


class use_backend:  # noqa: N801 - reads as a function, as torch.no_grad does
    """Force a backend, for the rest of the process or for a `with` block.

    The setting takes effect on the call itself and is process-wide: it holds in every thread. Of the
    blocks that several threads are in at once, the one begun last holds until it ends. A forced
    backend that cannot serve a call raises `ValueError` with its reasons; `"auto"` takes the fastest
    backend that can, and eager PyTorch otherwise.

    Args:
        name: `"eager"`, `"cpp"`, `"triton"`, `"cuda"` or `"auto"`. The environment variable
            `ELA_KERNELS_BACKEND` sets the initial value.

    Raises:
        ValueError: unknown name.

    Example:
        >>> import ela_kernels as ek
        >>> with ek.use_backend("eager"):
        ...     pass
    """

    def __init__(self, name: str) -> None:
        self._name = checked(name, "use_backend(name)")
        self._thread, self._is_block = threading.get_ident(), False
        with _lock:
            # Of two calls for good, one after the other, the first has had its time.
            before = [c for c in _calls if c._thread == self._thread][-2:]
            if len(before) == 2 and not any(c._is_block for c in before):
                _calls.remove(before[0])
            _calls.append(self)
            _take_the_latest()

    def __enter__(self) -> use_backend:
        with _lock:
            self._is_block = True
            if self not in _calls:  # of one object the second block
                _calls.append(self)
                _take_the_latest()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            if self not in _calls:
                return
            i = _calls.index(self)
            # With the block ends what was set for good inside of it.
            _calls[i:] = [c for c in _calls[i + 1 :] if c._is_block or c._thread != self._thread]
            _take_the_latest()


def _take_the_latest() -> None:
    global _setting
    _setting = _calls[-1]._name if _calls else _initial


def current_setting() -> str:
    """The name in force: one of the backends, or `"auto"`."""
    return _setting
