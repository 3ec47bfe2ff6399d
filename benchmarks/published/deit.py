"""Vision transformers with layer attention on their patches' tokens: base and light form, class token first."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.published.filters import LightAttention, StackedAttention
from benchmarks.published.parts import drop_path

Norm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbedding(nn.Module):
    def __init__(self, image: int, patch: int, dim: int) -> None:
        super().__init__()
        self.num_patches = (image // patch) ** 2
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def as_map(tokens: Tensor) -> Tensor:
    """`[B, N, C]` to `[B, C, H, W]`, whose memory stays that of the tokens where it can."""
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(tokens.shape[0], side, side, -1).permute(0, 3, 1, 2)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).permute(0, 2, 1)


class TokenBaseCell(nn.Module):
    """The base form on the normalised tokens; the class token goes by."""

    def __init__(self, dim: int, dim_perhead: int, init_cell: bool) -> None:
        super().__init__()
        self.init_cell = init_cell
        self.normx = Norm(dim)
        self.mrla = StackedAttention(dim, dim_perhead, init_cell)

    def forward(
        self, xt: Tensor, prev_k: Tensor | None, prev_v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        xt = self.normx(xt)
        if self.init_cell:
            prev_k = prev_v = None
        cls_token, tokens = torch.split(xt, [1, xt.shape[1] - 1], dim=1)
        out, k, v = self.mrla(as_map(tokens), prev_k, prev_v)
        return torch.cat((cls_token, as_tokens(out)), dim=1), k, v


class TokenLightCell(nn.Module):
    """The light form on the normalised tokens, GELU on the value, `lambda_t` `[C]` times the block's input."""

    def __init__(self, dim: int, dim_perhead: int) -> None:
        super().__init__()
        self.mrla = LightAttention(dim, dim_perhead, act_v=nn.GELU())
        self.lambda_t = nn.Parameter(torch.randn(dim))
        self.normx = Norm(dim)
        self.normo = Norm(dim)

    def forward(self, xt: Tensor, ot_1: Tensor) -> Tensor:
        xt, ot_1 = self.normx(xt), self.normo(ot_1)
        cls_token, tokens = torch.split(xt, [1, xt.shape[1] - 1], dim=1)
        tokens = as_tokens(self.mrla(as_map(tokens)))
        _, ot_1 = torch.split(ot_1, [1, ot_1.shape[1] - 1], dim=1)
        tokens = tokens + self.lambda_t.expand_as(ot_1) * ot_1
        return torch.cat((cls_token, tokens), dim=1)


class Encoder(nn.Module):
    """A transformer block; subclasses add the layer attention behind it."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = SelfAttention(dim, heads)
        self.drop_path = drop_path(drop)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def encoded(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BaseEncoder(Encoder):
    def __init__(
        self, dim: int, heads: int, dim_perhead: int, init_cell: bool, drop: float
    ) -> None:
        super().__init__(dim, heads, drop)
        self.mrla = TokenBaseCell(dim, dim_perhead, init_cell)

    def forward(
        self, x: Tensor, prev_k: Tensor | None, prev_v: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.encoded(x)
        attn, k, v = self.mrla(x, prev_k, prev_v)
        return x + attn, k, v


class LightEncoder(Encoder):
    def __init__(self, dim: int, heads: int, dim_perhead: int, drop: float) -> None:
        super().__init__(dim, heads, drop)
        self.mrla = TokenLightCell(dim, dim_perhead)

    def forward(self, x: Tensor) -> Tensor:
        before, x = x, self.encoded(x)
        return x + self.mrla(x, before)


class DeiT(nn.Module):
    """Embedding, class token and head; `every`: the base form begins anew at each such block."""

    def __init__(
        self,
        form: str,
        *,
        image: int = 224,
        patch: int = 16,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        dim_perhead: int = 16,
        every: int = 4,
        drop: float = 0.1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.form = form
        # Before the modules, as published: parameters of the network itself come first in its state_dict.
        self.patch_embed = PatchEmbedding(image, patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, self.patch_embed.num_patches + 1, dim) * 0.02)
        self.pos_drop = nn.Dropout(0.0)
        self.blocks: nn.Module
        if form == "base":
            self.blocks = nn.ModuleList(
                [BaseEncoder(dim, heads, dim_perhead, i % every == 0, drop) for i in range(depth)]
            )
        else:
            self.blocks = nn.Sequential(
                *[LightEncoder(dim, heads, dim_perhead, drop) for _ in range(depth)]
            )
        self.norm = Norm(dim)
        self.pre_logits = nn.Identity()
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.pos_drop(x + self.pos_embed)
        if self.form == "base":
            k: Tensor | None = None
            v: Tensor | None = None
            for block in self.blocks.children():
                x, k, v = block(x, k, v)
        else:
            x = self.blocks(x)
        return self.head(self.pre_logits(self.norm(x)[:, 0]))
