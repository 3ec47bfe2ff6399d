"""Small networks written as the published ones are: keys and values are tensors that pass from block to block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """The base form: `forward(x, keys, values) -> (out, keys, values)`."""

    def __init__(self, dim: int, head_dim: int = 4, starts: bool = False, size: int = 3) -> None:
        super().__init__()
        self.heads, self.starts = dim // head_dim, starts
        self.Wq = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wk = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        self.Wv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x: Tensor, prev_K: Any, prev_V: Any) -> tuple[Tensor, Tensor, Tensor]:
        b, c, h, w = x.shape
        y = x.mean((2, 3)).unsqueeze(1)
        q, k, v = self.Wq(y), self.Wk(y), self.Wv(x).unsqueeze(1)
        if not self.starts and prev_K is not None:
            k, v = torch.cat((prev_K, k), 1), torch.cat((prev_V, v), 1)
        by_head = (b, -1, self.heads, c // self.heads)
        scores = torch.einsum("bxgd,btgd->bgt", q.view(by_head), k.view(by_head))
        weights = (scores * (c // self.heads) ** -0.5).softmax(-1)
        out = torch.einsum("bgt,btgdn->bgdn", weights, v.reshape(*by_head, h * w))
        return out.reshape(b, c, h, w), k, v


class Around(nn.Module):
    """Nothing but a layer, as published code has one around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.mrla = layer

    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        return self.mrla(x, prev_k, prev_v)


class Gate(nn.Module):
    """The light form's layer: `forward(x)`."""

    def __init__(self, dim: int, head_dim: int = 4) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.Wq = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.Wk = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.Wv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = x.mean((2, 3)).unsqueeze(1)
        q, k = (w(y).view(b, self.heads, -1) for w in (self.Wq, self.Wk))
        gate = ((q * k).sum(-1, keepdim=True) * (c // self.heads) ** -0.5).sigmoid()
        return self.Wv(x) * gate.expand_as(q).reshape(b, c, 1, 1)


class ActivatedGate(Gate):
    """The same, whose value passes an activation: a module, or a function."""

    def __init__(self, dim: int, act: Callable[[Tensor], Tensor], head_dim: int = 4) -> None:
        super().__init__(dim, head_dim)
        self.act_v = act

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = x.mean((2, 3)).unsqueeze(1)
        q, k = (w(y).view(b, self.heads, -1) for w in (self.Wq, self.Wk))
        gate = ((q * k).sum(-1, keepdim=True) * (c // self.heads) ** -0.5).sigmoid()
        return self.act_v(self.Wv(x)) * gate.expand_as(q).reshape(b, c, 1, 1)


class Decay(nn.Module):
    """The light form: `forward(x, prev_out)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mrla = Gate(dim)
        self.lambda_t = nn.Parameter(torch.randn(dim, 1, 1))

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        return self.mrla(xt) + self.lambda_t * ot_1


class DropPath(nn.Module):
    """Drops whole samples, in another way than this package does."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1 - self.p
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x / keep * (keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor()


class Block(nn.Module):
    """A residual block with attention behind it, of the base or the light form."""

    def __init__(self, planes: int, dim: int, first: bool, light: bool, drop: float) -> None:
        super().__init__()
        stride = 2 if first and planes != dim else 1
        self.conv = nn.Conv2d(planes, dim, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(planes, dim, 1, stride) if first else None
        self.mrla = Decay(dim) if light else Around(Layer(dim, starts=first))
        self.bn_mrla = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.light = light

    def forward(self, x: Tensor, *state: Any) -> Any:
        identity = x if self.down is None else self.down(x)
        x = self.relu(self.bn(self.conv(x)) + identity)
        if self.light:
            return x + self.drop_path(self.bn_mrla(self.mrla(x, identity)))
        attn, k, v = self.mrla(x, *state)
        return x + self.drop_path(self.relu(self.bn_mrla(attn))), k, v


class BaseBlock(Block):
    def forward(self, x: Tensor, prev_k: Any, prev_v: Any) -> Any:
        return super().forward(x, prev_k, prev_v)


class LightBlock(Block):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class Network(nn.Module):
    """Two stages of three blocks."""

    def __init__(self, light: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        kind = LightBlock if light else BaseBlock
        self.light = light
        widths = [(3, 8), (8, 8), (8, 8), (8, 16), (16, 16), (16, 16)]
        self.blocks = nn.ModuleList(kind(a, b, a != b, light, drop) for a, b in widths)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        k = v = None
        for block in self.blocks:
            if self.light:
                x = block(x)
            else:
                x, k, v = block(x, k, v)
        return self.head(x.mean((2, 3)))


class TokenDecay(nn.Module):
    """The light form on tokens `[B, 1 + N, C]`: the class token goes by, and norms come first."""

    def __init__(
        self,
        dim: int,
        act: Callable[[Tensor], Tensor] | None = None,
        normed: tuple[bool, bool] = (True, True),
        shape: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.mrla = ActivatedGate(dim, nn.GELU() if act is None else act)
        self.lambda_t = nn.Parameter(torch.randn(*shape, dim))
        if normed[0]:
            self.normx = nn.LayerNorm(dim, eps=1e-6)
        if normed[1]:
            self.normo = nn.LayerNorm(dim, eps=1e-6)
        self.normed = normed

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        xt = self.normx(xt) if self.normed[0] else xt
        ot_1 = self.normo(ot_1) if self.normed[1] else ot_1
        b, n, c = xt.shape
        first, tokens = torch.split(xt, [1, n - 1], dim=1)
        side = int((n - 1) ** 0.5)
        out = self.mrla(tokens.reshape(b, side, side, c).permute(0, 3, 1, 2))
        out = out.flatten(2).permute(0, 2, 1) + self.lambda_t * ot_1[:, 1:]
        return torch.cat((first, out), dim=1)


class TokenBlock(nn.Module):
    """A block of a transformer, its attention between tokens left out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.mrla = TokenDecay(dim)

    def forward(self, x: Tensor) -> Tensor:
        before = x
        x = x + self.mlp(self.norm(x))
        return x + self.mrla(x, before)


class TokenNetwork(nn.Module):
    """Patches of 2 x 2 and a class token, then three blocks."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 2, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.blocks = nn.Sequential(*(TokenBlock(dim) for _ in range(3)))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        return self.head(self.blocks(x)[:, 0])
