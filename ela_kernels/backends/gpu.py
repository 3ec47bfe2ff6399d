"""What the two backends of GPUs have in common: what they ask of a device, and the order of a layer's launches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.checks import (
    check_epilogue,
    check_reused,
    check_shape,
    check_value_dtype,
)
from ela_kernels.backends.contract import ATTENTION_OPS, HALF_DTYPES, MIX_OPS, KernelBackend
from ela_kernels.backends.gpu_tables import GpuContribution, ProducerGradients
from ela_kernels.backends.layout import dense, resolved
from ela_kernels.backends.types import (
    NO_GRADIENTS,
    Arrived,
    Epilogue,
    Filters,
    Gradients,
    LayerForward,
    LayerGradients,
    LayerNeeds,
    NormAct,
    Residual,
    Retrieved,
    Saved,
    SavedLayer,
)


class GpuBackend(KernelBackend):
    """A backend whose whole layer is several launches, one after the other."""

    device_types = frozenset({"cuda"})
    dtypes = frozenset({torch.float32}) | HALF_DTYPES
    ops = ATTENTION_OPS | MIX_OPS
    forward_only_ops = frozenset({"layer_attention_weights"})
    contributes = GpuContribution

    @abstractmethod
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
        """A layer without a norm; its `statistics` are those of `out`, where they are wanted."""

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
        into: Tensor | None = None,
    ) -> Gradients:
        """As of every backend. `into`: where the gradient of the scores is to be written, `[B, G, depth]`."""

    @abstractmethod
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
        """What query, key and value send back to `x` and to the filters.

        Args:
            dq, dk, dv: their gradients, None where none arrives.
            residual: added to the gradient of `x`.
            needs: of x, wq, wk, wv.
        """

    contribution = staticmethod(GpuContribution)

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
        check_epilogue(epilogue)
        check_value_dtype(value_dtype)
        check_reused(x, filters, epilogue, reused)
        norm = epilogue if type(epilogue) is NormAct else None
        made = self.retrieve(
            x,
            filters,
            keys,
            values,
            heads,
            scale,
            prev_weights,
            type(epilogue) is Residual,
            norm is not None and norm.statistics is None,
            tolerance,
        )
        if reused is not None:
            made = made._replace(out=reused.o)
        if norm is None or made.out is None:
            return made
        statistics = made.statistics if norm.statistics is None else norm.statistics
        if reused is not None:
            statistics = reused.statistics
        assert statistics is not None
        out = self.norm_forward(made.out, x, statistics, norm)
        return made._replace(
            out=out, retrieved=made.out if keeps_retrieved else None, statistics=statistics
        )

    def layer_backward(
        self,
        saved: SavedLayer,
        arrived: Arrived,
        contributions: Sequence[GpuContribution],
        index: int,
        needs: LayerNeeds,
    ) -> tuple[LayerGradients, GpuContribution | None]:
        """The norm's, the attention's, the gathered ones of key and value, and last those of what made them."""
        x, filters, mean, heads, attention, epilogue, retrieved, statistics = saved
        dout, dweights, dkl, dk, dv, dretrieved = arrived
        residual = dgamma = dbeta = dreused = None
        if epilogue is not None and dout is not None:
            residual = dout
            if type(epilogue) is NormAct:
                assert retrieved is not None
                assert statistics is not None
                dout, dgamma, dbeta = self.norm_backward(
                    retrieved, dout, statistics, epilogue, dretrieved
                )
        elif dretrieved is not None:
            dout = dretrieved
        own = dq = dprev = None
        if attention is None:
            dreused = dout
        elif dout is not None or dweights is not None or dkl is not None:
            dscores = torch.empty_like(attention.weights)
            own = self.contribution(
                attention.q, attention.weights, dscores, dout, False, attention.tolerance
            )
            contributions = [own, *contributions]
        if own is None and residual is None and not contributions and dk is None and dv is None:
            return NO_GRADIENTS, None
        check_shape(x, mean, None if own is None else attention)
        if own is not None:
            assert attention is not None
            found = self.attend_backward(
                attention,
                dout,
                dweights,
                dkl,
                needs.x or needs.wq,
                needs.prev,
                into=own.dscores,
            )
            dq, dprev = found.dq, found.dprev
        need_key, need_value = needs.x or needs.wk, needs.x or needs.wv
        if contributions:
            more_dk, more_dv = self.gather(contributions, index, heads, False, need_key, need_value)
            dk, dv = _sum(dk, more_dk), _sum(dv, more_dv)
        dk = dense(dk) if need_key else None
        dv = resolved(dv) if need_value and dv is not None else None
        produced = self.produce_backward(x, filters, mean, dq, dk, dv, residual, needs[:4])
        return LayerGradients(*produced, dprev, dgamma, dbeta, dreused), own


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def no_device_reason() -> str | None:
    """Why PyTorch itself has no GPU here. Does not initialise CUDA."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "this PyTorch was built for the CPU alone; install one built for your GPU (pytorch.org)"
        )
    return "PyTorch finds no GPU here (torch.cuda.is_available() is False): no device, or a driver too old for it"
