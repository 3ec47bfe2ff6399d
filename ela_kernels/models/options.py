"""Options that the networks share, and their checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ela_kernels.modules.query_key_value import check_count
from ela_kernels.ops.checks import check_tolerance
from ela_kernels.ops.layer_attention.held import check_history_dtype

HEAD_DIM = 16


def check_identity_init(identity_init: object, attention: str) -> None:
    if not isinstance(identity_init, bool):
        raise TypeError(f"identity_init: got {type(identity_init).__name__}; allowed is a bool")
    if identity_init and attention == "none":
        raise ValueError(
            "identity_init: got True with attention='none', which has no layer to start as the identity; allowed is "
            "True with another attention"
        )


def check_history_options(
    dtype: torch.dtype | None, tolerance: float, attention: str, fused: bool
) -> None:
    check_history_dtype(dtype, "history_dtype")
    check_tolerance(tolerance)
    if attention in ("mrla", "ela") and fused:
        return
    form = "" if fused else " and fused=False"
    for name, value, is_given in (
        ("history_dtype", dtype, dtype is not None),
        ("tolerance", tolerance, tolerance > 0),
    ):
        if is_given:
            raise ValueError(
                f"{name}: got {value} with attention={attention!r}{form}, which has no LayerHistory; allowed is one "
                "with 'mrla' and 'ela', fused"
            )


def check_head_dim(
    head_dim: int | None, default: int, channels: Sequence[int], attention: str
) -> int:
    """What was given, or the default. Refused by that: a stage takes the lesser of it and its number of channels."""
    size = default if head_dim is None else check_count("head_dim", head_dim)
    if attention != "none" and any(count % min(size, count) for count in channels):
        got = f"None, which is {default}" if head_dim is None else str(head_dim)
        raise ValueError(
            f"head_dim: got {got}, for stages of {', '.join(map(str, channels))} channels; allowed is a divisor of "
            "each stage's channels, or a number that is larger than they are"
        )
    return size
