"""One of several processes that train a network with skipped layers under `DistributedDataParallel`, and by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from support.ela_models import Network, batch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import ela_kernels as ek
from ela_kernels.ebqm import idle_parameters, spare_skipped
from ela_kernels.integrations.checkpoint import EBQMState

STEPS = ({3}, {1, 3}, {1, 2, 5}, set(), {5}, {1, 2, 3, 4, 5})


def decide(network: Network, skip: set[int], mode: str) -> None:
    for i, layer in enumerate(network.layers):
        layer.skipped = i in skip
        layer.skip = mode


def step(run: nn.Module, network: Network, optimizer: Any, x: Any, by_hand: bool) -> list[Any]:
    """A training step, and the idle parameters before and after it."""
    idle = idle_parameters(network)
    before = [p.detach().clone() for p in idle]
    optimizer.zero_grad()
    run(x).square().mean().backward()
    if by_hand:
        for p in network.parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            distributed.all_reduce(grad)
            p.grad = grad / distributed.get_world_size()
    optimizer.step()
    return [torch.equal(a, b) for a, b in zip(before, idle, strict=True)]


def run(rank: int, processes: int, folder: str, mode: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    network = Network((6,))
    twin = copy.deepcopy(network)
    parallel = nn.parallel.DistributedDataParallel(network)
    pairs = []
    for model, wrapper in ((network, parallel), (twin, twin)):
        options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = torch.optim.SGD(model.parameters(), **options)
        spare_skipped(optimizer, model)
        pairs.append((wrapper, model, optimizer))
    torch.manual_seed(100 + rank)
    still: list[bool] = []
    for skip in STEPS * 3:
        x = batch()
        for wrapper, model, optimizer in pairs:
            decide(model, skip, mode)
            still += step(wrapper, model, optimizer, x, by_hand=wrapper is model)
    ebqm = ek.EBQM(network, warmup=2, interval=1)
    parallel(batch()).sum().backward()
    ebqm.step()
    ebqm.synchronize()
    saved = {"model": get_model_state_dict(parallel), "ebqm": EBQMState(ebqm)}
    checkpoint.save(saved, checkpoint_id=f"{folder}/checkpoint")
    fresh = Network((6,))
    other = ek.EBQM(fresh, warmup=2, interval=1)
    found = {"model": get_model_state_dict(fresh), "ebqm": EBQMState(other)}
    checkpoint.load(found, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(fresh, found["model"])
    result = {
        "still": still,
        "parameters": [[p.detach() for p in m.parameters()] for m in (network, twin)],
        "loaded": [
            # Not running statistics: they are each process's own, and one of them is saved.
            repr([*m.named_parameters()])
            for m in (network, fresh)
        ],
        "reports": [repr(e.report()) for e in (ebqm, other)],
        "skipped": [[layer.skipped for layer in m.layers] for m in (network, fresh)],
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
