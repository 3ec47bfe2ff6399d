"""torchvision's networks and detectors with layers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision")

from torch.utils.checkpoint import checkpoint  # noqa: E402
from torchvision.models import resnet18, resnet50  # noqa: E402
from torchvision.models.detection import backbone_utils  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d  # noqa: E402

import ela_kernels as ek  # noqa: E402
from ela_kernels.integrations import torchvision as ours  # noqa: E402
from ela_kernels.integrations.attach import attached_blocks  # noqa: E402

pytestmark = pytest.mark.integration


def same(a, b):
    # float64, sums over some thousand numbers in another order, through some ten layers.
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def backbone(attention="ela", **options):
    torch.manual_seed(2)
    return ours.resnet_fpn_backbone("resnet18", attention, **options)


def images(batch=2, height=72, width=100):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_a_network_is_the_one_with_explicit_histories(make):
    torch.manual_seed(2)
    model = make(num_classes=3).double()
    ours.add_layer_attention(model, identity_init=False)
    other = copy.deepcopy(model)
    x = images().double()
    y = other.maxpool(other.relu(other.bn1(other.conv1(x))))
    for stage in (other.layer1, other.layer2, other.layer3, other.layer4):
        history = ek.LayerHistory()
        for block in stage:
            y = block.ela(block.fused_original.forward(block, y), history)
    expected = other.fc(torch.flatten(other.avgpool(y), 1))
    out = model(x)
    same(out, expected)
    found = [
        torch.autograd.grad(o.square().sum(), list(m.parameters()))
        for o, m in ((out, model), (expected, other))
    ]
    same(*found)


@pytest.mark.parametrize("norm", ["batch", "frozen", "sync", "group"])
@pytest.mark.parametrize("attention", ["ela", "mrla", "mrla_light", "none"])
def test_a_backbone_is_at_first_torchvisions(norm, attention):
    model = backbone(attention, norm=norm).eval()
    norms = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d, "sync": nn.SyncBatchNorm}
    torch.manual_seed(2)
    make = norms.get(norm, lambda dim: nn.GroupNorm(dim // 16, dim))
    plain = backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=make
    ).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert bool(missing) is (attention != "none")
    assert all(".ela." in name for name in missing)
    found, expected = model(images()), plain(images())
    assert list(found) == list(expected) == ["0", "1", "2", "3", "pool"]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    if attention != "none":
        kind = {"frozen": nn.GroupNorm, "group": nn.GroupNorm}.get(norm, norms.get(norm))
        assert {type(b.ela.norm) for b in attached_blocks(model).values()} == {kind}
    trained = {n for n, p in plain.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, p in model.named_parameters() if p.requires_grad and ".ela." not in n
    }


@pytest.mark.parametrize("trainable", range(6))
def test_layers_of_a_frozen_stage_are_frozen(trainable):
    model = backbone(trainable_layers=trainable)
    for name, parameter in model.body.named_parameters():
        if ".ela." in name:
            assert parameter.requires_grad is (int(name[5]) > 4 - trainable)
    found = model(images())
    sum(y.square().sum() for y in found.values()).backward()
    for name, parameter in model.body.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_of_images_and_batches(norm, batch):
    model = backbone(norm=norm, identity_init=False, trainable_layers=5).train()
    for height, width in ((65, 97), (128, 64), (70, 70)):
        found = model(images(batch, height, width))
        sum(y.square().mean() for y in found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.body.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images(batch))
    assert all(y.isfinite().all() for y in found.values())
    sum(y.float().square().mean() for y in found.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.body.parameters())


def test_checkpointed_stages():
    """Each stage of the backbone recomputed, with a batch of one and frozen norms, as detectors train."""
    model = backbone(norm="frozen", identity_init=False, trainable_layers=5).double().train()
    other = copy.deepcopy(model)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        stage = getattr(model.body, name)
        forward = stage.forward
        stage.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    x = images(1).double()
    found, expected = ([*m(x).values()] for m in (model, other))
    same(found, expected)
    losses = [sum(y.square().mean() for y in ys) for ys in (found, expected)]
    grads = [
        torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
        for loss, m in zip(losses, (model, other), strict=True)
    ]
    same([g for g in grads[0] if g is not None], [g for g in grads[1] if g is not None])


DETECTORS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn")
SMALL = {"weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 128}


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name):
    torch.manual_seed(4)
    few = "detections_per_img" if name.startswith("retina") else "box_detections_per_img"
    options = {**SMALL, few: 5}
    model = getattr(ours, name)(**options)
    plain = getattr(torchvision.models.detection, name)(**options)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".ela." in n for n in missing)
    assert type(model) is type(plain)
    assert len(attached_blocks(model)) == 16
    model.eval()
    plain.eval()
    batch = [torch.rand(3, 60, 90), torch.rand(3, 100, 70)]
    for found, expected in zip(model(batch), plain(batch), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[-2:], dtype=torch.uint8),
        }
        for image in batch
    ]
    model.train()
    sum(model(batch, targets).values()).backward()
    grads = [p.grad for n, p in model.named_parameters() if n.endswith("ela.norm.weight")]
    assert len(grads) == 16
    assert all(g.abs().max() > 0 for g in grads)
    sum(model(batch[:1], targets[:1]).values()).backward()
    monitor = ek.EBQM(model, warmup=1)
    sum(model(batch, targets).values()).backward()
    monitor.step()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detectors_weights_load(name, monkeypatch):
    """As torchvision loads them, here from no network: norms are frozen, and first ones had no eps."""
    kind = {
        n.lower(): getattr(torchvision.models.detection, n)
        for n in dir(torchvision.models.detection)
    }
    weights = kind[f"{name}_weights"].COCO_V1
    torch.manual_seed(4)
    plain = getattr(torchvision.models.detection, name)(weights_backbone=None)
    state = {k: v + 0.5 if "running_var" in k else v for k, v in plain.state_dict().items()}
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: dict(state))
    model = getattr(ours, name)(weights=weights)
    plain = getattr(torchvision.models.detection, name)(weights=weights)
    trained = {n for n, p in plain.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, p in model.named_parameters() if p.requires_grad and ".ela." not in n
    }
    assert not any(p.requires_grad for n, p in model.named_parameters() if "layer1" in n)
    batch = [torch.rand(3, 60, 90)]
    for m in (model, plain):
        m.transform.min_size, m.transform.max_size = (64,), 96
        m.eval()
    (found,), (expected,) = model(batch), plain(batch)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(
        ValueError, match=r"^num_classes: got 3 with weights for 91; allowed is 91, or"
    ):
        getattr(ours, name)(weights=weights, num_classes=3)


def test_a_detector_without_attention_is_torchvisions():
    model = ours.fasterrcnn_resnet50_fpn(attention="none", **SMALL)
    plain = torchvision.models.detection.fasterrcnn_resnet50_fpn(**SMALL)
    assert list(model.state_dict()) == list(plain.state_dict())
    with pytest.warns(UserWarning, match="trainable_backbone_layers: got 2 without weights"):
        model = ours.fasterrcnn_resnet50_fpn(trainable_backbone_layers=2, **SMALL)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backbone_name": "resnet51"}, "backbone_name: got 'resnet51'; allowed are resnet18, re"),
        ({"backbone_name": "ResNet"}, "backbone_name: got 'ResNet'"),
        ({"attention": "all"}, "attention: got 'all'; allowed are 'none', 'ela', 'mrla', 'mrla_li"),
        ({"attention": "none", "head_dim": 8}, "head_dim: got an option of the layers with atte"),
        ({"norm": "layer"}, "norm: got 'layer'; allowed are 'batch', 'frozen', 'sync', 'group'"),
        ({"norm": "group", "weights": "DEFAULT"}, "weights: got some with norm='group'"),
        ({"trainable_layers": 6}, "trainable_layers: got 6; allowed is an int of 0 to 5"),
        ({"returned_layers": [0, 1]}, "returned_layers: got [0, 1]; allowed are numbers of 1 to 4"),
        (
            {"head_dim": 7},
            "head_dim: got 7, which does not divide the 64 channels of layer1.0; allowed",
        ),
        ({"every": 3}, "every: got 3, for stages of at most 2 blocks"),
        ({"attention_norm": "none"}, "attention_norm: got 'none'; allowed are 'batch', 'layer'"),
        (
            {"attention_norm": "frozen"},
            "attention_norm: got 'frozen'; allowed are 'batch', 'layer'",
        ),
        ({"attention_norm": lambda dim: dim}, "attention_norm: got one that gives int; allowed is"),
        (
            {"attention_norm": torch.nn.InstanceNorm2d},
            "attention_norm: got one that gives a InstanceNorm2d without a parameter `weight`",
        ),
        (
            {"weights": "DEFAULTT"},
            "weights: got 'DEFAULTT'; allowed are None and 'IMAGENET1K_V1', ",
        ),
        ({"weights": 3}, "weights: got 3; allowed are None and 'IMAGENET1K_V1', "),
        (
            {"attention": "mrla", "skip": "layer"},
            "skip: got 'layer' with form='mrla', whose layers",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, sentence):
    with pytest.raises((TypeError, ValueError)) as caught:
        ours.resnet_fpn_backbone(**{"backbone_name": "resnet18", **options})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weights": "DEFAULTT"}, "weights: got 'DEFAULTT'; allowed are None and 'COCO_V1', "),
        ({"weights": object}, "weights: got <class 'object'>; allowed are None and 'COCO_V1', "),
        (
            {"weights_backbone": "x"},
            "weights_backbone: got 'x'; allowed are None and 'IMAGENET1K_V1', 'IMAGENET1K_V2', 'DEF",
        ),
        ({"attention_norm": "frozen"}, "attention_norm: got 'frozen'; allowed are 'batch', 'lay"),
    ],
)
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_what_does_not_fit_in_a_detector_is_refused_by_name(name, options, sentence):
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(ours, name)(**{"weights_backbone": None, **options})
    assert str(caught.value).startswith(sentence)


def test_models_that_do_not_fit_are_refused_by_name():
    with pytest.raises(
        TypeError, match=r"^model: got MobileNetV3; allowed is a torchvision\.models\.R"
    ):
        ours.add_layer_attention(torchvision.models.mobilenet_v3_small())
    model = ours.add_layer_attention(resnet18())
    with pytest.raises(ValueError, match=r"^model: got ResNet with layers already, at layer1\.0"):
        ours.add_layer_attention(model)


def test_a_missing_library_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", None)
    monkeypatch.delitem(sys.modules, "ela_kernels.integrations.torchvision")
    with pytest.raises(
        ImportError, match=r"needs torchvision, which could .*'ela-kernels\[detection\]"
    ):
        import ela_kernels.integrations.torchvision  # noqa: F401
