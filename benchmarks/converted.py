"""Networks in their published shapes, as they are and after `ela_kernels.convert`: time and peak memory.

A step is forward, cross entropy and backward, without an optimizer: both have the same one, and weights that move could
end in numbers that are slow to compute with.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.contenders import check_close
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.memory import profiled_peak
from benchmarks.published.deit import DeiT
from benchmarks.published.dla import DLAResNet
from benchmarks.published.networks import NETWORKS
from benchmarks.published.resnet_base import BaseResNet
from benchmarks.published.resnet_light import LightResNet

ORIGINAL, CONVERTED = "original", "converted"

# Relative L2 norm, in float64: the two forms sum in another order, through a few layers and norms. A wrong head, layer
# or norm is off by 1e-2 and more.
EXACT = 1e-10
# The same in float32, through up to 101 layers.
CLOSE = 1e-3


class Family(NamedTuple):
    """A network, what it is called with, a small one of the same shape by its name, and what is to be reached.

    `faster`: times faster, training step and inference. `memory`: the converted step's peak over the original's.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    small: str
    faster: float
    memory: float | None = None


R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
_base: dict[str, Any] = {"width": 64, "stem": "deep", "dim_perhead": 16, "drop": 0.2}
_light: dict[str, Any] = {"width": 64, "stem": "imagenet", "drop": 0.2}
_images = (8, 3, 128, 128)

FAMILIES = {
    "cifar-56 base": Family(
        partial(BaseResNet, (6, 6, 6), drop=0.2), (32, 3, 32, 32), "base cifar", 1.7
    ),
    "resnet50 base": Family(partial(BaseResNet, R50, **_base), _images, "base imagenet", 1.15),
    "resnet101 base": Family(
        partial(BaseResNet, R101, **_base), _images, "base imagenet", 1.3, memory=0.5
    ),
    "resnet50 light": Family(partial(LightResNet, R50, **_light), _images, "light imagenet", 1.1),
    "deit-tiny base": Family(partial(DeiT, "base"), (8, 3, 224, 224), "base tokens", 1.0),
    "deit-tiny light": Family(
        partial(DeiT, "light", drop=0.0), (8, 3, 224, 224), "light tokens", 1.0
    ),
    "cifar-29 dynamic": Family(
        partial(DLAResNet, "base", (3, 3, 3), drop=0.2), (32, 3, 32, 32), "dynamic base", 1.0
    ),
}


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    network.zero_grad(set_to_none=True)
    F.cross_entropy(network(images), labels).backward()


def _infer(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(images)
    return out


def measure_converted(rounds: int, small: bool = False) -> dict[str, Any]:
    """Each family in turn. `small`: the small network of its shape, to see that everything runs."""
    found = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(0)
        check(name, *NETWORKS[family.small][:2])
        if small:
            make, shape = NETWORKS[family.small][:2]
        else:
            make, shape = family.make, family.shape
        found[name] = measure_family(name, make, shape, rounds)
        gc.collect()
    return found


def measure_family(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Milliseconds of both, how many times faster the converted one is, and the peak of a training step in bytes."""
    original = make()
    converted = copy.deepcopy(original)
    report = ek.convert(converted)
    networks = {ORIGINAL: original, CONVERTED: converted}
    images, labels = torch.randn(shape), torch.randint(10, shape[:1])
    for network in networks.values():
        network.eval()
    want = _infer(original, images).double()
    check_close(f"{name}: inference", _infer(converted, images), want, CLOSE)
    calls = {form: partial(_infer, network, images) for form, network in networks.items()}
    inference = _times(interleave(calls, rounds))
    for network in networks.values():
        network.train()
    steps = {form: partial(_step, network, images, labels) for form, network in networks.items()}
    training = _times(interleave(steps, rounds))
    peaks = {}
    for form, step in steps.items():
        networks[form].zero_grad(set_to_none=True)
        peaks[form] = profiled_peak(step)
        networks[form].zero_grad(set_to_none=True)
    return {
        "shape": list(shape),
        "converted": len(report.converted),
        "left": {name: str(reason) for name, reason in report.left.items()},
        "training": training,
        "inference": inference,
        "peak_bytes": peaks,
        "peak_ratio": peaks[CONVERTED] / peaks[ORIGINAL],
    }


def _times(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    return {
        "ms": {form: summarize(times)._asdict() for form, times in seconds.items()},
        "times_faster": ratio(seconds[ORIGINAL], seconds[CONVERTED]),
    }


def check(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """Refuse to time a family whose small network in float64 gives other numbers when converted.

    Compared are output, gradients and buffers of a training step, and the output of inference after it. Gradients of
    one kind are compared together: some are nothing but rounding, such as a bias's in front of a norm.
    """
    original = make().double()
    converted = copy.deepcopy(original)
    ek.convert(converted)
    images = torch.randn(shape, dtype=torch.float64)
    found: dict[str, dict[str, Tensor]] = {}
    for form, network in ((ORIGINAL, original), (CONVERTED, converted)):
        x = images.clone().requires_grad_()
        torch.manual_seed(1)  # drop path
        out = network.train()(x)
        out.square().sum().backward()
        tensors = {"output": out.detach(), "gradient of the input": x.grad}
        tensors |= {f"gradients of {kind}": g for kind, g in _gradients(network).items()}
        tensors |= {name: buffer.double() for name, buffer in network.named_buffers()}
        network.eval()
        tensors["inference"] = _infer(network, images)
        found[form] = tensors
    missing = found[ORIGINAL].keys() ^ found[CONVERTED].keys()
    if missing:
        raise RuntimeError(
            f"{name}: converted, it lacks or has beyond the original: {sorted(missing)}"
        )
    for what, want in found[ORIGINAL].items():
        check_close(f"{name}: {what}", found[CONVERTED][what], want, EXACT)


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    """All gradients by the parameters' names without their numbers."""
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            kinds.setdefault(kind, []).append(parameter.grad.flatten())
    return {kind: torch.cat(grads) for kind, grads in kinds.items()}
