"""The backend of the CPU: its limits, and which function does what the contract asks for.

Each is the method itself, and the type checker holds its signature to the contract's: no call passes through a second.
"""

from __future__ import annotations

import torch

from ela_kernels.backends import extension as built
from ela_kernels.backends.contract import (
    ATTENTION_OPS,
    HALF_DTYPES,
    LIGHT_OPS,
    MIX_OPS,
    POSITION_OPS,
    KernelBackend,
)
from ela_kernels.backends.cpp import attention, light, position
from ela_kernels.backends.cpp import layer as layers
from ela_kernels.backends.cpp import mix as mixes
from ela_kernels.backends.cpp import norm as norms
from ela_kernels.backends.cpp.attention import CppContribution


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

    attend = staticmethod(attention.attend)
    weights = staticmethod(attention.weights)
    attend_backward = staticmethod(attention.attend_backward)
    contribution = staticmethod(CppContribution)
    gather = staticmethod(attention.gather)
    layer = staticmethod(layers.layer)
    layer_backward = staticmethod(layers.layer_backward)
    norm_forward = staticmethod(norms.norm_forward)
    norm_backward = staticmethod(norms.norm_backward)
    light_layer = staticmethod(light.light_layer)
    light_layer_backward = staticmethod(light.light_layer_backward)
    mix = staticmethod(mixes.mix)
    mix_backward = staticmethod(mixes.mix_backward)
    position_attend = staticmethod(position.position_attend)
    position_attend_backward = staticmethod(position.position_attend_backward)
    position_gather = staticmethod(position.position_gather)
