"""The backend of the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends import extension as built
from ela_kernels.backends.contract import (
    ATTENTION_OPS,
    HALF_DTYPES,
    LIGHT_OPS,
    MIX_OPS,
    POSITION_OPS,
    KernelBackend,
)
from ela_kernels.backends.cpp import attention, layer, light, mix, position
from ela_kernels.backends.cpp import norm as norms
from ela_kernels.backends.cpp.attention import CppContribution
from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)
from ela_kernels.backends.types import (
    Arrived,
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


class CppBackend(KernelBackend):
    """The compiled CPU kernels in `csrc/cpu`."""

    name = "cpp"
    device_types = frozenset({"cpu"})
    dtypes = frozenset({torch.float64, torch.float32}) | HALF_DTYPES
    ops = ATTENTION_OPS | LIGHT_OPS | MIX_OPS | POSITION_OPS
    forward_only_ops = frozenset({"layer_attention_weights"})
    contributes = CppContribution
    value_dtypes = frozenset((torch.float32, half) for half in HALF_DTYPES)

    def unavailable_reason(self) -> str | None:
        module = built.extension()
        if module is None:
            return built.extension_problem()
        try:
            module.simd_level()
        except ValueError as error:  # ELA_KERNELS_SIMD names what this processor or build has not
            return str(error)
        return None

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
        return attention.attend(
            q, keys, values, heads, scale, prev_weights, channels_last, tolerance
        )

    def weights(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        return attention.weights(q, keys, heads, scale, prev_weights)

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
        return attention.attend_backward(
            saved, dout, dweights, dkl, need_q, need_prev, need_keys, need_values
        )

    def contribution(
        self,
        q: Tensor,
        weights: Tensor,
        dscores: Tensor,
        dout: Tensor | None,
        channels_last: bool,
        tolerance: float = 0.0,
    ) -> CppContribution:
        return CppContribution(q, weights, dscores, dout, channels_last, tolerance)

    def gather(
        self,
        contributions: Sequence[CppContribution],
        index: int,
        heads: int,
        channels_last: bool,
        need_key: bool,
        need_value: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        return attention.gather(contributions, index, heads, channels_last, need_key, need_value)

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
        of_attention = keys, values, heads, scale, prev_weights
        return layer.layer(
            x, filters, *of_attention, epilogue, keeps_retrieved, reused, value_dtype, tolerance
        )

    def layer_backward(
        self,
        saved: SavedLayer,
        arrived: Arrived,
        contributions: Sequence[CppContribution],
        index: int,
        needs: LayerNeeds,
    ) -> tuple[LayerGradients, CppContribution | None]:
        return layer.layer_backward(saved, arrived, contributions, index, needs)

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
        return norms.norm_forward(o, x, statistics, norm)

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        norm: NormAct,
        also: Tensor | None = None,
    ) -> NormGradients:
        return norms.norm_gradients(o, dout, statistics, norm, also)

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
        return light.light_layer(x, filters, prev, heads, scale, epilogue, value_act, keeps)

    def light_layer_backward(
        self,
        saved: SavedLightLayer,
        dout: Tensor | None,
        dnext: Tensor | None,
        needs: LightNeeds,
    ) -> LightGradients:
        return light.light_layer_backward(saved, dout, dnext, needs)

    def mix(self, weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
        return mix.mix(weights, values, channels_last)

    def mix_backward(
        self,
        weights: Tensor,
        values: Sequence[Tensor],
        dout: Tensor,
        channels_last: bool,
        need_weights: bool,
        need_values: Sequence[bool],
    ) -> MixGradients:
        return mix.mix_backward(weights, values, dout, channels_last, need_weights, need_values)

    def position_attend(self, call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        return position.position_attend(call)

    def position_attend_backward(
        self,
        call: PositionCall,
        weights: Tensor,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        needs: PositionNeeds,
    ) -> PositionGradients:
        return position.position_attend_backward(call, weights, dout, dweights, dkl, needs)

    def position_gather(
        self, value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
    ) -> Tensor:
        return position.position_gather(value, left, index, channels_last)
