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
from support.small_checkpoints import (
    FORMS,
    assert_loaded,
    checkpoint,
    images,
    network,
    with_shape,
    without,
)
from torch import Tensor

from ela_kernels.models import ResNet, build_model, load_weights, resnet20

# Of blocks by their stages; bottlenecks from the third on.
NETWORKS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet26": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}


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


def test_what_fits_is_loaded_where_not_strict() -> None:
    model = network("mrla", head_dim=8)
    state = with_shape(without(checkpoint("mrla"), "bn1.bias"), "stages.1.0.conv2.weight")
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
