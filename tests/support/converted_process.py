"""One of several processes that train a converted network, by DDP or sharded by FSDP2, and the original whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ela_kernels as ek
from tests.support.small_published import Network

# What is sharded by itself, before the whole.
WAYS: dict[str, Callable[[Any], list[nn.Module]]] = {
    "the whole": lambda network: [],
    "blocks": lambda network: [*network.blocks],
    "around the layers": lambda network: [block.mrla for block in network.blocks],
    "layers": lambda network: [block.mrla.mrla for block in network.blocks],
    "parts": lambda network: [block.bn_mrla for block in network.blocks],
}


def results(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = network(x)
    out.square().mean().backward()
    grads = [p.grad for p in network.parameters()]
    return [out.detach(), *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def run(rank: int, count: int, folder: str) -> None:
    """Leaves in `folder` what differed."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))
    wrong: list[object] = []
    for light in (False, True):
        torch.manual_seed(0)
        original = Network(light).double().eval()  # running statistics: the same on all processes
        x = torch.randn(4, 3, 8, 6, dtype=torch.float64)
        want = results(copy.deepcopy(original), x)
        for way, parts in WAYS.items():
            for first in (True, False):
                network = copy.deepcopy(original)
                if first:
                    ek.convert(network, strict=True)
                for part in parts(network):
                    fully_shard(part, mesh=mesh)
                fully_shard(network, mesh=mesh)
                if not first:
                    ek.convert(network)
                got = results(network, x)
                if not all(
                    torch.allclose(a, b, rtol=1e-10, atol=1e-12)
                    for a, b in zip(got, want, strict=True)
                ):
                    wrong.append((light, way, first))
        for first in (True, False):
            network = copy.deepcopy(original)
            if first:
                ek.convert(network, strict=True)
            wrapped = nn.parallel.DistributedDataParallel(network)
            if not first:
                ek.convert(wrapped, strict=True)
            got = results(wrapped, x)
            if not all(
                torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(got, want, strict=True)
            ):
                wrong.append((light, "DDP", first))
    torch.save(wrong, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
