"""The one function that chooses a backend, and the setting that forces one."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor

from ela_kernels.backends.contract import (
    Backend,
    EagerBackend,
    Kernels,
    LayerKernels,
    LightKernels,
    Request,
)
from ela_kernels.backends.cpp import CppBackend
from ela_kernels.backends.cuda import CudaBackend
from ela_kernels.backends.tracing import is_transformed
from ela_kernels.backends.triton import TritonBackend

logger = logging.getLogger("ela_kernels")

EAGER = EagerBackend()
# In the order in which `auto` asks them; eager serves everything and therefore stands last. CUDA before Triton: it has
# no compile time and the cheaper launch.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (CudaBackend(), TritonBackend(), CppBackend(), EAGER)
}
SETTINGS = (*BACKENDS, "auto")


def _checked(name: str, source: str) -> str:
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
        self._name = _checked(name, "use_backend(name)")
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


def backend_status() -> dict[str, str]:
    """For each backend `"available"`, or the sentence that says why it is not.

    Returns:
        A dict from backend name to status, in the order in which `"auto"` asks them.
    """
    status = {}
    for name, backend in BACKENDS.items():
        reason = backend.unavailable_reason()
        status[name] = "available" if reason is None else reason
    return status


def choose_backend(request: Request, setting: str | None = None) -> Backend:
    """The backend that serves `request` under the present setting, or under one asked for before.

    Raises:
        ValueError: the forced backend cannot serve it; the message holds its reasons.
    """
    return _choose(_setting if setting is None else setting, request)


def that_would_serve(names: tuple[str, ...], request: Request) -> str | None:
    """The first of some backends that may serve `request` under the present setting and can, or None.

    Never raises, and warns of nothing: for kernels that do in one call what is otherwise done in several, which a
    forced backend serves still.
    """
    return _that_would_serve(_setting, names, request)


@functools.lru_cache(maxsize=4096)
def _that_would_serve(setting: str, names: tuple[str, ...], request: Request) -> str | None:
    for name in names:
        if setting == name:
            reasons = BACKENDS[name].not_supported_reasons(request)
        elif setting == "auto":
            reasons = BACKENDS[name].automatic_reasons(request)
        else:
            continue
        if not reasons:
            return name
    return None


@functools.lru_cache(maxsize=4096)
def _choose(setting: str, request: Request) -> Backend:
    if _checked(setting, "ELA_KERNELS_BACKEND") != "auto":
        reasons = BACKENDS[setting].not_supported_reasons(request)
        if reasons:
            raise ValueError(
                f"backend {setting!r} was forced and cannot serve this {request.op} call "
                f"({request.dtype} on {request.device.type}, depth {request.depth}): "
                f"{'; '.join(reasons)}. Use use_backend('auto') to let another backend serve it."
            )
        return BACKENDS[setting]
    refusals: list[str] = []
    for name, backend in BACKENDS.items():
        reasons = backend.automatic_reasons(request)
        if not reasons:
            if (
                backend is EAGER
                and request.device.type != "meta"
                and not _only_no_backward(request)
            ):
                with _lock:  # two threads at once would each find that it was not said yet
                    _log_fallback(request.device.type, "; ".join(refusals))
            return backend
        if request.device.type in (backend.device_types or ()):  # others were never meant for it
            refusals.append(f"{name}: {', '.join(reasons)}")
    raise AssertionError("the eager backend serves every call")


def _only_no_backward(request: Request) -> bool:
    """True when a kernel would serve this call but for the gradient: not worth a warning."""
    return request.needs_grad and any(
        not b.automatic_reasons(request._replace(needs_grad=False))
        for b in BACKENDS.values()
        if b is not EAGER
    )


@functools.lru_cache(maxsize=256)
def _log_fallback(device_type: str, refusals: str) -> None:
    logger.warning(
        "layer attention on %s runs in eager PyTorch, because no kernel can serve it (%s). "
        "`python -m ela_kernels info` shows more.",
        device_type,
        refusals,
    )


_MODULES = {"cpp": "cpp.attention", "cuda": "cuda.attention", "triton": "triton.op"}


@functools.cache
def kernels_of(backend: str) -> Kernels:
    """The kernels of a backend that can run here; imported at their first use, since Triton takes a second."""
    module = importlib.import_module(f"ela_kernels.backends.{_MODULES[backend]}")
    return cast(Kernels, module)


def choose_kernels(op: str, q: Tensor, depth: int, needs_grad: bool = False) -> Kernels | None:
    """The kernels that serve a call under the present setting; None where eager PyTorch does.

    Raises:
        ValueError: the forced backend cannot serve it; the message holds its reasons.
    """
    backend = choose_backend(Request(op, q.device, q.dtype, depth, needs_grad, is_transformed()))
    return None if backend is EAGER else kernels_of(backend.name)


_LAYER_MODULES = {"cpp": "cpp.layer", "cuda": "cuda.layer", "triton": "triton.layer"}


@functools.cache
def layer_kernels_of(backend: str) -> LayerKernels | None:
    """The kernels of a whole layer that a backend has; None for one that has none."""
    if backend not in _LAYER_MODULES:
        return None
    return cast(
        LayerKernels,
        importlib.import_module(f"ela_kernels.backends.{_LAYER_MODULES[backend]}"),
    )


def choose_layer_kernels(
    x: Tensor, depth: int, dtype: torch.dtype | None = None, setting: str | None = None
) -> tuple[str, LayerKernels] | None:
    """The backend that serves a layer attention over `depth` maps like `x`, with its kernels of a whole layer.

    In `dtype`, where `x` is to be cast to one; under the present setting, or under one asked for before.

    None where it has none.

    Raises:
        ValueError: the forced backend cannot serve it; the message holds its reasons.
    """
    dtype = x.dtype if dtype is None else dtype
    request = Request("layer_attention", x.device, dtype, depth, False)
    backend = choose_backend(request, setting).name
    kernels = layer_kernels_of(backend)
    return None if kernels is None else (backend, kernels)


class LayerChoice:
    """:func:`choose_layer_kernels` with its last answer kept, since every layer asks twice."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        # Question and answer in one, so that no thread finds one without the other.
        self._last: tuple[Any, tuple[str, LayerKernels] | None] = (None, None)

    def __call__(
        self, x: Tensor, depth: int, dtype: torch.dtype | None = None
    ) -> tuple[str, LayerKernels] | None:
        dtype = x.dtype if dtype is None else dtype
        setting = current_setting()
        request = (dtype, x.device, depth, setting)
        last, found = self._last
        if last != request:
            found = choose_layer_kernels(x, depth, dtype, setting)
            self._last = request, found
        return found

    def again(self, x: Tensor, depth: int) -> tuple[str, LayerKernels] | None:
        """The last answer, where there was one and the question is the same; else a new one.

        Between the two another thread may have set another backend: the layer goes on as it began.
        """
        last, found = self._last
        if found is not None and last[:3] == (x.dtype, x.device, depth):
            return found
        return self(x, depth)


_LIGHT_MODULES = {"triton": "triton.light", "cpp": "cpp.light"}


@functools.cache
def light_kernels_of(backend: str) -> LightKernels:
    """The kernels of a whole light layer of a backend that can run here; imported at their first use."""
    module = importlib.import_module(f"ela_kernels.backends.{_LIGHT_MODULES[backend]}")
    return cast(LightKernels, module)
