"""Exported programs: stored, loaded where nothing but the operators is known, and run on batches of any size."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels import models
from ela_kernels.integrations.export import decompositions

LOAD = """
import sys, torch
{before}
program = torch.export.load(sys.argv[1])
torch.save(program.module()(torch.load(sys.argv[2])), sys.argv[3])
print("ela_kernels" in sys.modules)
"""
# float32: PyTorch's own pieces, in another order of sums than the kernels.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def network() -> nn.Module:
    """Stages of four layers and of two, with statistics of the norms that are not the first ones."""
    torch.manual_seed(0)
    model = models.ResNet((4, 2), (16, 32), "basic", 10, attention="ela", stem="small")
    model(torch.randn(4, 3, 16, 16))
    return model.eval()


def skip_some(model: nn.Module) -> list[ek.ELA]:
    """A layer in each mode, with one after it that retrieves."""
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    for i, mode in ((1, "reuse"), (2, "layer"), (4, "retrieval")):
        layers[i].skipped, layers[i].skip = True, mode
    return layers


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},))


def of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def in_a_fresh_process(program: Any, x: Tensor, folder: Path, before: str) -> tuple[Tensor, str]:
    files = [str(folder / name) for name in ("program.pt2", "x.pt", "out.pt")]
    torch.export.save(program, files[0])
    torch.save(x, files[1])
    run = subprocess.run(
        [sys.executable, "-c", LOAD.format(before=before), *files], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return torch.load(files[2]), run.stdout.strip()


@pytest.mark.parametrize("prunes", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_stored_program_in_a_fresh_process(prunes: bool, tmp_path: Path) -> None:
    model = network()
    skip_some(model)
    if prunes:
        ek.prune(model)
    x = torch.randn(5, 3, 16, 16)
    found, _ = in_a_fresh_process(exported(model), x, tmp_path, "import ela_kernels")
    torch.testing.assert_close(found, of(model, x), **CLOSE)


@pytest.mark.slow
def test_a_decomposed_program_needs_no_package(tmp_path: Path) -> None:
    model = network()
    skip_some(model)
    x = torch.randn(3, 3, 16, 16)
    program = exported(model).run_decompositions(decompositions())
    found, is_imported = in_a_fresh_process(program, x, tmp_path, "")
    assert is_imported == "False"
    torch.testing.assert_close(found, of(model, x), **CLOSE)


def test_decisions_are_data_in_a_program() -> None:
    model = network()
    program = exported(model).module()
    x = torch.randn(3, 3, 16, 16)
    before = of(model, x)
    torch.testing.assert_close(of(program, x), before, **CLOSE)
    layers = [m for m in model.modules() if isinstance(m, ek.ELA)]
    layers[4].skipped = True
    name = next(n for n, m in model.named_modules() if m is layers[4])
    program.get_buffer(f"{name}.decision")[0] = 1.0
    want = of(model, x)
    assert not torch.allclose(want, before, **CLOSE)
    torch.testing.assert_close(of(program, x), want, **CLOSE)


def test_a_pruned_program_holds_no_more_than_is_left() -> None:
    model = network()
    skip_some(model)
    whole = exported(model)
    ek.prune(model)
    found = exported(model)
    operators = [str(n.target) for n in found.graph.nodes if "ela_kernels" in str(n.target)]
    assert len(operators) == 3
    assert set(found.state_dict) < set(whole.state_dict)
    gone = set(whole.state_dict) - set(found.state_dict)
    # Of the skipped layers no query, and of the one that gives nothing to anybody, nothing at all.
    assert {"attentions.0.1.attn.Wq.weight", "attentions.0.2.attn.Wv.weight"} <= gone
    assert "attentions.0.1.attn.Wv.weight" in found.state_dict


def test_a_program_for_training_is_loaded() -> None:
    model = network().train()
    stored = io.BytesIO()
    torch.export.save(exported(model), stored)
    stored.seek(0)
    found = torch.export.load(stored).module()
    x = torch.randn(3, 3, 16, 16)
    want = model(x)
    torch.testing.assert_close(found(x), want, **CLOSE)
    for name, statistics in model.named_buffers():
        torch.testing.assert_close(found.get_buffer(name), statistics, **CLOSE)
