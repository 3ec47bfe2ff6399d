"""timm's networks with layers: the numbers of explicit histories, and what timm does with models."""

from __future__ import annotations

import copy
import io

import pytest
import torch

timm = pytest.importorskip("timm")

from timm.layers import PatchDropout  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

import ela_kernels as ek  # noqa: E402
from ela_kernels.integrations import detach  # noqa: E402
from ela_kernels.integrations.attach import attached_blocks  # noqa: E402
from ela_kernels.integrations.layers import LayerNorm2d  # noqa: E402
from ela_kernels.integrations.timm import add_layer_attention  # noqa: E402
from ela_kernels.models.blocks import MRLALight  # noqa: E402
from ela_kernels.ops.light_layer_attention.history import PreviousOutput  # noqa: E402

pytestmark = pytest.mark.integration

VIT = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": (48, 32)}
SWIN = {"embed_dim": 16, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 2, 4), "img_size": 64}
SWIN["drop_path_rate"] = 0.0  # random numbers
# Name, options, size of images, names of the blocks of each stage, and the form of what they give.
NETWORKS = {
    "resnet": ("resnet18", {}, (64, 48), "layer{}.", 4, "maps"),
    "seresnext": ("seresnext26d_32x4d", {}, (64, 48), "layer{}.", 4, "maps"),
    "resnetv2": ("resnetv2_18", {}, (64, 48), "stages.{}.", 4, "maps"),
    "regnet": ("regnetx_002", {}, (64, 48), "s{}.", 4, "maps"),
    "convnext": ("convnext_atto", {"depths": (2, 2, 3, 2)}, (64, 48), "stages.{}.", 4, "maps"),
    "vit": ("vit_tiny_patch16_224", VIT, (48, 32), "blocks.", 1, "tokens"),
    "deit": ("deit_tiny_distilled_patch16_224", VIT, (48, 32), "blocks.", 1, "tokens"),
    "registers": (
        "vit_tiny_patch16_224",
        {**VIT, "reg_tokens": 3},
        (48, 32),
        "blocks.",
        1,
        "tokens",
    ),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, (64, 64), "layers.{}.", 4, "last"),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, (64, 64), "layers.{}.", 4, "last"),
}
FEW = ("resnet", "convnext", "vit", "swin")


def plain(kind, **options):
    torch.manual_seed(5)
    name, usual, *_ = NETWORKS[kind]
    return timm.create_model(name, num_classes=4, **{**usual, **options}).double()


def network(kind, form="ela", **options):
    options = {"head_dim": 8, "identity_init": False, **options}
    return add_layer_attention(plain(kind), form, **options)


def images(kind, batch=2, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *NETWORKS[kind][2], dtype=torch.float64, generator=made)


def by_hand(model, kind):
    """A copy of the model without what `attach` did, in which hooks on the blocks run the layers.

    Stages by the names of blocks, not by what was found out of a trial.
    """
    found = {name: block.ela for name, block in attached_blocks(model).items()}
    other = copy.deepcopy(model)
    layers = {name: other.get_submodule(name).ela for name in found}
    detach(other)
    history = {}
    *_, stage_name, _, form = NETWORKS[kind]
    first, _, rest = stage_name.partition("{}")

    def stage_of(name):
        return name[: name.index(rest, len(first)) if rest else len(first)]

    def after(name, layer, is_first):
        def hook(block, args, out):
            if is_first:
                light = isinstance(layer, MRLALight)
                history[stage_of(name)] = PreviousOutput() if light else ek.LayerHistory()
            mine = history[stage_of(name)]
            if form == "maps":
                return layer(out, mine)
            if form == "last":
                return layer(out.permute(0, 3, 1, 2), mine).permute(0, 2, 3, 1)
            prefix = other.num_prefix_tokens
            b, n, c = out.shape
            assert n - prefix == 3 * 2
            tokens = out[:, prefix:].transpose(1, 2).reshape(b, c, 3, 2)
            tokens = layer(tokens, mine).reshape(b, c, n - prefix).transpose(1, 2)
            return torch.cat((out[:, :prefix], tokens), 1)

        return hook

    seen = set()
    for name, layer in layers.items():
        is_first = stage_of(name) not in seen
        seen.add(stage_of(name))
        other.get_submodule(name).register_forward_hook(after(name, layer, is_first))
    parameters = [*other.parameters(), *(p for m in layers.values() for p in m.parameters())]
    return other, parameters, len(seen)


def same(a, b):
    # float64: sums over some thousand numbers in another order, through some ten layers.
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def total(out):
    outs = out if isinstance(out, (list, tuple)) else (out,)
    return sum((y * y.detach().sin()).sum() for y in outs)


def gradients(model, out):
    model.zero_grad()
    total(out).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, "ela") for kind in NETWORKS]
    + [(kind, form) for kind in FEW for form in ("mrla", "mrla_light")],
)
def test_it_is_the_network_with_explicit_histories(kind, form):
    model = network(kind, form).train()
    other, parameters, stages = by_hand(model, kind)
    assert stages == NETWORKS[kind][4]
    x = images(kind)
    out, expected = model(x), other(x)
    if not isinstance(out, torch.Tensor):
        out, expected = out[0] + 2 * out[1], expected[0] + 2 * expected[1]
    same(out, expected)
    found = torch.autograd.grad(total(out), list(model.parameters()), allow_unused=True)
    named = dict(zip([n for n, _ in model.named_parameters()], found, strict=True))
    wanted = torch.autograd.grad(total(expected), parameters, allow_unused=True)
    inside = [n for n in named if ".ela." not in n] + [n for n in named if ".ela." in n]
    same([named[n] for n in inside], list(wanted))
    assert all(named[n] is not None for n in named if ".ela." in n)


@pytest.mark.parametrize("kind", NETWORKS)
def test_checkpointing_changes_no_number(kind):
    model = network(kind).train()
    other = copy.deepcopy(model)
    model.set_grad_checkpointing(True)
    x, y = images(kind, 2, 1), images(kind, 3, 2)
    outs = [[m(x), m(y)] for m in (model, other)]
    outs = [[o if isinstance(o, torch.Tensor) else o[0] + o[1] for o in some] for some in outs]
    same(*outs)
    # Two passes before one backward.
    same(*(gradients(m, some) for m, some in zip((model, other), outs, strict=True)))


@pytest.mark.parametrize("kind", NETWORKS)
def test_at_first_it_is_the_network_that_it_was(kind):
    model = plain(kind).eval()
    expected = model(images(kind))
    add_layer_attention(model, head_dim=8, every=2 if kind == "vit" else None)
    assert torch.equal(model(images(kind)), expected)
    # And yet it learns: the scale has a gradient.
    found = gradients(model, model(images(kind)))
    scales = [g for n, g in found.items() if n.endswith("ela.norm.weight")]
    if NETWORKS[kind][-1] == "tokens":
        # The class token alone is classified, and the last layer's map goes nowhere.
        assert scales.pop().abs().max() == 0
    assert scales
    assert all(g.abs().max() > 0 for g in scales)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("checkpointed", [True, False])
def test_features_only(kind, checkpointed):
    torch.manual_seed(5)
    name, usual, *_ = NETWORKS[kind]
    model = timm.create_model(name, features_only=True, **usual).double()
    add_layer_attention(model, head_dim=8, identity_init=False)
    other = copy.deepcopy(model)
    if checkpointed:
        model.set_grad_checkpointing(
            True
        ) if kind != "vit" else model.model.set_grad_checkpointing()
    found, expected = model(images(kind)), other(images(kind))
    assert len(found) >= 3
    same(found, expected)
    same(gradients(model, found), gradients(other, expected))
    if kind == "resnet":  # where names are those of the whole network
        whole = network(kind).eval()
        whole.load_state_dict(model.state_dict(), strict=False)
        same(model.eval()(images(kind))[-1], whole.forward_features(images(kind)))


@pytest.mark.parametrize("kind", FEW)
def test_a_checkpoint_of_the_plain_network_loads(kind):
    state = plain(kind).state_dict()
    model = network(kind)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing
    assert all(".ela." in name for name in missing)
    detach(model)
    model.load_state_dict(state)
    same(model.eval()(images(kind)), plain(kind).eval()(images(kind)))


@pytest.mark.parametrize("kind", FEW)
def test_copies_files_averages_and_another_head(kind):
    model = network(kind).eval()
    expected = model(images(kind))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        same(other(images(kind)), expected)
    again = network(kind)
    again.load_state_dict(model.state_dict())
    same(again.eval()(images(kind)), expected)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    average.update(model)
    assert not torch.equal(average.module(images(kind)), expected)
    model.reset_classifier(7)
    assert model.double()(images(kind)).shape == (2, 7)


@pytest.mark.parametrize("kind", FEW)
def test_explain_analyze_ebqm_and_prune(kind):
    model = network(kind, norm="batch").float()
    x = images(kind).float()
    blocks = attached_blocks(model)
    assert [e.name for e in ek.explain(model, x)] == [f"{name}.ela.attn" for name in blocks]
    assert {e.form for e in ek.explain(model, x)} == {"block"}
    found = ek.analyze(model, [x])
    assert [row.name for row in found.layers] == [f"{name}.ela" for name in blocks]
    assert len({row.stage for row in found.layers}) == NETWORKS[kind][4]
    monitor = ek.EBQM(model, warmup=1)
    for _ in range(2):
        total(model(x)).backward()
        monitor.step()
    last = list(blocks)[-1]
    model.get_submodule(last).ela.skipped = True
    model.eval()
    expected = model(x)
    ek.prune(model)
    assert torch.equal(model(x), expected)


def test_norms_by_the_blocks_and_by_name():
    def norm_of(model):
        return type(next(iter(attached_blocks(model).values())).ela.norm)

    assert norm_of(network("resnet")) is torch.nn.BatchNorm2d
    assert norm_of(network("vit")) is norm_of(network("convnext")) is LayerNorm2d
    assert norm_of(network("vit", "mrla", norm="group")) is torch.nn.GroupNorm
    own = network(
        "resnet", "mrla_light", norm=lambda dim: torch.nn.InstanceNorm2d(dim, affine=True)
    )
    assert norm_of(own) is torch.nn.InstanceNorm2d
    x = torch.randn(2, 16, 3, 5)
    norm = LayerNorm2d(16)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.layer_norm(x.movedim(1, -1), (16,), norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected.movedim(-1, 1))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_every_and_drop_path(kind):
    model = network(kind, every=2, drop_path=0.3)
    rates = [
        block.ela.drop_path.p for block in attached_blocks(model).values() if hasattr(block, "ela")
    ]
    count = {"resnet": 4, "vit": 2}[kind]
    assert rates == [pytest.approx(0.3 * i / (count - 1)) for i in range(count)]
    model(images(kind)).sum().backward()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_in_a_compiled_graph(kind):
    model = network(kind).float().eval()
    x = images(kind).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), model(x)
    # float32, through some ten layers.
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    found = gradients(model, out), gradients(model, expected)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_autocast():
    model = network("vit").float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images("vit").float())
    total(out.float()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("resnet", {"form": "none"}, "form: got 'none'; allowed are 'ela', 'mrla', 'mrla_light'"),
        ("resnet", {"every": 0}, "every: got 0"),
        ("resnet", {"every": 3}, "every: got 3, for stages of at most 2 blocks"),
        (
            "vit",
            {"every": 5},
            "every: got 5, for stages of at most 4 blocks; allowed is an int of 1",
        ),
        (
            "vit",
            {"head_dim": 5},
            "head_dim: got 5, which does not divide the 32 channels of blocks.0; ",
        ),
        (
            "regnet",
            {},
            "head_dim: got 16, which does not divide the 24 channels of s1.b1; allowed for",
        ),
        ("resnet", {"norm": "none"}, "norm: got 'none'"),
        (
            "resnet",
            {"norm": lambda dim: torch.nn.InstanceNorm2d(dim)},
            "norm: got one that gives a In",
        ),
        ("resnet", {"grid": "square"}, "grid: got 'square' for a ResNet"),
        ("vit", {"grid": (3, 0)}, "grid: got (3, 0)"),
        ("resnet", {"drop_path": 2.0}, "drop_path: got 2.0"),
        ("resnet", {"skip": "all"}, "skip: got 'all'"),
        ("resnet", {"skip": "layer", "form": "mrla"}, "skip: got 'layer' with form='mrla', whose"),
        ("resnet", {"skip": "reuse", "form": "mrla_light"}, "skip: got 'reuse' with form='mrla_l"),
        ("resnet", {"norm": torch.nn.BatchNorm2d(8)}, "norm: got BatchNorm2d(8, "),
        ("resnet", {"norm": lambda dim: "batch"}, "norm: got one that gives str; allowed is a"),
        ("resnet", {"identity_init": 1}, "identity_init: got int"),
        (
            "resnet",
            {"form": "mrla_light", "tolerance": 0.1},
            "history_dtype, tolerance: got one for",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind, options, sentence):
    model = plain(kind)
    names = list(model.state_dict())
    with pytest.raises((TypeError, ValueError)) as caught:
        add_layer_attention(model, **options)
    assert str(caught.value).startswith(sentence)
    assert list(model.state_dict()) == names
    assert not attached_blocks(model)
    assert model.training


def test_models_that_do_not_fit_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"^model: got MobileNetV3, without blocks that are known; al"
    ):
        add_layer_attention(timm.create_model("mobilenetv3_small_050"))
    with pytest.raises(TypeError, match=r"^model: got str"):
        add_layer_attention("resnet50")
    with pytest.raises(ValueError, match=r"^model: got ResNet with layers already, at layer1\.0"):
        add_layer_attention(network("resnet"))
    dropping = plain("vit", patch_drop_rate=0.5)
    assert isinstance(dropping.patch_drop, PatchDropout)
    with pytest.raises(ValueError, match=r"^model: got VisionTransformer with patch_drop_rate"):
        add_layer_attention(dropping)


def test_a_grid_that_changes_has_to_be_named():
    model = plain("vit", dynamic_img_size=True)
    with pytest.raises(
        ValueError, match=r"^grid: got None for a VisionTransformer that takes images"
    ):
        add_layer_attention(model, head_dim=8)
    add_layer_attention(model, head_dim=8, grid="square")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert model(x).shape == (1, 4)
    assert model(x[..., :32, :32]).shape == (1, 4)
    with pytest.raises(
        ValueError, match=r"^blocks\.0: got 8 tokens of a map, beside 1 others, which"
    ):
        model(x[..., :32])
    detach(model)
    add_layer_attention(model, head_dim=8, grid=(4, 2))
    assert model(x[..., :32]).shape == (1, 4)
    with pytest.raises(
        ValueError, match=r"^blocks\.0: got 16 tokens of a map.*allowed are 8, for th"
    ):
        model(x)
