"""FSDP2 around layers, their attention, their parts, or the whole: the gradients of the network that is not sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import fsdp_process
from torch import distributed, multiprocessing

pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP2")


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_sharded_networks_have_the_gradients_of_whole_ones(tmp_path: Path) -> None:
    multiprocessing.spawn(fsdp_process.run, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == []
