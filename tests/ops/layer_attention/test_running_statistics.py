"""The running statistics of a block's norm, which the CPU kernels move on themselves where they can."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ela_kernels as ek

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
DIM = 16


def block_of(form: str, dtype: torch.dtype, norm_dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    if form == "base":
        block: nn.Module = ek.ELA(DIM, 8)
    else:
        block = ek.models.resnet20(attention="mrla_light", num_classes=3)
    block.to(dtype)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(norm_dtype)
            nn.init.uniform_(module.running_mean, -1, 1)
    return block


def passes(block: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        if isinstance(block, ek.ELA):
            x = torch.randn(3, DIM, 7, 9, generator=generator).to(dtype)
            block(x.to(memory_format=memory_format), ek.LayerHistory())
        else:
            x = torch.randn(3, 3, 16, 16, generator=generator).to(dtype)
            block(x.to(memory_format=memory_format))


def norms(block: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def check_as_eager(block: nn.Module, dtype: torch.dtype, memory_format=torch.contiguous_format):
    """Buffers after three passes, of the kernels and of PyTorch's own batch norm."""
    other = copy.deepcopy(block)
    passes(block, dtype, memory_format)
    with ek.use_backend("eager"):
        passes(other, dtype, memory_format)
    for ours, theirs in zip(norms(block), norms(other), strict=True):
        if ours.num_batches_tracked is not None:
            assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 3
        # What is normed is rounded to the dtype of the maps, and so may the buffers be: a few of its last places.
        eps = max(torch.finfo(dtype).eps, torch.finfo(ours.running_mean.dtype).eps)
        for name in ("running_mean", "running_var"):
            found, wanted = getattr(ours, name), getattr(theirs, name)
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, 0.0, None])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_they_are_those_of_batch_norm(dtype, momentum, memory_format):
    block = block_of("base", dtype, dtype)
    block.norm.momentum = momentum
    check_as_eager(block, dtype, memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_float32_beside_half_precision(dtype):
    check_as_eager(block_of("base", dtype, torch.float32), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_of_the_light_form(dtype):
    # Seven norms of PyTorch's own stand before the first of ours: what they differ by has grown.
    block = block_of("light", torch.float32, torch.float32)
    block.to(dtype)
    before = [norm.running_mean.clone() for norm in norms(block)]
    passes(block, dtype, torch.contiguous_format)
    for norm, mean in zip(norms(block), before, strict=True):
        assert int(norm.num_batches_tracked) == 3
        assert not torch.equal(norm.running_mean, mean)


def light_block(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return ek.LightLayerAttention(DIM, 8).to(dtype), nn.BatchNorm2d(DIM).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_the_light_form(dtype):
    from ela_kernels.modules.residual import light_residual_block

    attn, norm = light_block(dtype)
    x, prev = (torch.randn(3, DIM, 7, 9).to(dtype) for _ in range(2))
    _, o = light_residual_block(attn, norm, nn.ReLU(), ek.modules.ela.DropPath(0.0), x, prev)
    wanted = nn.BatchNorm2d(DIM).to(dtype)
    wanted(o)
    assert int(norm.num_batches_tracked) == 1
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(norm.running_mean, wanted.running_mean, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(norm.running_var, wanted.running_var, rtol=8 * eps, atol=8 * eps)


def a_view(t: torch.Tensor) -> torch.Tensor:
    return torch.stack((t, t), 1)[:, 0]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_buffers_that_lie_apart_in_memory(name):
    block = block_of("base", torch.float32, torch.float32)
    other = copy.deepcopy(block)
    setattr(block.norm, name, a_view(getattr(block.norm, name)))
    for each in (block, other):
        passes(each, torch.float32, torch.contiguous_format)
    torch.testing.assert_close(block.norm.running_mean, other.norm.running_mean)
    torch.testing.assert_close(block.norm.running_var, other.norm.running_var)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_buffer_of_another_dtype_is_refused_as_by_batch_norm(name):
    block = block_of("base", torch.float32, torch.float32)
    setattr(block.norm, name, getattr(block.norm, name).double())
    with pytest.raises(RuntimeError, match="expected scalar type"):
        passes(block, torch.float32, torch.contiguous_format)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_a_change_is_seen_by_autograd(name):
    """A backward that needs a buffer as it was must say so, and not go on with other numbers."""
    block = block_of("base", torch.float32, torch.float32)
    buffer = getattr(block.norm, name)
    factor = torch.ones((), requires_grad=True)
    product = (factor * buffer).sum()
    block(torch.randn(2, DIM, 4, 4), ek.LayerHistory())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_buffers_of_inference_mode():
    """They have no versions to count up."""
    with torch.inference_mode():
        block = block_of("base", torch.float32, torch.float32)
        before = block.norm.running_mean.clone()
        block(torch.randn(2, DIM, 4, 4), ek.LayerHistory())
        assert not torch.equal(block.norm.running_mean, before)
        assert int(block.norm.num_batches_tracked) == 1


def test_a_freed_buffer_is_refused_by_name():
    block = block_of("base", torch.float32, torch.float32)
    block.norm.running_var.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError)):
        block(torch.randn(2, DIM, 4, 4), ek.LayerHistory())


def test_evaluation_changes_none():
    block = block_of("base", torch.float32, torch.float32).eval()
    before = {n: t.clone() for n, t in block.named_buffers()}
    passes(block, torch.float32, torch.contiguous_format)
    for name, buffer in block.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_parameters_in_half_precision(dtype):
    """The kernels read and write them in that dtype: as if they had been cast, both ways."""
    block = block_of("base", dtype, dtype)
    wide = copy.deepcopy(block)
    wide.norm.float()
    x = torch.randn(3, DIM, 7, 9).to(dtype)
    for each in (block, wide):
        each(x, ek.LayerHistory()).float().square().sum().backward()
    for ours, theirs in zip(block.norm.parameters(), wide.norm.parameters(), strict=True):
        assert ours.grad.dtype == dtype
        assert torch.equal(ours.grad, theirs.grad.to(dtype))
    assert torch.equal(block.attn.Wv.weight.grad, wide.attn.Wv.weight.grad)
