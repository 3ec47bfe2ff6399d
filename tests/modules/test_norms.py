"""Norms of the block that no kernel knows: over the channels, in every skip mode, and in the networks' blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from ela_kernels.models.blocks import MRLA, MRLALight
from ela_kernels.modules import ConcatHistory, ConcatLayerAttention
from ela_kernels.modules.norms import normed

C, HEAD = 8, 4
Norm = Callable[[int], nn.Module]


class ChannelsNorm(nn.LayerNorm):
    """Knows maps itself, as those of ConvNeXt do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        out = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return out.permute(0, 3, 1, 2)


def over_channels(o: Tensor, norm: Any) -> Tensor:
    """By sums alone."""
    mean = o.mean(1, keepdim=True)
    variance = (o - mean).square().mean(1, keepdim=True)
    weight, bias = (t.view(1, -1, 1, 1) for t in (norm.weight, norm.bias))
    return (o - mean) / (variance + norm.eps).sqrt() * weight + bias


def root_mean_square(o: Tensor, norm: Any) -> Tensor:
    eps = torch.finfo(o.dtype).eps if norm.eps is None else norm.eps
    found = o / (o.square().mean(1, keepdim=True) + eps).sqrt()
    return found * norm.weight.view(1, -1, 1, 1)


def in_groups(o: Tensor, norm: Any) -> Tensor:
    parts = o.unflatten(1, (norm.num_groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    variance = (parts - mean).square().mean((2, 3, 4), keepdim=True)
    found = ((parts - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    weight, bias = (t.view(1, -1, 1, 1) for t in (norm.weight, norm.bias))
    return found * weight + bias


NORMS: dict[str, tuple[Norm, Callable[[Tensor, Any], Tensor]]] = {
    "LayerNorm": (nn.LayerNorm, over_channels),
    "RMSNorm": (nn.RMSNorm, root_mean_square),
    "GroupNorm": (lambda dim: nn.GroupNorm(4, dim), in_groups),
    "ChannelsNorm": (ChannelsNorm, over_channels),
}
every_norm = pytest.mark.parametrize("name", NORMS)


class Stage(nn.Module):
    """Layers of ELA; 1 in the pattern is a layer that is skipped."""

    def __init__(self, make: Norm, pattern: str, act: Any = nn.ReLU, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ek.ELA(C, HEAD, norm_layer=make, act_layer=act, **options) for _ in pattern
        )
        for layer, mark in zip(self.layers, pattern, strict=True):
            for parameter in layer.norm.parameters():
                nn.init.normal_(parameter, 1.0, 0.5)
            layer.skipped = mark == "1"
        self.double()
        self.wrap: Callable[..., Tensor] = lambda layer, *args: layer(*args)

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for layer in self.layers:
            x = self.wrap(layer, x, history)
        return x


def by_hand(stage: Stage, x: Tensor, norm: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """Softmax over the layers so far, written out."""
    keys: list[Tensor] = []
    values: list[Tensor] = []
    o = None
    for layer in stage.layers:
        attn, y = layer.attn, x.mean((2, 3)).unsqueeze(1)
        q, k = (
            F.conv1d(y, w.weight, padding=w.weight.shape[-1] // 2).squeeze(1)
            for w in (attn.Wq, attn.Wk)
        )
        if not layer.skipped or layer.provides:
            keys.append(k.view(-1, C // HEAD, HEAD))
            values.append(attn.Wv(x).unflatten(1, (C // HEAD, HEAD)))
        if not layer.skipped:
            query = q.view(-1, C // HEAD, HEAD) * HEAD**-0.5
            scores = torch.stack([(query * key).sum(-1) for key in keys], -1)
            weights = scores.softmax(-1).unbind(-1)
            pairs = zip(weights, values, strict=True)
            o = sum(w[..., None, None, None] * v for w, v in pairs).flatten(1, 2)
        if o is not None and (not layer.skipped or layer.skip == "reuse"):
            x = x + layer.act(norm(o, layer.norm))
    return x


def step(run: Callable[[Tensor], Tensor], stage: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    wanted = [x, *stage.parameters()]
    grads = torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)),
    ]


def images(channels: int = C) -> Tensor:
    # As wide as there are channels: a norm over the last dimension would not fail.
    return torch.rand(2, channels, 3, channels, dtype=torch.float64) + 0.5


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_norm
@pytest.mark.parametrize("mode", ["reuse", "reuse alone", "retrieval", "layer"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_against_pytorch_by_hand(name: str, mode: str, form: Any, backend: str) -> None:
    make, formula = NORMS[name]
    options = {"skip": "reuse", "provides": False} if mode == "reuse alone" else {"skip": mode}
    stage = Stage(make, "010110", **options)
    x = images().contiguous(memory_format=form)
    want = step(lambda t: by_hand(stage, t, formula), stage, x)
    for _ in range(2):  # the layers know each other in the second pass
        close(step(stage, stage, x), want)


@every_norm
def test_the_whole_layer_is_served_and_why_not_the_block(name: str, kernels: object) -> None:
    first, block, pair, third = ek.explain(Stage(NORMS[name][0], "010"), images())
    reason = f"norm is {name}, and the kernels know BatchNorm2d"
    for found in (first, third):
        assert (found.form, found.backend) == ("layer", "cpp")
        assert found.reasons == {"block": (reason,)}
    assert (block.form, block.reasons) == ("reuse by pieces", {"reuse": (reason,)})
    assert (pair.form, pair.backend) == ("pair", "cpp")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("LayerNorm", "reuse"),
        ("LayerNorm", "retrieval"),
        ("LayerNorm", "layer"),
        ("GroupNorm", "reuse"),
    ],
)
def test_in_compiled_graphs(name: str, mode: str, kernels: object) -> None:
    torch._dynamo.reset()
    make, formula = NORMS[name]
    stage = Stage(make, "010", skip=mode)
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    for pattern in ("010", "001", "000"):
        for layer, mark in zip(stage.layers, pattern, strict=True):
            layer.skipped = mark == "1"
        x = images()
        want = step(lambda t: by_hand(stage, t, formula), stage, x)
        close(step(compiled, stage, x), want)


@every_norm
def test_checkpoints_and_tokens(name: str, backend: str) -> None:
    make, formula = NORMS[name]
    stage = Stage(make, "010", grid=(3, C))
    x = images()
    want = step(lambda t: by_hand(stage, t, formula), stage, x)
    stage.wrap = lambda layer, *args: checkpoint(layer, *args, use_reentrant=False)
    close(step(stage, stage, x), want)

    def on_tokens(t: Tensor) -> Tensor:
        out = stage(t.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, (3, C))

    close(step(on_tokens, stage, x), want)


@every_norm
def test_gradients(name: str, backend: str) -> None:
    stage = Stage(NORMS[name][0], "01", act=nn.Identity)
    x = (torch.rand(1, C, 1, 2, dtype=torch.float64) + 0.5).requires_grad_()
    names = [n for n, p in stage.named_parameters() if ".norm." in n]
    given = [dict(stage.named_parameters())[n] for n in names]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return stage(x)

    assert torch.autograd.gradcheck(run, (x, *given))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm"])
@pytest.mark.parametrize("mode", ["reuse", "retrieval", "layer"])
def test_under_autocast(name: str, mode: str, backend: str) -> None:
    stage = Stage(NORMS[name][0], "0101", skip=mode)
    exact = stage(x := images())
    with torch.autocast("cpu", torch.bfloat16):
        out = stage.float()(x.float())
    assert out.dtype == torch.float32
    # Some ten roundings of numbers near 1.
    torch.testing.assert_close(out.double(), exact, rtol=0.1, atol=0.1)


def test_a_retrieval_that_is_taken_over_stays_as_it_was(backend: str) -> None:
    """The activation works in place on what the norm made, and not on what later layers take over."""
    for name in NORMS:
        for act in (lambda: nn.ReLU(inplace=True), lambda: nn.Hardtanh(inplace=True)):
            stage = Stage(NORMS[name][0], "011", act=act)
            close(
                step(stage, stage, x := images()),
                step(lambda t, s=stage, n=name: by_hand(s, t, NORMS[n][1]), stage, x),
            )


def test_a_norm_for_other_channels() -> None:
    for kind in (nn.LayerNorm, nn.RMSNorm):
        layer = ek.ELA(C, HEAD, norm_layer=lambda dim, kind=kind: kind(5))
        message = rf"^norm: got {kind.__name__} over 5 numbers for maps \[2, 8, 5, 5\]; allowed is"
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(2, C, 5, 5), ek.LayerHistory())


@pytest.mark.parametrize("shape", [(C, 3, 5), (3, 5)])
def test_a_norm_over_space_is_pytorchs(shape: Any) -> None:
    layer = ek.ELA(C, HEAD, norm_layer=lambda dim: nn.LayerNorm(shape))
    x = torch.randn(2, C, 3, 5)
    o = layer.attn(x, ek.LayerHistory())
    want = x + F.layer_norm(o, shape).relu()
    torch.testing.assert_close(layer(x, ek.LayerHistory()), want)


def test_wrappers_of_pytorch_are_seen_through() -> None:
    norm, o = nn.LayerNorm(C), torch.randn(2, C, 3, C)
    want = normed(norm, o)
    assert not torch.allclose(want, norm(o))
    torch.testing.assert_close(want, over_channels(o, norm))
    compiled = torch.compile(norm, backend="eager")
    torch.testing.assert_close(normed(compiled, o), want)
    within = nn.Sequential(norm)  # knows what it does itself
    assert torch.equal(normed(within, o), norm(o))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kind", ["mrla", "concatenating", "light"])
def test_the_blocks_of_the_networks(kind: str, name: str, backend: str) -> None:
    make, formula = NORMS[name]
    of_block: dict[str, Callable[[], Any]] = {
        "mrla": lambda: MRLA(ek.LayerAttention(C, HEAD), 0.0, norm_layer=make),
        "concatenating": lambda: MRLA(ConcatLayerAttention(C, HEAD), 0.0, norm_layer=make),
        "light": lambda: MRLALight(ek.LightLayerAttention(C, HEAD), 0.0, norm_layer=make),
    }
    block = of_block[kind]().double()
    history: Callable[[Tensor], Any] = {
        "mrla": lambda x: ek.LayerHistory(),
        "concatenating": lambda x: ConcatHistory(),
        "light": lambda x: x.flip(0),
    }[kind]

    def hand(x: Tensor) -> Tensor:
        o = copy.copy(block.attn)(x, history(x))
        return x + formula(o, block.norm).relu()

    x = images()
    close(
        step(lambda t: block(t, history(t)), block, x),
        step(hand, block, x),
    )
