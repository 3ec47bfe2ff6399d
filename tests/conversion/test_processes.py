"""Converted networks in DistributedDataParallel and FSDP2; what is sharded already is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import converted_process
from torch import distributed, multiprocessing

pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no FSDP2")


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_several_processes_have_the_gradients_of_the_original(tmp_path: Path) -> None:
    multiprocessing.spawn(converted_process.run, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == []
