"""What is recognised and what is left, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_published import ActivatedGate, Decay, Gate, Layer, Network
from torch import Tensor, nn

import ela_kernels as ek


class Raw(Layer):
    """Keeps raw maps, and applies Wk and Wv to all of them at every layer."""

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        y, maps = x.mean((2, 3)).unsqueeze(1), x.unsqueeze(1)
        if prev_K is not None:
            y, maps = torch.cat((prev_K, y), 1), torch.cat((prev_V, maps), 1)
        b, t, c, h, w = maps.shape
        k = self.Wk(y.view(-1, 1, c)).view(b, t, self.heads, -1)
        q = self.Wq(y[:, -1:]).view(b, self.heads, -1)
        v = self.Wv(maps.view(-1, c, h, w)).view(b, t, self.heads, -1)
        weights = (torch.einsum("bgd,btgd->bgt", q, k) * k.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bgt,btgn->bgn", weights, v).view(x.shape), y, maps


class Linear(Layer):
    """Linear attention, by running sums."""

    def forward(self, x: Tensor, s: Any, z: Any) -> Any:
        b, c = x.shape[:2]
        y = x.mean((2, 3)).unsqueeze(1)
        q, k = (nn.functional.elu(w(y)).add(1).view(b, c) for w in (self.Wq, self.Wk))
        s = s + k[:, :, None] * self.Wv(x).view(b, 1, -1)
        z = z + k
        return (torch.einsum("bc,bcn->bn", q, s) / (q * z).sum(1, True)).view(x.shape), s, z


class Context(Layer):
    """Equation 4: given all maps so far, `[B, T, C, H, W]`."""

    mixes = True

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        b, t, c, h, w = ctx.shape
        q = self.Wq(x.mean((2, 3)).unsqueeze(1)).view(b, self.heads, -1)
        k = self.Wk(ctx.mean((3, 4)).view(b * t, 1, c)).view(b, t, c)
        v = self.Wv(ctx.view(b * t, c, h, w)).view(b, t, c, h, w)
        if self.mixes:
            k, v = k.view(b, self.heads, t, -1), v.view(b, self.heads, t, -1)
        else:
            k, v = (a.reshape(b, t, self.heads, -1).transpose(1, 2) for a in (k, v))
        weights = (torch.einsum("bgd,bgtd->bgt", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bgt,bgtn->bgn", weights, v).reshape(b, c, h, w)


class ByHead(Context):
    mixes = False


class State(Layer):
    """Hands on a list of its own."""

    def forward(self, x: Tensor, info: Any = None) -> Any:
        q = self.Wq(x.mean((2, 3)).unsqueeze(1))
        return self.Wv(x) * q.sigmoid().transpose(1, 2)[..., None], [q, x]


class Scaled(Layer):
    """Scores of another scale."""

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        out, k, v = super().forward(2 * x, prev_K, prev_V)
        return out / 2, k, v


class Dropping(Layer):
    """Another function in training."""

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        out, k, v = super().forward(x, prev_K, prev_V)
        return nn.functional.dropout(out, 0.1, self.training), k, v


class Failing(Layer):
    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
        raise KeyError("no such thing")


class Activated(Decay):
    """The light form whose value passes an activation."""

    def __init__(self, act: Callable[[Tensor], Tensor] = nn.SiLU()) -> None:  # noqa: B008
        super().__init__(8)
        self.mrla = ActivatedGate(8, act)
        self.mrla.register_forward_hook(lambda *_: None)


def unlike(change: Callable[[Layer], object]) -> Layer:
    layer = Layer(8)
    change(layer)
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "raw maps": (lambda: Raw(8), "raw feature maps"),
    "linear": (lambda: Linear(8), "running sums"),
    "equation 4": (lambda: Context(8), r"view\(\) mixes layers and heads"),
    "equation 4 by head": (lambda: ByHead(8), "applies Wk and Wv to all maps so far"),
    "a state of its own": (lambda: State(8), "running sums"),
    "another scale": (lambda: Scaled(8), "not the keys and values|not softmax attention"),
    "dropout": (lambda: Dropping(8), "in training differ"),
    "an error": (lambda: Failing(8), "raised KeyError: 'no such thing'"),
    "alone": (lambda: Gate(8), "the module around it is not called with the output before"),
    "an activation": (Activated, r"its value passes SiLU \(act_v\)"),
    "on the meta device": (lambda: Layer(8).to("meta"), "meta device"),
    "no depthwise value": (
        lambda: unlike(lambda m: setattr(m, "Wv", nn.Conv2d(8, 8, 1))),
        "no depthwise",
    ),
    "linear query": (
        lambda: unlike(lambda m: setattr(m, "Wq", nn.Linear(8, 8))),
        "no convolutions over the channels",
    ),
    "two sizes": (
        lambda: unlike(lambda m: setattr(m, "Wk", nn.Conv1d(1, 1, 5, padding=2, bias=False))),
        "two sizes",
    ),
    "no head size": (
        lambda: unlike(lambda m: (setattr(m, "starts", True), setattr(m, "heads", None))),
        "raised TypeError|head size cannot be told",
    ),
    "no copy": (
        lambda: unlike(lambda m: setattr(m, "file", (i for i in ()))),
        "a copy of it raised",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_and_why(name: str) -> None:
    make, reason = LEFT[name]
    model = nn.ModuleDict({"stranger": make(), "friend": Layer(8)})
    kinds = [type(m) for m in model["stranger"].modules()]
    report = ek.convert(model)
    assert list(report.converted) == ["friend"]
    (where,) = report.left
    assert where.startswith("stranger")
    assert re.search(reason, report.left[where])
    assert [type(m) for m in model["stranger"].modules()] == kinds
    assert report.left[where] in str(report)


@pytest.mark.parametrize("head_dim", [1, 2, 8])
def test_the_head_size_is_found_with_and_without_an_attribute(head_dim: int) -> None:
    layer = Layer(8, head_dim)
    heads = layer.heads
    assert ek.convert(layer).converted == {
        "": f"base form, {heads} heads of {head_dim}; not the block: no residual block is around it"
    }


def test_without_an_attribute_the_head_size_is_tried_out() -> None:
    class Unnamed(Layer):
        def __init__(self) -> None:
            super().__init__(8)
            self.groups_of = self.__dict__.pop("heads")

        def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> Any:
            parts = {"Wq": self.Wq, "Wk": self.Wk, "Wv": self.Wv}
            named: Any = SimpleNamespace(heads=self.groups_of, starts=False, **parts)
            return Layer.forward(named, x, prev_K, prev_V)

    assert "2 heads of 4" in ek.convert(Unnamed()).converted[""]


def test_zeros_in_the_weights_hide_no_difference() -> None:
    layer = Scaled(8)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    assert not ek.convert(nn.ModuleList([layer, Layer(8)])).converted.get("0")


def test_the_random_numbers_and_settings_are_left_alone() -> None:
    model = Network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    with ek.use_backend("eager"), torch.autocast("cpu", torch.bfloat16):
        ek.convert(model, strict=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads
    torch.set_default_dtype(torch.float64)
    try:
        ek.convert(ek.unconvert(model), strict=True)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_report_in_words() -> None:
    model = nn.ModuleDict({"a": Layer(8), "b": Layer(8), "c": Raw(8)})
    lines = str(ek.convert(model)).splitlines()
    assert lines[0] == "2 converted, 1 left"
    assert lines[1].startswith("converted, 2: base form, 2 heads of 4")
    assert lines[2] == "    a, b"
    assert lines[3].startswith("left, 1: it keeps raw feature maps")
