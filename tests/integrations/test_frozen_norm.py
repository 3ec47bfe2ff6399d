"""Frozen batch norms are served by the kernels of a block, and by nothing that changes them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ela_kernels as ek
from ela_kernels.models.blocks import MRLA, MRLALight
from ela_kernels.modules.norms import is_frozen, takes_batch

misc = pytest.importorskip("torchvision.ops.misc")

pytestmark = pytest.mark.integration

DIM, SHAPE = 32, (2, 32, 7, 5)


def frozen(dim: int) -> nn.Module:
    norm = misc.FrozenBatchNorm2d(dim)
    generator = torch.Generator().manual_seed(0)
    for buffer in norm.buffers():
        buffer.copy_(torch.rand(dim, generator=generator) + 0.5)
    return norm


def blocks(count: int = 3) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(ek.ELA(DIM, norm_layer=frozen) for _ in range(count))


def run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    history = ek.LayerHistory()
    for layer in layers:
        x = layer(x, history)
    return x


def test_a_batch_norm_in_evaluation_is_the_same_function() -> None:
    norm = frozen(DIM).double()
    other = nn.BatchNorm2d(DIM, eps=norm.eps).double().eval()
    other.load_state_dict(norm.state_dict(), strict=False)
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(norm(x), other(x), rtol=1e-12, atol=1e-12)
    assert is_frozen(norm)
    assert not is_frozen(other)
    assert not takes_batch(norm.train())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_kernels_and_pytorch_agree(dtype: torch.dtype, training: bool) -> None:
    layers = blocks().to(dtype).train(training)
    before = copy.deepcopy(layers.state_dict())
    found = []
    for backend in ("cpp", "eager"):
        torch.manual_seed(1)
        x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
        with ek.use_backend(backend):
            run(layers, x).square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in layers.parameters())])
        layers.zero_grad()
    # Sums of some hundred terms, in another order.
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-4}[dtype]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    after = {name: value for name, value in layers.state_dict().items() if ".norm." in name}
    assert len(after) == 12
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("skip", ["reuse", "retrieval", "layer"])
def test_skipped_layers(skip: str) -> None:
    layers = blocks(4)
    for layer in layers:
        layer.skip = skip
    layers[2].skipped = True
    x = torch.randn(SHAPE)
    with ek.use_backend("eager"):
        want = run(layers, x)
    with ek.use_backend("cpp"):
        torch.testing.assert_close(run(layers, x), want, rtol=1e-4, atol=1e-4)


def test_it_is_said_who_serves() -> None:
    layers = blocks()
    history = ek.LayerHistory()
    said = str(ek.explain(layers[0], torch.randn(SHAPE), history))
    assert "cpp" in said
    assert "the residual block in one call" in said
    assert "not" not in said


def test_the_light_form() -> None:
    torch.manual_seed(0)
    block = MRLALight(ek.LightLayerAttention(DIM), 0.0, norm_layer=frozen)
    x, before = torch.randn(SHAPE), torch.randn(SHAPE)
    with ek.use_backend("eager"):
        want = block(x, before)
    torch.testing.assert_close(block(x, before), want, rtol=1e-4, atol=1e-4)


def test_compiled() -> None:
    layers = blocks()
    x = torch.randn(SHAPE)
    want = run(layers, x)
    torch._dynamo.reset()
    got = torch.compile(lambda x: run(layers, x), backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_another_dtype_is_left_to_pytorch() -> None:
    """Beside half precision the product with a scale of float32 is of float32."""
    layers = blocks().to(torch.bfloat16)
    for layer in layers:
        layer.norm.float()
    x = torch.randn(SHAPE, dtype=torch.bfloat16)
    history = ek.LayerHistory()
    out = layers[0](x, history)
    assert out.dtype == torch.float32


def test_a_subclass_is_left_to_pytorch() -> None:
    class Halved(misc.FrozenBatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    torch.manual_seed(0)
    block = MRLA(ek.LayerAttention(DIM), 0.0, norm_layer=Halved)
    x = torch.randn(SHAPE)
    with ek.use_backend("eager"):
        want = block(x, ek.LayerHistory())
    torch.testing.assert_close(block(x, ek.LayerHistory()), want, rtol=1e-4, atol=1e-4)
    assert not is_frozen(block.norm)
