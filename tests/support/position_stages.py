"""A network of layers that retrieve by position_attention, in the pull form and in the push form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.layouts import contiguous
from torch import Tensor

import ela_kernels as ek

DEPTH = 4


class Stage:
    """A network of a few layers whose inputs are retrieved; leaves are `x`, queries, norm weights and layers."""

    def __init__(self, shape=(2, 5, 6), dtype=torch.float64, layout=contiguous, last=True) -> None:
        self.last, channels = last, shape[-1 if last else 1]
        self.x = layout(shape, dtype)
        self.queries = [torch.randn(channels, dtype=dtype) for _ in range(DEPTH)]
        self.norms = [torch.rand(channels, dtype=dtype) + 0.5 for _ in range(DEPTH)]
        self.layers = [torch.randn(channels, dtype=dtype) for _ in range(DEPTH)]

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.queries, *self.norms, *self.layers]

    def fresh(self) -> list[Tensor]:
        """Leaves that require grad, in place of those of before."""
        made = [t.detach().requires_grad_() for t in self.leaves()]
        self.x, self.queries, self.norms, self.layers = (
            made[0],
            made[1 : 1 + DEPTH],
            made[1 + DEPTH : 1 + 2 * DEPTH],
            made[1 + 2 * DEPTH :],
        )
        return made

    def layer(self, t: int, x: Tensor) -> Tensor:
        weight = self.layers[t]
        weight = weight if self.last else weight.reshape(-1, *[1] * (x.dim() - 2))
        return (x * weight).tanh()

    def pulled(self) -> tuple[list[Tensor], list[Any]]:
        history, outs, found = ek.PositionHistory(), [], []
        x = self.x * 1
        for t in range(DEPTH):
            history.append(x, channels_last=self.last)
            out = history.attend(self.queries[t], self.norms[t])
            outs.append(out)
            found.append((history.weights, history.kl, history.kl_mean))
            x = self.layer(t, out)
        return outs, found

    def pushed(self) -> tuple[list[Tensor], list[Any]]:
        values, prev, outs, found = [], None, [], []
        x = self.x * 1
        for t in range(DEPTH):
            values.append(x)
            r = ek.position_attention(
                self.queries[t],
                values,
                norm_weight=self.norms[t],
                prev_weights=prev,
                channels_last=self.last,
            )
            outs.append(r.out)
            found.append(tuple(r)[1:])
            prev = r.weights
            x = self.layer(t, r.out)
        return outs, found


def gradients(stage: Stage, run: Callable[[], Any], loss: Callable[[Any, Any], Tensor]) -> Any:
    leaves = stage.fresh()
    outs, found = run()
    grads = torch.autograd.grad(loss(outs, found), leaves, allow_unused=True)
    return outs, [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


LOSSES = {
    "the last output": lambda outs, _: outs[-1].sin().sum(),
    "every output": lambda outs, _: sum((1 + t) * o.square().sum() for t, o in enumerate(outs)),
    "an output in the middle": lambda outs, _: outs[1].sin().sum(),
    "weights": lambda _, found: found[-1][0].square().sum() + found[2][0].sin().sum(),
    "divergences": lambda _, found: sum(f[1].sum() + 2 * f[2].sum() for f in found[1:]),
    "all": lambda outs, found: outs[-1].sin().sum() + outs[1].sum() + found[-1][2].sum(),
}
