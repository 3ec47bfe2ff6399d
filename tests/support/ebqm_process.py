"""One of several processes that train the same planted network on different data."""

from __future__ import annotations

from pathlib import Path

import torch
from support.ela_models import Network, plant, train
from torch import distributed

import ela_kernels as ek


def run(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    network = Network((6,))
    plant(network, {2} if rank == 0 else {2, 4})
    ebqm = ek.EBQM(network, warmup=6, interval=3, probe_interval=2, smoothing=0.5)
    torch.manual_seed(100 + rank)
    train(network, ebqm, 5)
    alone = ebqm.state_dict()["statistics"]
    train(network, ebqm, 13)
    ebqm.synchronize()
    result = {
        "alone": alone,
        "report": repr(ebqm.report()),
        "skipped": [layer.skipped for layer in network.layers],
        "divergence": [row.divergence for row in ebqm.report().layers],
        "statistics": ebqm.state_dict()["statistics"],
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
