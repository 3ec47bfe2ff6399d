"""Finds out, by running a copy, whether all that a block does after its attention is the residual block's end."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ela_kernels.conversion.blocks import FUNCTIONAL, Tail
from ela_kernels.conversion.trial import Copy, DisagreementError, close, parameter_names

MAP, DEPTH = (4, 6), 2


def find_tail(block: nn.Module, attention: str, dim: int, holds: bool) -> Tail:
    """What `block` does after the call of its submodule `attention`.

    Args:
        block: the block.
        attention: name in it of a base layer, or of the module around a light one.
        dim: channels of the attention.
        holds: whether the block is called with keys and values beside the map.

    Raises:
        DisagreementError: something else than `x + drop_path(act(norm(attention(x))))`.
    """
    run = _Run(block, attention, dim, holds)
    evaluated, trained = run(training=False), run(training=True)
    after = evaluated.after
    norms = [n for n in after if isinstance(run.names[n], nn.BatchNorm2d)]
    acts = [n for n in after if isinstance(run.names[n], nn.ReLU)]
    others = [n for n in after if n not in norms and n not in acts]
    if len(norms) != 1:
        raise DisagreementError("no BatchNorm2d follows the attention, or several do")
    if len(others) > 1 or after != trained.after:
        raise DisagreementError(
            "more than a norm, an activation and a drop path follow the attention"
        )
    parts = attention.split(".")
    between = tuple(".".join(parts[:i]) for i in range(1, len(parts)))
    for act, drop_path in product([*acts, None, FUNCTIONAL], [*others, None]):
        tail = Tail(attention, between, norms[0], act, drop_path)
        if all(run.ends_in(tail, seen) for seen in (evaluated, trained)):
            return tail
    raise DisagreementError("something else than the end of a residual block follows the attention")


@dataclass
class _Seen:
    """One run of a block: what its attention was given and gave, what was called after it, and how it ended."""

    training: bool
    calls: int = 0
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    state: tuple[Any, ...] = ()
    random: Tensor = field(default_factory=lambda: torch.empty(0))
    buffers: dict[str, Tensor] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    result: Tensor = field(default_factory=lambda: torch.empty(0))
    later: dict[str, Tensor] = field(default_factory=dict)


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

    def __call__(self, training: bool) -> _Seen:
        failure: DisagreementError | None = None
        # A block may halve its map, and what it is given to hold has the size of what it makes.
        for stride in (1, 2):
            seen, held = _Seen(training), dict(vars(self.block))
            hooks = self._watch(seen)
            try:
                result = self.copy.evaluated(*self._inputs(stride), training=training)
            except DisagreementError as why:
                failure = why
            else:
                self._check(seen, result, held)
                return seen
            finally:
                for hook in hooks:
                    hook.remove()
        assert failure is not None
        raise failure

    def _inputs(self, stride: int) -> list[Tensor]:
        random, count = self.copy.random, len(parameter_names(self.block))
        x = random(2, self.channels, *MAP)
        small = [size // stride for size in MAP]
        if self.holds and count == 3:
            return [x, random(2, DEPTH, self.dim), random(2, DEPTH, self.dim, *small)]
        if not self.holds and count == 2:  # the output before is one of its arguments
            return [x, random(2, self.dim, *small)]
        if not self.holds and count == 1:
            return [x]
        raise DisagreementError(
            "the block is called with something else than maps, keys and values"
        )

    def _watch(self, seen: _Seen) -> list[Any]:
        """Hooks that note in `seen` what happens in a run."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.calls += 1
            seen.x, seen.random, seen.buffers = (
                args[0].clone(),
                torch.get_rng_state(),
                self._buffers(),
            )

        def behind(module: nn.Module, args: Any, out: Any) -> None:
            first, *state = out if isinstance(out, tuple) else (out,)
            seen.out, seen.state = first.clone(), tuple(state)

        inside = set(self.attention.modules())
        hooks = [
            self.attention.register_forward_pre_hook(before),
            self.attention.register_forward_hook(behind),
        ]
        for name, module in self.names.items():
            if name and module not in inside:

                def called(module: nn.Module, args: Any, name: str = name) -> None:
                    if seen.calls:
                        seen.after.append(name)

                hooks.append(module.register_forward_pre_hook(called))
        return hooks

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.block.named_buffers()}

    def _check(self, seen: _Seen, result: Any, held: dict[str, Any]) -> None:
        """That the block hands on what its attention gave, and keeps nothing for itself."""
        if seen.calls != 1:
            raise DisagreementError("the block calls its attention more than once, or not at all")
        first, *state = result if isinstance(result, tuple) else (result,)
        is_same = len(state) == len(seen.state) and all(map(_is, state, seen.state))
        if not isinstance(first, Tensor) or not is_same:
            raise DisagreementError("the block does not hand on what its attention gives")
        now = {name: value for name, value in vars(self.block).items() if name != "training"}
        if any(held.get(name, now) is not value for name, value in now.items()):
            raise DisagreementError("the block's forward keeps something in the block")
        seen.result, seen.later = first.clone(), self._buffers()

    def ends_in(self, tail: Tail, seen: _Seen) -> bool:
        """Whether the run ended so: in its result, its buffers, and with these random numbers."""
        for name, buffer in self.block.named_buffers():
            buffer.copy_(seen.buffers[name])
        torch.set_rng_state(seen.random)
        self.block.train(seen.training)
        norm: Any = self.block.get_submodule(tail.norm)
        o = norm(seen.out)
        if tail.act is not None:
            o = F.relu(o)
        if tail.drop_path is not None:
            o = o * self.block.get_submodule(tail.drop_path)(o.new_ones(o.shape[0], 1, 1, 1))
        if not close(seen.x + o, seen.result):
            return False
        return all(torch.equal(b, seen.later[name]) for name, b in self.block.named_buffers())


def _is(a: object, b: object) -> bool:
    return a is b
