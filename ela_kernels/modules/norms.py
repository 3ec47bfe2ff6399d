"""The norm of a residual block, of whatever class, applied to what a layer retrieved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ela_kernels.modules.query_key_value import runs_as
from ela_kernels.torch_internals import tensors_of_norm, without_wrappers

# Norms over the last dimensions: of a map those are width and height, and the channels are meant.
_OVER_LAST = (nn.LayerNorm, nn.RMSNorm)
# Norms that give new memory, and change their buffers in training alone. After any other an activation in place might
# change what later blocks take over as well.
KNOWN_NORMS = (
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    *_OVER_LAST,
)


# Batch norms whose statistics, scale and shift are buffers that no mode and no optimizer changes: known by name, since
# what they compute is known, and their libraries need not be there. In both `x * s + (bias - running_mean * s)` with
# `s = weight * (running_var + eps).rsqrt()`.
_FROZEN = frozenset(
    {
        ("torchvision.ops.misc", "FrozenBatchNorm2d"),
        ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"),
    }
)


def is_frozen(norm: nn.Module) -> bool:
    """Whether a norm is the frozen batch norm of torchvision or detectron2 itself, no subclass."""
    kind = type(norm)
    if kind is nn.BatchNorm2d:  # what most are, at a fifth of the cost
        return False
    return (kind.__module__, kind.__qualname__) in _FROZEN


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a norm has a scale, a shift and statistics for each channel, as the kernels of a block know them."""
    return isinstance(norm, nn.BatchNorm2d) or is_frozen(norm)


def takes_batch(norm: Any) -> bool:
    """Whether a batch norm takes the statistics of the batch, as `nn.BatchNorm2d` decides it; a frozen one never."""
    if is_frozen(norm):
        return False
    if norm.training:
        return True
    _, _, mean, variance = tensors_of_norm(norm)
    return mean is None and variance is None


def normed(norm: nn.Module, o: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
    """`norm` of a map `[B, C, H, W]`, with other buffers than its own where some are given.

    A `nn.LayerNorm` or `nn.RMSNorm` of one dimension is one over the channels, `norm(o.movedim(1, -1)).movedim(-1, 1)`.
    So is one of another library that works on the last dimension; what knows maps is called with them as they are.

    Raises:
        ValueError: such a norm is for another number of channels.
    """
    moves = _is_over_channels(norm, o)
    given = o.movedim(1, -1) if moves else o
    out: Any = norm(given) if buffers is None else functional_call(norm, buffers, (given,))
    found: Tensor = out.movedim(-1, 1) if moves else out
    return found


def _is_over_channels(norm: nn.Module, o: Tensor) -> bool:
    if type(norm) is nn.BatchNorm2d:  # what most are
        return False
    inner = without_wrappers(norm)
    shape = getattr(inner, "normalized_shape", None)
    if not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return False  # over height and width, and perhaps the channels: as PyTorch takes it
    is_known = any(isinstance(inner, kind) and runs_as(inner, kind) for kind in _OVER_LAST)
    if not is_known and not _takes_last(inner, int(shape[0]), o):
        return False
    if shape[0] != o.shape[1]:
        raise ValueError(
            f"norm: got {type(inner).__name__} over {shape[0]} numbers for maps {list(o.shape)}; allowed is one over "
            f"the {o.shape[1]} channels, as norm_layer={type(inner).__name__} makes it"
        )
    return True


# Of norms of other libraries with a forward of their own: whether they work on the last dimension, as those of tokens
# do, or on the channels of a map. A map that is as wide as it has channels would not tell.
_LAST: dict[type[nn.Module], bool] = {}


def _takes_last(norm: nn.Module, channels: int, o: Tensor) -> bool:
    kind = type(norm)
    if kind not in _LAST:
        if torch.compiler.is_compiling():
            if o.shape[-1] != channels:
                return False  # it says itself what it is
            raise ValueError(
                f"norm: got {kind.__name__} in a graph that is compiled, for maps {list(o.shape)} that are as wide as "
                "they have channels; allowed is it after a first pass without torch.compile, which tells over what it "
                "is"
            )
        _LAST[kind] = _refuses_maps(norm, channels)
    return _LAST[kind]


@torch.no_grad()
def _refuses_maps(norm: nn.Module, channels: int) -> bool:
    """Whether a norm does not work on a map of another width than it has channels."""
    like = next(norm.parameters(), torch.zeros((), device="cpu"))
    width = 1 if channels > 1 else 2
    probe = torch.zeros((1, channels, 1, width), device=like.device, dtype=like.dtype)
    try:
        out = norm.forward(probe)
    except Exception:  # a library's own
        return True
    return not isinstance(out, Tensor) or out.shape != probe.shape


def without_sharing(norm: nn.Module, o: Tensor) -> Tensor:
    """`o` for a norm, which leaves `o` itself as it is."""
    return o if type(norm) in KNOWN_NORMS else o.clone()
