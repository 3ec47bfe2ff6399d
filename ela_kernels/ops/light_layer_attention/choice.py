"""Which kernels serve a whole light layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ela_kernels.backends import dispatch
from ela_kernels.backends.contract import LightKernels, Request
from ela_kernels.backends.dispatch import light_kernels_of
from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.ops.autocast import fits_layer_dtype, layer_dtype


def choose_light_kernels(x: Tensor, filters: Sequence[Tensor], prev: Tensor) -> LightKernels | None:
    """The kernels that serve a whole light layer under the present setting; None where PyTorch and the op do.

    A forced backend that has no such kernels serves the layer still, in several calls.
    """
    dtype, device = layer_dtype(x), x.device
    for t in (x, prev, *filters):
        if needs_dispatcher(t) or t.device != device:
            return None
        if t.dtype is not dtype and not fits_layer_dtype(t, x):
            return None
    if is_transformed() or not x.numel() or prev.shape != x.shape:
        return None
    backend = dispatch.that_would_serve(
        tuple(dispatch._LIGHT_MODULES), Request("light_layer", device, dtype, 1, False)
    )
    return None if backend is None else light_kernels_of(backend)
