"""Two processes on different data decide alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import ebqm_process
from torch import distributed, multiprocessing


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_processes_average_and_decide_alike(tmp_path: Path) -> None:
    multiprocessing.spawn(ebqm_process.run, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(first["alone"], second["alone"])
    assert torch.equal(first["statistics"], second["statistics"])
    assert first["report"] == second["report"]
    # a mean over the processes, not a sum: the weights of 18 steps at a smoothing of 0.5
    assert float(first["statistics"][2, 1]) == pytest.approx(1 - 0.5**18)
    # Layer 2 is redundant to both; layer 4 to one of them only, so that on average it is half new.
    assert first["skipped"] == second["skipped"] == [i == 2 for i in range(6)]
    assert first["divergence"][4] == pytest.approx(0.5, abs=0.05)
