"""What skipping one layer does to the loss of a trained network, in each skip mode, beside its divergence."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.environment import describe
from benchmarks.study.settings import Settings
from benchmarks.study.training import Run
from benchmarks.tables import table
from ela_kernels.modules.skipping import SKIP_MODES
from ela_kernels.training.data import Task


def measure_loss(settings: Sequence[Settings], task: Task, images: int) -> dict[str, Any]:
    """Train each network with nothing skipped; then leave out one layer after the other.

    The loss is that of test images in training mode, as the step after a decision would see it: every norm takes the
    batch's statistics, also of a retrieval that it takes over.
    """
    runs = [_measure(one, task, images) for one in settings]
    return {"machine": describe(None), "images": images, "runs": runs}


def _measure(settings: Settings, task: Task, images: int) -> dict[str, Any]:
    run = Run(dataclasses.replace(settings, variant=f"ela-{SKIP_MODES[0]}"), task)
    assert run.ebqm is not None
    run.ebqm.detach()
    # It watches, and never decides.
    arguments = settings.ebqm_arguments(run.steps) | {"warmup": 10**9}
    run.ebqm = ebqm = ek.EBQM(run.network, **arguments)
    record = run.train()
    batch = _test_images(run, images)
    report = ebqm.report().layers
    layers = [layer for stage in run.layers for layer in stage]
    network = run.network.train()
    base = _loss(network, batch)
    found = []
    for row, layer in zip(report, layers, strict=True):
        if row.place == 0:
            continue
        change = {}
        for mode in SKIP_MODES:
            with _skipped(layer, mode):
                change[mode] = _loss(network, batch) - base
        found.append(
            {
                "stage": row.stage,
                "place": row.place,
                "divergence": row.divergence,
                "score": row.score,
                "change": change,
            }
        )
    return {
        "settings": settings.as_dict(),
        "test_accuracy": record["test_accuracy"][-1][1],
        "loss": base,
        "layers": found,
    }


def _test_images(run: Run, most: int) -> list[tuple[Tensor, Tensor]]:
    found, count = [], 0
    for images, labels in run.batches.test():
        if count >= most:
            break
        found.append((images.to(run.device), labels.to(run.device)))
        count += len(labels)
    return found


@torch.no_grad()
def _loss(network: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> float:
    """The mean over all images; the norms' running statistics are left as they were."""
    before = {name: b.clone() for name, b in network.named_buffers()}
    total = sum(
        float(F.cross_entropy(network(images), labels, reduction="sum")) for images, labels in batch
    )
    for name, buffer in network.named_buffers():
        buffer.copy_(before[name])
    return total / sum(len(labels) for _, labels in batch)


@contextmanager
def _skipped(layer: ek.ELA, mode: Any) -> Iterator[None]:
    layer.skip, layer.skipped = mode, True
    try:
        yield
    finally:
        layer.skipped = False


def loss_table(results: dict[str, Any]) -> str:
    """By skip mode: how the change of the loss goes with the divergence, and how large it is."""
    from scipy.stats import spearmanr

    runs, machine = results["runs"], results["machine"]
    settings = runs[0]["settings"]
    low_score = settings["low"]  # below it EBQM drops a layer
    rows = []
    for mode in SKIP_MODES:
        correlations = []
        for run in runs:
            x = [layer["divergence"] for layer in run["layers"]]
            y = [layer["change"][mode] for layer in run["layers"]]
            correlations.append(float(spearmanr(x, y).statistic))
        layers = [layer for run in runs for layer in run["layers"]]
        low = [layer["change"][mode] for layer in layers if layer["score"] < low_score]
        other = [layer["change"][mode] for layer in layers if layer["score"] >= low_score]
        rows.append([f"`{mode}`", _mean(correlations), _spread(low), _spread(other)])
    losses = ", ".join(f"{run['loss']:.4f}" for run in runs)
    counts = [sum(layer["score"] < low_score for layer in run["layers"]) for run in runs]
    head = (
        f"resnet{settings['depth']}, {len(runs)} seeds, {settings['epochs']} epochs of "
        f"{settings['train_images'] or 'all'} images of {settings['data']}; loss of {results['images']} test images "
        f"with nothing skipped: {losses}. Layers with a score below {low_score}: {', '.join(map(str, counts))} of "
        f"{len(runs[0]['layers'])}. {machine['cpu']}, torch {machine['torch']}, {machine['date']}"
    )
    names = [
        "skip mode",
        "Spearman's rho of change and divergence",
        f"change of the loss, score below {low_score}",
        "other layers",
    ]
    return "\n".join([head, "", *table(names, rows)]) + "\n"


def _mean(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def _spread(values: list[float]) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return "none" if not values else f"{values[0]:+.4f}"
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:+.4f} [{q1:+.4f}, {q3:+.4f}]"
