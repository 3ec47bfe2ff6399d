"""What code between converted layers may do to values without a map being made: numbers for samples and channels.

Dynamic layer attention takes each value of the layers before, averages it over space, multiplies it with a gate for
each sample and channel, and stacks all of them again, at every layer. Of that nothing needs a map: an average scales
with its map, and a sum by weights is one by weights times the gates. Whatever else is done makes the map, as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.backends.tracing import is_transformed
from ela_kernels.conversion.stacked import KNOWN, Lazy, Part, Stacked, check_of_no_function
from ela_kernels.modules.query_key_value import pooled
from ela_kernels.ops.autocast import is_autocast_on
from ela_kernels.torch_internals import dispatch_modes, plain_functions, top_saved_tensors_hooks

HAVE_FACTORS = "code between the layers multiplies values with numbers, and their sum is one by weights times these"


class Gated(NamedTuple):
    """What a layer retrieves from that was given values with factors: keys `[B, T, C]`, and the stack of the values."""

    keys: Tensor
    values: Stacked

    def factors(self) -> Tensor:
        """`[B, C, T]`, in the accumulation dtype."""
        pairs, factors = self.values.pairs, self.values.factors
        assert factors is not None
        one = pairs[0].new_ones(pairs[0].shape[:2], dtype=accumulate_dtype(pairs[0].dtype))
        return torch.stack([one if factor is None else factor for factor in factors], -1)

    def with_own(self, k: Tensor, v: Tensor) -> Gated:
        """With the pair of a layer behind the others."""
        values, keys = self.values, torch.cat((self.keys, k.unsqueeze(1)), 1)
        assert values.factors is not None
        pairs, factors = (*values.pairs, v), (*values.factors, None)
        # Means of its own: another layer may go on from the same values with a pair of its own in this place.
        return Gated(keys, Stacked.of(pairs, None, None, factors=factors, means=dict(values.means)))


def gated(keys: Tensor, values: Tensor) -> Gated | None:
    """Keys, and values that have factors; None where the values are something else by now.

    Raises:
        RuntimeError: reentrant checkpointing.
    """
    if type(values) is not Stacked or values.factors is None or not _stays(values):
        return None
    check_of_no_function(values)
    return Gated(keys.make() if isinstance(keys, Lazy) else keys, values)


def _stays(lazy: Lazy) -> bool:
    """Whether it may go on without being made here: as it was taken, and as it would be computed."""
    stack = lazy if isinstance(lazy, Stacked) else cast("Part", lazy).stack
    is_free = isinstance(lazy, Part) and lazy.is_scaled
    return (
        lazy.made is None
        and (is_free or stack.made is None)
        and lazy.has_grad == stack.has_grad == torch.is_grad_enabled()
        and stack.pairs[0].dim() == 4
        and stack.pairs[0].numel() > 0
        and len({pair.dtype for pair in stack.pairs}) == 1
        and not is_autocast_on(stack.pairs[0])
        and not (torch.compiler.is_compiling() or dispatch_modes() or is_transformed())
    )


def _arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any] | None:
    """Those of these names, MISSING where one is not given; None where there are others."""
    if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
        return None
    return [*args, *(kwargs.get(name, _MISSING) for name in names[len(args) :])]


_MISSING = object()


def _part_at(stack: object, index: object) -> Part | None:
    if type(stack) is not Stacked or type(index) is not int or not _stays(stack):
        return None
    count = len(stack.pairs)
    if not -count <= index < count:
        return None
    index %= count
    return Part.of(stack, index, None if stack.factors is None else stack.factors[index])


def _indexed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lazy | None:
    """`stack[:, i]` and `part[:, None]`."""
    lazy, index = args
    if not isinstance(index, tuple) or len(index) < 2:
        return None
    rest = [i for i in index[2:] if i is not Ellipsis]
    if any(not isinstance(i, slice) or i != slice(None) for i in (index[0], *rest)):
        return None
    if len(index) > lazy.dim() + (index[1] is None):
        return None
    if index[1] is None:
        return _with_dimension((lazy, 1), {})
    return _part_at(lazy, index[1])


def _selected(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Part | None:
    found = _arguments(("input", "dim", "index"), args, kwargs)
    if found is None or found[1] not in (1, -4):
        return None
    return _part_at(found[0], found[2])


def _unbound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Part, ...] | None:
    found = _arguments(("input", "dim"), args, kwargs)
    if found is None or type(found[0]) is not Stacked or found[1] not in (1, -4):
        return None
    parts = [_part_at(found[0], i) for i in range(len(found[0].pairs))]
    whole = [part for part in parts if part is not None]
    return tuple(whole) if len(whole) == len(parts) else None


def _with_dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Part | None:
    found = _arguments(("input", "dim"), args, kwargs)
    if found is None or type(found[0]) is not Part or found[1] not in (1, -4):
        return None
    part = found[0]
    if part.has_dimension or not _stays(part):
        return None
    return Part.of(part.stack, part.place, part.factor, part.is_scaled, True)


def _factor_in(by: object, part: Part) -> Tensor | None:
    """`[B, C]` in the accumulation dtype where a part is multiplied with one number for each sample and channel."""
    if type(by) not in PLAIN_TENSORS or not isinstance(by, Tensor):
        return None
    pair = part.stack.pairs[part.place]
    if by.dim() != 4 or by.shape[:2] != pair.shape[:2]:
        return None
    if by.dtype != pair.dtype or by.device != pair.device:
        return None
    for size, stride, of_map in zip(by.shape[2:], by.stride()[2:], pair.shape[2:], strict=True):
        if size not in (1, of_map) or (size != 1 and stride != 0):
            return None
    return by[:, :, 0, 0].to(accumulate_dtype(pair.dtype), copy=True)


def _multiplied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Part | None:
    found = _arguments(("input", "other"), args, kwargs)
    if found is None:
        return None
    part, by = found if type(found[0]) is Part else found[::-1]
    if type(part) is not Part or part.has_dimension or not _stays(part):
        return None
    factor = _factor_in(by, part)
    if factor is None:
        return None
    if part.factor is not None:
        factor = part.factor * factor
    return Part.of(part.stack, part.place, factor, is_scaled=True)


def _mean_of(part: Part) -> Tensor:
    """Over space, `[B, C]`: the value's, which is taken once, times the factor."""
    stack, key = part.stack, (part.place, part.has_grad)
    pair = stack.pairs[part.place]
    # A checkpoint has to find the same tensors when it recomputes.
    may_keep = top_saved_tensors_hooks is not None and top_saved_tensors_hooks(True) is None
    mean = stack.means.get(key) if may_keep else None
    if mean is None:
        mean = pooled(pair)
        if may_keep and not torch.is_inference_mode_enabled():
            stack.means[key] = mean
    if part.factor is not None:
        return (mean * part.factor).to(pair.dtype)
    # Whoever asked may change it in place, or hang a hook on it: what is kept is nobody's.
    return mean.clone() if key in stack.means else mean


def _averaged(part: object, keeps: bool) -> Tensor | None:
    if type(part) is not Part or part.has_dimension or not _stays(part):
        return None
    mean = _mean_of(part)
    return mean[:, :, None, None] if keeps else mean


def _pooled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    found = _arguments(("input", "output_size"), args, kwargs)
    if found is None or found[1] not in (1, (1, 1), [1, 1]):
        return None
    return _averaged(found[0], True)


def _mean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    found = _arguments(("input", "dim", "keepdim"), args, kwargs)
    if found is None or not isinstance(found[1], (tuple, list)):
        return None
    if sorted(i % 4 for i in found[1] if type(i) is int) != [2, 3]:
        return None
    return _averaged(found[0], found[2] is True)


def _stacked_again(tensors: object, has_dimension: bool) -> Stacked | None:
    """All parts of a stack, each once and in their order."""
    if not isinstance(tensors, (tuple, list)) or not tensors or type(tensors[0]) is not Part:
        return None
    pairs = tensors[0].stack.pairs
    if len(tensors) != len(pairs):
        return None
    for i, part in enumerate(tensors):
        if type(part) is not Part or part.stack.pairs is not pairs or part.place != i:
            return None
        if part.has_dimension != has_dimension or not _stays(part):
            return None
    factors = tuple(part.factor for part in tensors)
    return Stacked.of(pairs, None, None, factors=factors, means=tensors[0].stack.means)


def _concatenated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stacked | None:
    found = _arguments(("tensors", "dim"), args, kwargs)
    if found is None or found[1] not in (1, -4):
        return None
    return _stacked_again(found[0], True)


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stacked | None:
    found = _arguments(("tensors", "dim"), args, kwargs)
    if found is None or found[1] not in (1, -4):
        return None
    return _stacked_again(found[0], False)


def _expanded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`tensor.expand_as(part)`, which asks for a shape alone."""
    if len(args) != 2 or kwargs or isinstance(args[0], Lazy):
        return None
    with plain_functions():
        shape = args[1].shape
    found: Tensor = args[0].expand(shape)
    return found


KNOWN.update(
    {
        Tensor.__getitem__: _indexed,
        Tensor.select: _selected,
        torch.select: _selected,
        Tensor.unbind: _unbound,
        torch.unbind: _unbound,
        Tensor.unsqueeze: _with_dimension,
        torch.unsqueeze: _with_dimension,
        Tensor.mul: _multiplied,
        Tensor.__mul__: _multiplied,
        Tensor.__rmul__: _multiplied,
        torch.mul: _multiplied,
        F.adaptive_avg_pool2d: _pooled,
        Tensor.mean: _mean,
        torch.mean: _mean,
        torch.cat: _concatenated,
        torch.concat: _concatenated,
        torch.stack: _joined,
        Tensor.expand_as: _expanded,
    }
)
