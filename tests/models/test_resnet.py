import copy

import pytest
import torch

import ela_kernels as ek
from ela_kernels.backends.extension import extension
from ela_kernels.models import (
    MODELS,
    CifarResNet,
    build_model,
    resnet20,
    resnet32,
    resnet50,
    resnet56,
    resnet101,
)
from ela_kernels.modules import ConcatLayerAttention, LayerAttention

ATTENTIONS = ["none", "mrla", "mrla_light", "ela"]
needs_kernels = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


def small(**options):
    torch.manual_seed(0)
    return CifarResNet((3, 2, 3), (8, 16, 16), "basic", head_dim=8, **options)


def images(dtype=torch.float32, side=12):
    torch.manual_seed(1)
    return torch.randn(4, 3, side, side, dtype=dtype)


def count(model):
    return sum(p.numel() for p in model.parameters())


# The published sizes of the plain networks: table 6 of the ResNet paper gives 0.27, 0.46 and 0.85 M with parameter-free
# shortcuts; the 1x1 shortcuts add 2.75 k. The ImageNet nets have the numbers that every ResNet library gives.
@pytest.mark.parametrize(
    ("make", "parameters"),
    [(resnet20, 272474), (resnet32, 466906), (resnet56, 855770)],
)
def test_parameters_of_the_small_networks(make, parameters):
    assert count(make()) == parameters


def test_parameters_of_the_large_networks():
    with torch.device("meta"):
        assert count(resnet50()) == 25557032
        assert count(resnet101()) == 44549160


@pytest.mark.parametrize("kind", ["mrla", "ela", "mrla_light"])
def test_attention_adds_its_parameters_and_no_others(kind):
    expected = 0
    for channels in [16] * 3 + [32] * 3 + [64] * 3:
        # two filters over the channel axis of size 3, a 3x3 filter and an affine norm for each channel
        size = LayerAttention(channels).Wq.weight.numel()
        expected += 2 * size + 9 * channels + 2 * channels
        expected += channels if kind == "mrla_light" else 0
    assert count(resnet20(attention=kind)) - count(resnet20()) == expected


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_shapes_of_all_models(name, attention):
    with torch.device("meta"):
        model = build_model(name, num_classes=7, attention=attention)
        sides = {"resnet50": 64, "resnet101": 64, "vit_tiny": 224, "vit_small": 224}
        side = sides.get(name, 32)
        scores = model(torch.randn(2, 3, side, side))
    assert scores.shape == (2, 7)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_features_only(attention):
    model = small(attention=attention, features_only=True)
    maps = model(images())
    assert [m.shape for m in maps] == [(4, 8, 12, 12), (4, 16, 6, 6), (4, 16, 3, 3)]
    assert model.num_features == 16
    assert not any(name.startswith("head") for name, _ in model.named_parameters())


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_of_a_training_step_gets_a_gradient(attention, block):
    torch.manual_seed(0)
    model = CifarResNet((2, 2), (8, 16), block, attention=attention, head_dim=8)
    torch.nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # With one pair held the first layer's weights are 1 whatever its query is.
    first_queries = [f"attentions.{i}.0.attn.Wq.weight" for i in range(2)]
    assert missing == ([] if attention in ("none", "mrla_light") else first_queries)


@needs_kernels
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_fused_and_concatenating_forms_are_equal(backend):
    """float64: the same sums in another order, through 8 blocks; 1e-9 leaves room for the norms' divisions."""
    fused = small(attention="mrla").double()
    published = small(attention="mrla", fused=False).double()
    assert any(isinstance(m, ConcatLayerAttention) for m in published.modules())
    published.load_state_dict(fused.state_dict())
    x = images(torch.float64)
    with ek.use_backend(backend):
        found = fused(x)
        found.square().sum().backward()
    expected = published(x)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for (name, p), q in zip(fused.named_parameters(), published.parameters(), strict=True):
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_convert_makes_the_fused_model():
    model = small(attention="mrla", fused=False).eval()
    x = images()
    with torch.no_grad():
        before = model(x)
        ek.convert(model)
        assert not any(isinstance(m, ConcatLayerAttention) for m in model.modules())
        # float32 sums of at most 8 maps in another order
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_an_mrla_checkpoint_loads_into_ela():
    mrla, ela = small(attention="mrla").eval(), small(attention="ela").eval()
    ela.load_state_dict(mrla.state_dict())
    with torch.no_grad():
        assert torch.equal(mrla(images()), ela(images()))


def test_state_dict_round_trip_keeps_skipped_layers():
    model, other = small(attention="ela").eval(), small(attention="ela").eval()
    model.attentions[0][1].skipped = True
    other.load_state_dict(model.state_dict())
    assert other.attentions[0][1].skipped
    with torch.no_grad():
        assert torch.equal(model(images()), other(images()))
        assert not torch.equal(model(images()), small(attention="ela").eval()(images()))


@pytest.mark.parametrize("skip", ["retrieval", "layer", "reuse"])
def test_skipping_and_pruning_in_a_network(skip):
    model = small(attention="ela", skip=skip).eval()
    for i, j in [(0, 1), (0, 2), (2, 1)]:
        model.attentions[i][j].skipped = True
    with torch.no_grad():
        before = model(images())
        pruned = ek.prune(copy.deepcopy(model))
        assert torch.equal(pruned(images()), before)
    assert count(pruned) < count(model)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_checkpointing_changes_no_gradient(attention):
    plain = small(attention=attention).double()
    saving = small(attention=attention, checkpointing=True).double()
    x = images(torch.float64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_channels_last_gives_the_same(attention):
    model = small(attention=attention).double().eval()
    x = images(torch.float64)
    with torch.no_grad():
        expected = model(x)
        found = model.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_drop_path_grows_linearly():
    model = small(attention="ela", drop_path=0.7)
    rates = [layer.drop_path.p for stage in model.attentions for layer in stage]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "mla"}, "attention: got 'mla'"),
        ({"block": "wide"}, "block: got 'wide'"),
        ({"attention": "ela", "fused": False}, "fused: got False"),
        ({"attention": "ela", "skip": "all"}, "skip: got 'all'"),
        ({"attention": "mrla", "fused": False, "checkpointing": True}, "checkpointing: got True"),
        ({"attention": "ela", "head_dim": 5}, "head_dim: got 5"),
        # What was given, not what a stage or a layer makes of it.
        (
            {"attention": "ela", "head_dim": 24},
            "head_dim: got 24, for stages of 16, 32, 64 channels",
        ),
        ({"attention": "ela", "drop_path": 2}, r"drop_path: got 2; allowed is a float in \[0, 1\]"),
        ({"drop_path": -0.5}, r"drop_path: got -0\.5"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"num_classes": 0}, "num_classes: got 0"),
        ({"in_chans": -1}, "in_chans: got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        resnet20(**options)


@pytest.mark.parametrize("skip", [False, True])
def test_maps_given_away_may_be_changed_in_place(skip):
    model = small(attention="ela", features_only=True)
    model.attentions[-1][-1].skipped = skip
    kept = []
    model.stages[-1][-1].register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    last = model(images())[-1]
    last.mul_(2.0)
    assert torch.equal(*kept[0])
    last.sum().backward()


@pytest.mark.parametrize("mode", ["retrieval", "layer", "reuse"])
@pytest.mark.parametrize("of", ["the layer", "its attention"])
@pytest.mark.parametrize("skip", [False, True])
def test_hooks_may_change_the_output_in_place(mode, of, skip):
    model = small(attention="ela", skip=mode)
    layer = model.attentions[0][1]
    layer.skipped = skip
    hooked = layer if of == "the layer" else layer.attn
    hooked.register_forward_hook(lambda _, __, out: out.mul_(2.0))
    model(images()).sum().backward()


def test_options_of_another_type_are_named():
    for options, message in (
        ({"head_dim": 16.0}, "head_dim: got float"),
        ({"drop_path": "0.1"}, "drop_path: got str"),
        ({"num_classes": "ten"}, "num_classes: got str"),
    ):
        with pytest.raises(TypeError, match=message):
            resnet20(**options)
    for blocks, widths in ((3, (16,)), ((1.0,), (16,)), ((1,), "16"), ((True,), (16,))):
        with pytest.raises(TypeError, match="blocks, widths: got"):
            CifarResNet(blocks, widths)
    with pytest.raises(
        ValueError, match="head_dim: got None, which is 16, for stages of 24 channels"
    ):
        CifarResNet((1,), (24,), attention="ela")
    assert (
        CifarResNet((1,), (24,), attention="ela", head_dim=48).attentions[0][0].attn.head_dim == 24
    )


def test_bad_names_are_named():
    with pytest.raises(ValueError, match="name: got 'resnet21'"):
        build_model("resnet21")
    with pytest.raises(ValueError, match="block: got 'bottleneck' for resnet32"):
        resnet32(block="bottleneck")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mrla", "mrla_light", "ela"])
def test_torch_compile(attention):
    model = small(attention=attention)
    x = images()
    expected = copy.deepcopy(model)(x)
    # float32: inductor fuses norms and activations in another order
    torch.testing.assert_close(torch.compile(model)(x), expected, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("attention", ["mrla", "ela"])
@pytest.mark.parametrize("variant", ["ours", "published"])
def test_history_dtype_reaches_every_stage(attention, variant, monkeypatch):
    """And every history holds what it says, also where blocks are recomputed."""
    made, leave = [], ek.LayerHistory._leave

    def watched(history, *args):
        made.append(history)
        leave(history, *args)

    monkeypatch.setattr(ek.LayerHistory, "_leave", watched)
    options = {"attention": attention, "variant": variant}
    gradients = []
    for checkpointing in (False, True):
        model = small(**options, history_dtype=torch.bfloat16, checkpointing=checkpointing)
        model(images()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        histories = {id(h): h for h in made}
        made.clear()
        assert len(histories) == 3
        for history, depth in zip(histories.values(), (3, 2, 3), strict=True):
            assert [v.dtype for v in history._now.pairs.values] == [torch.bfloat16] * depth
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    plain = small(**options).eval()
    plain.load_state_dict(model.state_dict())
    rounded = model.eval()(images())
    assert not torch.equal(plain(images()), rounded)
    # Values are off by up to 2**-9 each, and the branches that they make are a part of what is summed.
    torch.testing.assert_close(plain(images()), rounded, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": "mrla_light"}, "with attention='mrla_light', which has no LayerHistory"),
        ({"attention": "mrla", "fused": False}, "with attention='mrla' and fused=False, which has"),
    ],
)
def test_history_dtype_without_a_history(options, says):
    with pytest.raises(ValueError, match=says):
        small(**options, history_dtype=torch.bfloat16)
