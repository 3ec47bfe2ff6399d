"""explain(): each reason against a better form, and how it is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from support.residual_stage import Stage, x_like
from torch import nn

import ela_kernels as ek

pytestmark = pytest.mark.usefixtures("kernels", "fresh_log")


def with_bias(layer: ek.ELA) -> None:
    layer.attn.Wv = nn.Conv2d(12, 12, 3, padding=1, groups=12)


def with_hook(layer: ek.ELA) -> None:
    layer.attn.Wk.register_forward_hook(lambda *_: None)


def with_forward_of_its_own(layer: ek.ELA) -> None:
    layer.attn.Wq.forward = layer.attn.Wq.forward


def with_another_filter(layer: ek.ELA) -> None:
    layer.attn.Wv = nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False)


def with_group_norm(layer: ek.ELA) -> None:
    layer.norm = nn.GroupNorm(3, 12)


def with_gelu(layer: ek.ELA) -> None:
    layer.act = nn.GELU()


def with_hook_on_the_norm(layer: ek.ELA) -> None:
    layer.norm.register_forward_pre_hook(lambda *_: None)


def with_norm_of_one_parameter(layer: ek.ELA) -> None:
    layer.norm.bias = None


REASONS: list[tuple[Callable[[ek.ELA], None], str, dict[str, str]]] = [
    (with_bias, "op", {"block": "Wv has a bias", "layer": "Wv has a bias"}),
    (with_hook, "op", {"block": "has hooks", "layer": "Wq, Wk or Wv has hooks"}),
    (with_forward_of_its_own, "op", {"block": "forward of its own", "layer": "of its own"}),
    (with_another_filter, "op", {"block": "another convolution", "layer": "depthwise 3x3"}),
    (with_group_norm, "layer", {"block": "norm is GroupNorm, and the kernels know BatchNorm2d"}),
    (with_gelu, "layer", {"block": "act is GELU, and the kernels know ReLU and Identity"}),
    (with_hook_on_the_norm, "layer", {"block": "attn, norm, act or drop_path has hooks"}),
    (with_norm_of_one_parameter, "layer", {"block": "has one parameter of two"}),
]


@pytest.mark.parametrize(
    ("change", "form", "reasons"), REASONS, ids=lambda c: getattr(c, "__name__", "")
)
def test_each_reason(
    change: Callable[[ek.ELA], None],
    form: str,
    reasons: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each form above the one that served has it; it is logged once, however often the layer runs; numbers stay."""
    layer = ek.ELA(12, 4)
    change(layer)
    stage, x = Stage(ek.ELA(12, 4), layer).eval(), x_like()
    with caplog.at_level(logging.WARNING, "ela_kernels"):
        first, second = ek.explain(stage, x)
        for _ in range(3):
            stage(x)
    assert (first.form, first.reasons) == ("block", {})
    assert second.form == form
    assert second.backend == "cpp"
    assert second.reasons.keys() == reasons.keys()
    for better, words in reasons.items():
        assert any(words in reason for reason in second.reasons[better]), second.reasons
    kinds = {reason for found in second.reasons.values() for reason in found}
    assert len(caplog.messages) == len(kinds)
    assert all("ela_kernels.explain(model, x)" in message for message in caplog.messages)
    with ek.use_backend("eager"):
        torch.testing.assert_close(stage(x), stage(x))


def test_all_reasons_at_once() -> None:
    layer = ek.ELA(12, 4)
    with_bias(layer), with_hook(layer), with_gelu(layer), with_group_norm(layer)
    (found,) = ek.explain(Stage(layer), x_like())
    assert len(found.reasons["layer"]) == 2
    assert len(found.reasons["block"]) == 4


def test_backends_reasons_are_there_too() -> None:
    stage = Stage(ek.ELA(12, 4))
    with ek.use_backend("cpp"), torch.autocast("cpu", torch.bfloat16):
        (found,) = ek.explain(stage, x_like())
    assert found.form == "layer"  # the sum with x is in float32, and the layer in bfloat16
    assert "autocast computes the layer in torch.bfloat16" in found.reasons["block"][0]


def test_another_dtype_in_the_history() -> None:
    first, second = ek.LayerAttention(12, 4), ek.LayerAttention(12, 4).double()

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            history = ek.LayerHistory()
            return second(first(x, history).double(), history)

    one, two = ek.explain(Mixed(), x_like())
    assert (one.form, two.form) == ("layer", "push")
    words = "the layers before it in the history are not all in torch.float64"
    assert words in two.reasons["layer"]
    assert words in two.reasons["op"]
