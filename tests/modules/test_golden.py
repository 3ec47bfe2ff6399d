"""The modules against the published ones' numbers, in float64.

Tolerance: 1e-10 of the largest entry. Rounding gives about 1e-15; anything that is not the same formula gives far more
than 1e-10.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.layer_stages import recorded_calls
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.modules import ConcatHistory, ConcatLayerAttention

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILTERS = ("Wq", "Wk", "Wv")


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


def close(got: Tensor | None, want: np.ndarray, what: str) -> None:
    assert got is not None, what
    atol = 1e-10 * float(np.abs(want).max())
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=atol, err_msg=what)


def made(cls: type[nn.Module], data: dict[str, np.ndarray]) -> list[nn.Module]:
    depth, _, dim, head_dim, _, _ = (int(n) for n in data["meta"])
    layers = []
    for i in range(depth):
        layer = cls(dim, head_dim=head_dim).double()
        state = {f"{f}.weight": torch.from_numpy(data[f"{f}_{i}"]) for f in FILTERS}
        if f"lambda_{i}" in data:
            state["lambda_t"] = torch.from_numpy(data[f"lambda_{i}"])
        layer.load_state_dict(state)  # strict: the names and shapes are the published ones
        layers.append(layer)
    return layers


def check_gradients(x: Tensor, layers: list[nn.Module], data: dict[str, np.ndarray]) -> None:
    close(x.grad, data["grad_x"], "grad_x")
    for i, layer in enumerate(layers):
        for f in FILTERS:
            close(getattr(layer, f).weight.grad, data[f"grad_{f}_{i}"], f"grad_{f}_{i}")


@pytest.fixture
def whole_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernels of whole layers were called for: a golden number proves them only where they ran."""
    names = ("layer", "layer_backward", "light_layer", "light_layer_backward")
    return recorded_calls(monkeypatch, KERNELS["cpp"], names)


@pytest.mark.parametrize("name", ["mrla_base", "mrla_base_channelwise"])
@pytest.mark.parametrize("form", ["fused", "concatenating"])
def test_base_layers_give_the_published_numbers(
    name: str, form: str, backend: str, whole_layers: list[str]
) -> None:
    data = load(name)
    cls, history = {
        "fused": (ek.LayerAttention, ek.LayerHistory()),
        "concatenating": (ConcatLayerAttention, ConcatHistory()),
    }[form]
    layers = made(cls, data)
    x = torch.from_numpy(data["x"]).requires_grad_()
    y = x
    for i, layer in enumerate(layers):
        out = layer(y, history)
        close(out, data[f"out_{i}"], f"out_{i}")
        close(history.weights, data[f"weights_{i}"], f"weights_{i}")
        if i:
            close(history.kl, data[f"kl_{i}"], f"kl_{i}")
        else:
            assert history.kl is None
        y = y + out
    close(y, data["y"], "y")
    (y * torch.from_numpy(data["cotangent"])).sum().backward()
    check_gradients(x, layers, data)
    fused = len(layers) if form == "fused" and backend == "cpp" else 0
    assert whole_layers == ["layer"] * fused + ["layer_backward"] * fused


def test_light_layers_give_the_published_numbers(backend: str, whole_layers: list[str]) -> None:
    data = load("mrla_light")
    layers = made(ek.LightLayerAttention, data)
    x = torch.from_numpy(data["x"]).requires_grad_()
    y = out = x
    for i, layer in enumerate(layers):
        out = layer(y, out)
        close(out, data[f"out_{i}"], f"out_{i}")
        y = y + out
    close(y, data["y"], "y")
    (y * torch.from_numpy(data["cotangent"])).sum().backward()
    check_gradients(x, layers, data)
    for i, layer in enumerate(layers):
        close(layer.lambda_t.grad, data[f"grad_lambda_{i}"], f"grad_lambda_{i}")
    fused = len(layers) if backend == "cpp" else 0
    assert whole_layers == ["light_layer"] * fused + ["light_layer_backward"] * fused
