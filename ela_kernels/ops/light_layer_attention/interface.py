"""The public operation, in eager PyTorch on every device; whole layers have kernels, see layer.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ela_kernels.backends.contract import Request
from ela_kernels.backends.dispatch import Refusal, plan, refusal_in_a_graph, refuse_forced
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.memory import check_not_freed
from ela_kernels.backends.types import ValueAct
from ela_kernels.ops import checks

_NAMES = ("q", "k", "v", "prev_out", "decay")


def light_layer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prev_out: Tensor,
    decay: Tensor,
    heads: int,
    scale: float | None = None,
) -> Tensor:
    """The light form of layer attention: gate this layer's value, and let the previous output decay.

    Equivalent PyTorch::

        s = scale * (q.unflatten(1, (heads, -1)) * k.unflatten(1, (heads, -1))).sum(-1)      # [B, G]
        out = s.sigmoid().repeat_interleave(C // heads, 1)[:, :, None, None] * v + decay * prev_out

    Args:
        q, k: query and key of this layer, `[B, C]`.
        v: value of this layer, `[B, C, *spatial]`.
        prev_out: output of the layer before, like `v`; the stage's input for the first layer.
        decay: learned factor for each channel, `[C, 1, ..., 1]` (one 1 for each spatial dimension), or `[C]`.
        heads: G, a divisor of C.
        scale: factor of the score; `1 / sqrt(C / G)` if None.

    Returns:
        `out`, shape and dtype of `v`; differentiable, twice too.

    Raises:
        TypeError: not a tensor, an integer or sparse tensor, or mixed dtypes.
        ValueError: shapes, heads or devices that do not fit, or a backend with kernels is forced: they serve whole
            layers (:class:`ela_kernels.LightLayerAttention`), not the operation alone.

    Source:
        MRLA (arXiv 2302.03985), the light form.
    """
    return gated(q, k, v, prev_out, decay, heads, scale)


def gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prev_out: Tensor,
    decay: Tensor,
    heads: int,
    scale: float | None = None,
    why: Refusal | None = None,
) -> Tensor:
    """:func:`light_layer_attention` for a whole layer that no kernels serve; `why`."""
    q = checks.check_query(q)
    checks.check_tensor("k", k)
    checks.check_like("k", k, q)
    if k.shape != q.shape:
        raise ValueError(f"k: got shape {list(k.shape)}; allowed is q's shape {list(q.shape)}")
    heads = checks.check_heads(heads, q.shape[1])
    scale = checks.check_scale(scale, q.shape[1] // heads)
    v = checks.check_map("v", v, q, channels_last=False)
    prev_out = checks.check_map("prev_out", prev_out, q, channels_last=False)
    if prev_out.shape != v.shape:
        raise ValueError(
            f"prev_out: got shape {list(prev_out.shape)}; allowed is v's shape {list(v.shape)}"
        )
    channels, spatial = v.shape[1], v.dim() - 2
    checks.check_tensor("decay", decay)
    if decay.device != q.device:
        raise ValueError(
            f"decay: got device {decay.device} while q is on {q.device}; allowed is one device"
        )
    if decay.numel() != channels or (decay.dim() and decay.shape[0] != channels):
        raise ValueError(
            f"decay: got shape {list(decay.shape)}; allowed is [{channels}] followed by ones"
        )
    for name, tensor in zip(_NAMES, (q, k, v, prev_out, decay), strict=True):
        check_not_freed(name, tensor)
    if v.numel():  # nothing has to be served otherwise
        op = "light_layer_attention" if why is None else "light_layer"
        request = Request(op, q.device, v.dtype, 1)
        refuse_forced(request, _refusal(request) if why is None else why)
    dtype = accumulate_dtype(v.dtype)
    product = (q.to(dtype) * k.to(dtype)).unflatten(1, (heads, -1)).sum(-1)
    gate = (scale * product).sigmoid().repeat_interleave(channels // heads, dim=1)
    gate = gate.reshape(v.shape[0], channels, *([1] * spatial))
    kept = decay.to(dtype).reshape(channels, *([1] * spatial)) * prev_out.to(dtype)
    out: Tensor = (gate * v.to(dtype) + kept).to(v.dtype)
    return out


def activated(v: Tensor, value_act: ValueAct | None) -> Tensor:
    """What a light layer gates: the value, or what its activation makes of it."""
    if checks.check_value_act(value_act) is None:
        return v
    return F.gelu(v, approximate="tanh" if value_act == "gelu_tanh" else "none")


def _refusal(request: Request) -> Refusal:
    found = refusal_in_a_graph() if torch.compiler.is_compiling() else plan(request)
    assert isinstance(found, Refusal)  # no backend has kernels of the operation alone
    return found
