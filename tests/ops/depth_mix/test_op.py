"""depth_mix: its formula, a network of it, who serves a call, and what is told of it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mixes import make_mix
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ela_kernels as ek
from ela_kernels.backends import dispatch
from ela_kernels.backends.contract import ATTENTION_OPS
from ela_kernels.backends.cpp.backend import CppBackend
from ela_kernels.backends.dispatch import Refusal

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "depth_mix.npz"


def einsum(weights: Tensor, values: Tensor) -> Tensor:
    """As the docstring has it, for maps `[B, C, H, W]`."""
    v = values.unflatten(2, (weights.shape[1], -1))
    return torch.einsum("bgt,btgdhw->bgdhw", weights, v).flatten(1, 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_the_formula_of_the_docstring(heads):
    mix = make_mix((2, 12, 5, 3), 4, heads, torch.float64)
    expected = einsum(mix.weights, torch.stack(mix.values, 1))
    torch.testing.assert_close(
        ek.depth_mix(mix.weights, mix.values), expected, rtol=1e-14, atol=1e-14
    )


@pytest.mark.usefixtures("backend")
def test_weights_of_a_softmax_retrieve_as_layer_attention_does():
    q, *keys = (torch.randn(2, 12, dtype=torch.float64) for _ in range(4))
    values = [torch.randn(2, 12, 5, 3, dtype=torch.float64) for _ in range(3)]
    expected = ek.layer_attention(q, keys, values, 3)
    found = ek.depth_mix(expected.weights, values)
    torch.testing.assert_close(found, expected.out, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("backend")
def test_factors_of_values_are_factors_of_weights():
    """What dynamic layer attention does to its maps, without writing one."""
    mix = make_mix((2, 6, 4, 5), 3, 6, torch.float64)
    gates = torch.rand(2, 6, 3, dtype=torch.float64)
    scaled = [v * gates[..., t, None, None] for t, v in enumerate(mix.values)]
    expected = ek.depth_mix(mix.weights, scaled)
    found = ek.depth_mix(mix.weights * gates, mix.values)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("form", ["shared", "heads", "channels"])
def test_golden_numbers(form, layout):
    with np.load(GOLDEN) as data:
        numbers = {name: torch.from_numpy(data[name]) for name in data.files}
    weights = numbers[f"weights_{form}"].requires_grad_()
    depth = len([name for name in numbers if name.startswith("value_")])
    values = [
        numbers[f"value_{t}"].contiguous(memory_format=layout).requires_grad_()
        for t in range(depth)
    ]
    out = ek.depth_mix(weights, values)
    gradients = torch.autograd.grad(out, [weights, *values], numbers["cotangent"])
    found = [out, *gradients]
    names = ["out", "grad_weights", *(f"grad_value_{t}" for t in range(depth))]
    for name, x in zip(names, found, strict=True):
        expected = numbers[f"{name}_{form}"]
        assert x.dtype == torch.float64
        assert (x - expected).abs().max() <= 1e-12 * expected.abs().max(), name


class DepthWeightedAverage(nn.Module):
    """DenseFormer's: after each block the mean of the input and all blocks' outputs, by weights that are learned."""

    def __init__(self, blocks: int, dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in range(blocks)
        )
        # At first each gives its block's output alone.
        self.alphas = nn.ParameterList(torch.tensor([0.0] * (i + 1) + [1.0]) for i in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for block, alpha in zip(self.blocks, self.alphas, strict=True):
            outputs.append(x + block(x))
            x = ek.depth_mix(alpha, outputs, channels_last=True)
        return x


@pytest.mark.usefixtures("backend")
def test_a_depth_weighted_average_begins_as_the_plain_stack_and_trains():
    torch.manual_seed(0)
    model = DepthWeightedAverage(4, 16)
    tokens, target = torch.randn(3, 10, 16), torch.randn(3, 10, 16)
    plain = tokens
    for block in model.blocks:
        plain = plain + block(plain)
    torch.testing.assert_close(model(tokens), plain)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = [alpha.detach().clone() for alpha in model.alphas]
    losses = []
    for _ in range(30):
        loss = (model(tokens) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all((a != b).all() for a, b in zip(before, model.alphas, strict=True))


def test_products_are_counted():
    mix = make_mix((2, 12, 5, 3), 4)
    weights, *values = (x.requires_grad_() for x in mix.inputs().values())
    counter = FlopCounterMode(display=False)
    with counter:
        ek.depth_mix(weights, values).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.ela_kernels.depth_mix] == 2 * 4 * values[0].numel()
    assert counts[torch.ops.ela_kernels.depth_mix_backward] == 4 * 4 * values[0].numel()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ek.depth_mix(torch.ones(2), [x, x])


@pytest.mark.usefixtures("kernels")
def test_explain():
    (found,) = ek.explain(Mixing(), torch.randn(2, 4, 3))
    assert (found.name, found.layer, found.form, found.backend) == ("", "function", "mix", "cpp")
    assert "the sum by given weights in one call" in str(ek.explain(Mixing(), torch.randn(2, 4, 3)))
    with ek.use_backend("eager"):
        (found,) = ek.explain(Mixing(), torch.randn(2, 4, 3))
    assert (found.form, found.backend) == ("eager", "eager")
    assert found.reasons == {"mix": ("use_backend('eager') is in force",)}


def test_a_backend_without_kernels_of_it_says_so(monkeypatch):
    mix = make_mix()
    monkeypatch.setattr(CppBackend, "ops", ATTENTION_OPS)
    dispatch._plan.cache_clear()
    try:
        with ek.use_backend("cpp"), pytest.raises(ValueError, match="no kernel for depth_mix"):
            ek.depth_mix(mix.weights, mix.values)
        assert ek.depth_mix(mix.weights, mix.values).shape == mix.values[0].shape
    finally:
        monkeypatch.undo()
        dispatch._plan.cache_clear()


@pytest.mark.usefixtures("kernels")
def test_a_device_without_kernels_is_told_once(caplog, monkeypatch):
    mix = make_mix()
    refusal = Refusal(("nothing: a test",), None)
    monkeypatch.setattr(dispatch, "_plan", lambda *_: refusal)
    dispatch._fallbacks.clear()
    with caplog.at_level(logging.WARNING, "ela_kernels"):
        for _ in range(2):
            ek.depth_mix(mix.weights, mix.values)
    assert len(caplog.records) == 1
    assert "nothing: a test" in caplog.text
