"""What the dry runs of the GPU benchmarks need: they run on the CPU, and on a tiny stage."""

from __future__ import annotations

import pytest
import torch

import ela_kernels as ek
from benchmarks.shapes import StageShape

SHAPE = StageShape(3, 2, 16, 6, 8)
CPU = torch.device("cpu")

needs_cpp = pytest.mark.skipif(
    ek.backend_status()["cpp"] != "available", reason="the dry run is on the cpp backend"
)
