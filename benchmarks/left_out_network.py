"""A whole network with a tolerance: what its layers leave out as they are initialised, and time.

Beside :mod:`benchmarks.left_out`, which has the weights of trained networks and retrievals alone: here is all else
that a network does, and weights of its first step.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.contenders import WrongResultError
from benchmarks.left_out import TOLERANCES
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.networks import Network
from ela_kernels.models import build_model

NETWORKS = (Network("resnet110", 32, 32), Network("resnet50", 8, 128))
SMALL = (Network("resnet20", 4, 16),)
# Relative L2 distance of the scores from those without a tolerance: up to fifty layers a network, each off by no more
# than what it leaves out.
SAME = {"0": 0.0, "2^-24": 1e-5, "1e-3": 5e-3}


def measure_left_out_networks(rounds: int, small: bool = False) -> dict[str, Any]:
    """Of each network: the share left out, a training step, and inference, for each tolerance."""
    return {str(network): _measure(network, rounds) for network in (SMALL if small else NETWORKS)}


def _measure(network: Network, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    first = build_model(network.name, attention="mrla").train()
    models = {}
    for name, tolerance in TOLERANCES.items():
        models[name] = copy.deepcopy(first)
        for stage in models[name].attentions:
            stage.tolerance = tolerance
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(network.batch, 3, network.size, network.size, generator=generator)
    labels = torch.randint(10, (network.batch,), generator=generator)
    shares = {name: _share(model, images) for name, model in models.items()}
    apart = _check(models, images)
    training = interleave(
        {name: partial(_gradients, model, images, labels) for name, model in models.items()}, rounds
    )
    for model in models.values():
        model.eval()
    inference = interleave(
        {name: partial(_infer, model, images) for name, model in models.items()}, rounds
    )
    return {
        "left_out": shares,
        "apart": apart,
        "training": _times(training),
        "inference": _times(inference),
    }


def _share(model: nn.Module, images: Tensor) -> float:
    """Of all retrievals of the network."""
    layers = copy.deepcopy(model)  # which has seen a batch afterwards
    shares = iter(ek.explain(layers, images))
    left_out = total = 0.0
    for stage in model.attentions:
        for count, _ in enumerate(stage, start=1):
            left_out += count * (next(shares).left_out or 0.0)
            total += count
    return left_out / total


def _check(models: dict[str, Any], images: Tensor) -> dict[str, float]:
    """How far the scores are from those without a tolerance.

    Raises:
        WrongResultError: further than :data:`SAME`.
    """
    scores = {name: _infer(copy.deepcopy(model), images) for name, model in models.items()}
    apart = {
        name: float((found - scores["0"]).norm() / scores["0"].norm())
        for name, found in scores.items()
    }
    for name, distance in apart.items():
        if not distance <= SAME[name]:
            raise WrongResultError(
                f"tolerance {name}: scores are {distance:.1e} from those without it; allowed is {SAME[name]:.0e}"
            )
    return apart


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """No step of an optimizer: weights stay those of the first."""
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(images), labels).backward()


def _infer(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(images)
    return out


def _times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "times_faster": {name: ratio(seconds["0"], times) for name, times in seconds.items()},
    }
