"""Norms of timm in a block: over the channels, on maps of any width, and on tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ela_kernels as ek
from ela_kernels.modules import norms

layers = pytest.importorskip("timm.layers")

pytestmark = pytest.mark.integration

C = 32


@pytest.mark.parametrize("kind", ["LayerNorm", "RmsNorm", "LayerNorm2d", "RmsNorm2d"])
@pytest.mark.parametrize("width", [C, 5])
def test_they_are_over_the_channels(kind: str, width: int) -> None:
    """Of a map that is as wide as it has channels nothing else can be seen."""
    norms._LAST.clear()
    norm = getattr(layers, kind)(C)
    nn.init.normal_(norm.weight)
    o = torch.randn(2, C, 4, width)
    last = o.movedim(1, -1)
    if kind.startswith("Layer"):
        want = F.layer_norm(last, (C,), norm.weight, norm.bias, norm.eps)
    else:
        want = F.rms_norm(last, (C,), norm.weight, norm.eps)
    torch.testing.assert_close(norms.normed(norm, o), want.movedim(-1, 1), rtol=1e-5, atol=1e-5)


def test_in_a_block_on_tokens() -> None:
    torch.manual_seed(0)
    ours, theirs = (ek.ELA(16, norm_layer=kind) for kind in (nn.LayerNorm, layers.LayerNorm))
    theirs.load_state_dict(ours.state_dict())
    theirs.norm.eps = ours.norm.eps
    x = torch.randn(2, 256, 16)  # a map of 16 x 16 with 16 channels
    torch.testing.assert_close(theirs(x, ek.LayerHistory()), ours(x, ek.LayerHistory()))


def test_of_another_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"norm: got LayerNorm over 8 numbers for maps \[2, 32"):
        norms.normed(layers.LayerNorm(8), torch.randn(2, C, 8, 8))


def test_a_graph_cannot_find_it_out() -> None:
    norms._LAST.clear()
    norm, o = layers.LayerNorm(C), torch.randn(2, C, 4, C)
    run = torch.compile(lambda o: norms.normed(norm, o), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"after a first pass without torch\.compile"):
        run(o)
    torch._dynamo.reset()
    want = norms.normed(norm, o)
    torch.testing.assert_close(run(o), want)
    torch._dynamo.reset()
