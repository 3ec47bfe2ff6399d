"""A stage of residual blocks around the light form, `x <- x + relu(norm(o))`: training, inference, and bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.blocks import Blocks, measure_form
from benchmarks.contenders import Stage, depthwise
from benchmarks.shapes import StageShape
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput


class LightBlocks(Blocks):
    """The light form as published, in plain PyTorch, and ours with the same parameters."""

    def __init__(self, shape: StageShape, dtype: torch.dtype = torch.float32) -> None:
        plain = Stage(shape)  # seeds what is drawn below too
        layers = nn.ModuleList(
            ek.LightLayerAttention(shape.channels, shape.head_dim) for _ in range(shape.depth)
        )
        for layer in layers:
            # Drawn as published, some decays are beyond one, and their powers beyond what float32 rounds alike.
            nn.init.uniform_(layer.lambda_t, -1, 1)
        blocks = nn.ModuleList(MRLALight(layer, 0.0) for layer in layers)
        super().__init__(plain, layers, blocks, dtype)

    def eager(self, x: Tensor) -> Tensor:
        """`o = sigmoid(scale * <q, k>) * v + decay * o of the layer before`, with PyTorch's own operations."""
        prev = x
        for layer, norm in zip(self.layers, self.norms, strict=True):
            prev = self._retrieved(
                x, prev, layer.Wq.weight, layer.Wk.weight, layer.Wv, layer.lambda_t
            )
            x = x + norm(prev).relu()
        return x

    def _retrieved(
        self, x: Tensor, prev: Tensor, wq: Tensor, wk: Tensor, convolve: Any, decay: Tensor
    ) -> Tensor:
        batch, heads, dim = x.shape[0], self.shape.heads, self.shape.head_dim
        y, pad = x.mean((2, 3)).unsqueeze(1), wq.shape[-1] // 2
        q, k = (F.conv1d(y, w, padding=pad).view(batch, heads, dim) for w in (wq, wk))
        gate = (dim**-0.5 * (q * k).sum(-1)).sigmoid().view(batch, heads, 1, 1, 1)
        v = convolve(x)
        return (gate * v.view(batch, heads, dim, *x.shape[2:])).view_as(x) + decay * prev

    def ours(self, x: Tensor) -> Tensor:
        previous = PreviousOutput()
        for block in self.blocks:
            x = block(x, previous)
        return x

    def expected(self) -> list[Tensor]:
        x, *parameters = (t.detach().double().requires_grad_() for t in self.inputs)
        count = self.shape.depth
        filters, norms = parameters[: 4 * count], parameters[4 * count :]
        names = [name for name, _ in self.layers[0].named_parameters()]
        out = prev = x
        for t in range(count):
            of = dict(zip(names, filters[4 * t : 4 * t + 4], strict=True))
            gamma, beta = norms[2 * t : 2 * t + 2]
            taps = of["Wv.weight"]
            prev = self._retrieved(
                out,
                prev,
                of["Wq.weight"],
                of["Wk.weight"],
                lambda y, taps=taps: depthwise(y, taps),
                of["lambda_t"],
            )
            normed = F.batch_norm(prev, None, None, gamma, beta, training=True)
            out = out + normed.relu()
        return [out.detach(), *torch.autograd.grad(out, [x, *parameters], self.dout.double())]


def measure_light(shape: StageShape, contenders: list[str], rounds: int) -> dict[str, Any]:
    """As :func:`benchmarks.blocks.measure_blocks`, of the light form."""
    return measure_form(LightBlocks, shape, contenders, rounds)
