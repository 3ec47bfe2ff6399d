"""What the CPU kernels leave out where no backward follows changes no number.

A block ends with its retrieval, which then is not stored, and a light layer's value is written over a few
samples of scratch.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ela_kernels as ek
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = pytest.mark.skipif(
    ek.backend_status()["cpp"] != "available", reason="the cpp backend is not available"
)

# Samples for each thread, and too few for that; planes of one chunk, of several, and cut by one in the middle.
SHAPES = [(2, 32, 7, 7), (3, 16, 14, 14), (8, 16, 5, 9), (1, 48, 33, 65), (4, 8, 1, 1)]
FORMATS = {"planar": torch.contiguous_format, "interleaved": torch.channels_last}


class LightStage(nn.Module):
    def __init__(self, channels: int, value_act: str | None) -> None:
        super().__init__()
        layers = [ek.LightLayerAttention(channels, 8) for _ in range(3)]
        for layer in layers:
            layer.value_act = value_act
        self.blocks = nn.ModuleList(MRLALight(layer, 0.0) for layer in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        previous = PreviousOutput()
        for block in self.blocks:
            x = block(x, previous)
        return x


class Stage(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ek.ELA(channels, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        history = ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history)
        return x


def drawn(stage: nn.Module) -> nn.Module:
    """With norms that do something, in evaluation mode."""
    for module in stage.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return stage.eval()


def assert_same_bits(stage: nn.Module, x: torch.Tensor, threads: int) -> None:
    """The output where a backward may follow, and where none does."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ek.use_backend("cpp"):
            kept = stage(x).detach()
            with torch.no_grad():
                found = stage(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, kept)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_stage_of_blocks(
    dtype: torch.dtype, shape: tuple[int, ...], form: str, threads: int
) -> None:
    torch.manual_seed(0)
    stage = drawn(Stage(shape[1])).to(dtype)
    x = torch.randn(shape, dtype=dtype).to(memory_format=FORMATS[form])
    assert_same_bits(stage, x, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value_act", [None, "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_stage_of_the_light_form(
    dtype: torch.dtype, shape: tuple[int, ...], value_act: str | None, form: str, threads: int
) -> None:
    torch.manual_seed(0)
    stage = drawn(LightStage(shape[1], value_act)).to(dtype)
    x = torch.randn(shape, dtype=dtype).to(memory_format=FORMATS[form])
    assert_same_bits(stage, x, threads)


def test_a_residual_and_what_is_kept_for_reuse() -> None:
    """Both are stored, whatever else ends at once."""
    torch.manual_seed(0)
    layer = drawn(ek.ELA(16, 8))
    x = torch.randn(4, 16, 9, 9)
    history = ek.LayerHistory()
    with ek.use_backend("cpp"), torch.no_grad():
        first = layer(x, history)
        layer.skipped = True
        again = layer(x, history)
    assert torch.equal(first, again)  # the same retrieval, under the same norm
