"""What a backend is: a name, its limits, the reasons why it cannot serve a call, and its kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)
from ela_kernels.backends.types import (
    Arrived,
    Contribution,
    Epilogue,
    Filters,
    Gradients,
    LayerForward,
    LayerGradients,
    LayerNeeds,
    LightFilters,
    LightForward,
    LightGradients,
    LightNeeds,
    MixGradients,
    NormAct,
    NormGradients,
    Retrieved,
    Saved,
    SavedLayer,
    SavedLightLayer,
    ValueAct,
)

HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
# An op, the weights alone, a whole layer with its residual, with all of its residual block, the block around an earlier
# layer's retrieval, and the light form of layer and block.
ATTENTION_OPS = frozenset({"layer_attention", "layer_attention_weights", "layer", "block", "reuse"})
LIGHT_OPS = frozenset({"light_layer", "light_block"})
# Values summed by weights that are given.
MIX_OPS = frozenset({"depth_mix"})
POSITION_OPS = frozenset({"position_attention"})


class Request(NamedTuple):
    """The facts about one call that decide which backend can serve it.

    Hashable on purpose: the choice is cached, so that a training step does not pay for it.

    Attributes:
        op: one of `ATTENTION_OPS`, `LIGHT_OPS`, `MIX_OPS` or `POSITION_OPS`, or `light_layer_attention`, which has
            no kernels of its own.
        device, dtype: of the tensors, as they are computed with.
        depth: layers in the history, this one included.
        needs_grad: whether a backward may follow.
        transformed: whether `torch.func` and its like have to see what is done (`tracing.is_transformed`).
        obstacles: what else stands between this call and any kernel.
        value_dtype: in which the history holds values, where that is not `dtype`.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    depth: int
    needs_grad: bool = False
    transformed: bool = False
    obstacles: tuple[str, ...] = ()
    value_dtype: torch.dtype | None = None


class Backend(ABC):
    """A name and limits; the limits are class constants, so that they can be listed."""

    name: ClassVar[str]
    device_types: ClassVar[frozenset[str] | None] = None
    dtypes: ClassVar[frozenset[torch.dtype] | None] = None
    ops: ClassVar[frozenset[str] | None] = None
    forward_only_ops: ClassVar[frozenset[str]] = frozenset()
    max_depth: ClassVar[int | None] = None

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine, or None when it can."""
        return None

    def device_reason(self, device: torch.device) -> str | None:
        """Why this backend cannot run on one of the devices of a type that it serves, or None when it can."""
        return None

    def call_reasons(self, request: Request) -> list[str]:
        """One sentence for each thing about `request` itself that this backend cannot serve; asks no device."""
        return []

    def reasons(self, request: Request) -> list[str]:
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
        return self.call_reasons(request) or self.reasons(request)


class EagerBackend(Backend):
    """Plain PyTorch: the reference and the fallback. Serves every call, on any device, by the operations themselves."""

    name = "eager"


class KernelBackend(Backend):
    """A backend with kernels.

    Arguments have been checked by the operations. Maps are `[B, C, *spatial]` or with `channels_last`
    `[B, *spatial, C]`, in any layout that `layout.py` knows or copies into one; those of whole layers `[B, C, H, W]`.

    Values may be of another dtype than the layers that read them, where `value_dtypes` has the two. Whatever is not a
    value, and every gradient, is in that of the layers.

    A `tolerance` above zero leaves out retrievals of a smaller weight, of each sample and head: of the sum, of the dot
    products that give a weight its gradient, and of the sum that is a value's gradient. What is left out is not read,
    or counts as zero whatever it is. With a tolerance of zero every value is multiplied, as IEEE has it. Weights,
    softmax and divergence know no tolerance. A NaN is no small weight.

    Attributes:
        value_dtypes: dtypes of layers, and of values that their history holds in another; none if it has no such
            kernels.
        contributes: the class of what :meth:`contribution` makes, which is all that :meth:`gather` and
            :meth:`layer_backward` can read.
    """

    contributes: type[Contribution]
    value_dtypes: ClassVar[frozenset[tuple[torch.dtype, torch.dtype]]] = frozenset()

    def __init__(self) -> None:
        if not hasattr(type(self), "contributes"):
            raise TypeError(
                f"{type(self).__name__}: got no `contributes`; allowed is the class of what contribution() makes"
            )

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        channels_last: bool,
        tolerance: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(out, weights, kl)`; `out` in the memory format of the last value."""

    @abstractmethod
    def weights(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`(weights, kl)`; no value is read."""

    @abstractmethod
    def attend_backward(
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

    @abstractmethod
    def contribution(
        self,
        q: Tensor,
        weights: Tensor,
        dscores: Tensor,
        dout: Tensor | None,
        channels_last: bool,
        tolerance: float = 0.0,
    ) -> Contribution:
        """Keeps what :meth:`gather` will need of one layer."""

    @abstractmethod
    def gather(
        self,
        contributions: Sequence[Any],
        index: int,
        heads: int,
        channels_last: bool,
        need_key: bool,
        need_value: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(dk, dv)` of the layer at `index`, each a sum over the layers that retrieved it.

        `dk = sum_m dscores_m[..., index] * q_m` and `dv = sum_m weights_m[..., index] * dout_m`, the latter over
        weights that are not below their layer's tolerance.

        Args:
            contributions: what :meth:`contribution` made, in order of depth.
        """

    @abstractmethod
    def layer(
        self,
        x: Tensor,
        filters: Filters,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        epilogue: Epilogue | None = None,
        keeps_retrieved: bool = True,
        reused: Retrieved | None = None,
        value_dtype: torch.dtype | None = None,
        tolerance: float = 0.0,
    ) -> LayerForward:
        """Query, key and value from `x` (as `layout.readable` gave it), what the query retrieves, and what follows.

        Args:
            keys, values: those of the layers before; without `filters.wq` nothing is retrieved.
            epilogue: what follows the retrieval.
            keeps_retrieved: whether a backward, or a later block, may need what a norm was given.
            reused: in place of a retrieval, for an `epilogue` with a norm and `filters` without `wq`.
            value_dtype: of the value, and of those of the layers before, where it is not that of `x`; one of those
                that `value_dtypes` has for it.
        """

    @abstractmethod
    def layer_backward(
        self,
        saved: SavedLayer,
        arrived: Arrived,
        contributions: Sequence[Any],
        index: int,
        needs: LayerNeeds,
    ) -> tuple[LayerGradients, Contribution | None]:
        """All gradients of the layer at `index`, and what it leaves to those before it, None where that is nothing.

        Args:
            contributions: what the later layers that retrieved this one left, in order of depth.
        """

    @abstractmethod
    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
        """`x + mask * act(norm(o))`, normed with `statistics` `[2, C]`; maps in one form."""

    @abstractmethod
    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        norm: NormAct,
        also: Tensor | None = None,
    ) -> NormGradients:
        """The gradients of what :meth:`norm_forward` does; `also` is added to that of `o`.

        Where `norm.statistics` is None, `statistics` are those of `o`, and move with it.
        """

    def light_layer(
        self,
        x: Tensor,
        filters: LightFilters,
        prev: Tensor,
        heads: int,
        scale: float,
        epilogue: NormAct | None = None,
        value_act: ValueAct | None = None,
        keeps: bool = True,
    ) -> LightForward:
        """Query, key and value from `x`, `gate * act(v) + decay * prev`, and what follows.

        Maps are in the form of `x`. Without `keeps` no backward follows, and the value may be left out.
        """
        raise NotImplementedError(f"{self.name} has no kernels of a light layer")

    def light_layer_backward(
        self,
        saved: SavedLightLayer,
        dout: Tensor | None,
        dnext: Tensor | None,
        needs: LightNeeds,
    ) -> LightGradients:
        """All gradients of a light layer.

        Args:
            dout: of the block's output, where a norm follows; otherwise None.
            dnext: of the light output.
        """
        raise NotImplementedError(f"{self.name} has no kernels of a light layer")

    def mix(self, weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
        """`sum_t weights[..., t] * values[t]`, in the dtype of the values and the memory format of the last one.

        Args:
            weights: `[B, G, T]` in the accumulation dtype; any numbers. None is left out, a zero and one below the
                least normal number neither.
        """
        raise NotImplementedError(f"{self.name} has no kernels of a mix by given weights")

    def mix_backward(
        self,
        weights: Tensor,
        values: Sequence[Tensor],
        dout: Tensor,
        channels_last: bool,
        need_weights: bool,
        need_values: Sequence[bool],
    ) -> MixGradients:
        """The gradients of what :meth:`mix` does.

        Args:
            values: without `need_weights` there may be none, since they are not read.
            need_values: one for each value.
        """
        raise NotImplementedError(f"{self.name} has no kernels of a mix by given weights")

    def position_attend(self, call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(out, weights, kl)`; weights `[B, T, *positions]`, `out` in the memory format of the last value."""
        raise NotImplementedError(f"{self.name} has no kernels of position_attention")

    def position_attend_backward(
        self,
        call: PositionCall,
        weights: Tensor,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        needs: PositionNeeds,
    ) -> PositionGradients:
        """Gradients of one retrieval, those of values and keys where they are needed (the push form)."""
        raise NotImplementedError(f"{self.name} has no kernels of position_attention")

    def position_gather(
        self, value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
    ) -> Tensor:
        """The gradient of the value at `index`, of what the layers that retrieved it left: the pull form."""
        raise NotImplementedError(f"{self.name} has no kernels of position_attention")

    def call_reasons(self, request: Request) -> list[str]:
        reasons = []
        if self.ops is not None and request.op not in self.ops:
            reasons.append(f"it has no kernel for {request.op}")
        if self.device_types is not None and request.device.type not in self.device_types:
            served = ", ".join(sorted(self.device_types))
            reasons.append(f"it serves tensors on {served}, and these are on {request.device.type}")
        if self.dtypes is not None and request.dtype not in self.dtypes:
            served = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            reasons.append(f"it serves {served}, and the values are {request.dtype}")
        held = request.value_dtype
        if held is not None and (request.dtype, held) not in self.value_dtypes:
            reasons.append(
                f"it has no kernels for values held in {held} by layers in {request.dtype}"
            )
        if self.max_depth is not None and request.depth > self.max_depth:
            reasons.append(
                f"it serves up to {self.max_depth} layers in one history, and these are {request.depth}"
            )
        if request.transformed:
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
