"""The growing list of values of one forward pass, whose backward gathers each value's gradient once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import kernels_for
from ela_kernels.backends.position import PositionCall
from ela_kernels.backends.tracing import needs_dispatcher
from ela_kernels.explaining import served
from ela_kernels.ops.autocast import as_autocast_dtype, is_autocast_on
from ela_kernels.ops.autograd.gathering import Gathering, signs_are_in_memory
from ela_kernels.ops.autograd.record import Record, graph_task, is_recomputing
from ela_kernels.ops.checks import check_tensor
from ela_kernels.ops.layer_attention.observer import present_observer
from ela_kernels.ops.position_attention import checks
from ela_kernels.ops.position_attention.autograd import OP, readable
from ela_kernels.ops.position_attention.history_node import (
    PositionLink,
    append_pull,
    retrieve_pull,
)
from ela_kernels.ops.position_attention.interface import (
    PositionAttentionOutput,
    checked_call,
    retrieve,
    with_mean,
)
from ela_kernels.torch_internals import version_of


class PositionHistory:
    """Values and last weights of the layers of one forward pass, for :func:`ela_kernels.position_attention`.

    Make one for each forward pass; add what each layer gives with :meth:`append`, and retrieve from all of it with
    :meth:`attend`. Equivalent PyTorch: a growing list, and the functional op over it. The gradients are the same; the
    memory is not: with a kernel the gradient of a value is gathered once, from the output gradients of the layers that
    retrieved it (the pull form), instead of added up over as many gradients of its size. Where no kernel serves a call,
    and in compiled graphs, the functional op does, and the gradients meet.

    Each value is its own key. Values have one shape, dtype and device, and must not be changed in place while the
    history is in use. Kernels give first derivatives only; second ones come with `use_backend("eager")`.

    Attributes:
        last: all of the last retrieval, as of :func:`ela_kernels.position_attention`; None before the first. Its `out`
            is what a skipped :class:`ela_kernels.AttentionResidual` takes over.
        position: how many came by, those that took over a retrieval included.

    Raises:
        RuntimeError: by its methods, in a checkpoint that recomputes: it would grow a second time. Keep the history
            outside of checkpoints, or give `position_attention` a list there.

    Example:
        >>> import torch, ela_kernels as ek
        >>> history, query = ek.PositionHistory(), torch.zeros(8)
        >>> for _ in range(3):
        ...     history.append(torch.randn(2, 5, 8))
        ...     out = history.attend(query)
        >>> history.weights.shape, history.kl.shape, history.kl_mean.shape
        (torch.Size([2, 3, 5]), torch.Size([2, 5]), torch.Size([2]))
    """

    def __init__(self) -> None:
        self.last: PositionAttentionOutput | None = None
        self._version = 0  # of the last output
        self._read = 0  # how many values the last retrieval read
        self._stage: int | None = None
        self.position = 0
        self._values: list[Tensor] = []
        self._gathering = Gathering()
        self._token: Tensor | None = None
        self._record = Record()
        self._backend: KernelBackend | None = None  # that the record is of
        self._channels_last: bool | None = None
        self._made_in = graph_task()
        self._observer = present_observer()
        self._probed: PositionAttentionOutput | None = None  # for who looks on

    @property
    def is_observed(self) -> bool:
        """Whether somebody looks on, who wants to know of skipped modules too what they would retrieve."""
        return self._observer is not None

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The values held."""
        return tuple(self._values)

    @property
    def weights(self) -> Tensor | None:
        """Weights `[B, T, *positions]` of the last retrieval; None before the first."""
        return None if self.last is None else self.last.weights

    @property
    def kl(self) -> Tensor | None:
        """Divergence `[B, *positions]` of the last retrieval from the one before it; None before the second."""
        return None if self.last is None else self.last.kl

    @property
    def kl_mean(self) -> Tensor | None:
        """Its mean `[B]` over a sample's positions."""
        return None if self.last is None else self.last.kl_mean

    @property
    def unread(self) -> tuple[Tensor, ...]:
        """The values added since the last retrieval."""
        return tuple(self._values[self._read :])

    def __len__(self) -> int:
        return len(self._values)

    def append(self, value: Tensor, channels_last: bool | None = None) -> None:
        """Add a value: tokens `[B, N, C]`, a map `[B, C, H, W]`, or as `channels_last` says.

        Raises:
            TypeError, ValueError: it is none, or does not fit the values before it.
        """
        self._check_not_recomputing()
        value = check_tensor("value", value)
        if is_autocast_on(value):
            dtype = torch.get_autocast_dtype(value.device.type)
            value = as_autocast_dtype(value, dtype, "value")
        last = checks.check_channels_last(channels_last, value)
        if self._values:
            checks.check_like("value", value, self._values[0], "the first value")
            if last != self._channels_last:
                raise ValueError(
                    f"channels_last: got {last} while the first value has {self._channels_last}; allowed is one form "
                    "for all values of a history"
                )
        self._channels_last = last
        self._values.append(value)
        if needs_dispatcher(value):
            # No kernel may read it, whatever it is that is retrieved later.
            self._gathering = Gathering(is_whole=False)
            return
        is_served = signs_are_in_memory(value) and kernels_for(OP, value, 1) is not None
        have_node = is_served and torch.is_grad_enabled()
        self._gathering = self._gathering.with_tensors((value,), have_node)
        if is_served:
            self._token = append_pull(value, self._token, self._link())

    def attend(
        self,
        query: Tensor,
        norm_weight: Tensor | None = None,
        eps: float = checks.DEFAULT_EPS,
        scale: float | None = None,
        caller: Any = None,
    ) -> Tensor:
        """Retrieve from all values so far; arguments and errors as of :func:`ela_kernels.position_attention`.

        The divergence is that of the retrieval before it in this history.

        Args:
            caller: the module that calls, which :func:`ela_kernels.explain` then names.

        Returns:
            `out`, like a value. Weights and divergence are then in :attr:`weights`, :attr:`kl` and :attr:`kl_mean`.
        """
        self._check_not_recomputing()
        if not self._values:
            raise ValueError(
                "attend: got a history without a value; allowed is one with values. Call append(value) first"
            )
        prev = self.weights
        options = query, self._values, None, norm_weight, eps, scale, prev, self._channels_last
        found = None
        if not torch.compiler.is_compiling():
            call = checked_call(*options)
            found = self._pulled(call, caller)
        if found is None:
            found = retrieve(*options, caller)
        place, self.position, self._read = self.position, self.position + 1, len(self._values)
        if self._observer is not None:
            self._observer.came_by_at_positions(self, caller, place, found.weights, found.kl, True)
        return self._hold(found)

    def stage_of(self, number: int) -> int:
        """The number of the first module that came by, which stands for the stage; `number` is that of this one."""
        if self._stage is None:
            self._stage = number
        return self._stage

    def reuse(self, caller: Any = None) -> Tensor:
        """What was retrieved last, the same tensor, for a module that is skipped. Weights and divergence stay.

        Args:
            caller: the module that is skipped, for who looks on.

        Raises:
            RuntimeError: nothing was, or it was changed in place (which is not noticed in inference mode).
        """
        self._check_not_recomputing()
        if self.last is None:
            raise RuntimeError(
                "reuse: got a history from which nothing was retrieved; allowed is one after attend()"
            )
        out = self.last.out
        if _version_of(out) != self._version:
            raise RuntimeError(
                "reuse: got what was retrieved last, changed in place since, for a layer that is skipped and takes it "
                "over; allowed is that tensor as it was. Change a copy of it, out.clone()"
            )
        place, self.position = self.position, self.position + 1
        if self._observer is not None:
            probed, self._probed = self._probed, None
            weights, kl = (None, None) if probed is None else (probed.weights, probed.kl)
            self._observer.came_by_at_positions(self, caller, place, weights, kl, False)
        return out

    @torch.no_grad()
    def probe(
        self,
        query: Tensor,
        norm_weight: Tensor | None = None,
        eps: float = checks.DEFAULT_EPS,
        scale: float | None = None,
    ) -> Tensor | None:
        """The divergence that :meth:`attend` would give, without a gradient; the history stays as it is.

        As much work as a retrieval, since the keys are the values; what is retrieved is dropped.
        """
        self._check_not_recomputing()
        prev = self.weights
        options = query, self._values, None, norm_weight, eps, scale, prev, self._channels_last
        found = retrieve(*options, None)
        self._probed = found if self.is_observed else None
        return found.kl

    def choose(self, active: Tensor, before: PositionAttentionOutput) -> Tensor:
        """The last retrieval where `active`, a boolean of no dimension, is True, and else `before`, the one before it.

        For decisions that are data: as though the last had not been made. The weights are then padded with zeros, which
        changes no divergence from them; where there was none before, the divergence is NaN.
        """
        last = self.last
        assert last is not None
        later = last.weights.shape[1] - before.weights.shape[1]
        padding = [0, 0] * (last.weights.dim() - 2) + [0, later]
        weights = torch.nn.functional.pad(before.weights, padding)
        return self._hold(
            PositionAttentionOutput(
                torch.where(active, last.out, before.out),
                torch.where(active, last.weights, weights),
                _chosen(active, last.kl, before.kl),
                _chosen(active, last.kl_mean, before.kl_mean),
            )
        )

    def _hold(self, found: PositionAttentionOutput) -> Tensor:
        self.last, self._version = found, _version_of(found.out)
        return found.out

    def check_form(self, channels_last: object) -> None:
        """Refuse another form than that of the values; where there is none yet, :meth:`attend` says so.

        Raises:
            ValueError: it is another.
        """
        if self._values and channels_last is not None and channels_last != self._channels_last:
            raise ValueError(
                f"channels_last: got {channels_last} with a history whose values have {self._channels_last}; allowed "
                "is None, or the same. Say it where they are added, append(value, channels_last)"
            )

    def _pulled(self, call: PositionCall, caller: Any) -> PositionAttentionOutput | None:
        """By kernels in the pull form; None where the functional op has to serve."""
        held = self._values
        # Values that autocast casts here are others than those that gather their gradients.
        if not self._gathering.serves or any(
            a is not b for a, b in zip(call.values, held, strict=True)
        ):
            return None
        backend = kernels_for(OP, held[-1], len(held))
        # What different backends leave does not meet in a gather: beyond the depth of the first, in the push form.
        if backend is None or self._backend not in (None, backend):
            return None
        self._backend = backend
        served(caller, "op", backend.name)
        outputs, self._token = retrieve_pull(readable(call), backend, self._token, self._link())
        return with_mean(outputs)

    def _link(self) -> PositionLink:
        assert self._channels_last is not None
        return PositionLink(tuple(range(len(self._values))), self._record, self._channels_last)

    def _check_not_recomputing(self) -> None:
        if is_recomputing(self._made_in):
            raise RuntimeError(
                "PositionHistory: got a call in a checkpoint that recomputes, where it would grow a second time; "
                "allowed is a history outside of checkpoints, or position_attention with a list of values inside"
            )


def _version_of(out: Tensor) -> int:
    """Where changes are counted: neither in inference mode nor in a graph that is being compiled."""
    return 0 if torch.compiler.is_compiling() or out.is_inference() else version_of(out)


def _chosen(active: Tensor, last: Tensor | None, before: Tensor | None) -> Tensor | None:
    return (
        None if last is None else torch.where(active, last, math.nan if before is None else before)
    )
