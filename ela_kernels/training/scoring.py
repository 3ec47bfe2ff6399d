"""What a classifier reached: losses and right answers, summed over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOP = 5


class Scores(NamedTuple):
    """On test images: the mean loss, and the shares whose class is the likeliest, and among the five likeliest.

    The last is NaN where there are no more than five classes.
    """

    loss: float
    accuracy: float
    accuracy_5: float

    def by_name(self, prefix: str) -> dict[str, float]:
        """With the names that logs have for them."""
        return {f"{prefix}_{name}": value for name, value in self._asdict().items()}


def totals(scores: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of losses, number of right answers, number of images.

    Args:
        scores: of the classes, `[B, classes]`.
        labels: `[B]`, or of mixed images the shares of the classes, `[B, classes]`, of which the largest counts.
        label_smoothing: of the loss.
    """
    scores = scores.float()
    loss = F.cross_entropy(
        scores, labels, reduction="sum", label_smoothing=label_smoothing
    ).double()
    likeliest = labels if labels.ndim == 1 else labels.argmax(1)
    right = (scores.argmax(1) == likeliest).sum().double()
    return torch.stack((loss, right, torch.full_like(loss, len(labels))))


def right_among_five(scores: Tensor, labels: Tensor) -> Tensor:
    """How many images have their class among the five likeliest."""
    best = scores.float().topk(min(TOP, scores.shape[1]), dim=1).indices
    return (best == labels.unsqueeze(1)).any(1).sum().double()


def results_of(history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """What a run reached, to be read: names and values, of rows with the names that logs have for them."""
    best, last = max(row["test_accuracy"] for row in history), history[-1]
    found = [
        ("test accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
        ("test accuracy, best epoch", f"{best:.2%}"),
    ]
    for name, title in (
        ("test_accuracy_5", f"among the {TOP} likeliest, last epoch"),
        ("ema_accuracy", "of the average, last epoch"),
        ("ema_accuracy_5", f"of the average among the {TOP} likeliest"),
    ):
        if name in last:
            found.append((title, f"{last[name]:.2%}"))
    return found


def evaluation_of(found: Mapping[str, Scores], has_top: bool) -> list[Sequence[str]]:
    """Head and rows of a table of what models reach, by their names."""
    head = ["", "loss", "top-1", *([f"top-{TOP}"] if has_top else [])]
    rows = [
        [name, f"{scores.loss:.4f}", f"{scores.accuracy:.2%}", f"{scores.accuracy_5:.2%}"]
        for name, scores in found.items()
    ]
    return [head, *(row[: len(head)] for row in rows)]
