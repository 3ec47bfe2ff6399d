"""The arguments of the training program, and what they make."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ela_kernels.ebqm.settings import REMOVED
from ela_kernels.models import MODELS, build_model
from ela_kernels.models.blocks import ATTENTIONS
from ela_kernels.modules.skipping import SKIP_MODES
from ela_kernels.training.data import DATA, SIDES, Task
from ela_kernels.training.options import AMP, OPTIMIZERS, SCHEDULES, Options

# Names of networks for each task, the one that is taken if none is given first.
USUAL_MODEL = "resnet56"
TASKS: dict[str, tuple[str, ...]] = {
    "classification": (USUAL_MODEL, *(name for name in MODELS if name != USUAL_MODEL)),
    "detection": ("fasterrcnn_small", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
}
_OF_BLOCKS = ("resnet20", "resnet32", "resnet56", "resnet110")
# In height and width of the images of a vision transformer, where no size of the patches is given.
_LEAST_PATCHES = 7
HELD = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# More threads than that only take memory, and systems refuse some tens of thousands by ending the process.
_MOST_THREADS = max(1024, os.cpu_count() or 1)


class AnyTask(Protocol):
    """What settings say of the images."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def train(self) -> Sized: ...


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ela_kernels train",
        description="Train a classifier or a detector with layer attention; under torchrun with one process a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="classification", help="detection needs torchvision")
    add(
        "--data",
        choices=(*DATA, "coco"),
        default="digits",
        help="digits are bundled with scikit-learn; coco is for detection",
    )
    add("--data-dir", type=Path, help="CIFAR's python pickles, or a folder with train/ and val/")
    add(
        "--side",
        "--image-size",
        type=int,
        help="height and width of the images; by the data if not given",
    )
    add(
        "--model",
        choices=tuple(name for names in TASKS.values() for name in names),
        help=f"{' and '.join(f'{names[0]} for {task}' for task, names in TASKS.items())} if not given",
    )
    add("--block", choices=("basic", "bottleneck"), help="of the small networks")
    add(
        "--patch-size",
        type=int,
        help="of vision transformers; if not given, up to 16 with at least 7 patches a side",
    )
    add(
        "--pretrained", action="store_true", help="detectors: torchvision's weights of the backbone"
    )
    add("--attention", choices=ATTENTIONS, default="ela")
    add("--unfused", action="store_true", help="mrla as published, concatenating")
    add("--head-dim", type=int, help="channels of a head")
    add("--drop-path", type=float, default=0.0)
    add("--skip", choices=SKIP_MODES, default="reuse", help="what is left out")
    add("--ebqm", nargs="*", metavar="NAME=NUMBER", help="e.g. warmup=500 quantile=0.8")
    add("--no-ebqm", action="store_true", help="ela without it: every layer retrieves")
    add("--history-dtype", choices=HELD, help="round and hold values of earlier layers so")
    add("--tolerance", type=float, default=0.0, help="leave out retrievals of a smaller weight")
    add("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64, help="images of a step, in each process")
    add("--lr", type=float, default=0.03)
    add("--optimizer", choices=OPTIMIZERS, default="sgd")
    add("--schedule", choices=SCHEDULES, default="one-cycle")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4)
    add("--no-augment", action="store_true", help="leave the training images as they are")
    add("--amp", choices=AMP, default="off")
    add("--channels-last", action="store_true", help="memory format of the model and its images")
    add("--workers", type=int, default=0, help="threads that read the next batches ahead")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/train"), help="folder for checkpoint and logs")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--save-every", type=int, default=1, metavar="EPOCHS", help="between checkpoints")
    add("--log-every", type=int, metavar="STEPS", help="also log means of so many, in steps.csv")
    add("--tensorboard", action="store_true", help="logs for TensorBoard besides log.csv")
    add("--threads", type=int, help="CPU threads; PyTorch's choice if not given")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse what no other check sees, by name; the usual model where none was given.

    Raises:
        ValueError: one does not fit.
    """
    if arguments.pretrained and arguments.task != "detection":
        raise ValueError(
            "pretrained: got it with --task classification; allowed is it with --task detection"
        )
    names = TASKS[arguments.task]
    if arguments.model is None:
        arguments.model = names[0]
    elif arguments.model not in names:
        raise ValueError(
            f"model: got {arguments.model!r} for --task {arguments.task}; allowed are {', '.join(names)}"
        )
    for name, least, most in (
        ("save_every", 1, None),
        ("log_every", 1, None),
        ("threads", 1, _MOST_THREADS),
        ("workers", 0, _MOST_THREADS),
    ):
        number = getattr(arguments, name)
        if number is not None and (number < least or (most is not None and number > most)):
            allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name.replace('_', '-')}: got {number}; allowed is an int {allowed}")


def make_options(arguments: argparse.Namespace, task: AnyTask) -> Options:
    kept = [
        "data",
        "side",
        "model",
        "block",
        "attention",
        "unfused",
        "head_dim",
        "drop_path",
        "skip",
        "checkpointing",
    ]
    if arguments.task != "classification":  # runs of before there was a choice go on without
        kept += ["task", "pretrained"]
    if arguments.history_dtype is not None:  # runs of before there was a choice go on without
        kept.append("history_dtype")
    if arguments.patch_size is not None:
        kept.append("patch_size")
    if arguments.tolerance:
        kept.append("tolerance")
    return Options(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        schedule=arguments.schedule,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
        amp=arguments.amp,
        seed=arguments.seed,
        augment=not arguments.no_augment,
        channels_last=arguments.channels_last,
        ebqm=_ebqm_options(arguments),
        task={
            **{name: getattr(arguments, name) for name in kept},
            "classes": len(task.classes),
            "images": len(task.train),
        },
    )


def _ebqm_options(arguments: argparse.Namespace) -> dict[str, float] | None:
    if arguments.no_ebqm:
        if arguments.ebqm is not None:
            raise ValueError("ebqm: got both --ebqm and --no-ebqm; allowed is one of them")
        return None
    if arguments.ebqm is not None and arguments.attention != "ela":
        raise ValueError(
            f"ebqm: got --ebqm with attention {arguments.attention!r}; allowed with 'ela' only"
        )
    return _ebqm_arguments(arguments.ebqm or [])


def _ebqm_arguments(pairs: Sequence[str]) -> dict[str, float]:
    allowed = {
        **dict.fromkeys(("max_row", "warmup", "interval", "probe_interval"), int),
        **dict.fromkeys(("low", "high", "quantile", "max_share", "smoothing"), float),
    }
    arguments: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name in REMOVED:
            raise ValueError(
                f"ebqm: got {pair!r}, but {name} is not there any more, since {REMOVED[name]}; allowed are "
                f"{', '.join(allowed)}"
            )
        if name in arguments:
            raise ValueError(f"ebqm: got {name} more than once; allowed is once")
        try:
            arguments[name] = allowed[name](number)
        except (KeyError, ValueError):
            raise ValueError(
                f"ebqm: got {pair!r}; allowed is NAME=NUMBER with a name of {', '.join(allowed)}"
            ) from None
    return arguments


def of_layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of layer attention, which all networks of this package take."""
    return {
        "attention": arguments.attention,
        "head_dim": arguments.head_dim,
        "drop_path": arguments.drop_path,
        "skip": arguments.skip,
        "checkpointing": arguments.checkpointing,
        "history_dtype": HELD.get(arguments.history_dtype),
        "tolerance": arguments.tolerance,
    }


def make_model(arguments: argparse.Namespace, task: Task) -> nn.Module:
    options: dict[str, Any] = {"num_classes": len(task.classes), "in_chans": task.channels}
    options |= of_layers(arguments)
    if arguments.model.startswith("vit_"):
        return build_model(arguments.model, **options, **_of_transformer(arguments))
    if arguments.patch_size is not None:
        raise ValueError(
            f"patch-size: got {arguments.patch_size} for {arguments.model}; allowed with vision transformers only"
        )
    options["fused"] = not arguments.unfused
    if arguments.block is not None:
        if arguments.model not in _OF_BLOCKS:
            raise ValueError(
                f"block: got {arguments.block!r} for {arguments.model}; allowed with resnet20/32/56/110 only"
            )
        options["block"] = arguments.block
    return build_model(arguments.model, **options)


def _of_transformer(arguments: argparse.Namespace) -> dict[str, int]:
    for name, is_given in (("block", arguments.block is not None), ("unfused", arguments.unfused)):
        if is_given:
            raise ValueError(
                f"{name}: got --{name} for {arguments.model}, which has no such thing; allowed with residual networks"
            )
    side = SIDES[arguments.data] if arguments.side is None else arguments.side
    patch = arguments.patch_size
    if patch is None:
        fitting = [n for n in (16, 8, 4, 2, 1) if side % n == 0 and side // n >= _LEAST_PATCHES]
        patch = fitting[0] if fitting else 1
    return {"img_size": side, "patch_size": patch}
