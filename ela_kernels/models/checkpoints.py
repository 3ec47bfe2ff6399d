"""Checkpoints of networks: the tensors that one holds, and their names here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

Source = Literal["auto", "torchvision", "timm", "mrla", "ela_kernels"]
SOURCES: tuple[str, ...] = get_args(Source)

_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".safetensors")
# Where training programs put the model's state in what they save.
_CONTAINERS = ("state_dict", "model")
# What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")

_STAGE = re.compile(r"(?:layer(?P<layer>[1-9]\d*)|stages\.(?P<stage>\d+))\.(?P<block>\d+)\.(.+)")
_ATTENTION = re.compile(r"mrla\.(?:mrla\.(?P<filter>W[qkv]\.weight)|(?P<decay>lambda_t))")


def read_tensors(given: object) -> dict[str, Tensor]:
    """The tensors of a file or of a state dict, by the names that they have there, without what wrappers put before.

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError: `path_or_state_dict` is none, or cannot be read.
    """
    if isinstance(given, (str, os.PathLike)):
        given = _read_file(os.fspath(given))
    if not isinstance(given, Mapping):
        raise TypeError(
            f"path_or_state_dict: got {type(given).__name__}; allowed is a path, a state dict, or a mapping that has "
            "one under 'state_dict' or 'model'. Of a module pass its state_dict()"
        )
    for key in _CONTAINERS:
        if isinstance(given.get(key), Mapping):
            given = given[key]
            break
    assert isinstance(given, Mapping)
    tensors = {name: _checked(name, value) for name, value in given.items()}
    if not tensors:
        raise ValueError(
            "path_or_state_dict: got one without tensors; allowed is the state dict of a network"
        )
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read_file(path: str | bytes) -> object:
    name = os.fsdecode(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"path_or_state_dict: got {name!r}; allowed are files that end in {', '.join(_SUFFIXES)}. Rename the file, "
            "or pass what is in it"
        )
    if not os.path.isfile(name):
        raise FileNotFoundError(
            f"path_or_state_dict: got {name!r}, and there is no such file; allowed is the path of one"
        )
    if suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(
                f"path_or_state_dict: got {name!r}, and the package safetensors, which reads it, is missing; allowed "
                "without it are files of torch.save. Install it: pip install 'ela-kernels[weights]'"
            ) from None
        read: Callable[[str], object] = load_file
    else:
        # Tensors and plain values alone: nothing in the file is executed.
        read = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        return read(name)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # What is no such file, or holds objects of other classes, raises nearly anything.
        raise ValueError(
            f"path_or_state_dict: got {name!r}, in which no plain values and tensors are found "
            f"({type(error).__name__}); allowed is a file that safetensors or torch.load(weights_only=True) reads. Of "
            "one that you trust and that holds objects of other classes, save the state dict alone"
        ) from error


def _checked(name: object, value: object) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise TypeError(
            f"path_or_state_dict: got {type(value).__name__} under {name!r}; allowed are names with a tensor each, or "
            "a mapping that has them under 'state_dict' or 'model'"
        )
    if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
        kind = "no memory (device meta)" if value.is_meta else f"{value.layout} {value.dtype}"
        raise ValueError(
            f"path_or_state_dict: got a tensor with {kind} under {name!r}; allowed are dense real ones with memory"
        )
    return value.detach()


def source_of(names: Mapping[str, object]) -> Source:
    """Whose names these are.

    Raises:
        ValueError: nobody's that is known.
    """
    if any(name.startswith(("stem.", "attentions.")) for name in names):
        return "ela_kernels"
    if any(".mrla.mrla." in name for name in names):
        return "mrla"
    if any(name.startswith("layer1.") for name in names):
        return "torchvision"
    if any(name.startswith("patch_embed.") for name in names):
        return "timm"
    raise ValueError(
        f"path_or_state_dict: got names as {', '.join(list(names)[:3])}; allowed are those of networks of "
        f"{', '.join(map(repr, SOURCES[1:]))}. Name the source if it is one of them"
    )


def names_here(names: Mapping[str, object], source: Source) -> dict[str, str]:
    """For each name of a checkpoint the one that the tensor has here, if a network here has it."""
    if source == "ela_kernels":
        return {name: name for name in names}
    # In a deep stem the last convolution is the seventh module, and its norm stands beside it.
    end = 7 if any(name.startswith("conv1.0.") for name in names) else 1
    return {name: _name_here(name, end, source == "mrla") for name in names}


def _name_here(name: str, end_of_stem: int, with_attention: bool) -> str:
    first, _, rest = name.partition(".")
    if first == "fc":
        return f"head.{rest}"
    if first == "bn1":
        return f"stem.{end_of_stem}.{rest}"
    if first == "conv1":
        return f"stem.{rest if end_of_stem > 1 else f'0.{rest}'}"
    match = _STAGE.fullmatch(name)
    if match is None:
        return name
    stage = int(match["layer"]) - 1 if match["layer"] else int(match["stage"])
    place, rest = f"{stage}.{match['block']}", match[4]
    if with_attention:
        attention = _ATTENTION.fullmatch(rest)
        if attention is not None:
            return f"attentions.{place}.attn.{attention['filter'] or attention['decay']}"
        if rest.startswith("bn_mrla."):
            return f"attentions.{place}.norm.{rest.removeprefix('bn_mrla.')}"
    return f"stages.{place}.{rest}"
