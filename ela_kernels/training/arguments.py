"""What the options of the training program make, and which of them go together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence, Sized
from dataclasses import fields
from typing import Any, Protocol

from torch import nn

from ela_kernels.command_line import nearest
from ela_kernels.ebqm.settings import REMOVED
from ela_kernels.models import build_model
from ela_kernels.training.data import SIDES, ClassTask
from ela_kernels.training.options import Options
from ela_kernels.training.parser import HELD, TASKS
from ela_kernels.training.recipe import Recipe

_OF_BLOCKS = ("resnet20", "resnet32", "resnet56", "resnet110")
# In height and width of the images of a vision transformer, where no size of the patches is given.
_LEAST_PATCHES = 7
# More threads than that only take memory, and systems refuse some tens of thousands by ending the process.
_MOST_THREADS = max(1024, os.cpu_count() or 1)


# Of the recipe what is for classifiers alone, besides the variation of images.
_OF_CLASSIFIERS = ("label_smoothing", "model_ema", "compile")


class AnyTask(Protocol):
    """What settings say of the images."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def train(self) -> Sized: ...


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse what no other check sees, by name; the usual model where none was given.

    Raises:
        ValueError: one does not fit.
    """
    if arguments.pretrained and arguments.task != "detection":
        raise ValueError(
            "pretrained: got it with --task classification; allowed is it with --task detection"
        )
    if arguments.resume and arguments.evaluate is not None:
        raise ValueError("evaluate: got both --evaluate and --resume; allowed is one of them")
    if arguments.dry_run and arguments.evaluate is not None:
        raise ValueError("evaluate: got both --evaluate and --dry-run; allowed is one of them")
    if arguments.data == "digits" and arguments.data_dir is not None:
        raise ValueError(
            f"data-dir: got {arguments.data_dir} with --data digits, which are bundled; allowed is it with other --data"
        )
    make_recipe(arguments)
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


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments describe.

    Raises:
        ValueError: one does not fit, or would do nothing.
    """
    given = {
        f.name: value for f in fields(Recipe) if (value := getattr(arguments, f.name)) is not None
    }
    for name, of, is_used in (
        ("ra_magnitude", "--auto-augment ra", arguments.auto_augment == "ra"),
        ("model_ema_decay", "--model-ema", arguments.model_ema),
        ("model_ema_steps", "--model-ema", arguments.model_ema),
        ("lr_warmup_decay", "--lr-warmup-epochs", arguments.lr_warmup_epochs != 0),
    ):
        if name in given and not is_used:
            raise ValueError(
                f"{_flag(name)}: got {given[name]} without {of}; allowed is it with that"
            )
    recipe = Recipe(**given)
    if arguments.task == "detection":
        for name in (*recipe.of_images, *_OF_CLASSIFIERS):
            if getattr(arguments, name):
                raise ValueError(
                    f"{_flag(name)}: got {getattr(arguments, name)!r} with --task detection; allowed is it with --task "
                    "classification"
                )
    return recipe


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
    of_data: dict[str, Any] = {"classes": len(task.classes), "images": len(task.train)}
    if arguments.data in ("cifar10", "cifar100", "folder"):
        # Runs of before torchvision read these cannot go on: they had other images.
        of_data["reading"] = "torchvision"
    if arguments.data in ("folder", "coco"):
        of_data["class_names"] = list(task.classes)
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
        augment=arguments.augment,
        channels_last=arguments.channels_last,
        ebqm=_ebqm_options(arguments),
        task={
            **{name: getattr(arguments, name) for name in kept},
            **of_data,
        },
        recipe=make_recipe(arguments),
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
            near = None if name in allowed else nearest(name, allowed)
            meant = "" if near is None else f" did you mean {near}?"
            raise ValueError(
                f"ebqm: got {pair!r};{meant} allowed is NAME=NUMBER with a name of {', '.join(allowed)}"
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


def make_model(arguments: argparse.Namespace, task: ClassTask) -> nn.Module:
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


def _flag(name: str) -> str:
    return name.replace("_", "-")
