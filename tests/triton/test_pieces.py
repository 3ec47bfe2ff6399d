"""The pieces of a whole layer as the GPU benchmarks call and check them, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import WrongResultError
from benchmarks.gpu.footprint import PIECES
from benchmarks.gpu.pieces import LayerPieces
from benchmarks.gpu.shapes import INTERLEAVED, PLANAR, Case
from benchmarks.shapes import StageShape
from ela_kernels.backends.dispatch import KERNELS

SHAPE = StageShape(1, 2, 16, 6, 8)
CPU = torch.device("cpu")


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_alone(piece, dtype, layout):
    of_layer, kernels = LayerPieces(Case(SHAPE, dtype, layout), CPU), KERNELS["triton"]
    assert of_layer.is_alone(piece, kernels)
    assert of_layer.check(piece, kernels) > 0


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("piece", "function"), [("epilogue", "norm_forward"), ("epilogue backward", "norm_backward")]
)
def test_a_wrong_piece_is_not_timed(piece, function, monkeypatch):
    of_layer, kernels = LayerPieces(Case(SHAPE), CPU), KERNELS["triton"]
    right = getattr(kernels, function)

    def wrong(*args):
        found = right(*args)
        (found if isinstance(found, torch.Tensor) else found.o)[1, 3, 2, 2] = 7.0
        return found

    monkeypatch.setitem(vars(kernels), function, wrong)
    with pytest.raises(WrongResultError, match=f"{piece}: "):
        of_layer.check(piece, kernels)
