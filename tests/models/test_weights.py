"""load_weights: published checkpoints by renaming, what is reported, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.published_networks import PublishedNetwork, state_of, trained
from support.refusals import assert_refused
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.models import LoadedWeights, ResNet, build_model, load_weights, resnet20

BLOCKS, WIDTHS = (1, 2, 1, 1), (8, 8, 16, 16)
FORMS = {"mrla": "base", "mrla_light": "light", "ela": "base", "none": "none"}
# Of blocks by their stages; bottlenecks from the third on.
NETWORKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet26": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}


def network(attention: str = "none", classes: int = 5, **options: Any) -> ResNet:
    torch.manual_seed(7)
    options = {"variant": "published", **options}
    return ResNet(BLOCKS, WIDTHS, num_classes=classes, attention=attention, **options)


def checkpoint(attention: str = "none", **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    options = {"head_dim": 32 if attention == "mrla_light" else 16, **options}
    return state_of(trained(PublishedNetwork(FORMS[attention], BLOCKS, WIDTHS, **options)))


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 40, 40)


def assert_loaded(model: ResNet, report: LoadedWeights, state: Mapping[str, Tensor]) -> None:
    """Every tensor that was reported as loaded is in the model."""
    own = model.state_dict()
    assert report.loaded
    for mine, theirs in report.loaded.items():
        assert torch.equal(own[mine], state[theirs]), mine
    assert report.loaded.keys() | report.missing.keys() == {
        name for name in own if not name.endswith((".decision", "._extra_state"))
    }
    assert set(report.loaded.values()) | report.left.keys() == state.keys()


# The numbers of tensors are those of torchvision's and timm's state dicts.
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("resnet18", 122),
        ("resnet34", 218),
        ("resnet26", 176),
        ("resnet50", 320),
        ("resnet101", 626),
    ],
)
@pytest.mark.parametrize("source", ["auto", "torchvision", "timm"])
def test_plain_networks_load_whole(name: str, tensors: int, source: str) -> None:
    basic = name in ("resnet18", "resnet34")
    # By their names and shapes alone: one number stands for each tensor.
    with torch.device("meta"):
        theirs = PublishedNetwork(
            "none", NETWORKS[name], (64, 128, 256, 512), basic=basic, classes=1000
        )
    state = {n: torch.full((), 0.5).expand(t.shape) for n, t in theirs.state_dict().items()}
    state = {n: t.long() if n.endswith("tracked") else t for n, t in state.items()}
    model = build_model(name, attention="mrla_light")
    report = load_weights(model, state, source=source)
    assert len(report.loaded) == tensors == len(state)
    assert report.left == {}
    assert set(report.missing.values()) == {"the checkpoint has no attention"}
    assert str(report).startswith(f"{tensors} of {tensors} tensors loaded")
    assert all((p == 0.5).all() for p in (*model.stem.parameters(), *model.stages.parameters()))


@pytest.mark.parametrize("attention", list(FORMS))
def test_what_is_loaded_is_in_the_model(attention: str) -> None:
    state, model = checkpoint(attention), network(attention)
    report = load_weights(model, state)
    assert_loaded(model, report, state)
    assert report.source == ("torchvision" if attention == "none" else "mrla")
    assert report.missing == report.left == {}
    assert len(report.notes) == (attention != "none")
    assert all("head_dim" in note for note in report.notes)


def test_a_plain_network_loads_into_one_with_attention() -> None:
    state, model = checkpoint(), network("mrla", variant="ours", identity_init=True)
    before = {name: t.clone() for name, t in model.attentions.state_dict().items()}
    report = load_weights(model, state)
    assert_loaded(model, report, state)
    assert {name.split(".")[0] for name in report.missing} == {"attentions"}
    assert all(torch.equal(t, before[name]) for name, t in model.attentions.state_dict().items())
    plain = network(variant="ours")
    load_weights(plain, state)
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), plain.eval()(images()))


def test_a_classifier_of_another_size_is_left() -> None:
    state, model = checkpoint("mrla"), network("mrla", classes=3)
    before = {name: p.clone() for name, p in model.head.named_parameters()}
    report = load_weights(model, state)
    assert_loaded(model, report, state)
    reason = "a classifier of another number of classes"
    assert report.left == {"fc.weight": reason, "fc.bias": reason}
    assert report.missing == {"head.weight": reason, "head.bias": reason}
    assert all(torch.equal(p, before[name]) for name, p in model.head.named_parameters())
    assert f"left: 2 ({reason}): fc.weight, fc.bias" in str(report)


def test_a_checkpoint_without_a_classifier() -> None:
    state, model = without(checkpoint("mrla"), "fc.weight", "fc.bias"), network("mrla")
    report = load_weights(model, state)
    assert_loaded(model, report, state)
    reason = "the checkpoint has no classifier"
    assert report.missing == {"head.weight": reason, "head.bias": reason}


def test_a_model_without_a_classifier_leaves_it() -> None:
    model = network("mrla", features_only=True)
    report = load_weights(model, checkpoint("mrla"))
    assert set(report.left) == {"fc.weight", "fc.bias"}
    assert report.missing == {}


def test_checkpoints_from_before_batches_were_counted() -> None:
    state = {n: t for n, t in checkpoint().items() if not n.endswith("num_batches_tracked")}
    model = network()
    report = load_weights(model, state)
    assert report.missing
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert_loaded(model, report, state)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: {f"module.{n}": t for n, t in s.items()},
        lambda s: {f"_orig_mod.module.{n}": t for n, t in s.items()},
        lambda s: {"epoch": 3, "arch": "resnet50_mrlab", "state_dict": s, "optimizer": {}},
        lambda s: {"model": {f"module.{n}": t for n, t in s.items()}, "epoch": 3},
    ],
)
def test_wrapped_states(wrapped: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    state, model = checkpoint("mrla"), network("mrla")
    report = load_weights(model, wrapped(state))
    assert_loaded(model, report, state)


def test_states_of_this_package() -> None:
    """From the training program too: under "model", with decisions to skip."""
    trained_model = network("ela")
    trained_model.attentions[1][1].skipped = True
    state = state_of(trained_model)
    model = network("ela", classes=3)
    report = load_weights(model, {"options": {}, "model": state})
    assert report.source == "ela_kernels"
    assert set(report.missing) == {"head.weight", "head.bias"}
    assert model.attentions[1][1].skipped
    assert not model.attentions[1][0].skipped
    # Of the base form they load into layers that can be skipped, and are not.
    report = load_weights(model, state_of(network("mrla", classes=3)))
    assert report.missing == {}
    assert not model.attentions[1][1].skipped


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin"])
@pytest.mark.parametrize("old", [False, True])
def test_files_of_pytorch(suffix: str, old: bool, tmp_path: Path) -> None:
    state, model = checkpoint("mrla_light"), network("mrla_light")
    path = tmp_path / f"model{suffix}"
    content = {"epoch": 3, "arch": "resnet50_mrlal", "state_dict": state, "best": torch.tensor(1.0)}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    report = load_weights(model, str(path) if old else path)
    assert_loaded(model, report, state)


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """By the format: the length of a header, the header with every tensor's place, the bytes."""
    names = {torch.float32: "F32", torch.int64: "I64"}
    header, content = {}, b""
    for name, tensor in state.items():
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        place = [len(content), len(content) + len(raw)]
        shape = list(tensor.shape)
        header[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": place}
        content += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def test_files_of_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    torch.manual_seed(3)
    theirs = trained(PublishedNetwork("none", (1, 1, 1), (4, 8, 8), basic=True, small=True))
    state = state_of(theirs)
    model = ResNet((1, 1, 1), (4, 8, 8), "basic", num_classes=5, stem="small")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, state)
    report = load_weights(model, path)
    assert_loaded(model, report, state)
    assert len(report.loaded) == len(state)


def test_files_of_safetensors_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    arguments = {"model": network(), "path_or_state_dict": path}
    words = ("safetensors", "pip install 'ela-kernels[weights]'")
    assert_refused(load_weights, arguments, ImportError, "path_or_state_dict", *words)


class Holder:
    """What no file may make on being read."""

    made = 0

    def __init__(self) -> None:
        Holder.made += 1

    def __reduce__(self) -> Any:
        return Holder, ()


@pytest.mark.parametrize("what", ["an object", "text", "nothing", "no safetensors"])
def test_files_that_cannot_be_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / ("model.safetensors" if what == "no safetensors" else "model.pth")
    if what == "no safetensors":
        pytest.importorskip("safetensors")
    if what == "an object":
        torch.save({"state_dict": checkpoint(), "args": Holder()}, path)
    else:
        path.write_bytes(b"" if what == "nothing" else b"not a checkpoint")
    made = Holder.made
    arguments = {"model": network(), "path_or_state_dict": path}
    words = (str(path), "weights_only=True", "state dict alone")
    assert_refused(load_weights, arguments, ValueError, "path_or_state_dict", *words)
    assert Holder.made == made


def without(state: dict[str, Tensor], *ends: str) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if not name.endswith(ends)}


def with_shape(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**state, name: torch.zeros(3, 3)}


MRLA, LIGHT = checkpoint("mrla"), checkpoint("mrla_light")
REFUSED: dict[str, tuple[dict[str, Any], Any, type[Exception], str, tuple[str, ...]]] = {
    # model's options, path_or_state_dict, error, argument, words
    "no path": ({}, 3, TypeError, "path_or_state_dict", ("int", "state dict")),
    "a module": ({}, nn.Linear(2, 2), TypeError, "path_or_state_dict", ("Linear", "state_dict()")),
    "a list in it": ({}, {"a": [1]}, TypeError, "path_or_state_dict", ("list", "'a'")),
    "a number for a name": ({}, {1: MRLA["fc.bias"]}, TypeError, "path_or_state_dict", ("1",)),
    "nothing": ({}, {"state_dict": {}}, ValueError, "path_or_state_dict", ("without tensors",)),
    "no file": ({}, "no/such.pth", FileNotFoundError, "path_or_state_dict", ("no/such.pth",)),
    "another suffix": ({}, "a.ckpt", ValueError, "path_or_state_dict", ("a.ckpt", ".safetensors")),
    "other names": (
        {},
        {"blocks.0.attn.weight": torch.ones(2)},
        ValueError,
        "path_or_state_dict",
        ("blocks.0.attn.weight", "'torchvision'"),
    ),
    "names of two kinds": (
        {"attention": "mrla"},
        {**MRLA, "stages.0.0.bn1.weight": torch.ones(8), "layer1.0.bn1.weight": torch.ones(8)},
        ValueError,
        "path_or_state_dict",
        ("two tensors for one place",),
    ),
    "no memory": (
        {},
        {"conv1.weight": torch.ones(2, device="meta")},
        ValueError,
        "path_or_state_dict",
        ("device meta", "conv1.weight"),
    ),
    "sparse": (
        {},
        {"conv1.weight": torch.ones(2, 2).to_sparse()},
        ValueError,
        "path_or_state_dict",
        ("sparse", "conv1.weight"),
    ),
    "complex": (
        {},
        {"conv1.weight": torch.ones(2, dtype=torch.complex64)},
        ValueError,
        "path_or_state_dict",
        ("complex64", "conv1.weight"),
    ),
    "another shape": (
        {"attention": "mrla"},
        with_shape(MRLA, "stages.1.0.conv2.weight"),
        ValueError,
        "path_or_state_dict",
        ("1 (of another shape): stages.1.0.conv2.weight ([3, 3] for [8, 8, 3, 3])", "strict=False"),
    ),
    "integers": (
        {"attention": "mrla"},
        {**MRLA, "bn1.weight": torch.ones(64, dtype=torch.int8)},
        ValueError,
        "path_or_state_dict",
        ("(of another kind of number): bn1.weight (torch.int8 for torch.float32)",),
    ),
    "a classifier of another network": (
        {"attention": "mrla"},
        {**MRLA, "fc.weight": torch.ones(3, 7), "fc.bias": torch.ones(3)},
        ValueError,
        "path_or_state_dict",
        ("(of another shape): fc.weight ([3, 7] for [5, 64])",),
    ),
    "half a classifier": (
        {"attention": "mrla"},
        without(MRLA, "fc.bias"),
        ValueError,
        "path_or_state_dict",
        ("1 (the checkpoint has no such tensor): head.bias",),
    ),
    "tensors without a place": (
        {"attention": "mrla"},
        {**MRLA, "stages.0.0.se.fc1.weight": torch.ones(2)},
        ValueError,
        "path_or_state_dict",
        ("(the model has no such tensor): stages.0.0.se.fc1.weight",),
    ),
    "a tensor that is missing": (
        {"attention": "mrla"},
        without(MRLA, "stages.0.0.conv2.weight"),
        ValueError,
        "path_or_state_dict",
        ("1 (the checkpoint has no such tensor): stages.0.0.conv2.weight",),
    ),
    "a part of the attention that is missing": (
        {"attention": "mrla"},
        without(MRLA, "stages.1.1.bn_mrla.bias"),
        ValueError,
        "path_or_state_dict",
        ("1 (the checkpoint has no such tensor): attentions.1.1.norm.bias",),
    ),
    "attention in a plain network": (
        {"stem": "deep"},
        MRLA,
        ValueError,
        "path_or_state_dict",
        ("(the model has no such tensor): stages.0.0.mrla.mrla.Wq.weight",),
    ),
    "a deep stem": (
        {"attention": "mrla", "stem": "imagenet"},
        MRLA,
        ValueError,
        "path_or_state_dict",
        ("conv1.3.weight", "with stem='deep'"),
    ),
    "no deep stem": (
        {"attention": "mrla"},
        checkpoint(),
        ValueError,
        "path_or_state_dict",
        ("conv1.weight|stem.0.weight", "with stem='imagenet'"),
    ),
    "the light form in the base form": (
        {"attention": "mrla", "stem": "imagenet"},
        LIGHT,
        ValueError,
        "path_or_state_dict",
        ("the base form", "attention='mrla_light'", "lambda_t"),
    ),
    "the base form in the light form": (
        {"attention": "mrla_light", "stem": "deep"},
        MRLA,
        ValueError,
        "path_or_state_dict",
        ("the light form", "attention='mrla' or 'ela'"),
    ),
    "the published light form in ours": (
        {"attention": "mrla_light", "variant": "ours", "head_dim": 32},
        LIGHT,
        ValueError,
        "path_or_state_dict",
        ("light form is not the published one", "variant='published'"),
    ),
    "other heads": (
        {"attention": "mrla_light", "head_dim": 16},
        LIGHT,
        ValueError,
        "path_or_state_dict",
        ("head_dim=16 for 32 channels", "has 32"),
    ),
    "other heads of the base form": (
        {"attention": "mrla", "head_dim": 32},
        MRLA,
        ValueError,
        "path_or_state_dict",
        ("head_dim=32 for 32 channels", "has 1 or 16"),
    ),
    "no ReLU where one was published": (
        {"attention": "ela", "identity_init": True},
        MRLA,
        ValueError,
        "path_or_state_dict",
        ("Identity after the norm", "a ReLU", "without identity_init"),
    ),
    "layers that are skipped in layers that are not": (
        {"attention": "mrla"},
        network("ela").state_dict(),
        ValueError,
        "path_or_state_dict",
        ("the model has no such tensor", "attentions.0.0.decision"),
    ),
}


def assert_refused_unchanged(
    model: nn.Module, arguments: dict[str, Any], error: type[Exception], name: str, *words: str
) -> None:
    before = state_of(model)
    assert_refused(load_weights, {"model": model, **arguments}, error, name, *words)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("case", list(REFUSED))
def test_refusals_change_nothing(case: str) -> None:
    options, given, error, name, words = REFUSED[case]
    model = network(**options)
    assert_refused_unchanged(model, {"path_or_state_dict": given}, error, name, *words)


def test_other_arguments_that_are_refused() -> None:
    model, state = network(), checkpoint()
    refused = assert_refused_unchanged
    given = {"path_or_state_dict": state}
    refused(nn.DataParallel(model), given, TypeError, "model", "DataParallel", "model.module")
    with torch.device("meta"):
        empty = network()
    arguments = {"model": empty, "path_or_state_dict": state}
    assert_refused(load_weights, arguments, ValueError, "model", "meta", "to_empty")
    refused(model, {**given, "source": "keras"}, ValueError, "source", "'keras'", "'torchvision'")
    refused(model, {**given, "strict": 1}, TypeError, "strict", "int", "bool")
    pruned = network("ela")
    pruned(images())
    pruned.attentions[1][1].skipped = True
    given = {"path_or_state_dict": ek.prune(pruned).state_dict(), "strict": False}
    refused(network("ela"), given, ValueError, "path_or_state_dict", "pruned", "load_state_dict")


def test_the_source_is_what_was_named() -> None:
    """Names of attention are those of no plain network."""
    given = {"path_or_state_dict": MRLA, "source": "torchvision"}
    words = ("names of torchvision", "stages.0.0.mrla.mrla.Wq.weight")
    assert_refused_unchanged(network("mrla"), given, ValueError, "path_or_state_dict", *words)


def test_what_fits_is_loaded_where_not_strict() -> None:
    model = network("mrla", head_dim=8)
    state = with_shape(without(MRLA, "bn1.bias"), "stages.1.0.conv2.weight")
    before = state_of(model)
    report = load_weights(model, {**state, "extra": torch.ones(2)}, strict=False)
    assert_loaded(model, report, {**state, "extra": torch.ones(2)})
    shapes = "of another shape: [3, 3] for [8, 8, 3, 3]"
    assert report.left == {
        "stages.1.0.conv2.weight": shapes,
        "extra": "the model has no such tensor",
    }
    assert report.missing.pop("stages.1.0.conv2.weight") == shapes
    assert set(report.missing.values()) == {"the checkpoint has no such tensor"}
    assert all(name.endswith(("bn1.bias", "stem.7.bias")) for name in report.missing)
    for name in (*report.missing, "stages.1.0.conv2.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert "computes something else" in report.notes[1]
    assert "head_dim=8" in report.notes[1]
    assert "stages.1.0.conv2.weight ([3, 3] for [8, 8, 3, 3])" in str(report)


def test_what_does_not_fit_at_all_is_refused_where_not_strict() -> None:
    given = {"path_or_state_dict": {"layer1.9.bn1.weight": torch.ones(3)}, "strict": False}
    words = ("nothing of it fits the model", "layer1.9.bn1.weight")
    assert_refused_unchanged(network(), given, ValueError, "path_or_state_dict", *words)


def test_small_networks_take_either_published_head() -> None:
    blocks, widths = (1, 1, 1), (16, 16, 32)
    theirs = PublishedNetwork("light", blocks, widths, 16, small=True, classes=10)
    options = {"stem": "small", "num_classes": 10, "attention": "mrla_light"}
    for head_dim in (16, 32):
        model = ResNet(blocks, widths, variant="published", head_dim=head_dim, **options)
        (note,) = load_weights(model, state_of(theirs)).notes
        assert f"head_dim, {head_dim} in the model" in note
    model = ResNet(blocks, widths, variant="published", head_dim=8, **options)
    with pytest.raises(ValueError, match="head_dim=8 for 64 channels"):
        load_weights(model, state_of(theirs))


def test_half_precision_is_loaded_in_the_dtype_of_the_model() -> None:
    model = resnet20()
    state = {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    other = resnet20()
    load_weights(other, state)
    assert all(p.dtype == torch.float32 for p in other.parameters())
    assert torch.equal(other.stem[0].weight, state["stem.0.weight"].float())
