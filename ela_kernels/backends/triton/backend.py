"""The backend of Triton. Its kernels are imported when the first of them is called: Triton takes a second."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.contract import (
    ATTENTION_OPS,
    LIGHT_OPS,
    MIX_OPS,
    POSITION_OPS,
    Request,
)
from ela_kernels.backends.gpu import GpuBackend, no_device_reason
from ela_kernels.backends.gpu_tables import GpuContribution, ProducerGradients
from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)
from ela_kernels.backends.types import (
    Filters,
    Gradients,
    LayerForward,
    LightFilters,
    LightForward,
    LightGradients,
    LightNeeds,
    MixGradients,
    NormAct,
    NormGradients,
    Saved,
    SavedLightLayer,
    ValueAct,
)


class TritonBackend(GpuBackend):
    """The Triton kernels in `kernels/`."""

    name = "triton"
    # The loop over the maps is unrolled when Triton compiles: 20 seconds at 128 layers, minutes at 256.
    max_depth = 128
    ops = ATTENTION_OPS | LIGHT_OPS | MIX_OPS | POSITION_OPS
    min_capability = (8, 0)

    @property
    def interprets(self) -> bool:
        """True under TRITON_INTERPRET=1: kernels run step by step in NumPy, to be tested and debugged."""
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

    def unavailable_reason(self) -> str | None:
        problem = triton_problem()
        if problem is not None or self.interprets:
            return problem
        return no_device_reason()

    def call_reasons(self, request: Request) -> list[str]:
        if self.interprets and request.device.type == "cpu":
            request = request._replace(device=torch.device("cuda"))
        if request.op in POSITION_OPS:
            request = request._replace(depth=1)  # addresses come from a table: no loop is unrolled
        return super().call_reasons(request)

    def automatic_reasons(self, request: Request) -> list[str]:
        if request.device.type == "cpu":
            return ["on cpu it only interprets, for tests and when forced"]
        return super().automatic_reasons(request)

    def device_reason(self, device: torch.device) -> str | None:
        if self.interprets or torch.version.hip is not None:
            return None
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= self.min_capability:
            return None
        return (
            f"Triton compiles for compute capability 8.0 and later, and {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}"
        )

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
        from ela_kernels.backends.triton import attention

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
        from ela_kernels.backends.triton import attention

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
        into: Tensor | None = None,
    ) -> Gradients:
        from ela_kernels.backends.triton import attention_backward

        return attention_backward.attend_backward(
            saved, dout, dweights, dkl, need_q, need_prev, need_keys, need_values, into
        )

    def gather(
        self,
        contributions: Sequence[GpuContribution],
        index: int,
        heads: int,
        channels_last: bool,
        need_key: bool,
        need_value: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        from ela_kernels.backends.triton import attention_backward

        return attention_backward.gather(
            contributions, index, heads, channels_last, need_key, need_value
        )

    def retrieve(
        self,
        x: Tensor,
        filters: Filters,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        has_residual: bool,
        wants_statistics: bool,
        tolerance: float,
    ) -> LayerForward:
        from ela_kernels.backends.triton import layer

        return layer.retrieve(
            x,
            filters,
            keys,
            values,
            heads,
            scale,
            prev_weights,
            has_residual,
            wants_statistics,
            tolerance,
        )

    def produce_backward(
        self,
        x: Tensor,
        filters: Filters,
        mean: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        residual: Tensor | None,
        needs: Sequence[bool],
    ) -> ProducerGradients:
        from ela_kernels.backends.triton import producer

        return producer.produce_backward(x, filters, mean, dq, dk, dv, residual, needs)

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
        from ela_kernels.backends.triton import norm as norms

        return norms.norm_forward(o, x, statistics, norm)

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        norm: NormAct,
        also: Tensor | None = None,
    ) -> NormGradients:
        from ela_kernels.backends.triton import norm as norms

        return norms.norm_backward(o, dout, statistics, norm, also)

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
        from ela_kernels.backends.triton import light

        made = light.light_layer(x, filters, prev, heads, scale, epilogue, value_act)
        if epilogue is None:
            return made
        statistics = made.statistics if epilogue.statistics is None else epilogue.statistics
        assert statistics is not None
        block = self.norm_forward(made.out, x, statistics, epilogue)
        return made._replace(statistics=statistics, block=block)

    def light_layer_backward(
        self,
        saved: SavedLightLayer,
        dout: Tensor | None,
        dnext: Tensor | None,
        needs: LightNeeds,
    ) -> LightGradients:
        from ela_kernels.backends.triton import light

        epilogue, do = saved.epilogue, dnext
        dgamma = dbeta = residual = None
        if dout is not None and epilogue is not None:
            assert saved.out is not None
            assert saved.statistics is not None
            residual = dout
            do, dgamma, dbeta = self.norm_backward(
                saved.out, dout, saved.statistics, epilogue, dnext
            )
        if do is None:
            return LightGradients()
        found = light.light_layer_backward(saved, do, residual, needs)
        return found._replace(gamma=dgamma, beta=dbeta)

    def mix(self, weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
        from ela_kernels.backends.triton import mix

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
        from ela_kernels.backends.triton import mix

        return mix.mix_backward(weights, values, dout, channels_last, need_weights, need_values)

    def position_attend(self, call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        from ela_kernels.backends.triton import position

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
        from ela_kernels.backends.triton import position

        return position.position_attend_backward(call, weights, dout, dweights, dkl, needs)

    def position_gather(
        self, value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
    ) -> Tensor:
        from ela_kernels.backends.triton import position

        return position.position_gather(value, left, index, channels_last)


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported, in one sentence; None where it can. It is looked for, not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install ela-kernels[triton]` (on Linux)"
    return None
