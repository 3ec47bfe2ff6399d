"""Threads in Triton's interpreter, which runs one kernel at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ela_kernels as ek

STRESS = Path(__file__).resolve().parents[1] / "support" / "thread_stress.py"


@pytest.mark.parametrize(
    "form",
    ["op", *(pytest.param(f, marks=pytest.mark.slow) for f in ("block", "light_block", "history"))],
)
def test_new_shapes_in_four_threads(form: str) -> None:
    package = str(Path(ek.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(STRESS), "1", "--backend", "triton", "--forms", form],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
