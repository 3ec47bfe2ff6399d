"""The norm of a residual block, of whatever class, applied to what a layer retrieved."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ela_kernels.modules.query_key_value import runs_as
from ela_kernels.torch_internals import without_wrappers

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


def normed(norm: nn.Module, o: Tensor, buffers: dict[str, Tensor] | None = None) -> Tensor:
    """`norm` of a map `[B, C, H, W]`, with other buffers than its own where some are given.

    A `nn.LayerNorm` or `nn.RMSNorm` of one dimension is one over the channels, `norm(o.movedim(1, -1)).movedim(-1, 1)`.
    Subclasses with a forward of their own know maps themselves, and are called with them as they are.

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
    if not any(isinstance(inner, kind) and runs_as(inner, kind) for kind in _OVER_LAST):
        return False
    shape = inner.normalized_shape
    assert isinstance(shape, tuple)
    if len(shape) > 1:
        return False  # over height and width, and perhaps the channels: as PyTorch takes it
    if shape[0] != o.shape[1]:
        raise ValueError(
            f"norm: got {type(inner).__name__} over {shape[0]} numbers for maps {list(o.shape)}; allowed is one over "
            f"the {o.shape[1]} channels, as norm_layer={type(inner).__name__} makes it"
        )
    return True


def without_sharing(norm: nn.Module, o: Tensor) -> Tensor:
    """`o` for a norm, which leaves `o` itself as it is."""
    return o if type(norm) in KNOWN_NORMS else o.clone()
