"""The compiled CPU kernels in `csrc/cpu`."""

from __future__ import annotations

import torch

from ela_kernels.backends.contract import FORWARD_ONLY_OPS, HALF_DTYPES, KERNEL_OPS, Backend


class CppBackend(Backend):
    """The compiled CPU kernels in `csrc/cpu`."""

    name = "cpp"
    device_types = frozenset({"cpu"})
    dtypes = frozenset({torch.float64, torch.float32}) | HALF_DTYPES
    ops = KERNEL_OPS | {"light_layer"}
    forward_only_ops = FORWARD_ONLY_OPS

    def unavailable_reason(self) -> str | None:
        from ela_kernels.backends.extension import extension, extension_problem

        module = extension()
        if module is None:
            return extension_problem()
        try:
            module.simd_level()
        except ValueError as error:  # ELA_KERNELS_SIMD names what this processor or build has not
            return str(error)
        return None
