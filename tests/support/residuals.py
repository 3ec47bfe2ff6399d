"""A small language model of attention residuals, and the same by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek

KINDS, LENGTH, DIM = 11, 7, 8


class Residuals(nn.Module):
    """The input of every layer, and of the head, is retrieved from all before it.

    With `twins` the module of that number has the query of the one before it, and the value between the two points away
    from that query: so it retrieves what the one before it did.
    """

    def __init__(self, depth: int = 5, twins: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(KINDS, DIM)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(depth))
        self.mixes = nn.ModuleList(ek.AttentionResidual(DIM) for _ in range(depth + 1))
        self.head = nn.Linear(DIM, KINDS)
        for mix in self.mixes:
            nn.init.normal_(mix.query)
        if twins is not None:
            direction = torch.zeros(DIM)
            direction[0] = 1.0
            with torch.no_grad():
                for number in (twins - 1, twins):
                    self.mixes[number].query.copy_(3 * direction)
                self.layers[twins - 1].bias.copy_(-20 * direction)

    def forward(self, ids: Tensor, history: ek.PositionHistory | None = None) -> Tensor:
        history = ek.PositionHistory() if history is None else history
        history.append(self.embed(ids))
        for layer, mix in zip(self.layers, self.mixes, strict=False):
            history.append(torch.tanh(layer(mix(history))) + layer.bias)
        return self.head(self.mixes[-1](history))


def by_hand(model: Residuals, ids: Tensor, skip: set[int]) -> tuple[Tensor, list[Tensor | None]]:
    """The same in PyTorch's own operations, and each module's divergence, None where it makes none."""
    values, kls = [model.embed(ids)], []
    last: Tensor | None = None
    before: Tensor | None = None
    for i, mix in enumerate(model.mixes):
        kl = None
        if last is None or i not in skip:
            v = torch.stack(values, 1)
            s = F.rms_norm(v, (DIM,), mix.norm_weight, mix.eps) @ mix.query
            weights = s.softmax(1)
            last = (weights.unsqueeze(-1) * v).sum(1)
            if before is not None:
                p = F.pad(before, (0, 0, 0, weights.shape[1] - before.shape[1]))
                kl = (p * (p.log() - s.log_softmax(1))).masked_fill(p == 0, 0.0).sum(1)
            before = weights
        kls.append(kl)
        if i < len(model.layers):
            layer = model.layers[i]
            values.append(torch.tanh(layer(last)) + layer.bias)
    return model.head(last), kls


def decide(model: Residuals, skip: set[int]) -> None:
    for i, mix in enumerate(model.mixes):
        mix.skipped = i in skip


def skipped(model: Residuals) -> set[int]:
    return {i for i, mix in enumerate(model.mixes) if mix.skipped}


def names(*numbers: int) -> set[str]:
    """Of the parameters of these modules."""
    return {f"mixes.{i}.{name}" for i in numbers for name in ("query", "norm_weight")}


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(KINDS, (batch, LENGTH))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Of the next token."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, KINDS), ids[:, 1:].reshape(-1))
