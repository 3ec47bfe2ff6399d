"""Weights of published checkpoints, loaded into the networks here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ela_kernels.models.checkpoints import SOURCES, Source, names_here, read_tensors, source_of
from ela_kernels.models.fidelity import difference_from_published, is_light, note_on_options
from ela_kernels.models.resnet import ResNet
from ela_kernels.models.vit import VisionTransformer

_MOST_NAMES = 6  # in a message, of one kind


@dataclass(frozen=True)
class LoadedWeights:
    """What :func:`load_weights` did; printed as a few lines.

    Attributes:
        source: whose names the checkpoint has.
        loaded: name of each tensor of the model that was loaded, to its name in the checkpoint.
        missing: name of each tensor of the model that stayed as it was, to the reason.
        left: name of each tensor of the checkpoint that was not taken, to the reason.
        notes: what no checkpoint says, and has to be right for the model to compute what was trained.
    """

    source: Source
    loaded: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.left)
        lines = [f"{len(self.loaded)} of {total} tensors loaded, named as in {self.source}"]
        for title, found in (("missing", self.missing), ("left", self.left)):
            lines += [f"{title}: {group}" for group in _grouped(found)]
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))


def load_weights(
    model: ResNet | VisionTransformer,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    source: Source = "auto",
    strict: bool = True,
) -> LoadedWeights:
    """Load a published checkpoint into a network, in place; names are translated, numbers copied.

    Equivalent PyTorch: `model.load_state_dict({name_here(name): tensor for name, tensor in state.items()})`.

    What need not fit: attention layers stay as they are where the checkpoint has no attention at all, and so does the
    classifier where it has none, or one of another number of classes. Everything else has to, unless `strict` is False.
    Nothing is changed where anything is refused. Networks whose names and shapes are the same and that compute
    something else cannot be told, but for the attention of MRLA.

    Args:
        model: a :class:`ResNet` or :class:`VisionTransformer`. Of a wrapped one what is inside, as `model.module`.
        path_or_state_dict: a file of `torch.save` (`.pth`, `.pt`, `.tar`, `.bin`; read with `weights_only=True`) or
            `.safetensors` (which needs the package safetensors), or what is in one: tensors by name, or a mapping that
            has them under `"state_dict"` or `"model"`. `module.` and `_orig_mod.` before all names are taken off.
        source: whose names they are. `"torchvision"` and `"timm"`: plain residual networks, which have the same;
            `"timm"` also plain vision transformers, which are named here as there.
            `"mrla"`: the networks of MRLA with attention, and their copies in DLA and KCLA for small images.
            `"ela_kernels"`: those of this package, from a run of its training program too. `"auto"` looks at the names.
        strict: False loads whatever has its name and shape in the model, and reports the rest.

    Returns:
        What was loaded, missing and left.

    Raises:
        TypeError: an argument of another type.
        ValueError: tensors of another shape, without a place in the model, or missing; a model that would compute
            something else with the weights than the network that they are from; a file that cannot be read.
        FileNotFoundError, ImportError: there is no such file; the package that reads it is missing.

    Example:
        >>> import torch
        >>> from ela_kernels.models import load_weights, resnet20
        >>> trained = resnet20(num_classes=100).state_dict()
        >>> model = resnet20(num_classes=10, attention="mrla", identity_init=True)
        >>> report = load_weights(model, trained)
        >>> sorted(report.left)
        ['head.bias', 'head.weight']
    """
    if not isinstance(model, (ResNet, VisionTransformer)):
        raise TypeError(
            f"model: got {type(model).__name__}; allowed is a ResNet or a VisionTransformer of ela_kernels.models. "
            "Of a wrapped one pass what is inside, as model.module"
        )
    if source not in SOURCES:
        raise ValueError(f"source: got {source!r}; allowed are {', '.join(map(repr, SOURCES))}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict: got {type(strict).__name__}; allowed is a bool")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "model: got tensors without memory (device meta); allowed is a model with memory. Call "
            "model.to_empty(device=...) first, and initialise what the checkpoint does not have"
        )
    tensors = read_tensors(path_or_state_dict)
    found: Source = source_of(tensors) if source == "auto" else source
    if isinstance(model, VisionTransformer) and found in ("mrla", "torchvision"):
        raise ValueError(
            f"source: got a checkpoint with the names of {found} for a VisionTransformer; allowed are 'timm' and "
            "'ela_kernels', whose transformers have the names of this one"
        )
    here = names_here(tensors, found)
    there = {mine: theirs for theirs, mine in here.items()}
    if len(there) < len(here):
        raise ValueError(
            "path_or_state_dict: got two tensors for one place, under names of two kinds; allowed is one checkpoint"
        )
    if _is_pruned(tensors):
        raise ValueError(
            "path_or_state_dict: got the state of a model with pruned layers; allowed is that of one without. "
            "model.load_state_dict takes it, and prunes the model"
        )
    report = _compared(model, tensors, there, found)
    difference, notes = None, []
    if any(name.startswith("attentions.") for name in report.loaded):
        notes.append(note_on_options(model))
        if found == "mrla":
            assert isinstance(model, ResNet)
            difference = difference_from_published(model, is_light(there))
    problems = _problems(report, there) if strict else []
    if difference is not None and strict:
        problems.append(difference)
    elif difference is not None:
        notes.append(f"the model computes something else than the published one: {difference}")
    if not report.loaded:
        problems.append(f"nothing of it fits the model: {_listed(tensors)}")
    if problems:
        raise ValueError(
            f"path_or_state_dict: got a checkpoint with the names of {found}, of which nothing was loaded: "
            f"{'; '.join(problems)}; allowed is one of the same network{_advice(report)}. strict=False loads what fits"
        )
    state = {mine: tensors[theirs] for mine, theirs in report.loaded.items()}
    model.load_state_dict(state, strict=False)
    return replace(report, notes=tuple(notes))


# Reasons. Of a shape the two shapes follow.
_OTHER_SHAPE = "of another shape"
_OTHER_KIND = "of another kind of number"
_NO_PLACE = "the model has no such tensor"
_NOT_THERE = "the checkpoint has no such tensor"
_NO_ATTENTION = "the checkpoint has no attention"
_NOT_COUNTED = "the checkpoint did not count batches"
_NO_CLASSIFIER = "the model gives feature maps, and has no classifier"
_CLASSES = "a classifier of another number of classes"
_CLASSES_UNKNOWN = "the checkpoint has no classifier"
_ALLOWED = (_NO_ATTENTION, _NOT_COUNTED, _NO_CLASSIFIER, _CLASSES, _CLASSES_UNKNOWN)

_CLASSIFIER = ("head.weight", "head.bias")


def _compared(
    model: ResNet | VisionTransformer,
    tensors: dict[str, Tensor],
    there: dict[str, str],
    source: Source,
) -> LoadedWeights:
    """What would be loaded, and why the rest would not."""
    state = model.state_dict()
    reasons = {
        mine: _reason_against(mine, tensors[theirs], state[mine])
        for mine, theirs in there.items()
        if mine in state
    }
    against = [name for name in _CLASSIFIER if reasons.get(name) is not None]
    if against and all(_has_other_classes(tensors[there[n]], state[n]) for n in against):
        reasons.update({name: _CLASSES for name in _CLASSIFIER if name in reasons})
    left = {}
    for mine, theirs in there.items():
        no_place = _NO_CLASSIFIER if mine in _CLASSIFIER and model.head is None else _NO_PLACE
        reason = reasons.get(mine) if mine in state else no_place
        if reason is not None:
            left[theirs] = reason
    has_attention = any(name.startswith("attentions.") for name in there)
    missing = {}
    for mine in state:
        reason = reasons.get(mine, _NOT_THERE)
        if mine not in there:
            if mine.endswith((".decision", "._extra_state")):
                continue  # of a layer that can be skipped: where nothing is said, it is not
            if mine.startswith("attentions.") and not has_attention:
                reason = _NO_ATTENTION
            elif mine in _CLASSIFIER and not any(name in there for name in _CLASSIFIER):
                reason = _CLASSES_UNKNOWN
            elif mine.endswith(".num_batches_tracked"):
                reason = _NOT_COUNTED
        if reason is not None:
            missing[mine] = reason
    loaded = {mine: there[mine] for mine in state if mine not in missing and mine in there}
    return LoadedWeights(source, loaded, missing, left)


def _has_other_classes(given: Tensor, mine: Tensor) -> bool:
    """Of a classifier's weight or bias: whether the number of rows is all that differs."""
    return given.shape != mine.shape and given.shape[1:] == mine.shape[1:]


def _reason_against(name: str, given: Tensor, mine: Tensor) -> str | None:
    if name.endswith("._extra_state"):
        return None  # it grows, and reads what is older
    if given.shape != mine.shape:
        return f"{_OTHER_SHAPE}: {list(given.shape)} for {list(mine.shape)}"
    if given.is_floating_point() != mine.is_floating_point():
        return f"{_OTHER_KIND}: {given.dtype} for {mine.dtype}"
    return None


def _problems(report: LoadedWeights, there: Mapping[str, str]) -> list[str]:
    """What a strict load refuses, each kind with its names."""
    # A tensor that is in both is named once, as the checkpoint has it.
    missing = {name: reason for name, reason in report.missing.items() if name not in there}
    found = {**report.left, **missing}
    return _grouped({name: reason for name, reason in found.items() if reason not in _ALLOWED})


def _advice(report: LoadedWeights) -> str:
    """What the model would have to be built with, where the names tell."""
    if any(name.startswith("conv1.0.") for name in report.left):
        return ", with stem='deep'"
    if any(name == "pos_embed" for name in report.left):
        return ", with the img_size and patch_size that it was trained with"
    if any(name.startswith("stem.7.") for name in report.missing):
        return ", with stem='imagenet', or 'small' for small images"
    return ""


def _is_pruned(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a layer was pruned, by what layers that can be skipped say beside their parameters."""
    return any(name.endswith("._extra_state") and bool(t[3:4].any()) for name, t in tensors.items())


def _grouped(found: Mapping[str, str]) -> list[str]:
    """Names by their reasons; what follows a reason's colon is said beside each name."""
    groups: dict[str, list[str]] = {}
    for name, reason in found.items():
        kind, _, detail = reason.partition(": ")
        groups.setdefault(kind, []).append(f"{name} ({detail})" if detail else name)
    return [f"{len(names)} ({kind}): {_listed(names)}" for kind, names in groups.items()]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
