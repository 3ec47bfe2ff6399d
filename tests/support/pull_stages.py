"""Stages of layers whose queries, keys and values are given, and what rounding may do to their gradients.

In them nothing is chained from layer to layer but the history, so that what one layer's rounding does stays in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.cases import Case, Maker
from support.layouts import contiguous
from support.oracle import largest, oracle, tolerances
from torch import Tensor

import ela_kernels as ek

Wanted = Callable[[str, int], bool]


class Stage:
    """A random stage; `makers` lay the values out, `douts` the output gradients, repeated in turn.

    `provide` are the layers that retrieve nothing, `used` those at whose outputs gradients arrive (all where None), and
    `through` the names of these outputs. `wanted` tells of a kind (`q`, `k` or `v`) and a layer whether its gradient is
    asked for.
    """

    def __init__(
        self,
        shape: Sequence[int],
        heads: int,
        depth: int,
        dtype: torch.dtype,
        makers: Maker | Sequence[Maker] = contiguous,
        channels_last: bool = False,
        provide: Sequence[int] = (),
        through: str = "out weights kl",
        douts: Maker | Sequence[Maker] | None = None,
        used: Sequence[int] | None = None,
        wanted: Wanted = lambda kind, layer: True,
    ) -> None:
        makers = [makers] if callable(makers) else list(makers)
        douts = makers if douts is None else [douts] if callable(douts) else list(douts)
        batch, channels = shape[0], shape[-1 if channels_last else 1]
        self.heads, self.channels_last, self.provide, self.through = (
            heads,
            channels_last,
            provide,
            through,
        )
        self.used = range(depth) if used is None else used
        self.wanted = wanted
        accumulate = torch.promote_types(dtype, torch.float32)
        rows = [torch.randn(batch, channels).to(dtype) for _ in range(2 * depth)]
        self.inputs = {
            "q": rows[:depth],
            "k": rows[depth:],
            "v": [makers[t % len(makers)](shape, dtype) for t in range(depth)],
        }
        self.dout = [douts[t % len(douts)](shape, dtype) for t in range(depth)]
        self.dweights = [torch.randn(batch, heads, t + 1, dtype=accumulate) for t in range(depth)]
        self.dkl = [torch.randn(batch, heads, dtype=accumulate) for _ in range(depth)]

    def run(
        self, put: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[list[Tensor], dict[str, list[Tensor | None]]]:
        """Outputs, and gradients of every query, key and value through a LayerHistory, under the backend in force.

        `put` puts a tensor where the backend runs.
        """
        leaves = {
            kind: [put(x.detach()).requires_grad_(self.wanted(kind, t)) for t, x in enumerate(xs)]
            for kind, xs in self.inputs.items()
        }
        history, outs, roots, arriving = ek.LayerHistory(), [], [], []
        options: dict[str, Any] = {"heads": self.heads, "channels_last": self.channels_last}
        for t, (q, k, v) in enumerate(zip(leaves["q"], leaves["k"], leaves["v"], strict=True)):
            if t in self.provide:
                history.provide(k, v, **options)
                continue
            out = history.attend(q, k, v, **options)
            outs.append(out.detach().cpu())
            named = {"out": out, "weights": history.weights, "kl": history.kl}
            coming = {"out": self.dout[t], "weights": self.dweights[t], "kl": self.dkl[t]}
            for name, root in named.items():
                has_gradient = root is not None and root.requires_grad
                if has_gradient and t in self.used and name in self.through:
                    roots.append(root)
                    arriving.append(put(coming[name]))
        flat = [x for xs in leaves.values() for x in xs if x.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(flat)
        if roots:
            grads = torch.autograd.grad(roots, flat, arriving, allow_unused=True)
        found = iter([g if g is None else g.cpu() for g in grads])
        return outs, {
            kind: [next(found) if x.requires_grad else None for x in xs]
            for kind, xs in leaves.items()
        }

    def expected(self) -> tuple[dict[str, list[Tensor]], dict[str, list[float]]]:
        """The same gradients from the oracle of single calls, last layer first, and what rounding may add to each.

        A layer's previous weights are another layer's output, so the gradient that arrives at these is the sum of the
        caller's and of that layer's `d prev_weights`; the error of the latter goes into the scores' gradient, whose
        softmax backward takes it twice. That the kernels' previous weights are rounded is a relative error below
        `factor` of :func:`support.oracle.tolerances`, which counts it once: twice its tolerance has room for it.
        """
        depth = len(self.inputs["q"])
        sums = {
            n: [torch.zeros(x.shape, dtype=torch.float64) for x in xs]
            for n, xs in self.inputs.items()
        }
        allowed = {n: [0.0] * depth for n in sums}
        cases = self.cases()
        carried, carried_error = None, 0.0
        for t, case in reversed(cases.items()):
            if carried is not None:
                case.dweights = carried if case.dweights is None else case.dweights + carried
            found, tolerance = oracle(case), tolerances(case)
            scale = (case.q.shape[1] // self.heads) ** -0.5
            more_q = 2 * carried_error * scale * largest(case.keys)
            more_k = 2 * carried_error * scale * largest([case.q])
            sums["q"][t] += found["d q"]
            allowed["q"][t] += 2 * tolerance["d q"] + more_q
            for j in range(t + 1):
                sums["k"][j] += found[f"d keys[{j}]"]
                allowed["k"][j] += 2 * tolerance[f"d keys[{j}]"] + more_k
                sums["v"][j] += found[f"d values[{j}]"]
                allowed["v"][j] += 2 * tolerance[f"d values[{j}]"]
            carried, carried_error = found.get("d prev_weights"), 2 * tolerance["d prev_weights"]
        return sums, allowed

    def cases(self) -> dict[int, Case]:
        """Each retrieving layer as a call of its own, with its previous layer's weights in float64."""
        cases: dict[int, Case] = {}
        prev = None
        for t in range(len(self.inputs["q"])):
            if t in self.provide:
                continue
            case = Case(
                self.inputs["q"][t],
                self.inputs["k"][: t + 1],
                self.inputs["v"][: t + 1],
                self.heads,
                prev_weights=prev,
                channels_last=self.channels_last,
            )
            if t in self.used:
                case.dout = self.dout[t] if "out" in self.through else None
                case.dweights = self.dweights[t] if "weights" in self.through else None
                has_kl = "kl" in self.through and prev is not None
                case.dkl = self.dkl[t] if has_kl else None
            case.wanted = list(case.inputs())
            prev = oracle(case)["weights"].detach()
            cases[t] = case
        return cases


def check_stage(stage: Stage, put: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Outputs and gradients of a stage are the oracle's, within what rounding explains."""
    outs, found = stage.run(put)
    for out, case in zip(outs, stage.cases().values(), strict=True):
        info = torch.finfo(out.dtype)
        error = 2 * tolerances(case)["out"] + info.smallest_normal * info.eps
        torch.testing.assert_close(
            out.double(), oracle(case)["out"].detach(), rtol=info.eps, atol=error
        )
    sums, allowed = stage.expected()
    for name, exact in sums.items():
        for t, (x, y, error) in enumerate(zip(found[name], exact, allowed[name], strict=True)):
            if x is None:
                assert not (stage.wanted(name, t) and y.any()), f"{name}[{t}]"
                continue
            info = torch.finfo(x.dtype)
            torch.testing.assert_close(
                x.double(),
                y,
                rtol=info.eps,
                atol=error + info.smallest_normal * info.eps,
                msg=lambda text, name=name, t=t: f"d {name}[{t}]: {text}",
            )
