"""Norms that scale by zero before a ReLU are named when a training run begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels import explaining
from ela_kernels.__main__ import main
from ela_kernels.models import CifarResNet, VisionTransformer
from ela_kernels.training import making
from ela_kernels.training.dead import check_single_image, dead_norms

IMAGE = torch.rand(1, 1, 8, 8)


def network(**options: Any) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet((2,), (8,), in_chans=1, head_dim=8, **options)


@pytest.mark.parametrize("attention", ["ela", "mrla", "mrla_light"])
def test_the_norm_of_a_retrieval(attention: str) -> None:
    model = network(attention=attention)
    assert dead_norms(model, IMAGE) == {}
    nn.init.zeros_(model.attentions[0][1].norm.weight)
    assert dead_norms(model, IMAGE) == {"attentions.0.1.norm": "8 of 8 channels"}
    assert model.training
    model.train()
    x = torch.rand(4, 1, 8, 8)
    model(x).square().sum().backward()
    if attention != "mrla_light":  # which hands what it retrieves on to the next layer
        assert not model.attentions[0][1].norm.weight.grad.any()
        assert not model.attentions[0][1].attn.Wv.weight.grad.any()


@pytest.mark.parametrize("make", [nn.LayerNorm, lambda dim: nn.GroupNorm(2, dim)])
def test_another_norm_of_a_retrieval(make: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        8, 3, 2, img_size=8, patch_size=4, in_chans=1, attention="ela", norm_layer=make, head_dim=8
    )
    assert dead_norms(model, IMAGE) == {}
    nn.init.zeros_(model.attentions[0][1].norm.weight)
    assert dead_norms(model, IMAGE) == {"attentions.0.1.norm": "8 of 8 channels"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: nn.init.zeros_(m.stem[1].weight), {"stem.1": "8 of 8 channels"}),
        (lambda m: nn.init.zeros_(m.stem[1].weight[:3]), {"stem.1": "3 of 8 channels"}),
        # A shift above zero passes the ReLU, and scale and shift learn.
        (lambda m: (m.stem[1].weight.zero_(), m.stem[1].bias.fill_(0.1)), {}),
        (
            lambda m: (m.stem[1].weight.zero_(), m.stem[1].bias.fill_(-0.1)),
            {"stem.1": "8 of 8 channels"},
        ),
        # Added to the shortcut before the ReLU: not a dead branch, and a usual start.
        (lambda m: nn.init.zeros_(m.stages[0][0].bn2.weight), {}),
    ],
)
@torch.no_grad()
def test_others(change: Callable[[Any], object], expected: dict[str, str]) -> None:
    model = network(attention="none")
    change(model)
    assert dead_norms(model, IMAGE) == expected


def test_without_a_relu_it_is_a_start_like_any() -> None:
    layer = ek.ELA(8, 4, act_layer=nn.Identity)
    nn.init.zeros_(layer.norm.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.repeat(1, 8, 1, 1), ek.LayerHistory())

    assert dead_norms(Net(), IMAGE) == {}
    layer.act = nn.ReLU()
    assert dead_norms(Net(), IMAGE) == {"layer.norm": "8 of 8 channels"}
    assert not layer.norm._forward_hooks


def test_it_is_printed_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    command = "--side 8 --batch-size 700 --model resnet20 --threads 1 --epochs 1 --out"
    assert main(["train", *command.split(), str(tmp_path / "usual")]) == 0
    assert "warning" not in capsys.readouterr().err
    make_model = making.make_model

    def with_zeros(*arguments: Any) -> nn.Module:
        model = make_model(*arguments)
        for layer in model.attentions[1]:
            nn.init.zeros_(layer.norm.weight)
        return model

    monkeypatch.setattr(making, "make_model", with_zeros)
    assert main(["train", *command.split(), str(tmp_path / "dead")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 1
    assert told[0].startswith(
        "warning: norms with a scale of zero before a ReLU: attentions.1.0.norm ("
    )
    assert "attentions.1.2.norm" in told[0]
    assert "attentions.0" not in told[0]


def test_a_look_at_one_image_does_not_warn_of_its_own_hooks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explaining, "_told", type(explaining._told)())
    check_single_image(network(attention="ela"), IMAGE)
    assert not caplog.records


def test_a_batch_of_one_image_on_maps_of_one_value_is_refused() -> None:
    model = network(attention="ela")
    with pytest.raises(ValueError, match="batch-size: got 1 with images of side 1, whose last"):
        check_single_image(model, IMAGE[..., :1, :1])
