"""What a layer keeps of its divergences until EBQM asks for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.torch_internals import active_ddp, is_grad_tracking, is_wrapped, unwrapped

# Rows of what a compiled graph adds up: the sum of z = 1 - exp(-kl), of its squares, of how many, and passes that had
# one not finite.
SUM, SQUARES, COUNT, BAD = range(4)


class Totals:
    """Divergences added up by compiled graphs, which cannot put tensors into a list without being compiled for it.

    `any` is set by a pass, so that the numbers, which may be on a device, need not be asked for.
    """

    __slots__ = ("any", "values")

    def __init__(self) -> None:
        self.any = False
        self.values = _zeros(torch.device("cpu"))

    def add(self, kl: Tensor, is_seen: Tensor | None) -> None:
        """Take in the divergence of one pass `[B, G]`; `is_seen`: whether it is one, where that is data."""
        row = totals_of(kl.detach(), self.values.dtype)
        if is_seen is not None:
            row = torch.where(is_seen, row, 0.0)
        with torch.no_grad():
            self.values.add_(row)
        self.any = True

    def to(self, device: torch.device) -> None:
        """Move the numbers; they are lost where they come from or go to a device without memory."""
        values = self.values
        if values.device != device:
            self.values = (
                _zeros(device) if values.is_meta else values.to(device, sums_dtype(device))
            )

    def take(self) -> Tensor | None:
        """The numbers `[4]`, which then start anew; None where no pass added any."""
        if not self.any:
            return None
        values = self.values.clone()
        with torch.no_grad():
            self.values.zero_()
        self.any = False
        return values


def totals_of(kl: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """What :class:`Totals` adds for one pass with the divergence `kl` `[B, G]`: sums of z and z * z, count, is bad."""
    z = (-torch.expm1(-kl.float())).clamp(0.0, 1.0).to(dtype)
    total, squares = z.sum(), z.square().sum()
    good = total.isfinite()
    found = torch.stack((total, squares, torch.full_like(total, kl.numel())))
    return torch.cat((torch.where(good, found, 0.0), (~good).to(dtype).reshape(1)))


def outside_of_transforms(kl: Tensor) -> Tensor | None:
    """`kl` without what `torch.func.grad` and its like wrap around it, and which means nothing once they have ended.

    None under `torch.func.vmap`: samples or models apart are no pass of this model.
    """
    while is_wrapped(kl):
        if not is_grad_tracking(kl):
            return None
        kl = unwrapped(kl)
    return kl


def sums_dtype(device: torch.device) -> torch.dtype:
    """In which sums are kept: a variance is the small difference of two of them. Not every device has float64."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def _zeros(device: torch.device) -> Tensor:
    return torch.zeros(4, dtype=sums_dtype(device), device=device)


def refuse_static_graph() -> None:
    """Refuse `DistributedDataParallel(static_graph=True)` around the pass under way.

    Raises:
        ValueError: it would fail at the first decision, with a message that speaks of something else.
    """
    wrapper = active_ddp()
    if wrapper is not None and getattr(wrapper, "static_graph", False):
        raise ValueError(STATIC_GRAPH)


STATIC_GRAPH = (
    "static_graph: got DistributedDataParallel(static_graph=True) around ELA layers that EBQM watches; allowed is "
    "static_graph=False, the default, since which parameters get a gradient changes with its "
    "decisions. After ela_kernels.prune() and EBQM.detach() nothing changes any more"
)
