"""What a value passes before it is gated, and its slope there, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(v, ACT: tl.constexpr):
    """GELU, 1, or its form with a tanh, 2; `v` itself for 0."""
    if ACT == 1:
        return v * _up_to(v)
    elif ACT == 2:
        return v * _gate(v)
    else:
        return v


@triton.jit
def slope(v, ACT: tl.constexpr):
    """The derivative of :func:`activated`."""
    if ACT == 1:
        return _up_to(v) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327  # 1 / sqrt(2 pi)
    elif ACT == 2:
        gate, inner = _gate(v), _clamped(v)
        by_inner = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * inner * inner)
        return gate + v * gate * (1.0 - gate) * by_inner
    else:
        return tl.full(v.shape, 1.0, tl.float32)


@triton.jit
def _up_to(v):
    """The normal distribution up to `v`."""
    return 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))


@triton.jit
def _gate(v):
    """`(1 + tanh(w / 2)) / 2` with `w = 2 sqrt(2 / pi) (v + 0.044715 v^3)`."""
    inner = _clamped(v)
    w = 1.5957691216057308 * inner * (1.0 + 0.044715 * inner * inner)
    return 1.0 / (1.0 + tl.exp(-w))


@triton.jit
def _clamped(v):
    """Where the gate is neither 0 nor 1, so that neither a cube nor an exponential overflows; a NaN stays one."""
    v = tl.where(v > 10.0, 10.0, v)
    return tl.where(v < -10.0, -10.0, v)
