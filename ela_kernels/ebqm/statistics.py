"""The running divergence of every layer: gathered on the device, read once a decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ela_kernels.modules.observations import BAD, COUNT, SUM, totals_of

# Rows of the state: the weighted sum of divergences, the sum of its weights, steps since the layer was last seen,
# and how many values were not finite since the last decision.
_SUM, _WEIGHT, _GAP, _BAD = range(4)
ROWS = 4


def bounded_divergence(kl: Tensor) -> Tensor:
    """`mean over batch and heads of 1 - exp(-kl)`, for divergences `[..., B, G]`: our definition of x_t.

    Bounded before it is averaged: weights are often nearly one-hot, and a single head's divergence then ranges from 0
    to over 100, so that a mean of it would be a mean of outliers. By the Bretagnolle-Huber inequality the total
    variation between the two layers' weights is at most `sqrt(1 - exp(-kl))`.
    """
    return (-torch.expm1(-kl.float())).clamp(0.0, 1.0).mean((-2, -1))


class Statistics:
    """Exponential moving averages of the layers' divergences, bias-corrected, as one small tensor `[4, L]`.

    A layer seen again after n steps is averaged as though it had shown that value for all n of them: so the average of
    a skipped layer, which is seen only when it is probed, follows as fast as any other's. With s the smoothing::

        sum <- s**n * sum + (1 - s**n) * x,    weight <- s**n * weight + (1 - s**n),    x_t = sum / weight

    A value that is not finite is counted and otherwise left out.
    """

    def __init__(self, layers: int, smoothing: float, device: torch.device | None = None) -> None:
        device = torch.device("cpu") if device is None else device
        self.state = torch.zeros((ROWS, layers), dtype=torch.float32, device=device)
        self.smoothing = smoothing
        # An index tensor made anew every step would stop the host at each copy to the device.
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._hosts: Any = None  # a process group of the hosts, where the model's has none

    def update(
        self,
        observations: Sequence[Sequence[Tensor]],
        totals: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Take in one training step.

        Args:
            observations: for each layer the divergences `[B, G]` of its forward passes, or none.
            totals: by the layer's number what was added up of other passes: the sum of `1 - exp(-kl)`, of how many, and
                how many passes had one that is not finite.
        """
        totals = {} if totals is None else totals
        if totals:
            totals = {i: sum(map(totals_of, observations[i]), t) for i, t in totals.items()}
            observations = [() if i in totals else kls for i, kls in enumerate(observations)]
        seen, values = self._averages(observations)
        found = [] if values is None else [(seen, values, torch.ones_like(values))]
        if totals:
            rows = torch.stack(list(totals.values())).to(torch.float32)
            values = torch.where(rows[:, BAD] > 0, math.nan, rows[:, SUM] / rows[:, COUNT])
            found.append(
                (tuple(totals), values, (rows[:, COUNT] + rows[:, BAD] > 0).to(values.dtype))
            )
        if found and found[0][1].device != self.state.device:
            self.state = self.state.to(found[0][1].device)
        state = self.state
        total, weight, gap, bad = state.unbind(0)
        gap = gap + 1.0
        if found:
            # NaN stands for "not seen" from here on, so that every step below is one operation for all layers.
            x, is_seen = torch.full_like(total, math.nan), torch.zeros_like(total)
            for numbers, values, flags in found:
                index = self._index(numbers, state.device)
                x = x.index_copy(0, index, values.to(state.device))
                is_seen = is_seen.index_copy(0, index, flags.to(state.device))
            finite = x.isfinite()
            decay = torch.where(finite, torch.pow(self.smoothing, gap), 1.0)
            total = decay * total + (1.0 - decay) * torch.where(finite, x, 0.0)
            weight = decay * weight + (1.0 - decay)
            bad = bad + is_seen * (~finite)
            gap = torch.where(finite, 0.0, gap)
        self.state = torch.stack((total, weight, gap, bad))

    def average_over_processes(self, group: Any, device: torch.device) -> None:
        """Make all processes' statistics their mean. Does nothing without `torch.distributed`.

        They meet on `device`, the model's, or where the group can work: one of NCCL knows no host, and the statistics
        are on the host as long as nothing was seen.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        processes = distributed.get_world_size(group)
        if processes > 1:
            place, group = self._meeting_place(group, device)
            state = self.state.to(place)
            distributed.all_reduce(state, group=group)
            self.state = state / processes

    def _meeting_place(self, group: Any, device: torch.device) -> tuple[torch.device, Any]:
        """Where the processes of `group` can average, and the group that can."""
        config = distributed.get_backend_config(group)
        served = {part.partition(":")[0] for part in config.split(",")}
        if device.type in served:
            return device, group
        if "cuda" in served and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), group
        if self._hosts is None:
            ranks = distributed.get_process_group_ranks(group)
            self._hosts = distributed.new_group(
                ranks, backend="gloo", use_local_synchronization=True
            )
        return torch.device("cpu"), self._hosts

    def keep(self, columns: Sequence[int | None]) -> None:
        """Go on with other layers: each has the column of an old one, or None for a new one that was never seen."""
        state = self.state
        fresh = torch.zeros_like(state[:, :1])
        parts = [fresh if i is None else state[:, i : i + 1] for i in columns]
        self.state = torch.cat(parts, 1)

    def load(self, state: Tensor, device: torch.device) -> None:
        """Take over the state of another run."""
        self.state = state.detach().to(device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hosts": None}  # a process group belongs to its process

    def read(self) -> list[float | None]:
        """Each layer's divergence on the host: None when never seen, NaN with a bad value since the last decision."""
        rows = self.state.double().cpu()
        return [
            math.nan if bad > 0 else None if weight == 0 else total / weight
            for total, weight, bad in zip(
                rows[_SUM].tolist(), rows[_WEIGHT].tolist(), rows[_BAD].tolist(), strict=True
            )
        ]

    def forget_bad(self) -> None:
        """Start counting anew what is not finite."""
        self.state[_BAD] = 0.0

    def _averages(
        self, observations: Sequence[Sequence[Tensor]]
    ) -> tuple[tuple[int, ...], Tensor | None]:
        """The layers seen, and the divergence of each: one pass for all layers of a shape."""
        groups: dict[tuple[torch.Size, torch.device], list[tuple[int, Tensor]]] = {}
        for i, kls in enumerate(observations):
            if not kls:
                continue
            kl = kls[0] if len(kls) == 1 else torch.cat([k.to(kls[0].device) for k in kls])
            if kl.numel():
                groups.setdefault((kl.shape, kl.device), []).append((i, kl))
        if not groups:
            return (), None
        seen = tuple(i for members in groups.values() for i, _ in members)
        means = [
            bounded_divergence(torch.stack([kl for _, kl in members]))
            for members in groups.values()
        ]
        return seen, torch.cat([m.to(means[0].device) for m in means])

    def _index(self, seen: tuple[int, ...], device: torch.device) -> Tensor:
        index = self._indices.get((seen, device))
        if index is None:
            # A pattern belongs to a set of decisions: old ones do not come back often.
            if len(self._indices) >= 32:
                self._indices.clear()
            index = self._indices[seen, device] = torch.tensor(seen, device=device)
        return index
