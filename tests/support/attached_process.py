"""One of several processes that train a network with attached layers, sharded block by block or replicated."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from support.attached_networks import gradients, images, network
from support.leaving import leave_together
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint


def full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    wrong: list[object] = []
    for form in ("ela", "mrla_light"):
        for recompute in (False, True):
            model = network(form)
            wanted = gradients(model, model(images()).square().sum())
            if recompute:
                model.run = checkpointed
            replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
            for block in (*model.first, *model.second):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            for what, one in (("sharded", model), ("replicated", replicated)):
                found = gradients(one, one(images()).square().sum())
                for name, gradient in found.items():
                    expected = wanted[name.removeprefix("module.")]
                    # float64, a mean of equal numbers.
                    if not torch.allclose(full(gradient), expected, rtol=1e-10, atol=1e-10):
                        wrong.append((form, recompute, what, name))
    torch.save(wrong, Path(folder) / f"{rank}.pt")
    leave_together()
