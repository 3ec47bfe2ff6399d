"""Whole networks: plain, with the published attention, with ours, and with retrievals skipped."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, ratio, summarize
from benchmarks.memory import profiled_peak
from ela_kernels.models import build_model

PLAIN, CONCATENATING, FUSED, SKIPPING = "plain", "concatenating", "mrla", "ela"


def make_networks(name: str, **common: Any) -> dict[str, nn.Module]:
    """The network of that name plain and with each attention; in `ela` every third layer is skipped."""
    options: dict[str, dict[str, Any]] = {
        PLAIN: {"attention": "none"},
        CONCATENATING: {"attention": "mrla", "fused": False},
        FUSED: {"attention": "mrla"},
        SKIPPING: {"attention": "ela"},
    }
    networks: dict[str, nn.Module] = {}
    for kind, given in options.items():
        torch.manual_seed(0)
        networks[kind] = build_model(name, **common, **given).train()
    for stage in networks[SKIPPING].attentions:
        for i, layer in enumerate(stage):
            layer.skipped = i % 3 == 2
    return networks


class Network(NamedTuple):
    """A network of :mod:`ela_kernels.models`, and the batch of images that it is measured on."""

    name: str
    batch: int
    size: int
    block: str | None = None

    def __str__(self) -> str:
        block = "" if self.block is None else f" of {self.block}s"
        return f"{self.name}{block}, {self.batch} at {self.size}x{self.size}"

    def make(self) -> dict[str, nn.Module]:
        return make_networks(self.name, **({} if self.block is None else {"block": self.block}))


NETWORKS = (
    Network("resnet50", 8, 224),
    Network("resnet50", 8, 128),
    Network("resnet110", 32, 32),
    Network("resnet56", 32, 32),
    Network("resnet56", 32, 32, "bottleneck"),
)
SMALL = (Network("resnet20", 4, 16),)


def _step(network: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.SGD) -> None:
    loss = nn.functional.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _infer(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(images)
    return out


def measure_networks(rounds: int, small: bool = False) -> dict[str, Any]:
    """Of each network: a training step with SGD, and inference, plain and with each attention."""
    return {str(network): _measure(network, rounds) for network in (SMALL if small else NETWORKS)}


def _measure(network: Network, rounds: int) -> dict[str, Any]:
    made = network.make()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(network.batch, 3, network.size, network.size, generator=generator)
    labels = torch.randint(10, (network.batch,), generator=generator)
    steps: dict[str, Callable[[], object]] = {}
    for name, module in made.items():
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        steps[name] = partial(_step, module, images, labels, optimizer)
    training = _times(interleave(steps, rounds))
    peaks = {name: profiled_peak(step) for name, step in steps.items()}
    for module in made.values():
        module.eval()
    steps = {name: partial(_infer, module, images) for name, module in made.items()}
    layers = [layer for stage in made[SKIPPING].attentions for layer in stage]
    return {
        "layers": len(layers),
        "skipped": sum(layer.skipped for layer in layers),
        "training": training,
        "peak_bytes": peaks,
        "inference": _times(interleave(steps, rounds)),
    }


def _times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds, how much longer than the plain network, and how much of attention's cost is gone.

    That is what lies between the plain network and the one that concatenates.
    """
    plain, most = (statistics.median(seconds[name]) for name in (PLAIN, CONCATENATING))
    return {
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "times_plain": {name: ratio(times, seconds[PLAIN]) for name, times in seconds.items()},
        "share_removed": {
            name: (most - statistics.median(seconds[name])) / (most - plain)
            for name in (FUSED, SKIPPING)
        },
    }
