"""variant="published": the networks as they were published, and what is ours beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.published_networks import PublishedNetwork, state_of, trained
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.models import CifarResNet, ResNet, build_model, load_weights, resnet20

BLOCKS, WIDTHS = (1, 3, 1, 2), (8, 8, 16, 16)  # channels 32, 32, 64, 64: several heads of 16 and 32
FORMS = {"mrla": "base", "mrla_light": "light", "ela": "base", "none": "none"}
needs_kernels = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


def published(attention: str, **options: Any) -> ResNet:
    return ResNet(
        BLOCKS, WIDTHS, num_classes=5, attention=attention, variant="published", **options
    )


def images(side: int = 40) -> Tensor:
    return torch.randn(2, 3, side, side, dtype=torch.float64)


def pair(attention: str, seed: int = 0, **options: Any) -> tuple[nn.Module, ResNet, dict[str, str]]:
    """A published network, ours with its weights, and names of ours to its own; in float64."""
    torch.manual_seed(seed)
    head_dim = 32 if attention == "mrla_light" else 16
    theirs = trained(PublishedNetwork(FORMS[attention], BLOCKS, WIDTHS, head_dim).double())
    ours = published(attention, **options).double()
    report = load_weights(ours, state_of(theirs))
    assert report.missing == report.left == {}
    return theirs, ours, report.loaded


def assert_same(theirs: nn.Module, ours: ResNet, names: dict[str, str], x: Tensor) -> None:
    """Output, gradients and running statistics. float64, through 7 blocks and their norms: 1e-9 leaves room."""
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ours(mine), theirs(yours)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-9, atol=1e-9)
    theirs_by_name = dict(theirs.named_parameters())
    compared = 0
    for name, p in ours.named_parameters():
        expected_grad = theirs_by_name[names[name]].grad
        if p.grad is None:
            # With one pair held the weights are 1 whatever query and key are.
            assert ".attn.W" in name
            assert not expected_grad.any()
            continue
        torch.testing.assert_close(p.grad, expected_grad, rtol=1e-9, atol=1e-9, msg=name)
        compared += bool(p.grad.any())
    assert compared > 50
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if name in names:
            torch.testing.assert_close(buffer, buffers[names[name]], rtol=1e-9, atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", list(FORMS))
def test_published_networks(attention: str, training: bool, backend: str) -> None:
    theirs, ours, names = pair(attention)
    with ek.use_backend(backend):
        assert_same(theirs.train(training), ours.train(training), names, images())


def test_published_concatenating_modules() -> None:
    theirs, ours, names = pair("mrla", fused=False)
    assert_same(theirs, ours, names, images())


@pytest.mark.parametrize("attention", ["mrla", "mrla_light"])
def test_checkpointing_of_published_networks(attention: str) -> None:
    theirs, ours, names = pair(attention, checkpointing=True)
    assert_same(theirs.eval(), ours.eval(), names, images())


@pytest.mark.parametrize("attention", ["mrla", "mrla_light"])
@pytest.mark.parametrize(("basic", "head_dim"), [(False, 32), (True, 16)])
def test_published_networks_for_small_images(attention: str, basic: bool, head_dim: int) -> None:
    torch.manual_seed(0)
    blocks, widths = (2, 2, 2), (16, 32, 64)
    theirs = PublishedNetwork(FORMS[attention], blocks, widths, head_dim, basic, small=True)
    ours = CifarResNet(
        blocks,
        widths,
        "basic" if basic else "bottleneck",
        num_classes=5,
        attention=attention,
        variant="published",
    ).double()
    names = load_weights(ours, state_of(trained(theirs.double()))).loaded
    assert_same(theirs, ours, names, images(side=12))


@needs_kernels
@pytest.mark.parametrize("attention", ["mrla", "mrla_light", "ela"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_whole_blocks_are_served(attention: str, memory_format: torch.memory_format) -> None:
    model = published(attention).to(memory_format=memory_format)
    x = images().float().to(memory_format=memory_format)
    found = ek.explain(model, x)
    assert [(e.backend, e.form, e.reasons) for e in found] == [("cpp", "block", {})] * sum(BLOCKS)


def test_channels_last_of_the_published_light_form() -> None:
    theirs, ours, _ = pair("mrla_light")
    x = images()
    found = ours.eval().to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(found, theirs.eval()(x), rtol=1e-10, atol=1e-10)


def test_our_light_form_is_another_network() -> None:
    """The same names and shapes, and neither the same output nor the activation."""
    torch.manual_seed(0)
    ours = resnet20(attention="mrla_light").eval()
    other = resnet20(attention="mrla_light", variant="published").eval()
    other.load_state_dict(ours.state_dict())
    x = images(16).float()
    with torch.no_grad():
        assert not torch.allclose(ours(x), other(x), rtol=0.1)


def test_how_published_networks_start() -> None:
    torch.manual_seed(0)
    rates = {
        attention: [
            layer.drop_path.p
            for stage in published(attention, drop_path=0.2).attentions
            for layer in stage
        ]
        for attention in ("mrla", "mrla_light", "ela")
    }
    assert all(found == [0.2] * sum(BLOCKS) for found in rates.values())
    for attention in FORMS:
        model = published(attention)
        assert all(not block.last_norm.weight.any() for stage in model.stages for block in stage)
        other = ResNet(BLOCKS, WIDTHS, attention=attention)
        assert all((block.last_norm.weight == 1).all() for stage in other.stages for block in stage)
    # The copies for small images begin with whole branches.
    small = resnet20(attention="mrla_light", variant="published")
    assert all((block.last_norm.weight == 1).all() for stage in small.stages for block in stage)
    # Kaiming's: a variance of 2 over 9 numbers of each of 64 channels; of 576 numbers within a third.
    expected = (2 / (9 * 64)) ** 0.5
    filters = published("mrla").attentions[3][1].attn.Wv.weight
    assert filters.std().item() == pytest.approx(expected, rel=0.3)
    assert ResNet(BLOCKS, WIDTHS, attention="mrla").attentions[3][1].attn.Wv.weight.std() > 0.15


@pytest.mark.parametrize(
    ("attention", "stem", "block", "variant", "head_dim", "convolutions"),
    [
        ("mrla", None, "bottleneck", "ours", 16, 1),
        ("mrla_light", None, "bottleneck", "ours", 16, 1),
        ("mrla", None, "bottleneck", "published", 16, 3),
        ("ela", None, "bottleneck", "published", 16, 3),
        ("mrla_light", None, "bottleneck", "published", 32, 1),
        ("mrla", "imagenet", "bottleneck", "published", 16, 1),
        ("mrla_light", "deep", "bottleneck", "published", 32, 3),
        ("mrla", None, "basic", "published", 16, 3),
        ("mrla_light", None, "basic", "published", 32, 1),
        ("mrla", "small", "bottleneck", "published", 32, 1),
        ("mrla", "small", "basic", "published", 16, 1),
        ("mrla_light", "small", "bottleneck", "published", 32, 1),
        ("mrla_light", "small", "basic", "published", 16, 1),
        ("mrla_light", "small", "bottleneck", "ours", 16, 1),
    ],
)
def test_heads_and_stems(
    attention: str, stem: str | None, block: str, variant: str, head_dim: int, convolutions: int
) -> None:
    model = ResNet((1, 1), (32, 32), block, attention=attention, stem=stem, variant=variant)
    assert {layer.attn.head_dim for stage in model.attentions for layer in stage} == {head_dim}
    assert sum(isinstance(m, nn.Conv2d) for m in model.stem) == convolutions


# Sizes of the networks as MRLA published them, of torchvision's ResNet-18 and 34, and of timm's ResNet-26.
@pytest.mark.parametrize(
    ("name", "attention", "parameters"),
    [
        ("resnet50", "mrla", 25742580),
        ("resnet50", "mrla_light", 25738452),
        ("resnet101", "mrla", 44926366),
        ("resnet101", "mrla_light", 44939646),
        ("resnet18", "none", 11689512),
        ("resnet26", "none", 15995176),
        ("resnet34", "none", 21797672),
    ],
)
def test_parameters(name: str, attention: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build_model(name, attention=attention, variant="published")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "resnet34"])
@pytest.mark.parametrize("attention", list(FORMS))
@pytest.mark.parametrize("variant", ["ours", "published"])
def test_shapes_of_the_smaller_networks(name: str, attention: str, variant: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=7, attention=attention, variant=variant)
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("attention", list(FORMS))
def test_every_parameter_gets_a_gradient(attention: str) -> None:
    """After a first step, since the branches begin with nothing."""
    torch.manual_seed(0)
    model = published(attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images().float()), torch.arange(2))
        loss.backward()
        optimizer.step()
    missing = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # With one pair held the first layer's weights are 1 whatever its query is; alone in its stage, its key too.
    firsts = {f"attentions.{i}.0.attn.Wq.weight" for i in range(4)}
    firsts |= {f"attentions.{i}.0.attn.Wk.weight" for i in (0, 2)}
    assert missing == (firsts if FORMS[attention] == "base" else set())


def test_maps_given_away_may_be_changed_in_place() -> None:
    model = published("mrla_light", features_only=True)
    maps = model(images().float())
    maps[-1].mul_(2.0)
    maps[-1].sum().backward()
    assert all(p.grad is not None for p in model.stages[0].parameters())


def test_blocks_and_stages_that_were_pickled_before_there_was_a_choice() -> None:
    model = resnet20(attention="mrla_light").eval()
    x = images(12).float()
    expected = model(x)
    for module in model.modules():
        module.__dict__.pop("gives_shortcut", None)
        module.__dict__.pop("takes_shortcut", None)
    assert torch.equal(copy.deepcopy(model)(x), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"variant": "theirs"},
            ValueError,
            "variant: got 'theirs'; allowed are 'ours', 'published'",
        ),
        ({"stem": "wide"}, ValueError, "stem: got 'wide'; allowed are 'small', 'imagenet', 'deep'"),
        ({"identity_init": True}, ValueError, "identity_init: got True with attention='none'"),
        ({"identity_init": 1}, TypeError, "identity_init: got int; allowed is a bool"),
        ({"history_dtype": "bfloat16"}, TypeError, "history_dtype: got str; allowed is torch.bf"),
        ({"history_dtype": torch.float32}, ValueError, "history_dtype: got torch.float32; allowed"),
        ({"history_dtype": torch.float16}, ValueError, "with attention='none', which has no Layer"),
        (
            {"attention": "mrla_light", "variant": "published", "widths": (12,)},
            ValueError,
            "head_dim: got None, which is 32, for stages of 48 channels",
        ),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ResNet(**{"blocks": (1,), "widths": (16,), **options})


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mrla", "mrla_light", "ela"])
def test_torch_compile(attention: str) -> None:
    torch.manual_seed(0)
    model = published(attention)
    x = images().float()
    expected = copy.deepcopy(model)(x)
    # float32: inductor fuses norms and activations in another order
    torch.testing.assert_close(torch.compile(model)(x), expected, rtol=1e-4, atol=1e-4)
