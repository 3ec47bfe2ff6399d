"""The running moments of every layer's divergence: gathered on the device, read once a decision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from ela_kernels.ebqm.beta import fit_beta, score
from ela_kernels.modules.observations import BAD, COUNT, SQUARES, SUM, sums_dtype, totals_of

# Rows of the state: the weighted sums of z and of its square, the sum of the weights, steps since the layer was last
# seen, and how many values were not finite since the last decision.
_MOMENTS, _WEIGHT, _GAP, _BAD = slice(0, 2), 2, 3, 4
ROWS = 5


class Moments(NamedTuple):
    """Of z = 1 - exp(-kl), over images, heads and steps; NaN both of a layer with values that were not finite."""

    mean: float
    second: float

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return self.mean if math.isnan(self.mean) else math.sqrt(fit_beta(*self).variance)

    def score(self, quantile: float) -> float:
        """By :func:`ela_kernels.ebqm.score`; NaN of NaN."""
        return self.mean if math.isnan(self.mean) else score(*self, quantile)


def moments(kl: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of `z = 1 - exp(-kl)` over batch and heads, for divergences `[..., B, G]`.

    Bounded before it is averaged: weights are often nearly one-hot, and a single head's divergence then ranges from 0
    to over 100, so that its moments would be those of outliers. By the Bretagnolle-Huber inequality the total
    variation between the two layers' weights is at most `sqrt(1 - exp(-kl))`.
    """
    # Exact in float64, in which a variance is no noise of the two that it is the difference of.
    negative = torch.expm1(-kl.float()).clamp_(-1.0, 0.0).to(sums_dtype(kl.device))
    mean = -negative.mean((-2, -1))
    return mean, negative.square_().mean((-2, -1))


class Statistics:
    """Exponential moving averages of the moments of the layers' divergences, as one small tensor `[5, L]`.

    Bias-corrected. A layer seen again after n steps is averaged as though it had shown those values for all n of them:
    so the average of a skipped layer, which is seen only when it is probed, follows as fast as any other's. With s the
    smoothing, for z and alike for its square::

        sum <- s**n * sum + (1 - s**n) * mean(z),    weight <- s**n * weight + (1 - s**n),    m = sum / weight

    A value that is not finite is counted and otherwise left out. Sums are in float64 on the CPU and with CUDA, where
    the variance `m2 - m * m` is exact to 1e-14 of `m * m` or so; elsewhere in float32, to 1e-6 of it, which moves a
    score by some thousandths of `m`.
    """

    def __init__(self, layers: int, smoothing: float, device: torch.device | None = None) -> None:
        device = torch.device("cpu") if device is None else device
        self.state = torch.zeros((ROWS, layers), dtype=sums_dtype(device), device=device)
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
            totals: by the layer's number what was added up of other passes: the sums of z and of its square, of how
                many, and how many passes had one that is not finite.
        """
        totals = {} if totals is None else totals
        if totals:
            totals = {i: sum(map(totals_of, observations[i]), t) for i, t in totals.items()}
            observations = [() if i in totals else kls for i, kls in enumerate(observations)]
        seen, values = self._averages(observations)
        found = [] if values is None else [(seen, values)]
        if totals:
            rows = torch.stack(list(totals.values()), 1)
            means = rows[SUM : SQUARES + 1] / rows[COUNT]
            means = torch.where(rows[BAD] > 0, math.nan, means)
            is_seen = rows[COUNT] + rows[BAD] > 0
            found.append((tuple(totals), torch.cat((means, is_seen.to(means.dtype)[None]))))
        if found and found[0][1].device != self.state.device:
            device = found[0][1].device
            self.state = self.state.to(device, sums_dtype(device))
        state = self.state
        sums, weight, gap, bad = state[_MOMENTS], state[_WEIGHT], state[_GAP], state[_BAD]
        gap = gap + 1.0
        if found:
            # NaN stands for "not seen" from here on, so that every step below is one operation for all layers.
            x = torch.full_like(state[:3], math.nan)
            for numbers, values in found:
                x = x.index_copy_(1, self._index(numbers, state.device), values.to(state))
            means, is_seen = x[:2], x[2] > 0  # NaN is not
            finite = means[1].isfinite()
            decay = torch.where(finite, torch.pow(self.smoothing, gap), 1.0)
            sums = decay * sums + (1.0 - decay) * torch.where(finite, means, 0.0)
            weight = decay * weight + (1.0 - decay)
            bad = bad + (is_seen & ~finite)
            gap = torch.where(finite, 0.0, gap)
        self.state = torch.cat((sums, torch.stack((weight, gap, bad))))

    def average_over_processes(self, group: Any, device: torch.device) -> None:
        """Make all processes' statistics their mean. Does nothing without `torch.distributed`."""
        self.state = self.mean_over_processes(self.state, group, device)

    def mean_over_processes(self, values: Tensor, group: Any, device: torch.device) -> Tensor:
        """The mean of all processes' `values`; `values` itself without `torch.distributed`.

        They meet on `device`, the model's, or where the group can work: one of NCCL knows no host, and the statistics
        are on the host as long as nothing was seen.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return values
        processes = distributed.get_world_size(group)
        if processes <= 1:
            return values
        place, group = self._meeting_place(group, device)
        # On every process the same dtype, whatever each has seen.
        total = values.to(place, sums_dtype(place), copy=True)
        distributed.all_reduce(total, group=group)
        return total / processes

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
        self.state = state.detach().to(device, sums_dtype(device), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hosts": None}  # a process group belongs to its process

    def read(self) -> list[Moments | None]:
        """Each layer's moments on the host: None when never seen, NaN with a bad value since the last decision."""
        bad = Moments(math.nan, math.nan)
        return [
            bad
            if n > 0
            else None
            if weight == 0
            else Moments(min(total / weight, 1.0), squares / weight)
            for total, squares, weight, _, n in self.state.cpu().double().t().tolist()
        ]

    def forget_bad(self) -> None:
        """Start counting anew what is not finite."""
        self.state[_BAD] = 0.0

    def _averages(
        self, observations: Sequence[Sequence[Tensor]]
    ) -> tuple[tuple[int, ...], Tensor | None]:
        """The layers seen, and of each mean, mean square and one `[3, n]`: one pass for all layers of a shape."""
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
        rows = []
        for members in groups.values():
            mean, second = moments(torch.stack([kl for _, kl in members]))
            rows.append(torch.stack((mean, second, torch.ones_like(mean))))
        return seen, torch.cat([row.to(rows[0]) for row in rows], 1)

    def _index(self, seen: tuple[int, ...], device: torch.device) -> Tensor:
        index = self._indices.get((seen, device))
        if index is None:
            # A pattern belongs to a set of decisions: old ones do not come back often.
            if len(self._indices) >= 32:
                self._indices.clear()
            index = self._indices[seen, device] = torch.tensor(seen, device=device)
        return index
