"""Queries and keys that are normalised before the attention."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ela_kernels as ek
from ela_kernels.ebqm.optimizers import idle_parameters
from ela_kernels.modules.query_key_value import QK_NORM_EPS

DIM, HEAD, DEPTH = 16, 4, 3
G = DIM // HEAD


def drawn(module: nn.Module) -> nn.Module:
    """With weights of the norms that are not one, so that they show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return module


def normed(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    heads = row.reshape(len(row), G, HEAD)
    inverse = (heads.square().mean(-1, keepdim=True) + QK_NORM_EPS).rsqrt()
    return (heads * inverse * weight).reshape(row.shape)


def rows(layer: ek.LayerAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key, written out."""
    y = x.mean((2, 3)).unsqueeze(1)
    pad = layer.kernel_size // 2
    q, k = (F.conv1d(y, w.weight, padding=pad).squeeze(1) for w in (layer.Wq, layer.Wk))
    return normed(q, layer.q_norm.weight), normed(k, layer.k_norm.weight)


def by_hand(layers: nn.ModuleList, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stage `x <- x + layer(x)`, and the last layer's weights."""
    keys, values = [], []
    for layer in layers:
        q, k = rows(layer, x)
        keys.append(k)
        values.append(F.conv2d(x, layer.Wv.weight, padding=1, groups=DIM))
        k = torch.stack(keys, 1).unflatten(2, (G, HEAD))
        scores = torch.einsum("bgd,btgd->bgt", q.unflatten(1, (G, HEAD)), k) / HEAD**0.5
        weights = scores.softmax(-1)
        v = torch.stack(values, 1).unflatten(2, (G, HEAD))
        x = x + torch.einsum("bgt,btgdhw->bgdhw", weights, v).flatten(1, 2)
    return x, weights


def stage() -> tuple[nn.ModuleList, torch.Tensor]:
    layers = nn.ModuleList(ek.LayerAttention(DIM, HEAD, qk_norm=True) for _ in range(DEPTH))
    torch.manual_seed(0)
    return drawn(layers.double()), torch.randn(2, DIM, 5, 6, dtype=torch.float64)


def run(layers: nn.ModuleList, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    history = ek.LayerHistory()
    for layer in layers:
        x = layer(x, history, residual=True)
    assert history.weights is not None
    return x, history.weights


def gradients(outputs: tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = sum((o.sin() * torch.arange(o.numel(), dtype=o.dtype).view_as(o)).sum() for o in outputs)
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_base_form_is_the_formula(backend):
    layers, x = stage()
    x.requires_grad_()
    inputs = [x, *layers.parameters()]
    with ek.use_backend(backend):
        found = run(layers, x)
        got = gradients(found, inputs)
    wanted = by_hand(layers, x)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got, gradients(wanted, inputs), rtol=1e-9, atol=1e-9)


def test_scores_do_not_grow_with_the_input():
    """What it is for: a softmax of products of large rows would be one-hot."""
    layers, x = stage()
    with torch.no_grad():
        small, large = run(layers[:2], x)[1], run(layers[:2], 1e4 * x)[1]
    # The second layer's input has grown as the first one's has.
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)


def test_the_light_form_is_the_formula():
    torch.manual_seed(0)
    layer = drawn(ek.LightLayerAttention(DIM, HEAD, qk_norm=True).double())
    x, prev = (torch.randn(2, DIM, 5, 6, dtype=torch.float64, requires_grad=True) for _ in "ab")
    q, k = rows(layer, x)
    gate = torch.sigmoid((q * k).unflatten(1, (G, HEAD)).sum(-1) / HEAD**0.5)
    v = F.conv2d(x, layer.Wv.weight, padding=1, groups=DIM)
    wanted = gate.repeat_interleave(HEAD, 1)[..., None, None] * v + layer.lambda_t * prev
    found = layer(x, prev)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    inputs = [x, prev, *layer.parameters()]
    got, want = gradients((found,), inputs), gradients((wanted,), inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("skip", ["reuse", "retrieval", "layer"])
def test_blocks_skipped_and_not(skip):
    """A skipped layer's key is normalised too, and a probe sees the weights that the layer would have."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        ek.ELA(DIM, HEAD, skip=skip, qk_norm=True) for _ in range(DEPTH)
    ).double()
    drawn(blocks)
    blocks[1].skipped = True
    x = torch.randn(2, DIM, 5, 6, dtype=torch.float64)

    def outputs() -> list[torch.Tensor]:
        history, y, found = ek.LayerHistory(), x, []
        for block in blocks:
            y = block(y, history)
            found.append(y)
        return [*found, history.weights]

    ours = outputs()
    if skip == "layer":
        assert torch.equal(ours[1], ours[0])
    with ek.use_backend("eager"):
        torch.testing.assert_close(ours, outputs(), rtol=1e-11, atol=1e-11)
    history = ek.LayerHistory()
    out = blocks[0](x, history)
    q, k = rows(blocks[1].attn, out)
    expected = history.probe(q, k, heads=G).weights
    blocks[1].skipped = False
    blocks[1](out, history)
    torch.testing.assert_close(history.weights, expected, rtol=1e-11, atol=1e-11)


def test_what_serves_it_and_why_not_more():
    layers, x = stage()
    report = str(ek.explain(layers[0], x, ek.LayerHistory()))
    assert "qk_norm" in report


def test_tokens_and_autocast_and_compiled_graphs():
    torch.manual_seed(0)
    layer = ek.LayerAttention(DIM, HEAD, qk_norm=True)
    x = torch.randn(2, DIM, 4, 4)
    out = layer(x, ek.LayerHistory())
    tokens = layer(x.flatten(2).mT.contiguous(), ek.LayerHistory())
    torch.testing.assert_close(tokens.mT.unflatten(2, (4, 4)), out, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x, ek.LayerHistory())
    assert half.dtype == torch.bfloat16
    # Rounded at each of four operations, to eight bits each.
    torch.testing.assert_close(half.float(), out, rtol=3e-2, atol=3e-2)
    compiled = torch.compile(
        lambda x: layer(x, ek.LayerHistory()), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), out, rtol=1e-5, atol=1e-6)


def test_names_and_copies():
    names = {"q_norm.weight", "k_norm.weight"}
    plain, layer = ek.LayerAttention(DIM, HEAD), ek.LayerAttention(DIM, HEAD, qk_norm=True)
    assert set(layer.state_dict()) - set(plain.state_dict()) == names
    assert "qk_norm=True" in repr(layer)
    assert "qk_norm" not in repr(plain)
    assert set(copy.deepcopy(layer).state_dict()) == set(layer.state_dict())


def test_prune_removes_the_norm_of_queries():
    blocks = nn.ModuleList(ek.ELA(DIM, HEAD, qk_norm=True) for _ in range(DEPTH))
    x = torch.randn(2, DIM, 5, 6)

    def forward() -> torch.Tensor:
        history, y = ek.LayerHistory(), x
        for block in blocks:
            y = block(y, history)
        return y

    blocks[1].skipped = True
    forward()
    idle = {id(p) for p in idle_parameters(blocks)}
    assert id(blocks[1].attn.q_norm.weight) in idle
    assert id(blocks[1].attn.k_norm.weight) not in idle
    blocks.eval()
    before = forward()
    ek.prune(blocks)
    left = set(blocks[1].state_dict())
    assert not [name for name in left if "q_norm" in name or ".Wq." in name]
    assert "attn.k_norm.weight" in left
    torch.testing.assert_close(forward(), before)


@pytest.mark.parametrize("kind", [ek.LayerAttention, ek.LightLayerAttention, ek.ELA])
@pytest.mark.parametrize("value", [1, "yes", None, nn.RMSNorm])
def test_what_is_no_bool_is_refused_by_name(kind, value):
    with pytest.raises(TypeError, match=r"^qk_norm: got \w+; allowed is True or False$"):
        kind(DIM, HEAD, qk_norm=value)
