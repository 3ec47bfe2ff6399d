"""Two processes on different data decide alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import ddp_process, ebqm_process, residuals_process
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


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize(
    "mode",
    ["reuse", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("retrieval", "layer"))],
)
def test_data_parallel_with_its_defaults(mode: str, tmp_path: Path) -> None:
    """Decisions that change from step to step, and a checkpoint of all of it."""
    multiprocessing.spawn(ddp_process.run, args=(2, str(tmp_path), mode), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    by_wrapper, by_hand = first["parameters"]
    # float32: gradients of two processes, averaged in another order.
    torch.testing.assert_close(by_wrapper, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_wrapper, second["parameters"][0], rtol=0, atol=0)
    # Nothing moved what took no part: no momentum, no decay.
    assert len(first["still"]) > 50
    assert all(first["still"])
    for name in ("loaded", "reports", "skipped"):
        saved, loaded = first[name]
        assert saved == loaded


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_attention_residuals_in_data_parallel(tmp_path: Path) -> None:
    """Decisions that change from step to step, then EBQM's own."""
    multiprocessing.spawn(residuals_process.run, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    by_wrapper, by_hand = first["parameters"]
    # float32: gradients of two processes, averaged in another order.
    torch.testing.assert_close(by_wrapper, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_wrapper, second["parameters"][0], rtol=0, atol=0)
    # Query and norm weight of each that was skipped, of wrapper and twin; the first of a history retrieves.
    assert len(first["still"]) == 2 * 2 * 2 * (1 + 3 + 0 + 1 + 1)
    assert all(first["still"])
    assert first["report"] == second["report"]
    assert first["skipped"] == second["skipped"] == {3}
