"""One retrieval over a history in one autograd node, from query, key and value, with the pull form of the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.layout import in_form, is_interleaved
from ela_kernels.backends.types import Saved
from ela_kernels.ops.autograd.gradients import refuse_second_derivative, with_own_memory
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.record import applied, new_token, token_gradient
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.layer_attention.link import Link, contributions, keep
from ela_kernels.torch_internals import runs_as_written


def _gather(ctx: Any, need_key: bool, need_value: bool) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer that `ctx` belongs to."""
    left = contributions(ctx)
    if not left:
        return None, None
    index = len(ctx.path) - 1
    gathered: tuple[Tensor | None, Tensor | None] = ctx.backend.gather(
        left, index, ctx.heads, ctx.channels_last, need_key, need_value
    )
    return gathered


def _attended(
    q: Tensor, prev_weights: Tensor | None, link: Link
) -> tuple[Tensor, Tensor, Tensor | None]:
    return link.backend.attend(
        q,
        link.keys,
        link.values,
        link.heads,
        link.scale,
        prev_weights,
        link.channels_last,
        link.tolerance,
    )


@opaque
class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prev_weights: Tensor | None,
        token: Tensor | None,
        link: Link,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        keep(ctx, link)
        ctx.token = token
        out, weights, kl = _attended(q, prev_weights, link)
        save(ctx, q, weights, prev_weights, *link.keys, *link.values)
        return out, weights, kl, new_token(token, q)

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        need_q, need_k, need_v, need_prev = ctx.needs_input_grad[:4]
        dq = dprev = None
        if dout is not None or dweights is not None or dkl is not None:
            q, weights, prev_weights, *maps = unpacked(ctx)
            depth = len(maps) // 2
            values = maps[depth:]
            dout, dweights, dkl = (
                None if d is None else with_own_memory(d) for d in (dout, dweights, dkl)
            )
            if dout is not None:
                # A user's value may be in no form that the kernels read, and the gradient be strided as it is.
                form = ctx.channels_last, is_interleaved(values[-1], ctx.channels_last)
                dout = in_form(dout, *form)
            saved = Saved(
                q,
                maps[:depth],
                values,
                ctx.heads,
                ctx.scale,
                prev_weights,
                weights,
                ctx.channels_last,
                ctx.tolerance,
            )
            found = ctx.backend.attend_backward(saved, dout, dweights, dkl, need_q, need_prev)
            dq, dprev = found.dq, found.dprev
            contribution = ctx.backend.contribution(
                q, weights, found.dscores, dout, ctx.channels_last, ctx.tolerance
            )
            ctx.record.add(ctx.path, contribution)
        dk, dv = _gather(ctx, need_k, need_v)
        return dq, dk, dv, dprev, token_gradient(ctx, ctx.token), None


@opaque
class _Provide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, token: Tensor | None, link: Link) -> Tensor:
        keep(ctx, link)
        ctx.token = token
        return new_token(token, k)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dk, dv = _gather(ctx, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return dk, dv, token_gradient(ctx, ctx.token), None


@runs_as_written
def attend_pull(
    q: Tensor, k: Tensor, v: Tensor, token: Tensor | None, prev_weights: Tensor | None, link: Link
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`(out, weights, kl, token)`; the token of the last layer that has a gradient goes on."""
    if not torch.is_grad_enabled():
        out, weights, kl = _attended(q, prev_weights, link)
        return out, weights, kl, token
    out, weights, kl, own = applied(_Attend, q, k, v, prev_weights, token, link)
    return out, weights, kl, own if own.requires_grad else token


@runs_as_written
def provide_pull(k: Tensor, v: Tensor, token: Tensor | None, link: Link) -> Tensor | None:
    """The token after a layer that gives its pair and retrieves nothing."""
    if not torch.is_grad_enabled():
        return token
    own = applied(_Provide, k, v, token, link)
    return own if own.requires_grad else token
