"""load_weights: what is refused, by name, and that nothing is changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.published_networks import state_of
from support.refusals import assert_refused
from support.small_checkpoints import checkpoint, images, network, with_shape, without
from torch import nn

import ela_kernels as ek
from ela_kernels.models import load_weights

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


def test_what_does_not_fit_at_all_is_refused_where_not_strict() -> None:
    given = {"path_or_state_dict": {"layer1.9.bn1.weight": torch.ones(3)}, "strict": False}
    words = ("nothing of it fits the model", "layer1.9.bn1.weight")
    assert_refused_unchanged(network(), given, ValueError, "path_or_state_dict", *words)
