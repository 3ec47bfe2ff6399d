"""One of several processes of a small training run; started by tests with torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ela_kernels.models import CifarResNet
from ela_kernels.training.data import load_task
from ela_kernels.training.loop import Trainer
from ela_kernels.training.options import Options
from ela_kernels.training.processes import join_processes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    processes = join_processes(device)
    torch.manual_seed(0)
    task = load_task("digits", side=8)
    model = CifarResNet((4,), (16,), in_chans=1, attention="ela", head_dim=8)
    # Any layer that may be skipped soon is, so that parameters without gradients come up.
    ebqm = {
        "warmup": 2,
        "interval": 2,
        "probe_interval": 1,
        "low": 0.98,
        "high": 0.99,
    }
    options = Options(epochs=2, batch_size=178, lr=0.01, augment=False, ebqm=ebqm)
    trainer = Trainer(model, task, options, device, processes)
    images = torch.cat([images for images, _ in trainer._rest_of_epoch()])
    while not trainer.done:
        trainer.run_epoch()
    assert trainer.ebqm is not None
    state = trainer.state_dict()
    torch.save(
        {
            "parameters": [p.detach() for p in model.parameters()],
            "ebqm": state["ebqm"],
            "history": trainer.history,
            "images": images,
        },
        folder / f"{processes.rank}.pt",
    )
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
