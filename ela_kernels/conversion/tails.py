"""Finds out, by running a copy, whether all that a block does after its attention is the residual block's end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ela_kernels.conversion.blocks import FUNCTIONAL, FusedBlock, Tail
from ela_kernels.conversion.fused import fuse
from ela_kernels.conversion.trial import (
    Copy,
    DisagreementError,
    RaisedError,
    close,
    kept_by,
    parameter_names,
    same_gradients,
)

MAP, DEPTH = (4, 6), 2


# These drop single elements or channels, whatever they do at a rate of zero.
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def find_tail(
    block: nn.Module,
    attention: str,
    dim: int,
    holds: bool,
    fuse_attention: Callable[[nn.Module], None],
) -> Tail:
    """What `block` does after the call of its submodule `attention`.

    A copy is run as it is, and once more converted: results, gradients, running statistics and random numbers have to
    be the same, in training and evaluation, and for a block that begins a stage too.

    Args:
        block: the block.
        attention: name in it of a base layer, or of the module around a light one.
        dim: channels of the attention.
        holds: whether the block is called with keys and values beside the map.
        fuse_attention: converts a copy of the attention.

    Raises:
        DisagreementError: something else than `x + drop_path(act(norm(attention(x))))`.
    """
    run = _Run(block, attention, dim, holds)
    seen = run.all()
    after = seen[0].after
    norms = [n for n in after if isinstance(run.names[n], nn.BatchNorm2d)]
    acts = [n for n in after if isinstance(run.names[n], nn.ReLU)]
    others = [n for n in after if n not in norms and n not in acts]
    if len(norms) != 1:
        raise DisagreementError("no BatchNorm2d follows the attention, or several do")
    if norms[0] in seen[0].first:
        raise DisagreementError("the norm that follows the attention is used before it as well")
    if len(others) > 1 or any(one.after != after for one in seen):
        raise DisagreementError(
            "more than a norm, an activation and a drop path follow the attention"
        )
    if others and not _may_drop_samples(run.names[others[0]]):
        raise DisagreementError(
            f"{others[0]}, which follows the attention, is no drop path: it has numbers of its own, or drops elements"
        )
    parts = attention.split(".")
    between = tuple(".".join(parts[:i]) for i in range(1, len(parts)))
    for act, drop_path in product([*acts, None, FUNCTIONAL], [*others, None]):
        drops = nn.Identity if drop_path is None else type(run.names[drop_path])
        tail = Tail(attention, between, norms[0], act, drop_path, drops)
        if all(run.ends_in(tail, one) for one in seen):
            fuse_attention(run.attention)
            fuse(run.block, FusedBlock, fused_tail=tail)
            for one in seen:
                run.check_converted(one)
            return tail
    raise DisagreementError("something else than the end of a residual block follows the attention")


def _may_drop_samples(module: nn.Module) -> bool:
    """Whether it can be what multiplies whole samples, now and at any other rate."""
    has_numbers = any(True for _ in (*module.parameters(), *module.buffers()))
    return not has_numbers and not any(isinstance(m, _DROPOUTS) for m in module.modules())


@dataclass
class _Seen:
    """One run of a block: what it was given, what its attention gave, what else was called, and how it ended."""

    training: bool
    inputs: list[Any]
    before: dict[str, Tensor]
    start: Tensor
    calls: int = 0
    x: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    out: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    state: tuple[Any, ...] = ()
    random: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))
    buffers: dict[str, Tensor] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    results: tuple[Tensor, ...] = ()
    gradients: list[Tensor | None] = field(default_factory=list)
    later: dict[str, Tensor] = field(default_factory=dict)
    end: Tensor = field(default_factory=lambda: torch.empty(0, device="cpu"))


class _Run:
    """A copy of a block, to be run."""

    def __init__(self, block: nn.Module, attention: str, dim: int, holds: bool) -> None:
        self.copy = Copy(block)
        self.block = self.copy.module
        self.attention = self.block.get_submodule(attention)
        self.names = dict(self.block.named_modules())
        self.dim, self.holds = dim, holds
        convolutions = (m for m in self.block.modules() if isinstance(m, nn.Conv2d))
        self.channels = next((m.in_channels for m in convolutions), dim)

    def all(self) -> list[_Seen]:
        """In both modes, with something held and with nothing, as far as the block can be called so."""
        found = [self._held(training) for training in (False, True)]
        if self.holds:
            x = found[0].inputs[0]
            with contextlib.suppress(RaisedError):  # it is never called so
                found += [self._run([x, None, None], training) for training in (False, True)]
        return found

    def _held(self, training: bool) -> _Seen:
        # A block may halve its map, and what it is given to hold has the size of what it makes.
        try:
            return self._run(self._inputs(1), training)
        except RaisedError as why:
            try:
                return self._run(self._inputs(2), training)
            except RaisedError:
                raise why from None

    def _inputs(self, stride: int) -> list[Tensor]:
        random, count = self.copy.random, len(parameter_names(self.block))
        x = random(2, self.channels, *MAP)
        small = [size // stride for size in MAP]
        if self.holds and count == 3:
            found = [x, random(2, DEPTH, self.dim), random(2, DEPTH, self.dim, *small)]
        elif not self.holds and count == 2:  # the output before is one of its arguments
            found = [x, random(2, self.dim, *small)]
        elif not self.holds and count == 1:
            found = [x]
        else:
            raise DisagreementError(
                "the block is called with something else than maps, keys and values"
            )
        return [t.requires_grad_() for t in found]

    def _run(self, inputs: list[Any], training: bool) -> _Seen:
        seen = _Seen(training, inputs, self._buffers(), torch.get_rng_state())
        hooks = self._watch(seen)
        try:
            result = self.copy.evaluated(*inputs, training=training)
        finally:
            for hook in hooks:
                hook.remove()
        self._check(seen, result)
        return seen

    def _watch(self, seen: _Seen) -> list[Any]:
        """Hooks that note in `seen` what happens in a run."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.calls += 1
            seen.x, seen.random = args[0].detach().clone(), torch.get_rng_state()
            seen.buffers, seen.kept = self._buffers(), kept_by(self.block, numbers=False)

        def behind(module: nn.Module, args: Any, out: Any) -> None:
            first, *state = out if isinstance(out, tuple) else (out,)
            seen.out, seen.state = first.detach().clone(), tuple(state)

        inside = set(self.attention.modules())
        hooks = [
            self.attention.register_forward_pre_hook(before),
            self.attention.register_forward_hook(behind),
        ]
        for name, module in self.names.items():
            if name and module not in inside:

                def called(module: nn.Module, args: Any, name: str = name) -> None:
                    (seen.after if seen.calls else seen.first).append(name)

                hooks.append(module.register_forward_pre_hook(called))
        return hooks

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self.block.named_buffers()}

    def _restore(self, buffers: dict[str, Tensor], random: Tensor) -> None:
        with torch.no_grad():
            for name, buffer in self.block.named_buffers():
                buffer.copy_(buffers[name])
        torch.set_rng_state(random)

    def _check(self, seen: _Seen, result: Any) -> None:
        """That the block hands on what its attention gave, and keeps nothing for itself."""
        if seen.calls != 1:
            raise DisagreementError("the block calls its attention more than once, or not at all")
        first, *state = result if isinstance(result, tuple) else (result,)
        is_same = len(state) == len(seen.state) and all(map(_is, state, seen.state))
        if not isinstance(first, Tensor) or not is_same:
            raise DisagreementError("the block does not hand on what its attention gives")
        # Not the objects that the run itself has made: hooks, and what is called before the attention.
        if kept_by(self.block, numbers=False) != seen.kept:
            raise DisagreementError("the block keeps something of what it does after its attention")
        seen.later, seen.end = self._buffers(), torch.get_rng_state()
        seen.gradients = self.copy.gradients((first, *state), seen.inputs)
        seen.results = tuple(t.detach().clone() for t in (first, *state))

    def ends_in(self, tail: Tail, seen: _Seen) -> bool:
        """Whether the run ended so: in its result, its buffers, and with these random numbers."""
        self._restore(seen.buffers, seen.random)
        self.block.train(seen.training)
        with torch.no_grad():
            norm: Any = self.block.get_submodule(tail.norm)
            o = norm(seen.out)
            if tail.act is not None:
                o = F.relu(o)
        if tail.drop_path is not None:
            mask = self._mask(tail.drop_path, o)
            if mask is None:
                return False
            o = o * mask
        if not close(seen.x + o, seen.results[0]):
            return False
        return torch.equal(torch.get_rng_state(), seen.end) and self._has(seen.later)

    def _mask(self, name: str, o: Tensor) -> Tensor | None:
        """What `name` multiplies samples with, `[B, 1, 1, 1]`; None where it does something else, backwards too."""
        module, random = self.block.get_submodule(name), torch.get_rng_state()
        ones = o.new_ones(o.shape[0], 1, 1, 1)
        mask: Any = module(ones)
        if not isinstance(mask, Tensor) or mask.shape != ones.shape:
            return None
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        given = o.detach().clone().requires_grad_()
        out = module(given)
        torch.set_rng_state(after)
        if not close(out, o * mask) or not out.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(out.sum(), given, allow_unused=True)
        return mask if gradient is not None and close(gradient, mask.expand_as(o)) else None

    def _has(self, buffers: dict[str, Tensor]) -> bool:
        """Whether the running statistics are these, up to rounding."""
        return all(
            close(b, buffers[n]) if b.is_floating_point() else torch.equal(b, buffers[n])
            for n, b in self.block.named_buffers()
        )

    def check_converted(self, seen: _Seen) -> None:
        """That the copy, converted by now, does the same from beginning to end.

        Raises:
            DisagreementError: it does not.
        """
        self._restore(seen.before, seen.start)
        result = self.copy.evaluated(*seen.inputs, training=seen.training)
        ours = [t + 0 for t in (result if isinstance(result, tuple) else (result,))]
        if len(ours) != len(seen.results) or not all(map(close, ours, seen.results)):
            raise DisagreementError("converted, the block gives another result")
        if not self._has(seen.later) or not torch.equal(torch.get_rng_state(), seen.end):
            raise DisagreementError(
                "converted, the block leaves other running statistics or random numbers"
            )
        if not same_gradients(self.copy.gradients(ours, seen.inputs), seen.gradients):
            raise DisagreementError("converted, the block has other gradients")


def _is(a: object, b: object) -> bool:
    return a is b
