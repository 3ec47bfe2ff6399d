"""The keys or values of a history as the one tensor that published networks pass on, made only when somebody looks."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from ela_kernels.backends.tracing import is_transformed
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


KNOWN: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {}
"""What gives something without making a tensor, by function: `factors.py` fills it. Each is given the arguments of the
function, and gives None where it does not know them."""


class Lazy(Tensor):
    """A tensor that is made only when somebody uses it otherwise than here is known.

    `requires_grad` is False until then, so that wrappers which put hooks on whatever has a gradient leave it alone.
    """

    has_grad: bool
    _cell: list[Tensor | None]  # what was made, shared with the others for the same

    @property
    def made(self) -> Tensor | None:
        """The tensor, where it or another one for the same was made."""
        return self._cell[0]

    @made.setter
    def made(self, made: Tensor | None) -> None:
        self._cell[0] = made

    def make(self) -> Tensor:
        """The tensor; the same one at every call."""
        if self.made is None:
            # Not as whoever looks at it has gradients enabled: the layers go on from it.
            with torch.inference_mode(False), torch.set_grad_enabled(self.has_grad):
                self.made = self._made_now()
        return self.made

    def _made_now(self) -> Tensor:
        raise NotImplementedError

    def again(self) -> Lazy:
        """Another one for the same: a change of either's tensor in place is one of both."""
        raise NotImplementedError

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
        known = KNOWN.get(func)
        found = None if known is None else known(args, kwargs)
        if found is not None:
            return found
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


def _without_memory(
    kind: type[Lazy], shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> Any:
    """A new tensor of a lazy class, which is given its attributes afterwards."""
    found = cast("Lazy", tensor_without_memory(kind, shape, dtype, like.device))
    found._cell, found.has_grad = [None], torch.is_grad_enabled()
    if found.has_grad and like.requires_grad and not is_transformed():
        # Autograd's own engine may take it for an input, and leave its gradient here, where nobody asks for it. A
        # transform has an engine of its own, and refuses the asking.
        with plain_functions():
            found.requires_grad_().register_hook(_lost)
    return found


Means = dict[tuple[int, bool], Tensor]
"""The mean over space `[B, C]` of some pairs' values, with gradients or without."""


class Stacked(Lazy):
    """Stands for `torch.stack(pairs, 1)`, and carries the history that the pairs are in.

    The layers of a converted network hand it from one to the next as the original hands its concatenated keys and
    values, and go on with the history: nothing is concatenated. Whoever else uses it, by an operation, an index or a
    method, gets the tensor itself, made then, with its gradients; from there on the layers too go on from that tensor,
    since it may have been changed. Shape, dtype and device are told without making it.

    Of values, code may take one after the other, average it over space, multiply it with a number for each sample and
    channel, and stack them again, as dynamic layer attention does between its layers: that gives a stack with
    `factors`, and no map is written. It has no history, since its layers' sums are by weights times these factors.

    Attributes:
        held: the first of the pairs, stacked already.
        factors: `[B, C]` in the accumulation dtype for each pair, None for one that has none; None: of no pair.
        means: those that are known, of all stacks of these pairs.
    """

    history: LayerHistory | None
    snapshot: Snapshot | None
    pairs: tuple[Tensor, ...]
    held: Tensor | None
    factors: tuple[Tensor | None, ...] | None
    means: Means

    @staticmethod
    def of(
        pairs: tuple[Tensor, ...],
        history: LayerHistory | None,
        snapshot: Snapshot | None,
        held: Tensor | None = None,
        factors: tuple[Tensor | None, ...] | None = None,
        means: Means | None = None,
    ) -> Stacked:
        """The stack of `pairs`, the keys or the values of `snapshot`, of which the first are stacked in `held`."""
        last = pairs[-1]
        dtype = last.dtype
        if snapshot is not None and snapshot.pairs.mixed:  # as torch.cat promotes them
            dtype = reduce(torch.promote_types, [pair.dtype for pair in pairs])
        shape = (last.shape[0], len(pairs), *last.shape[1:])
        stacked: Stacked = _without_memory(Stacked, shape, last, dtype)
        stacked.pairs, stacked.history, stacked.snapshot = pairs, history, snapshot
        stacked.held, stacked.factors = held, factors
        stacked.means = {} if means is None else means
        return stacked

    def again(self) -> Stacked:
        of_pairs = self.pairs, self.history, self.snapshot, self.held, self.factors, self.means
        other = Stacked.of(*of_pairs)
        other._cell, other.has_grad = self._cell, self.has_grad
        return other

    def _made_now(self) -> Tensor:
        with plain_functions():
            dtype = self.dtype
        held, pairs = self.held, self.pairs
        if self.factors is not None:
            pairs = tuple(map(scaled_map, pairs, self.factors))
        if held is None or self.factors is not None:
            return torch.stack([pair.to(dtype) for pair in pairs], 1)
        own = [pair.unsqueeze(1) for pair in pairs[held.shape[1] :]]
        return torch.cat((held, *own), 1).to(dtype)


class Part(Lazy):
    """Stands for one value of a stack, `stack[:, place]`, or for that times a factor; with a dimension more, perhaps.

    Attributes:
        stack: what it was taken from. Without a factor of its own it is a view of that.
        factor: as of the stack's factors.
        is_scaled: whether it was multiplied since it was taken.
        has_dimension: whether it is `[B, 1, C, H, W]`.
    """

    stack: Stacked
    place: int
    factor: Tensor | None
    is_scaled: bool
    has_dimension: bool

    @staticmethod
    def of(
        stack: Stacked,
        place: int,
        factor: Tensor | None,
        is_scaled: bool = False,
        has_dimension: bool = False,
    ) -> Part:
        pair = stack.pairs[place]
        shape = (pair.shape[0], 1, *pair.shape[1:]) if has_dimension else tuple(pair.shape)
        part: Part = _without_memory(Part, shape, pair, pair.dtype)
        part.stack, part.place, part.factor = stack, place, factor
        part.is_scaled, part.has_dimension = is_scaled, has_dimension
        return part

    def again(self) -> Part:
        other = Part.of(self.stack, self.place, self.factor, self.is_scaled, self.has_dimension)
        other._cell, other.has_grad = self._cell, self.has_grad
        return other

    def _made_now(self) -> Tensor:
        if self.is_scaled:
            made = scaled_map(self.stack.pairs[self.place], self.factor)
        else:
            made = self.stack.make()[:, self.place]
        return made.unsqueeze(1) if self.has_dimension else made


def scaled_map(value: Tensor, factor: Tensor | None) -> Tensor:
    return value if factor is None else (value * factor[:, :, None, None]).to(value.dtype)


def _made(value: Any) -> Any:
    """`value` with every stack in it made."""
    if isinstance(value, Lazy):
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
    if keys.history is None or keys.snapshot is None:
        return None
    check_of_no_function(keys, values)
    return keys.history.at(keys.snapshot)


def check_of_no_function(*stacks: Stacked) -> None:
    """Refuse what an autograd function gave, which hides from the pairs in it what they were made of.

    Raises:
        RuntimeError: one did.
    """
    if any(made_by(stack) is not None for stack in stacks):
        raise RuntimeError(
            "a converted network: got keys or values from an autograd function, as reentrant checkpointing makes them, "
            "which would lose the gradients between layers; allowed is "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
