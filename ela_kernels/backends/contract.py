"""What a backend is: a name, a reason why it cannot run here, reasons why it cannot serve one call, and its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ela_kernels.backends.types import (
    Attended,
    Epilogue,
    Filters,
    Gradients,
    LayerForward,
    LayerGradients,
    LightFilters,
    LightForward,
    LightGradients,
    NormGradients,
    Retrieval,
    Saved,
)


class Request(NamedTuple):
    """The facts about one call that decide which backend can serve it.

    Hashable on purpose: the choice is cached, so that a training step does not pay for it.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    depth: int
    needs_grad: bool
    transformed: bool = False


class Backend:
    """Base of the backends; the limits are class constants, so that they can be listed."""

    name: str
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    ops: frozenset[str] | None = None
    forward_only_ops: frozenset[str] = frozenset()
    max_depth: int | None = None
    reads_memory = True

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine, or None when it can."""
        return None

    def device_reason(self, device: torch.device) -> str | None:
        """Why this backend cannot run on one of the devices of a type that it serves, or None when it can."""
        return None

    def call_reasons(self, request: Request) -> list[str]:
        """One sentence for each thing about `request` itself that this backend cannot serve; asks no device."""
        reasons = []
        if self.ops is not None and request.op not in self.ops:
            reasons.append(f"it has no kernel for {request.op}")
        if self.device_types is not None and request.device.type not in self.device_types:
            served = ", ".join(sorted(self.device_types))
            reasons.append(f"it serves tensors on {served}, and these are on {request.device.type}")
        if self.dtypes is not None and request.dtype not in self.dtypes:
            served = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            reasons.append(f"it serves {served}, and the values are {request.dtype}")
        if self.max_depth is not None and request.depth > self.max_depth:
            reasons.append(
                f"it serves up to {self.max_depth} layers in one history, and these are {request.depth}"
            )
        if request.transformed and self.reads_memory:
            reasons.append(
                "it has no rules for torch.func, for forward-mode derivatives and for torch.jit.trace: "
                "call it outside of them"
            )
        if request.needs_grad and request.op in self.forward_only_ops:
            reasons.append(
                f"its {request.op} has no backward, and an input requires grad: "
                "call it under torch.no_grad() or detach the inputs"
            )
        return reasons

    def not_supported_reasons(self, request: Request) -> list[str]:
        """One sentence for each reason why this backend cannot serve `request`; empty when it can."""
        reasons = self.call_reasons(request)
        unavailable = self.unavailable_reason()
        if unavailable is None and not reasons:
            unavailable = self.device_reason(request.device)
        return reasons if unavailable is None else [unavailable, *reasons]

    def automatic_reasons(self, request: Request) -> list[str]:
        """Why `auto` does not take this backend for `request`; empty when it does.

        Devices are asked only for calls that are theirs: a process that computes on the CPU must not wake a driver,
        which would keep the processes that it forks from using the GPU.
        """
        return self.call_reasons(request) or self.not_supported_reasons(request)


class EagerBackend(Backend):
    """Plain PyTorch: the reference and the fallback. Serves every call, on any device."""

    name = "eager"
    reads_memory = False


HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
KERNEL_OPS = frozenset({"layer_attention", "layer_attention_weights"})
FORWARD_ONLY_OPS = frozenset({"layer_attention_weights"})


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


class LayerKernels(Protocol):
    """The four names that a backend's module has."""

    def layer_forward(
        self,
        x: Tensor,
        filters: Filters,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        has_residual: bool,
        epilogue: Epilogue | None = None,
        keeps_out: bool = True,
    ) -> LayerForward:
        """Query, key and value from `x` (as `layout.readable` gave it), and what the query retrieves.

        Args:
            keys, values: those of the layers before; without `filters.wq` nothing is retrieved.
            epilogue: what follows in a residual block. Statistics of the batch are taken where it wants them; the rest
                of it may be done here, or is left to :meth:`norm_forward`.
            keeps_out: whether `out` will be needed after that.
        """

    def layer_backward(
        self,
        x: Tensor,
        filters: Filters,
        mean: Tensor,
        heads: int,
        index: int,
        own: Attended | None,
        retrieved: Sequence[Any],
        dk: Tensor | None,
        dv: Tensor | None,
        residual: Tensor | None,
        needs: Sequence[bool],
        pending: Any = None,
    ) -> LayerGradients:
        """All gradients of the layer at `index`.

        Args:
            own: its attention, where a gradient arrived through it.
            retrieved: what the layers that retrieved this one left, this one included if it did.
            dk, dv: gradients of key and value from elsewhere, if there are any.
            residual: what arrives past the retrieval, added to the gradient of `x`.
            needs: of x, wq, wk, wv.
            pending: what :meth:`norm_backward` left to do first.
        """

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
        """`x + mask * act(norm(o))`; asked for where :meth:`layer_forward` did not do it."""

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        epilogue: Epilogue,
        also: Tensor | None = None,
    ) -> NormGradients:
        """The gradients of what :meth:`norm_forward` does, from that of its output; `also` is added to that of `o`."""


class LightKernels(Protocol):
    """The four names that a backend's module has. Maps are in one form: that of a readable `x`."""

    def light_layer_forward(
        self,
        x: Tensor,
        filters: LightFilters,
        prev: Tensor,
        heads: int,
        scale: float,
        epilogue: Epilogue | None = None,
    ) -> LightForward:
        """Query, key and value from `x`, and `gate * v + decay * prev`.

        Args:
            epilogue: what follows in a residual block. Statistics of the batch are taken where it wants them; the rest
                of it may be done here, or is left to :meth:`norm_forward`.
        """

    def light_layer_backward(
        self,
        x: Tensor,
        filters: LightFilters,
        prev: Tensor,
        heads: int,
        scale: float,
        kept: LightForward,
        dout: Tensor,
        residual: Tensor | None,
        needs: Sequence[bool],
        pending: Any = None,
    ) -> LightGradients:
        """All gradients of a layer.

        Args:
            residual: what arrives at `x` past the layer, added to its gradient.
            needs: of x, wq, wk, wv, decay, prev.
            pending: what :meth:`norm_backward` left to do first.
        """

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, epilogue: Epilogue) -> Tensor:
        """As of :class:`~ela_kernels.backends.contract.LayerKernels`."""

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        epilogue: Epilogue,
        also: Tensor | None = None,
    ) -> NormGradients:
        """As of :class:`~ela_kernels.backends.contract.LayerKernels`."""
