"""The networks in published shapes that `convert` is measured and tested on are what they say they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.published.filters import (
    ContextAttention,
    LightAttention,
    LinearAttention,
    RawAttention,
    StackedAttention,
)
from benchmarks.published.networks import NETWORKS
from benchmarks.published.resnet_light import LightCell

GOLDEN = Path(__file__).resolve().parent / "golden"

# Names in the published code's checkpoints, one layer each: they are what a converted network has to keep.
NAMES = {
    "base cifar": "stages.1.1.mrla.mrla.",
    "base imagenet": "stages.1.1.mrla.mrla.",
    "light cifar": "layer2.1.mrla.mrla.",
    "light backbone": "layer2.1.mrla.mrla.",
    "base tokens": "blocks.4.mrla.mrla.",
    "light tokens": "blocks.4.mrla.mrla.",
    "dynamic base": "stages.1.attention.1.layer_attention.layer_attention.",
    "dynamic light": "stages.1.attention.1.layer_attention.layer_attention.",
    "dynamic light, imagenet": "layer2.attention.1.layer_attention.mrla.",
    "equation (4)": "layer2.1.la.",
    "raw features": "stages.1.1.mrla.mrla.",
    "norms of keys": "stages.1.1.kcla.",
}


def outputs(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    out = network(torch.randn(shape))
    return out if isinstance(out, Tensor) else torch.cat([o.flatten() for o in out])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_and_infers(name: str) -> None:
    make, shape, layers, _ = NETWORKS[name]
    network = make()
    assert sum(hasattr(module, "Wq") for module in network.modules()) == layers
    out = outputs(network.train(), shape)
    out.square().sum().backward()
    filters = [p for n, p in network.named_parameters() if ".W" in n and "u_Wk" not in n]
    assert len(filters) == 3 * layers
    assert all(p.grad is not None and p.grad.isfinite().all() for p in filters)
    with torch.no_grad():
        assert outputs(network.eval(), shape).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_published_checkpoints(name: str) -> None:
    state = NETWORKS[name].make().state_dict()
    assert {f"{NAMES[name]}{w}.weight" for w in ("Wq", "Wk", "Wv")} <= state.keys()


@pytest.mark.parametrize("file", ["mrla_base", "mrla_base_channelwise"])
def test_base_layers_give_the_published_numbers(file: str) -> None:
    data = {n: torch.from_numpy(v) for n, v in np.load(GOLDEN / f"{file}.npz").items()}
    T, _, C, D, _, _ = data["meta"].int().tolist()
    x = data["x"].requires_grad_()
    layers = [StackedAttention(C, D, init_cell=i == 0).double() for i in range(T)]
    y, keys, values = x, None, None
    for i, layer in enumerate(layers):
        load_filters(layer, data, i)
        out, keys, values = layer(y, keys, values)
        close(out, data[f"out_{i}"])
        y = y + out
    (y * data["cotangent"]).sum().backward()
    close(x.grad, data["grad_x"])
    for i, layer in enumerate(layers):
        for w in ("Wq", "Wk", "Wv"):
            close(getattr(layer, w).weight.grad, data[f"grad_{w}_{i}"])


def test_light_layers_give_the_published_numbers() -> None:
    data = {n: torch.from_numpy(v) for n, v in np.load(GOLDEN / "mrla_light.npz").items()}
    T, _, C, D, _, _ = data["meta"].int().tolist()
    x = data["x"].requires_grad_()
    cells = [LightCell(C, D).double() for _ in range(T)]
    y = out = x
    for i, cell in enumerate(cells):
        load_filters(cell.mrla, data, i)
        cell.lambda_t.data.copy_(data[f"lambda_{i}"].view(C, 1, 1))
        out = cell(y, out)
        close(out, data[f"out_{i}"])
        y = y + out
    (y * data["cotangent"]).sum().backward()
    close(x.grad, data["grad_x"])
    for i, cell in enumerate(cells):
        close(cell.lambda_t.grad.flatten(), data[f"grad_lambda_{i}"].flatten())


def test_activation_is_on_the_value_alone() -> None:
    plain, active = LightAttention(8, 4), LightAttention(8, 4, act_v=nn.ReLU())
    active.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(active(x), plain(x).relu())


def test_other_forms_are_the_base_form_where_they_agree() -> None:
    """Over one layer all are the same; over two, each differs from the base form in its own way."""
    base, later = StackedAttention(8, 4, init_cell=True), StackedAttention(8, 4)
    raw, raw_later = RawAttention(8, 4, init_cell=True), RawAttention(8, 4)
    context, context_later = ContextAttention(8, 4), ContextAttention(8, 4)
    for other in (later, raw, raw_later, context, context_later):
        other.load_state_dict(base.state_dict())
    x, after = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    want, k, v = base(x, None, None)
    torch.testing.assert_close(raw(x, None, None)[0], want)
    torch.testing.assert_close(context(x, x.unsqueeze(1)), want)
    want = later(after, k, v)[0]
    # With the same filters in every layer it does not matter when they are applied...
    raw_out, _, _ = raw_later(after, *raw(x, None, None)[1:])
    torch.testing.assert_close(raw_out, want)
    # ... but views that mix layers and heads do.
    mixed = context_later(after, torch.stack((x, after), 1))
    assert not torch.allclose(mixed, want, rtol=1e-2, atol=1e-3)


def test_linear_attention_is_a_mean_weighted_by_running_sums() -> None:
    first, second = LinearAttention(8, 1), LinearAttention(8, 1)
    a, b = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    out, s, z = first(a, 0.0, 0.0)
    # One channel a group, one layer: the key cancels, but for eps.
    torch.testing.assert_close(out, first.Wv(a), rtol=1e-4, atol=1e-5)
    out, _, _ = second(b, s, z)
    k1, k2 = (positive(m.Wk(x.mean((2, 3)).unsqueeze(1))) for m, x in ((first, a), (second, b)))
    want = (k1 * first.Wv(a) + k2 * second.Wv(b)) / (k1 + k2)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def positive(keys: Tensor) -> Tensor:
    """`elu + 1` by hand, as `[B, C, 1, 1]`."""
    return torch.where(keys > 0, keys + 1, keys.exp()).squeeze(1)[:, :, None, None]


def load_filters(layer: nn.Module, data: dict[str, Tensor], i: int) -> None:
    with torch.no_grad():
        for w in ("Wq", "Wk", "Wv"):
            getattr(layer, w).weight.copy_(data[f"{w}_{i}"])


def close(got: Tensor | None, want: Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
