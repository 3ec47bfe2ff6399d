"""The published modules' numbers, recomputed in float64 from their inputs and weights with this operation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ela_kernels as ek

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / name) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def query_key_value(data: dict[str, torch.Tensor], i: int, x: torch.Tensor):
    pooled = x.mean((2, 3)).unsqueeze(1)
    wq, wk, wv = data[f"Wq_{i}"], data[f"Wk_{i}"], data[f"Wv_{i}"]
    q = F.conv1d(pooled, wq, padding=wq.shape[-1] // 2).squeeze(1)
    k = F.conv1d(pooled, wk, padding=wk.shape[-1] // 2).squeeze(1)
    return q, k, F.conv2d(x, wv, padding=1, groups=x.shape[1])


def assert_golden(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    # Relative to the largest number of the tensor: an element near zero is a difference of such numbers.
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["mrla_base.npz", "mrla_base_channelwise.npz"])
def test_base_form(name, memory_format):
    data = load(name)
    T, _, C, head_dim = data["meta"][:4].tolist()
    x, keys, values, prev = data["x"].to(memory_format=memory_format), [], [], None
    for i in range(T):
        q, k, v = query_key_value(data, i, x)
        keys.append(k)
        values.append(v.to(memory_format=memory_format))
        r = ek.layer_attention(q, keys, values, C // head_dim, prev_weights=prev)
        assert_golden(r.out, data[f"out_{i}"])
        assert_golden(r.weights, data[f"weights_{i}"])
        if i:
            assert_golden(r.kl, data[f"kl_{i}"])
        x, prev = x + r.out, r.weights
    assert_golden(x, data["y"])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["mrla_base.npz", "mrla_base_channelwise.npz", "mrla_light.npz"])
def test_gradients_of_a_stage(name):
    data = load(name)
    T, _, C, head_dim = data["meta"][:4].tolist()
    trained = [key for key in data if "grad_" + key in data]
    assert len(trained) == 1 + T * (4 if "light" in name else 3)
    for key in trained:
        data[key].requires_grad_()
    x, keys, values, previous = data["x"], [], [], data["x"]
    for i in range(T):
        q, k, v = query_key_value(data, i, x)
        if "light" in name:
            with ek.use_backend("auto"):  # no backend has kernels of this operation alone
                previous = ek.light_layer_attention(
                    q, k, v, previous, data[f"lambda_{i}"], C // head_dim
                )
            out = previous
        else:
            keys.append(k)
            values.append(v)
            out = ek.layer_attention(q, keys, values, C // head_dim).out
        assert_golden(out, data[f"out_{i}"])
        x = x + out
    assert_golden(x, data["y"])
    grads = torch.autograd.grad(x, [data[key] for key in trained], data["cotangent"])
    for key, g in zip(trained, grads, strict=True):
        assert_golden(g, data["grad_" + key])
