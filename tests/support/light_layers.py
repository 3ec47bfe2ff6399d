"""Light layers and blocks of them, as their kernels are tested on them."""

from __future__ import annotations

import copy

import torch
from torch import nn

import ela_kernels as ek
from ela_kernels.models.blocks import MRLALight
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

FORMS = [torch.contiguous_format, torch.channels_last]
ACTS = ["gelu", "gelu_tanh"]


def make_layer(shape, head_dim=None, dtype=torch.float64, form=FORMS[0], act=None):
    torch.manual_seed(4)
    layer = ek.LightLayerAttention(shape[1], head_dim or shape[1], value_act=act).to(dtype)
    if act is not None:  # values as far from zero as an activation bends
        nn.init.normal_(layer.Wv.weight)
    x, prev = (torch.randn(shape).to(dtype).contiguous(memory_format=form) for _ in range(2))
    return layer, x.requires_grad_(), prev.requires_grad_()


class WithPrevious(nn.Module):
    """A layer and the previous output, so that they are copied and cast together."""

    def __init__(self, layer, prev):
        super().__init__()
        self.layer = layer
        self.prev = nn.Parameter(prev.detach(), prev.requires_grad)

    def forward(self, x):
        return self.layer(x, self.prev)


def layer_step(layer, x, prev):
    """Output and gradients of one layer; None where there is none."""
    out = layer(x, prev)
    loss = (out.double() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum()
    inputs = [t for t in (x, prev, *layer.parameters()) if t.requires_grad]
    return [out, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def make_blocks(
    shape, depth=3, head_dim=None, form=FORMS[0], drop_path=0.0, dtype=torch.float64, act=None
):
    torch.manual_seed(2)
    size = head_dim or shape[1]
    blocks = nn.ModuleList(
        MRLALight(ek.LightLayerAttention(shape[1], size, value_act=act), drop_path)
        for _ in range(depth)
    ).to(dtype)
    for block in blocks:
        nn.init.normal_(block.norm.weight, 1.0, 0.5)
        nn.init.normal_(block.norm.bias)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=form)
    return blocks, x.requires_grad_()


def run_blocks(blocks, x):
    previous, outs = PreviousOutput(), []
    for block in blocks:
        x = block(x, previous)
        outs.append(x)
    return outs


def block_step(blocks, x):
    """Outputs, gradients and buffers of a forward and backward pass on copies of the blocks."""
    blocks = copy.deepcopy(blocks)
    torch.manual_seed(5)  # of the drop path
    outs = run_blocks(blocks, x)
    loss = outs[-1].square().sum() + outs[0].sin().sum()
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [x, *parameters])
    return [*outs, *grads, *(b.double() for b in blocks.buffers())]
