"""Each instruction set's kernels, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ela_kernels

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "simd_checks.py"


def run(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(ela_kernels.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"ELA_KERNELS_SIMD": level, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_instruction_set(level, kernels):
    if level not in kernels.simd_levels():
        pytest.skip(f"this build and processor have {', '.join(kernels.simd_levels())}")
    done = run(level, str(SCRIPT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"passed on {level}" in done.stdout


def test_an_unknown_level_is_refused(kernels):
    done = run(
        "sse9",
        "-c",
        "from ela_kernels.backends.extension import extension; extension().simd_level()",
    )
    assert done.returncode != 0
    assert "ELA_KERNELS_SIMD: got 'sse9'" in done.stderr
    assert ", ".join(kernels.simd_levels()) in done.stderr


def test_the_widest_level_is_chosen(kernels):
    done = run(
        "",
        "-c",
        "from ela_kernels.backends.extension import extension; print(extension().simd_level())",
    )
    assert done.stdout.strip() == kernels.simd_levels()[-1]
