"""Our vision transformers against timm's, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ela_kernels as ek
from ela_kernels.models import build_model, load_weights

timm = pytest.importorskip("timm", reason="needs timm")
pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small"])
@pytest.mark.parametrize(("side", "patch"), [(224, 16), (32, 8)])
def test_the_same_scores_and_gradients(name: str, side: int, patch: int) -> None:
    torch.manual_seed(0)
    theirs: Any = timm.create_model(f"{name}_patch16_224", img_size=side, patch_size=patch)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # scales of one and shifts of zero would hide which is which
            nn.init.normal_(parameter, 0.5, 0.3)
    ours = build_model(name, img_size=side, patch_size=patch)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(load_weights(ours, theirs.state_dict()).loaded) == 152
    x = torch.randn(2, 3, side, side)
    found = []
    for model in (ours, theirs):
        out = model.train()(x)
        out.sin().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        # float32, the same operations in the same order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_attention_put_into_a_trained_network() -> None:
    torch.manual_seed(0)
    theirs: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8).eval()
    ours = build_model(
        "vit_tiny", img_size=32, patch_size=8, attention="ela", identity_init=True
    ).eval()
    report = load_weights(ours, theirs.state_dict(), source="timm")
    assert set(report.missing.values()) == {"the checkpoint has no attention"}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert len(ek.explain(ours, x)) == 11


def test_a_norm_of_timm_that_knows_maps() -> None:
    """`LayerNorm2d` is a `nn.LayerNorm` whose forward turns maps itself."""
    norm = timm.layers.LayerNorm2d
    torch.manual_seed(0)
    ours, plain = ek.ELA(8, 4, norm_layer=norm), ek.ELA(8, 4, norm_layer=nn.LayerNorm)
    plain.load_state_dict(ours.state_dict())
    plain.norm.eps = ours.norm.eps
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(ours(x, ek.LayerHistory()), plain(x, ek.LayerHistory()))
