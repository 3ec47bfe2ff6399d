"""The keys or values of a history as the one tensor that published networks pass on, made only when somebody looks."""

from __future__ import annotations

from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.snapshot import Snapshot
from ela_kernels.torch_internals import made_by, plain_functions, tensor_without_memory

# What can be told without making the tensor.
_METADATA = frozenset(
    {
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.layout.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        Tensor.is_meta.__get__,  # type: ignore[attr-defined]
        Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
        Tensor.is_nested.__get__,  # type: ignore[attr-defined]
        Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
        Tensor.__len__,
        Tensor.dim,
        Tensor.get_device,
        Tensor.is_complex,
        Tensor.is_floating_point,
        Tensor.nelement,
        Tensor.numel,
        Tensor.size,
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
    }
)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _lost(gradient: Tensor | None) -> None:
    # What backward hooks pass on has zeros here, or nothing.
    if gradient is not None and bool(gradient.any()):
        raise RuntimeError(
            "a converted network: got an autograd function that was applied to the keys or values which its layers "
            "hand on, and whose gradient would be lost; allowed is to apply it to keys[:] or values[:]"
        )


class Stacked(Tensor):
    """Stands for `torch.stack(pairs, 1)`, and carries the history that the pairs are in.

    The layers of a converted network hand it from one to the next as the original hands its concatenated keys and
    values, and go on with the history: nothing is concatenated. Whoever else uses it, by an operation, an index or a
    method, gets the tensor itself, made then, with its gradients; from there on the layers too go on from that tensor,
    since it may have been changed. Shape, dtype and device are told without making it. `requires_grad` is False until
    then, so that wrappers which put hooks on whatever has a gradient leave it alone.
    """

    history: LayerHistory
    snapshot: Snapshot
    pairs: tuple[Tensor, ...]
    held: Tensor | None
    made: Tensor | None
    has_grad: bool

    @staticmethod
    def of(
        pairs: tuple[Tensor, ...],
        history: LayerHistory,
        snapshot: Snapshot,
        held: Tensor | None = None,
    ) -> Stacked:
        """The stack of `pairs`, the keys or the values of `snapshot`, of which the first are stacked in `held`."""
        last = pairs[-1]
        dtype = last.dtype
        if snapshot.pairs.mixed:  # as torch.cat promotes them
            dtype = reduce(torch.promote_types, [pair.dtype for pair in pairs])
        shape = (last.shape[0], len(pairs), *last.shape[1:])
        stacked = cast("Stacked", tensor_without_memory(Stacked, shape, dtype, last.device))
        stacked.pairs, stacked.history, stacked.snapshot = pairs, history, snapshot
        stacked.held, stacked.made, stacked.has_grad = held, None, torch.is_grad_enabled()
        if stacked.has_grad and last.requires_grad:
            # Autograd's own engine may take it for an input, and leave its gradient here, where nobody asks for it.
            with plain_functions():
                stacked.requires_grad_().register_hook(_lost)
        return stacked

    def again(self) -> Stacked:
        """Another one for the same."""
        other = Stacked.of(self.pairs, self.history, self.snapshot, self.held)
        other.made, other.has_grad = self.made, self.has_grad
        return other

    def make(self) -> Tensor:
        """The tensor; the same one at every call."""
        if self.made is None:
            with plain_functions():
                dtype = self.dtype
            # Not as whoever looks at it has gradients enabled: the layers go on from it.
            with torch.inference_mode(False), torch.set_grad_enabled(self.has_grad):
                held, pairs = self.held, self.pairs
                if held is None:
                    self.made = torch.stack([pair.to(dtype) for pair in pairs], 1)
                else:
                    own = [pair.unsqueeze(1) for pair in pairs[held.shape[1] :]]
                    self.made = torch.cat((held, *own), 1).to(dtype)
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _REQUIRES_GRAD:
            return False
        with plain_functions():
            if func in _METADATA:
                return func(*args, **kwargs)
        if func is Tensor.view_as and len(args) == 2 and args[0] is args[1]:
            # What autograd does to an input that a function gives back, as the one behind backward hooks does.
            return args[0].again()
        return func(*(_made(a) for a in args), **{name: _made(a) for name, a in kwargs.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0].again()
        raise RuntimeError(
            f"{func}: got the keys or values of a converted network from code that passes PyTorch's functions by; "
            "allowed is to use them by those. Call ela_kernels.unconvert(model), or index them once (keys[:, :])"
        )


def _made(value: Any) -> Any:
    """`value` with every stack in it made."""
    if isinstance(value, Stacked):
        return value.make()
    if isinstance(value, (tuple, list)):
        made = [_made(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {key: _made(v) for key, v in value.items()}
    return value


def continued(keys: object, values: object) -> LayerHistory | None:
    """The history that a layer goes on with which is given these; None where they are tensors by now.

    Raises:
        RuntimeError: reentrant checkpointing.
    """
    if type(keys) is not Stacked or type(values) is not Stacked:
        return None
    if keys.made is not None or values.made is not None or keys.snapshot is not values.snapshot:
        return None
    if made_by(keys) is not None or made_by(values) is not None:
        # It came out of an autograd function, which hid from the pairs in it what they were made of.
        raise RuntimeError(
            "a converted network: got keys or values from an autograd function, as reentrant checkpointing makes them, "
            "which would lose the gradients between layers; allowed is "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    return keys.history.at(keys.snapshot)
