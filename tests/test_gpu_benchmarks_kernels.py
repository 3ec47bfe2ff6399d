"""Triton kernels that are brought along to a machine with a GPU: made without one, and found in a cache elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import kernels

ROOT = Path(__file__).resolve().parents[1]

# Launches of the functional op, compiled only; says how many kernels there are and how many were compiled anew.
SCRIPT = textwrap.dedent(
    """
    import sys, torch, triton
    import ela_kernels as ek
    from benchmarks.gpu.kernels import compiling_only
    anew = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **rest: anew.append(not cache_hit)
    q, v = torch.randn(2, 8), torch.randn(2, 8, 4, 4)
    with compiling_only(90) as made, ek.use_backend("triton"):
        ek.layer_attention(q, [q, q], [v, v], 2)
    print(len(made), sum(anew))
    """
)


def compiled(cache: Path) -> list[int]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_STORE_BINARY_ONLY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_what_was_made_elsewhere_is_found(tmp_path: Path) -> None:
    made, cache = tmp_path / "made", tmp_path / "cache"
    count, anew = compiled(made)
    assert count == anew > 0
    packed = tmp_path / "packed"
    packed.mkdir()
    kernels.pack(made, packed, {"capability": "9.0", "kernels": count})
    assert kernels.put(packed, cache) == f"{count} Triton kernels for 9.0 were brought along"
    # Triton lists a kernel's files by their whole paths.
    made.rename(tmp_path / "gone")
    assert compiled(cache) == [count, 0]
    assert not list(cache.rglob("*.source"))


def test_kernels_of_another_triton_are_left_out(tmp_path: Path) -> None:
    about = {"triton": "2.0.0", "files": "0", "capability": "9.0", "kernels": 3}
    (tmp_path / kernels.MANIFEST).write_text(json.dumps(about))
    said = kernels.put(tmp_path, tmp_path / "cache")
    assert "are left out: they are of Triton 2.0.0, and here is" in said
    assert not (tmp_path / "cache").exists()
