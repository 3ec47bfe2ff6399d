"""LayerAttention, LightLayerAttention and the concatenating baseline, beyond their numbers."""

from __future__ import annotations

import copy
import inspect
import pickle
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.modules import ConcatHistory, ConcatLayerAttention
from ela_kernels.modules.query_key_value import default_kernel_size

# float32 results of two orders of summation over 9 or fewer terms and C / G = 16 products differ by a few roundings
# (6e-8 each) of numbers near 1; gradients add some tens of them.
FEW_ROUNDINGS = {"rtol": 1e-5, "atol": 1e-5}


def stage(depth: int = 4, dim: int = 32, head_dim: int = 16) -> nn.ModuleList:
    return nn.ModuleList(ek.LayerAttention(dim, head_dim) for _ in range(depth))


def run(
    layers: nn.ModuleList, x: Tensor, recompute: bool = False
) -> tuple[Tensor, ek.LayerHistory]:
    history = ek.LayerHistory()
    for layer in layers:
        out = checkpoint(layer, x, history, use_reentrant=False) if recompute else layer(x, history)
        x = x + out
    return x, history


def gradients(layers: nn.ModuleList, x: Tensor, recompute: bool = False) -> list[Tensor]:
    layers.zero_grad()
    x = x.clone().requires_grad_()
    run(layers, x, recompute)[0].square().sum().backward()
    found = [x.grad, *(p.grad for p in layers.parameters())]
    assert all(g is not None for g in found)
    return found


@pytest.mark.parametrize(
    ("dim", "size"), [(1, 1), (16, 3), (32, 3), (64, 3), (128, 5), (256, 5), (1024, 5), (2048, 7)]
)
def test_default_kernel_size_is_the_published_rule(dim: int, size: int) -> None:
    # int(|log2(dim) + 1| / 2) by hand: 0 -> 1, 2 -> 3, 3, 3, 4 -> 5, 4 -> 5, 5, 6 -> 7
    assert default_kernel_size(dim) == size


@pytest.mark.parametrize(("dim", "size"), [(4, 3), (32, 5), (5, 9), (1, 1)])
def test_query_and_key_are_convolutions_over_the_channels(dim: int, size: int) -> None:
    layer, x = ek.LayerAttention(dim, 1, size).double(), torch.randn(3, dim, 4, 5).double()
    y = x.mean((2, 3)).unsqueeze(1)
    for got, filters in zip(layer.query_key(x), (layer.Wq, layer.Wk), strict=True):
        want = nn.functional.conv1d(y, filters.weight, padding=size // 2).squeeze(1)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(layer.key_value(x)[0], layer.query_key(x)[1])


def test_parameters_have_the_published_names_and_shapes() -> None:
    for cls in (ek.LayerAttention, ConcatLayerAttention):
        shapes = {name: list(p.shape) for name, p in cls(64).named_parameters()}
        assert shapes == {
            "Wq.weight": [1, 1, 3],
            "Wk.weight": [1, 1, 3],
            "Wv.weight": [64, 1, 3, 3],
        }
    light = {name: list(p.shape) for name, p in ek.LightLayerAttention(64).named_parameters()}
    assert light["lambda_t"] == [64, 1, 1]
    assert ek.LayerAttention(32, kernel_size=7).Wk.weight.shape[-1] == 7


def test_the_kernel_runs(kernels: object, ran: list[str]) -> None:
    gradients(stage(3), torch.randn(2, 32, 5, 5))
    assert ran == ["cpp layer"] * 3 + ["cpp layer backward"] * 3


def test_fused_and_concatenating_agree(backend: str) -> None:
    fused = stage()
    published = nn.ModuleList(ConcatLayerAttention(32) for _ in range(4))
    published.load_state_dict(fused.state_dict())
    x = torch.randn(2, 32, 7, 6)
    history, y = ConcatHistory(), x.clone().requires_grad_()
    z = y
    for layer in published:
        z = z + layer(z, history)
    z.square().sum().backward()
    want = [y.grad, *(p.grad for p in published.parameters())]
    for got, expected in zip(gradients(fused, x), want, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
    out, fused_history = run(fused, x)
    torch.testing.assert_close(out, z, **FEW_ROUNDINGS)
    torch.testing.assert_close(fused_history.kl, history.kl, **FEW_ROUNDINGS)
    assert history.depth == fused_history.depth == 4


def test_concatenated_divergence_is_finite_where_weights_underflow() -> None:
    layers = [ConcatLayerAttention(16, head_dim=16) for _ in range(2)]
    with torch.no_grad():
        for layer, key in zip(layers, (1.0, 40.0), strict=True):
            for conv, value in ((layer.Wq, 1.0), (layer.Wk, key)):
                conv.weight.copy_(torch.tensor([[[0.0, value, 0.0]]]))
    history = ConcatHistory()
    for layer in layers:
        layer(torch.full((1, 16, 3, 3), 4.0), history)
    assert history.weights is not None
    assert history.weights[0, 0, 0] == 0.0
    # scores: <q, k_j> / 4 with q = 4: 64 and 2560; the first layer had all its weight on itself
    torch.testing.assert_close(history.kl, torch.tensor([[2560.0 - 64.0]]), rtol=1e-6, atol=0)


def test_channels_last_input_gives_the_same(backend: str) -> None:
    layers, x = stage(), torch.randn(2, 32, 6, 5)
    plain, _ = run(layers, x)
    interleaved, history = run(layers, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(interleaved, plain, **FEW_ROUNDINGS)
    assert history.values[0].is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_changes_no_gradient(backend: str) -> None:
    layers, x = stage(), torch.randn(2, 32, 5, 5)
    for got, want in zip(gradients(layers, x, True), gradients(layers, x), strict=True):
        assert torch.equal(got, want)


def test_autocast_takes_float32_parameters(backend: str) -> None:
    layers = stage()
    x = torch.randn(2, 32, 6, 6)
    want, _ = run(layers, x)
    with torch.autocast("cpu", torch.bfloat16):
        got, history = run(layers, x)
        (got.float().square().mean()).backward()
    assert history.values[0].dtype == torch.bfloat16
    assert history.weights is not None
    assert history.weights.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layers.parameters())
    # bfloat16 keeps 8 bits; four layers, each a sum with rounded scores, values and output
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


def test_light_form_under_autocast_takes_a_float32_stage_input() -> None:
    layer, x = ek.LightLayerAttention(32), torch.randn(2, 32, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied) -> None:
    layers, x = stage(), torch.randn(2, 32, 5, 5)
    want, _ = run(layers, x)
    twin = copied(layers)
    assert torch.equal(run(twin, x)[0], want)
    with torch.no_grad():
        twin[0].Wv.weight.zero_()
    assert torch.equal(run(layers, x)[0], want)


def test_empty_batch_goes_through(backend: str) -> None:
    layers = stage(2)
    out, history = run(layers, torch.randn(0, 32, 4, 4, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 32, 4, 4)
    assert history.kl is not None
    assert history.kl.shape == (0, 2)


def test_meta_tensors_give_shapes() -> None:
    layers = stage(2).to("meta")
    out, history = run(layers, torch.empty(3, 32, 4, 4, device="meta"))
    assert out.shape == (3, 32, 4, 4)
    assert history.weights is not None
    assert history.weights.shape == (3, 2, 2)


@pytest.mark.parametrize("cls", [ek.LayerAttention, ek.LightLayerAttention, ConcatLayerAttention])
class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "name"),
        [
            ((0,), ValueError, "dim"),
            ((32.0,), TypeError, "dim"),
            ((32, 0), ValueError, "head_dim"),
            ((32, 12), ValueError, "head_dim"),
            ((32, "16"), TypeError, "head_dim"),
            ((32, 16, 4), ValueError, "kernel_size"),
            ((32, 16, -3), ValueError, "kernel_size"),
            ((32, 16, True), TypeError, "kernel_size"),
        ],
    )
    def test_arguments(self, cls, arguments, error, name) -> None:
        with pytest.raises(error, match=rf"^{name}: got .*allowed is"):
            cls(*arguments)

    @pytest.mark.parametrize("shape", [(32, 4, 4), (2, 16, 4, 4), (2, 32, 9)])
    def test_shapes(self, cls, shape) -> None:
        with pytest.raises(ValueError, match=r"^x: got shape .*allowed is \[B, 32, H, W\]"):
            cls(32)(torch.randn(shape), None)

    def test_no_tensor(self, cls) -> None:
        with pytest.raises(TypeError, match=r"^x: got list"):
            cls(32)([1.0], None)


@pytest.mark.parametrize("cls", [ek.LayerAttention, ek.ELA])
@pytest.mark.parametrize("history", [None, [], ek.LayerHistory])
def test_something_else_than_a_history_is_refused(cls, history) -> None:
    with pytest.raises(TypeError, match=r"^history: got \w+; allowed is the LayerHistory of this"):
        cls(32)(torch.randn(1, 32, 4, 4), history)


def test_the_concatenating_form_refuses_another_history() -> None:
    with pytest.raises(TypeError, match="history: got LayerHistory; allowed is a ConcatHistory"):
        ConcatLayerAttention(32)(torch.randn(1, 32, 4, 4), ek.LayerHistory())


def documented(layer: nn.Module, **names: Any) -> Tensor:
    """What the lines under "Equivalent PyTorch" in the docstring of a layer's class give, with the layer's parts."""
    text = inspect.getdoc(type(layer)) or ""
    lines = text.split("Equivalent PyTorch", 1)[1].split("::\n\n", 1)[1].split("\n")
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    parts = dict(layer.named_children()) | dict(layer.named_parameters(recurse=False))
    parts |= {name: getattr(layer, name) for name in ("dim", "head_dim")}
    found: dict[str, Any] = {"ek": ek, "F": F, **parts, **names}
    exec(textwrap.dedent("\n".join(lines[:end])), found)
    out: Tensor = found["out"]
    return out


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_documented_equivalent_gives_the_layers_numbers(size: int) -> None:
    torch.manual_seed(0)
    layers = [ek.LayerAttention(32, 8, size) for _ in range(3)]
    history, keys, values = ek.LayerHistory(), [], []
    for layer in layers:
        x = torch.randn(2, 32, 5, 6)
        expected = documented(layer, x=x, keys=keys, values=values)
        torch.testing.assert_close(layer(x, history), expected, **FEW_ROUNDINGS)
    light = ek.LightLayerAttention(32, 8, size)
    x, prev_out = torch.randn(2, 2, 32, 5, 6)
    expected = documented(light, x=x, prev_out=prev_out)
    torch.testing.assert_close(light(x, prev_out), expected, **FEW_ROUNDINGS)
