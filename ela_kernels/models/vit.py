"""Vision transformers with layer attention between their blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ela_kernels.models.blocks import (
    ATTENTIONS,
    Attention,
    NormLayer,
    StageAttention,
    begin_as_identity,
    run_block,
)
from ela_kernels.models.options import (
    HEAD_DIM,
    check_head_dim,
    check_history_options,
    check_identity_init,
)
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.query_key_value import check_count
from ela_kernels.modules.skipping import SkipMode, check_skip
from ela_kernels.modules.tokens import as_tokens
from ela_kernels.ops.traced import is_traced

_EPS = 1e-6  # of all norms of a transformer


class SelfAttention(nn.Module):
    """Attention between the tokens of an image, in heads.

    Equivalent PyTorch::

        q, k, v = qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        proj(((q @ k.mT / math.sqrt(dim // heads)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    Args:
        dim: number of channels C.
        heads: a divisor of it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, C]` of `[B, N, C]`."""
        qkv: Tensor = self.qkv(x)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return found


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on every token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """`x = x + attn(norm1(x))`, then `x + mlp(norm2(x))`: the norms come first.

    Args:
        dim: number of channels C.
        heads: of the attention between tokens.
        mlp_ratio: hidden channels of the MLP, in multiples of C.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """A token of every patch: a convolution whose stride is its size, `proj(images).flatten(2).transpose(1, 2)`."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, N, C]` of `[B, in_chans, H, W]`."""
        return as_tokens(self.proj(images))


class VisionTransformer(nn.Module):
    """A plain vision transformer whose blocks each query all earlier blocks.

    Patches become tokens, a class token comes before them, learned positions are added; then blocks with their norms
    first, a last norm, and a linear classifier of the class token. After every block but the last stands an attention
    layer, `x <- x + drop_path(act(norm(o)))`, on the map of the patches, which the class token passes by; the whole
    depth is one stage, with one history for each forward pass. After the last block it would change nothing: the
    classifier reads the class token alone, which learns of the patches in the blocks. With `attention="none"` it is the
    plain transformer, and its parameters have the names and shapes that they have in timm's `VisionTransformer`, so
    that those checkpoints load (:func:`ela_kernels.models.load_weights`, or `load_state_dict`).

    Args:
        dim: number of channels C.
        depth: number of blocks; at least 2 with attention.
        heads: of the attention between tokens; a divisor of `dim`.
        img_size: height and width of the images, one number where they are the same; multiples of `patch_size`.
        patch_size: height and width of a patch.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        attention: `"none"`, `"mrla"`, `"mrla_light"` or `"ela"`; :class:`ela_kernels.EBQM` then finds what to skip.
        head_dim: channels of a head of layer attention; 16 if None. The attention between tokens has `dim / heads`.
        drop_path: probability of dropping a retrieval in training: of the last layer, from 0 at the first and growing
            linearly between them.
        skip: what a skipped ELA layer leaves out, `"reuse"`, `"retrieval"` or `"layer"`.
        checkpointing: recompute each block and its attention in the backward pass instead of keeping their
            intermediate tensors. Running statistics of batch norms are then updated twice a step.
        identity_init: every attention layer gives its input at first, as in :class:`ResNet`.
        history_dtype, tolerance: as of :class:`ResNet`, for `"mrla"` and `"ela"`.
        mlp_ratio: hidden channels of a block's MLP, in multiples of `dim`.
        norm_layer: makes the norm after each retrieval; `nn.BatchNorm2d`, which the kernels of a whole block know, or
            another, as of :class:`ela_kernels.ELA`. The transformer's own norms are `nn.LayerNorm`.

    Shapes:
        Images `[B, in_chans, H, W]` to scores `[B, num_classes]`.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named; images of another size.

    Source:
        ViT (arXiv 2010.11929), the names of parameters as in timm; layer attention as in our :class:`ResNet`, of MRLA
        (arXiv 2302.03985) and ELA (arXiv 2503.06473). Where it stands is our definition.

    Example:
        >>> import torch
        >>> from ela_kernels.models import vit_tiny
        >>> model = vit_tiny(num_classes=10, img_size=32, patch_size=4, attention="ela")
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        in_chans: int = 3,
        attention: Attention = "none",
        head_dim: int | None = None,
        drop_path: float = 0.0,
        skip: SkipMode = "reuse",
        checkpointing: bool = False,
        identity_init: bool = False,
        history_dtype: torch.dtype | None = None,
        tolerance: float = 0.0,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        counts = {"dim": dim, "depth": depth, "heads": heads, "patch_size": patch_size}
        for name, value in {**counts, "num_classes": num_classes, "in_chans": in_chans}.items():
            check_count(name, value)
        if dim % heads:
            raise ValueError(
                f"heads: got {heads} for dim={dim}; allowed is a divisor of dim, so that heads are of one size"
            )
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)):
            raise TypeError(
                f"mlp_ratio: got {type(mlp_ratio).__name__}; allowed is a positive number"
            )
        if not 1 <= dim * mlp_ratio < float("inf"):
            raise ValueError(
                f"mlp_ratio: got {mlp_ratio} for dim={dim}; allowed is a number that leaves a hidden channel"
            )
        if attention not in ATTENTIONS:
            allowed = ", ".join(map(repr, ATTENTIONS))
            raise ValueError(f"attention: got {attention!r}; allowed are {allowed}")
        check_identity_init(identity_init, attention)
        if attention != "none" and depth < 2:
            raise ValueError(
                f"depth: got {depth} with attention={attention!r}; allowed is at least 2, since an attention layer "
                "stands between two blocks"
            )
        head_size = check_head_dim(head_dim, HEAD_DIM, [dim], attention)
        DropPath(drop_path)  # its checks, before the value is spread over the layers
        check_skip(skip)
        check_history_options(history_dtype, tolerance, attention, fused=True)
        self.img_size = _check_img_size(img_size, patch_size)
        self.in_chans, self.num_features = in_chans, dim
        self.grid = self.img_size[0] // patch_size, self.img_size[1] // patch_size
        self.checkpointing = checkpointing
        patches = self.grid[0] * self.grid[1]
        self.patch_embed = PatchEmbedding(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, num_classes)
        # A list of one stage, as the residual networks have several.
        self.attentions = nn.ModuleList()
        if attention != "none":
            self.attentions.append(
                StageAttention(
                    attention,
                    dim,
                    [drop_path * i / max(depth - 2, 1) for i in range(depth - 1)],
                    min(head_size, dim),
                    True,
                    skip,
                    relu=not identity_init,
                    history_dtype=history_dtype,
                    tolerance=tolerance,
                    norm_layer=norm_layer,
                    prefix_tokens=1,
                    grid=self.grid,
                )
            )
        self._initialise()
        if identity_init:
            begin_as_identity(self.attentions)

    def _initialise(self) -> None:
        """Small normal numbers, as transformers begin; convolutions and attention layers keep PyTorch's."""
        for weight in (self.pos_embed, *(m.weight for m in self.modules() if type(m) is nn.Linear)):
            nn.init.trunc_normal_(weight, std=0.02)
        for module in self.modules():
            if type(module) is nn.Linear:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens behind the last norm, `[B, 1 + N, C]`; the class token is the first."""
        if not is_traced(images):
            self._check(images)
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        stage = self.attentions[0] if len(self.attentions) else None
        history = stage.new_history() if isinstance(stage, StageAttention) else None
        for i, block in enumerate(self.blocks):
            is_last = i == len(self.blocks) - 1
            layer = stage[i] if isinstance(stage, StageAttention) and not is_last else None
            # The next block, or the last norm, makes new memory in any case.
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run_block, block, layer, x, history, False, use_reentrant=False)
            else:
                x = run_block(block, layer, x, history, False)
        out: Tensor = self.norm(x)
        return out

    def _check(self, images: object) -> None:
        allowed = self.in_chans, *self.img_size
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images: got {type(images).__name__}; allowed is a torch.Tensor [B, {', '.join(map(str, allowed))}]"
            )
        if images.dim() != 4 or images.shape[1:] != allowed:
            raise ValueError(
                f"images: got shape {list(images.shape)}; allowed is [B, {', '.join(map(str, allowed))}], as the model "
                "was made. Resize the images, or make it with their img_size and in_chans"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Class scores, of the class token."""
        scores: Tensor = self.head(self.forward_features(images)[:, 0])
        return scores


def _check_img_size(img_size: object, patch_size: int) -> tuple[int, int]:
    allowed = f"allowed is a positive int, or (height, width) of two, multiples of patch_size={patch_size}"
    sizes = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(sizes) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"img_size: got {img_size!r}; {allowed}")
    height, width = sizes
    if min(height, width) < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"img_size: got {img_size!r}; {allowed}")
    return height, width
