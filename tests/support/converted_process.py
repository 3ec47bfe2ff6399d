"""One of several processes that train a converted network, by DDP or sharded by FSDP2, and the original whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from support.leaving import leave_together
from support.small_published import Network, TokenNetwork
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ela_kernels as ek

KINDS: dict[str, Callable[[], Any]] = {
    "base": Network,
    "light": partial(Network, light=True),
    "tokens": TokenNetwork,
}
# What is sharded by itself, before the whole.
WAYS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "the whole": lambda network: [],
    "blocks": lambda network: [*network.blocks],
    "around the layers": lambda network: [block.mrla for block in network.blocks],
    "layers": lambda network: [block.mrla.mrla for block in network.blocks],
    "norms": lambda network: [
        m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))
    ],
}


def results(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = network(x)
    out.square().mean().backward()
    grads = [p.grad for p in network.parameters()]
    return [out.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def differences(count: int, kind: str) -> list[object]:
    """The ways in which a network of a kind gives something else than the original."""
    torch.manual_seed(0)
    original = KINDS[kind]().double().eval()  # running statistics: the same on all processes
    converted = copy.deepcopy(original)
    ek.convert(converted, strict=True)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    want = results(copy.deepcopy(original), x)
    mesh = init_device_mesh("cpu", (count,))
    wrong: list[object] = []

    def compare(network: nn.Module, *case: object) -> None:
        for a, b in zip(results(network, x), want, strict=True):
            if not torch.allclose(a, b, rtol=1e-10, atol=1e-12):
                wrong.append((kind, *case))
                return

    for way, parts in WAYS.items():
        for first in (True, False):
            network = copy.deepcopy(converted if first else original)
            for part in parts(network):
                fully_shard(part, mesh=mesh)
            fully_shard(network, mesh=mesh)
            if not first:
                with warnings.catch_warnings(record=True):
                    warnings.simplefilter("always")
                    left = ek.convert(network).left
                if len(left) != len(network.blocks):
                    wrong.append((kind, way, left))
            compare(network, way, first)
    for first in (True, False):
        network = copy.deepcopy(converted if first else original)
        wrapped = nn.parallel.DistributedDataParallel(network)
        if not first:
            ek.convert(wrapped, strict=True)
        compare(wrapped, "DDP", first)
    return wrong


def run(rank: int, count: int, folder: str) -> None:
    """Leaves in `folder` what differed."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=count)
    wrong = [found for kind in KINDS for found in differences(count, kind)]
    torch.save(wrong, Path(folder) / f"{rank}.pt")
    leave_together()
