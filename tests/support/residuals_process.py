"""One of two processes that train attention residuals under `DistributedDataParallel`, and by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from support.ddp_process import step
from support.residuals import Residuals, decide, skipped, tokens
from torch import distributed, nn

import ela_kernels as ek
from ela_kernels.ebqm import spare_skipped

STEPS: tuple[set[int], ...] = ({2}, {1, 2, 4}, set(), {5}, {0, 3})


def run(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    model = Residuals(twins=3)
    twin = copy.deepcopy(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    pairs = []
    for network, wrapper in ((model, parallel), (twin, twin)):
        options = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = torch.optim.SGD(network.parameters(), **options)
        spare_skipped(optimizer, network)
        pairs.append((wrapper, network, optimizer))
    torch.manual_seed(100 + rank)
    still: list[bool] = []
    for skip in STEPS * 2:
        ids = tokens()
        for wrapper, network, optimizer in pairs:
            decide(network, skip)
            still += step(wrapper, network, optimizer, ids, by_hand=wrapper is network)
    parameters = [[p.detach().clone() for p in m.parameters()] for m in (model, twin)]
    decide(model, set())
    ebqm = ek.EBQM(parallel, low=0.1, high=0.2, warmup=2, interval=2, probe_interval=1)
    for _ in range(4):
        parallel(tokens()).square().mean().backward()
        ebqm.step()
    found = {
        "parameters": parameters,
        "still": still,
        "skipped": skipped(model),
        "report": repr(ebqm.report()),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
