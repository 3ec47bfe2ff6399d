"""One training step of a whole network: plain, with the published attention, with ours, and with retrievals skipped."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, ratio, summarize
from ela_kernels.models import build_model

PLAIN, CONCATENATING, FUSED, SKIPPING = "plain", "concatenating", "mrla", "ela"
BATCH = 32


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


def _step(network: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.SGD) -> None:
    loss = nn.functional.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure_networks(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of each network, and how much longer each takes than the plain one."""
    networks = make_networks("resnet56", block="bottleneck")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)
    steps = {}
    for name, network in networks.items():
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        steps[name] = partial(_step, network, images, labels, optimizer)
    seconds = interleave(steps, rounds)
    skipped = sum(layer.skipped for stage in networks[SKIPPING].attentions for layer in stage)
    return {
        "network": f"resnet56, bottlenecks, [{BATCH}, 3, 32, 32], SGD",
        "skipped": skipped,
        "layers": sum(len(stage) for stage in networks[SKIPPING].attentions),
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "times_plain": {name: ratio(times, seconds[PLAIN]) for name, times in seconds.items()},
        "concatenating_over": {
            name: ratio(seconds[CONCATENATING], times) for name, times in seconds.items()
        },
    }
