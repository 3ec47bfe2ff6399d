"""Values and retrievals of a history as autograd nodes, with the pull form of the backward.

Nodes pass on a token, as those of layer attention do, so that the engine runs them in reverse order: every retrieval
has left its part when the node of a value that it read gathers them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.layout import in_form, is_interleaved
from ela_kernels.backends.position import PositionCall, PositionLeft, PositionNeeds
from ela_kernels.ops.autograd.gradients import (
    check_unchanged,
    refuse_second_derivative,
    with_own_memory,
)
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.record import (
    Record,
    applied,
    new_token,
    refuse_other_kernels,
    token_gradient,
)
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.position_attention.reference import Outputs
from ela_kernels.torch_internals import runs_as_written, version_of


class PositionLink(NamedTuple):
    """A node's place in its history: the numbers of the values up to it, and where parts are left."""

    path: tuple[int, ...]
    record: Record
    channels_last: bool


class Left(NamedTuple):
    """What a retrieval left in the record, and whose kernels can read it."""

    backend: KernelBackend
    part: PositionLeft

    @property
    def dscores(self) -> Tensor:
        return self.part.coefficients

    @property
    def dout(self) -> Tensor | None:
        return self.part.dout

    @property
    def dout_version(self) -> int:
        return self.part.dout_version


def _keep(ctx: Any, link: PositionLink, token: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.path, ctx.record, ctx.channels_last = link
    ctx.token = token


def _refuse_second_derivative() -> None:
    refuse_second_derivative("PositionHistory", "position_attention")


@opaque
class _Value(torch.autograd.Function):
    """A value that retrievals to come will read."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, token: Tensor | None, link: PositionLink) -> Tensor:
        _keep(ctx, link, token)
        save(ctx, value)
        return new_token(token, value)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        dvalue = None
        left: list[Any] = ctx.record.contributions(ctx.path) if ctx.needs_input_grad[0] else []
        if left:
            for one in left:
                check_unchanged(one.dout, one.dout_version)
                if one.backend is not left[0].backend:
                    refuse_other_kernels("PositionHistory")
            (value,) = unpacked(ctx)
            dvalue = left[0].backend.position_gather(
                value, [one.part for one in left], len(ctx.path) - 1, ctx.channels_last
            )
        return dvalue, token_gradient(ctx, ctx.token), None


@opaque
class _Retrieve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        query: Tensor | None,
        prev: Tensor | None,
        call: PositionCall,
        backend: KernelBackend,
        token: Tensor | None,
        link: PositionLink,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        _keep(ctx, link, token)
        ctx.form, ctx.backend = (call.normed, call.eps), backend
        out, weights, kl = backend.position_attend(call)
        save(ctx, row, query, prev, weights, *call.values)
        return out, weights, kl, new_token(token, row)

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        drow = dquery = dprev = None
        if dout is not None or dweights is not None or dkl is not None:
            row, query, prev, weights, *values = unpacked(ctx)
            # Gathers read it by its address; a hook may have given it back with other strides.
            weights = weights.contiguous()
            dout, dweights, dkl = (
                None if d is None else with_own_memory(d, "PositionHistory")
                for d in (dout, dweights, dkl)
            )
            if dout is not None:
                interleaved = is_interleaved(values[-1], ctx.channels_last)
                dout = in_form(dout, ctx.channels_last, interleaved)
            (normed, eps), (row_needed, query_needed, prev_needed) = (
                ctx.form,
                ctx.needs_input_grad[:3],
            )
            call = PositionCall(row, query, values, None, normed, eps, prev, ctx.channels_last)
            needs = PositionNeeds(row_needed, query_needed, prev_needed, (), ())
            found = ctx.backend.position_attend_backward(call, weights, dout, dweights, dkl, needs)
            drow, dquery, dprev = found.row, found.query, found.prev
            version = 0 if dout is None else version_of(dout)
            part = PositionLeft(row, query, weights, found.coefficients, dout, version)
            ctx.record.add(ctx.path, Left(ctx.backend, part))
        return drow, dquery, dprev, None, None, token_gradient(ctx, ctx.token), None


@runs_as_written
def retrieve_pull(
    call: PositionCall, backend: KernelBackend, token: Tensor | None, link: PositionLink
) -> tuple[Outputs, Tensor | None]:
    """`(out, weights, kl)` and the token that goes on."""
    if not torch.is_grad_enabled():
        return backend.position_attend(call), token
    # Without their graph: the values' gradients go by the record.
    plain = call._replace(
        row=call.row.detach(),
        query=None if call.query is None else call.query.detach(),
        prev_weights=None if call.prev_weights is None else call.prev_weights.detach(),
    )
    out, weights, kl, own = applied(
        _Retrieve, call.row, call.query, call.prev_weights, plain, backend, token, link
    )
    return (out, weights, kl), own if own.requires_grad else token


@runs_as_written
def append_pull(value: Tensor, token: Tensor | None, link: PositionLink) -> Tensor | None:
    """The token after a value that was added."""
    if not torch.is_grad_enabled():
        return token
    own: Tensor = applied(_Value, value, token, link)
    return own if own.requires_grad else token
