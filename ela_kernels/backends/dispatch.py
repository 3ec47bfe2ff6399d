"""The one table of backends, and the one function that decides which of them serves a call."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

from torch import Tensor

from ela_kernels.backends.contract import Backend, EagerBackend, KernelBackend, Request
from ela_kernels.backends.cpp.backend import CppBackend
from ela_kernels.backends.cuda.backend import CudaBackend
from ela_kernels.backends.once import Once
from ela_kernels.backends.setting import NAMES, checked, current_setting
from ela_kernels.backends.tracing import TRACED, is_transformed
from ela_kernels.backends.triton.backend import TritonBackend

logger = logging.getLogger("ela_kernels")

EAGER = EagerBackend()
KERNELS: dict[str, KernelBackend] = {
    b.name: b for b in (CudaBackend(), TritonBackend(), CppBackend())
}
BACKENDS: dict[str, Backend] = {name: KERNELS.get(name, EAGER) for name in NAMES}


class Refusal(NamedTuple):
    """Why no kernel serves a call.

    Attributes:
        reasons: of the backends, one sentence each; several backends are told apart by their names.
        forced: the backend that the setting asks for; None where any would do.
        obstacles: what the call itself brought, whichever backend.
    """

    reasons: tuple[str, ...]
    forced: str | None
    obstacles: tuple[str, ...] = ()


def plan(request: Request) -> KernelBackend | Refusal:
    """The backend whose kernels serve `request` under the present setting, or every reason why none does.

    Raises:
        ValueError: the environment variable `ELA_KERNELS_BACKEND` names no backend.
    """
    return _plan(current_setting(), request)


@functools.lru_cache(maxsize=4096)
def _plan(setting: str, request: Request) -> KernelBackend | Refusal:
    obstacles, request = request.obstacles, request._replace(obstacles=())
    reasons: list[str] = []
    if checked(setting, "ELA_KERNELS_BACKEND") == EAGER.name:
        return Refusal((f"use_backend({EAGER.name!r}) is in force",), EAGER.name, obstacles)
    if setting != "auto":
        reasons = KERNELS[setting].reasons(request)
        if reasons or obstacles:
            return Refusal(tuple(reasons), setting, obstacles)
        return KERNELS[setting]
    for name, backend in KERNELS.items():
        found = backend.automatic_reasons(request)
        if not found:
            return Refusal((), None, obstacles) if obstacles else backend
        if request.device.type in (backend.device_types or ()):
            # Others were never meant for it.
            reasons.append(f"{name}: {', '.join(found)}")
    if not reasons:
        reasons.append(f"no backend has kernels for tensors on {request.device.type}")
    return Refusal(tuple(reasons), None, obstacles)


def refusal_by(obstacles: tuple[str, ...]) -> Refusal:
    """Of a call that no backend need be asked about."""
    setting = current_setting()
    return Refusal((), None if setting == "auto" else setting, obstacles)


def refusal_in_a_graph() -> Refusal:
    """Of a call in a graph that is being compiled: no backend is asked, so that there is little to trace."""
    return refusal_by((TRACED,))


def require(request: Request) -> KernelBackend | None:
    """As :func:`plan`, for what must be served: None where eager PyTorch does, which is told once.

    Raises:
        ValueError: the forced backend cannot serve it; the message holds its reasons.
    """
    found = plan(request)
    if not isinstance(found, Refusal):
        return found
    refuse_forced(request, found)
    if found.forced is None and request.device.type != "meta" and not _only_no_backward(request):
        _log_fallback(request.device.type, "; ".join((*found.obstacles, *found.reasons)))
    return None


def refuse_forced(request: Request, refusal: Refusal) -> None:
    """Raise where a backend with kernels was forced, and cannot serve.

    Raises:
        ValueError: the message holds all reasons.
    """
    if refusal.forced in (None, EAGER.name):
        return
    raise ValueError(
        f"backend {refusal.forced!r} was forced and cannot serve this {request.op} call "
        f"({request.dtype} on {request.device.type}, depth {request.depth}): "
        f"{'; '.join((*refusal.obstacles, *refusal.reasons))}. Use use_backend('auto') to let another backend serve it."
    )


def kernels_for(op: str, q: Tensor, depth: int, needs_grad: bool = False) -> KernelBackend | None:
    """:func:`require` of an operation on query `q`."""
    return require(Request(op, q.device, q.dtype, depth, needs_grad, is_transformed()))


def why_eager(op: str, q: Tensor, depth: int) -> Refusal:
    """The reasons, where :func:`kernels_for` gave None."""
    found = plan(Request(op, q.device, q.dtype, depth, False, is_transformed()))
    return found if isinstance(found, Refusal) else Refusal((), None)


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


_fallbacks = Once()


def _only_no_backward(request: Request) -> bool:
    """True when a kernel would serve this call but for the gradient: not worth a warning."""
    without = request._replace(needs_grad=False)
    return request.needs_grad and any(not b.automatic_reasons(without) for b in KERNELS.values())


def _log_fallback(device_type: str, refusals: str) -> None:
    for what in _fallbacks.new(
        [f"{device_type} runs in eager PyTorch, because no kernel can serve it ({refusals})"]
    ):
        logger.warning("layer attention on %s. `python -m ela_kernels info` shows more.", what)
