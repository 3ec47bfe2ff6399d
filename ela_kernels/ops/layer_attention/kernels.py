"""What the kernels of one backend offer to the op, and where they are found by name.

A backend's kernels are a module with the names of :class:`Kernels`: `cpp.py`, `cuda.py` or `triton_kernels/`. Their
arguments have been checked; gradients are asked of them by `autograd.py` (push form) and `pull.py` (pull form).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ela_kernels.backends.base import Request, is_transformed
from ela_kernels.backends.dispatch import EAGER, choose_backend
from ela_kernels.ops.layer_attention.memory import with_memory


class Saved(NamedTuple):
    """What the forward of one layer leaves to its backward."""

    q: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: int
    scale: float
    prev_weights: Tensor | None
    weights: Tensor
    channels_last: bool


class Gradients(NamedTuple):
    """Gradients of one layer; None where none was asked for. `dkeys` and `dvalues` only in the push form.

    `dscores` is that of the dot products before the scale, so that a key's gradient is a plain sum over layers.
    """

    dscores: Tensor
    dq: Tensor | None
    dprev: Tensor | None
    dkeys: list[Tensor | None]
    dvalues: list[Tensor | None]


class Retrieval(Protocol):
    """What one layer's backward leaves for the layers that it retrieved from; made by :meth:`Kernels.Retrieved`."""

    dout: Tensor | None
    dout_version: int


class Kernels(Protocol):
    """The five names that a backend's module has."""

    def forward(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        channels_last: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(out, weights, kl)`; `out` in the memory format of the last value."""

    def weights(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(weights, kl)`; no value is read."""

    def backward(
        self,
        saved: Saved,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        need_q: bool,
        need_prev: bool,
        need_keys: Sequence[bool] = (),
        need_values: Sequence[bool] = (),
    ) -> Gradients:
        """Gradients of scores, query and previous weights, and in the push form of every key and value."""

    def gather(
        self,
        retrieved: Sequence[Any],
        index: int,
        heads: int,
        channels_last: bool,
        need_key: bool,
        need_value: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(dk, dv)` of the layer at `index`, each a sum over the layers that retrieved it.

        `dk = sum_m dscores_m[..., index] * q_m` and `dv = sum_m weights_m[..., index] * dout_m`.
        """

    def Retrieved(  # noqa: N802 - a class in each module
        self, q: Tensor, weights: Tensor, dscores: Tensor, dout: Tensor | None, channels_last: bool
    ) -> Retrieval:
        """Keeps what :meth:`gather` will need of one layer."""


_MODULES = {"cpp": "cpp", "cuda": "cuda", "triton": "triton_kernels"}


@functools.cache
def kernels_of(backend: str) -> Kernels:
    """The kernels of a backend that can run here; imported at their first use, since Triton takes a second."""
    module = importlib.import_module(f"ela_kernels.ops.layer_attention.{_MODULES[backend]}")
    return cast(Kernels, module)


def choose_kernels(op: str, q: Tensor, depth: int, needs_grad: bool = False) -> Kernels | None:
    """The kernels that serve a call under the present setting; None where eager PyTorch does.

    Raises:
        ValueError: the forced backend cannot serve it; the message holds its reasons.
    """
    backend = choose_backend(Request(op, q.device, q.dtype, depth, needs_grad, is_transformed()))
    return None if backend is EAGER else kernels_of(backend.name)


def resolved(tensor: Tensor) -> Tensor:
    """`tensor` with its signs in memory: PyTorch may hold a negation back as a flag, which a kernel cannot see."""
    return with_memory(tensor).resolve_neg() if tensor.is_neg() else tensor


def contiguous(tensor: Tensor) -> Tensor:
    """`tensor` contiguous and with its signs in memory."""
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return with_memory(tensor).resolve_neg().contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """:func:`contiguous`, of what may be None."""
    return None if tensor is None else contiguous(tensor)


def new_row(like: Tensor) -> Tensor:
    """A new contiguous tensor for the gradient of a query or key."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
