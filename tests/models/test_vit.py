"""Vision transformers with layer attention: against plain PyTorch, their options, EBQM, and weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import ela_kernels as ek
from ela_kernels.__main__ import main
from ela_kernels.models import VisionTransformer, build_model, load_weights, vit_small, vit_tiny
from ela_kernels.models.blocks import MRLALight, StageAttention
from ela_kernels.training.arguments import make_model
from ela_kernels.training.parser import make_parser

ATTENTIONS = ["none", "mrla", "mrla_light", "ela"]
LAYERS = ["mrla", "mrla_light", "ela"]


def small(attention: Any = "ela", **options: Any) -> VisionTransformer:
    """Five blocks, a grid of 3 x 4."""
    torch.manual_seed(0)
    given = {"img_size": (12, 16), "patch_size": 4, "in_chans": 2, "num_classes": 5, **options}
    return VisionTransformer(16, 5, 2, attention=attention, head_dim=8, **given)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 12, 16, generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module) -> nn.Module:
    """With other numbers than those that cancel: biases of zero, scales of one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(model: VisionTransformer, x: Tensor) -> Tensor:
    """In float64, every step written out; the base form of attention, nothing skipped."""
    p = {name: t.detach().double() for name, t in model.state_dict().items() if t.ndim}
    dim, eps = model.num_features, 1e-6

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    size = p["patch_embed.proj.weight"].shape[-1]
    patches = x.double().unfold(2, size, size).unfold(3, size, size)
    height, width = patches.shape[2:4]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    weight = p["patch_embed.proj.weight"].flatten(1)
    x = patches @ weight.T + p["patch_embed.proj.bias"]
    x = torch.cat((p["cls_token"].expand(len(x), 1, dim), x), 1) + p["pos_embed"]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for i in range(len(model.blocks)):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        heads = model.blocks[0].attn.heads
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        weights = (q @ k.mT / math.sqrt(dim // heads)).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
        layer = f"attentions.0.{i}"
        if f"{layer}.attn.Wq.weight" not in p:
            continue
        maps = x[:, 1:].transpose(1, 2).unflatten(2, (height, width))
        y = maps.mean((2, 3)).unsqueeze(1)
        wq, wk = p[f"{layer}.attn.Wq.weight"], p[f"{layer}.attn.Wk.weight"]
        q, k = (F.conv1d(y, w, padding=w.shape[-1] // 2).squeeze(1) for w in (wq, wk))
        keys.append(k)
        values.append(F.conv2d(maps, p[f"{layer}.attn.Wv.weight"], padding=1, groups=dim))
        with ek.use_backend("eager"):
            o = ek.layer_attention(q, keys, values, heads=dim // 8).out
        mean = p[f"{layer}.norm.running_mean"]
        variance = p[f"{layer}.norm.running_var"]
        scale, shift = p[f"{layer}.norm.weight"], p[f"{layer}.norm.bias"]
        mean, variance, scale, shift = (t.view(1, -1, 1, 1) for t in (mean, variance, scale, shift))
        o = ((o - mean) / (variance + 1e-5).sqrt() * scale + shift).relu()
        x = torch.cat((x[:, :1], x[:, 1:] + o.flatten(2).transpose(1, 2)), 1)
    return linear(norm(x, "norm")[:, 0], "head")


@pytest.mark.parametrize("attention", ["none", "mrla", "ela"])
def test_against_every_step_written_out(attention: str, backend: str) -> None:
    model = shaken(small(attention)).eval()
    torch.testing.assert_close(model.double()(images().double()), by_hand(model, images()))


def test_names_and_sizes() -> None:
    # As timm's vit_tiny_patch16_224 and vit_small_patch16_224 have them.
    assert sum(p.numel() for p in vit_tiny().parameters()) == 5_717_416
    assert sum(p.numel() for p in vit_small().parameters()) == 22_050_664
    names = list(build_model("vit_tiny", num_classes=3).state_dict())
    assert names[:4] == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    ]
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    of_block = [f"blocks.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert names[4:16] == of_block
    assert names[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert len(names) == 152


@pytest.mark.parametrize("attention", LAYERS)
def test_every_parameter_learns(attention: str, backend: str) -> None:
    model = small(attention)
    model(images()).square().sum().backward()
    # The query and key of the first layer, which has itself alone to retrieve from, have no say.
    without = {
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    }
    first = {f"attentions.0.0.attn.{w}.weight" for w in ("Wq", "Wk")}
    assert without <= first


@pytest.mark.parametrize("attention", LAYERS)
def test_kernels_serve_every_layer(attention: str, kernels: object) -> None:
    found = ek.explain(small(attention), images())
    assert [e.form for e in found] == ["block"] * 4
    assert {e.backend for e in found} == {"cpp"}


@pytest.mark.parametrize("attention", LAYERS)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.LayerNorm])
def test_an_identity_at_first(attention: str, norm: Any) -> None:
    plain = small("none").eval()
    model = small(attention, identity_init=True, norm_layer=norm).eval()
    report = load_weights(model, plain.state_dict())
    assert report.source == "timm"
    assert len(report.loaded) == len(plain.state_dict())
    assert set(report.missing.values()) == {"the checkpoint has no attention"}
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=0)
    model.train()(images()).square().sum().backward()
    assert model.attentions[0][1].norm.weight.grad.any()


def test_weights_that_do_not_fit() -> None:
    state = small("none").state_dict()
    with pytest.raises(
        ValueError, match=r"pos_embed \(\[1, 13, 16\] for .*img_size and patch_size"
    ):
        load_weights(small("none", img_size=(16, 16)), state)
    other = small("none", num_classes=7)
    assert sorted(load_weights(other, state).left) == ["head.bias", "head.weight"]
    for source in ("mrla", "torchvision"):
        with pytest.raises(ValueError, match=rf"^source: got .* {source} for a VisionTransformer"):
            load_weights(small("none"), state, source=source)
    trained = small("ela")
    again = small("ela")
    assert load_weights(again, trained.state_dict()).source == "ela_kernels"
    assert torch.equal(again.eval()(images()), trained.eval()(images()))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return [out.detach(), *(grad.clone() for grad in grads)]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_checkpointing(attention: str, backend: str) -> None:
    model = small(attention)
    twin = small(attention, checkpointing=True)
    if attention == "ela":
        model.attentions[0][2].skipped = twin.attentions[0][2].skipped = True
    for a, b in zip(gradients(twin, images()), gradients(model, images()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", LAYERS)
def test_one_compiled_graph(attention: str, kernels: object) -> None:
    torch._dynamo.reset()
    model = small(attention)
    twin = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    got, want = gradients(compiled, images()), gradients(twin, images())
    for a, b in zip(got, want, strict=True):
        # float32: sums in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("skip", ["reuse", "retrieval", "layer"])
def test_ebqm_and_prune(skip: str) -> None:
    model = small("ela", skip=skip)
    layers = list(model.attentions[0])
    ebqm = ek.EBQM(model, warmup=2, interval=2, probe_interval=1, low=0.99, high=0.995)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(8):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
        ebqm.step()
    report = ebqm.report()
    assert [row.name for row in report.layers] == [f"attentions.0.{i}" for i in range(4)]
    assert not layers[0].skipped
    assert any(layer.skipped for layer in layers)
    want = model.eval()(images())
    before = sum(p.numel() for p in model.parameters())
    ek.prune(model)
    assert sum(p.numel() for p in model.parameters()) < before
    torch.testing.assert_close(model(images()), want)
    other = small("ela", skip=skip).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(images()), want)


@pytest.mark.parametrize("attention", ["mrla", "ela"])
def test_a_history_in_half_precision_and_a_tolerance(attention: str, kernels: object) -> None:
    exact = small(attention).eval()(images())
    model = small(attention, history_dtype=torch.bfloat16, tolerance=0.01).eval()
    found = model(images())
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_autocast(attention: str, backend: str) -> None:
    model = small(attention)
    exact = model.eval()(images())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images()).float(), exact, rtol=0.05, atol=0.05)
        model.train()(images()).float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_grows() -> None:
    model = small("ela", drop_path=0.3)
    rates = [layer.drop_path.p for layer in model.attentions[0]]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


REFUSED = [
    ({"img_size": 13}, ValueError, r"img_size: got 13; allowed is .*multiples of patch_size=4"),
    ({"img_size": (12, 16, 1)}, TypeError, r"img_size: got \(12, 16, 1\); allowed is"),
    ({"img_size": 12.0}, TypeError, r"img_size: got 12.0; allowed is"),
    ({"img_size": 0}, ValueError, r"img_size: got 0; allowed is"),
    ({"patch_size": 0}, ValueError, r"patch_size: got 0; allowed is"),
    ({"patch_size": True}, TypeError, r"patch_size: got bool; allowed is"),
    ({"num_classes": 0}, ValueError, r"num_classes: got 0; allowed is"),
    ({"attention": "full"}, ValueError, r"attention: got 'full'; allowed are 'none', 'mrla'"),
    ({"drop_path": 2.0}, ValueError, r"drop_path: got 2.0; allowed is"),
    ({"skip": "all"}, ValueError, r"skip: got 'all'; allowed are"),
    ({"mlp_ratio": 0}, ValueError, r"mlp_ratio: got 0 for dim=16; allowed is"),
    ({"mlp_ratio": "4"}, TypeError, r"mlp_ratio: got str; allowed is"),
    ({"attention": "none", "identity_init": True}, ValueError, r"identity_init: got True with"),
    ({"attention": "none", "tolerance": 0.1}, ValueError, r"tolerance: got 0.1 with attention="),
    (
        {"identity_init": True, "norm_layer": nn.InstanceNorm2d},
        ValueError,
        r"norm_layer: got one that makes InstanceNorm2d without a scale",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refusals(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        small(**options)


def test_refusals_of_sizes_and_images() -> None:
    with pytest.raises(ValueError, match=r"^heads: got 3 for dim=16; allowed is a divisor"):
        VisionTransformer(16, 2, 3)
    with pytest.raises(
        ValueError, match=r"^depth: got 1 with attention='ela'; allowed is at least"
    ):
        VisionTransformer(16, 1, 2, attention="ela")
    with pytest.raises(ValueError, match=r"^head_dim: got 5, for stages of 16 channels"):
        VisionTransformer(16, 2, 2, attention="ela", head_dim=5)
    model = small()
    for shape in ((3, 2, 16, 12), (3, 3, 12, 16), (2, 12, 16)):
        with pytest.raises(ValueError, match=r"^images: got shape .*allowed is \[B, 2, 12, 16\]"):
            model(torch.randn(shape))
    with pytest.raises(TypeError, match=r"^images: got list; allowed is a torch.Tensor"):
        model([1.0])


def test_the_training_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "train",
        "--side",
        "8",
        "--threads",
        "1",
        "--model",
        "vit_tiny",
        "--out",
        str(tmp_path),
    ]
    for more, message in (
        (["--patch-size", "3"], "img_size: got 8; allowed is"),
        (["--unfused", "--attention", "mrla"], "unfused: got --unfused for vit_tiny"),
        (["--block", "basic"], "block: got --block for vit_tiny"),
        (["--model", "resnet20", "--patch-size", "4"], "patch-size: got 4 for resnet20"),
    ):
        assert main([*common, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "patch"), [(8, 1), (16, 2), (28, 4), (32, 4), (64, 8), (224, 16), (29, 1), (4, 1)]
)
def test_patches_that_the_training_program_takes(side: int, patch: int) -> None:
    arguments = make_parser().parse_args(
        ["--model", "vit_tiny", "--side", str(side), "--attention", "mrla_light"]
    )
    task: Any = SimpleNamespace(classes=["a", "b"], channels=1)
    with torch.device("meta"):
        model = make_model(arguments, task)
    assert isinstance(model, VisionTransformer)
    assert model.grid == (side // patch, side // patch)
    assert model.attentions[0].kind == "mrla_light"


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.LayerNorm])
@pytest.mark.parametrize("kind", ["mrla", "concatenating", "mrla_light", "ela"])
def test_a_stage_on_tokens_is_the_stage_on_maps(kind: Any, norm: Any, backend: str) -> None:
    fused, name = kind != "concatenating", "mrla" if kind == "concatenating" else kind
    arguments = (name, 16, [0.0] * 3, 8, fused, "reuse")
    ours = StageAttention(*arguments, norm_layer=norm, prefix_tokens=2, grid=(3, 4))
    theirs = StageAttention(*arguments, norm_layer=norm)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 14, 16)
    got, want = x, x[:, 2:].unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    histories = ours.new_history(), theirs.new_history()
    for a, b in zip(ours, theirs, strict=True):
        got, want = a(got, histories[0]), b(want, histories[1])
    assert torch.equal(got[:, :2], x[:, :2])
    # The same numbers in another order of sums: the concatenating form copies the map.
    torch.testing.assert_close(got[:, 2:], want.flatten(2).transpose(1, 2))


def test_what_stands_for_the_layer_before_may_be_tokens() -> None:
    block = MRLALight(ek.LightLayerAttention(16, 8), 0.0, prefix_tokens=2, grid=(3, 4)).eval()
    x, before = torch.randn(2, 2, 14, 16)
    want = block(x, before[:, 2:].unflatten(1, (3, 4)).permute(0, 3, 1, 2))
    assert torch.equal(block(x, before), want)
    with pytest.raises(ValueError, match=r"^previous: got shape \[2, 13, 16\]; allowed is that of"):
        block(x, before[:, :13])


@pytest.mark.parametrize("attention", ["none", "mrla", "mrla_light", "ela"])
def test_exported_with_a_batch_of_any_size(attention: str) -> None:
    model = VisionTransformer(
        32, 4, 2, img_size=32, patch_size=8, num_classes=3, attention=attention, head_dim=16
    ).eval()
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=sizes)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["none", "mrla", "mrla_light", "ela"])
def test_traced_by_fx(attention: str) -> None:
    model = VisionTransformer(
        32, 4, 2, img_size=32, patch_size=8, num_classes=3, attention=attention, head_dim=16
    ).eval()
    traced = torch.fx.symbolic_trace(model)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", nn.BatchNorm2d(16), lambda dim: dim])
@pytest.mark.parametrize("kind", ["ela", "mrla", "mrla_light"])
def test_a_norm_that_is_none_is_refused_by_name(kind: Any, norm: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^norm_layer: got .*; allowed is a class or function .*number of ch"
    ):
        StageAttention(kind, 16, [0.0], 8, True, "reuse", norm_layer=norm)
