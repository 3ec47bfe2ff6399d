"""The options of the training program, as they stand on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ela_kernels.models import MODELS
from ela_kernels.models.blocks import ATTENTIONS
from ela_kernels.modules.skipping import SKIP_MODES
from ela_kernels.training.data import DATA
from ela_kernels.training.options import AMP, OPTIMIZERS, SCHEDULES
from ela_kernels.training.recipe import AUTO_AUGMENT

# Names of networks for each task, the one that is taken if none is given first.
USUAL_MODEL = "resnet56"
TASKS: dict[str, tuple[str, ...]] = {
    "classification": (USUAL_MODEL, *(name for name in MODELS if name != USUAL_MODEL)),
    "detection": ("fasterrcnn_small", "fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
}
HELD = {"bfloat16": torch.bfloat16, "float16": torch.float16}


_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


class Parser(argparse.ArgumentParser):
    """As :class:`argparse.ArgumentParser`; it knows its options by name, for files that hold them.

    Attributes:
        options: an option's action by its name, with dashes.
    """

    def __init__(self, **arguments: Any) -> None:
        self.options: dict[str, argparse.Action] = {}
        super().__init__(**arguments)

    def group(self, title: str) -> Callable[..., None]:
        """A function that adds options to a group: as `add_argument`, with the default in the help where it has one."""
        add_argument = self.add_argument_group(title).add_argument

        def add(*names: str, **arguments: Any) -> None:
            text, default = arguments.pop("help", ""), arguments.get("default")
            if default is not None and not isinstance(default, bool):
                text = f"{text} ({default})" if text else f"({default})"
            if "metavar" not in arguments and arguments.get("type") in _METAVARS:
                arguments["metavar"] = _METAVARS[arguments["type"]]
            action = add_argument(*names, **arguments)
            # Set here, since some releases of Python add the default to a switch's help by themselves.
            action.help = text
            self.options |= {n[2:]: action for n in names}

        return add


def _switch(default: bool = False) -> dict[str, Any]:
    """An option that can be turned on, and off again where a file turns it on."""
    return {"action": argparse.BooleanOptionalAction, "default": default}


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m ela_kernels train",
        usage="%(prog)s [options]",
        description="Train a classifier or a detector with layer attention; under torchrun with one process a GPU.",
        epilog="What stands in brackets is taken if nothing is given.",
    )
    add = parser.group("data")
    add("--task", choices=TASKS, default="classification", help="detection needs torchvision")
    add(
        "--data",
        choices=(*DATA, "coco"),
        default="digits",
        help="digits are bundled with scikit-learn; cifar and folder need torchvision; coco is for detection",
    )
    add("--data-dir", type=Path, help="CIFAR's python version, or a folder with train/ and val/")
    add(
        "--side",
        "--image-size",
        type=int,
        help="height and width of the images; by the data if not given",
    )
    add("--workers", type=int, default=0, help="processes that read the next batches ahead")

    add = parser.group("model")
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
    add("--pretrained", help="detectors: torchvision's weights of the backbone", **_switch())

    add = parser.group("attention")
    add("--attention", choices=ATTENTIONS, default="ela")
    add("--unfused", help="mrla as published, concatenating", **_switch())
    add("--head-dim", type=int, help="channels of a head")
    add(
        "--drop-path",
        type=float,
        default=0.0,
        help="probability that a sample's retrieval is left out",
    )
    add("--history-dtype", choices=HELD, help="round and hold values of earlier layers so")
    add("--tolerance", type=float, default=0.0, help="leave out retrievals of a smaller weight")
    add("--checkpointing", help="recompute blocks in the backward pass", **_switch())

    add = parser.group("EBQM")
    add("--skip", choices=SKIP_MODES, default="reuse", help="what is left out")
    add("--ebqm", nargs="*", metavar="NAME=NUMBER", help="e.g. warmup=500 quantile=0.8")
    add("--no-ebqm", action="store_true", help="ela without it: every layer retrieves")

    add = parser.group("optimisation")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64, help="images of a step, in each process")
    add("--lr", type=float, default=0.03, help="learning rate, the highest of a schedule")
    add("--optimizer", choices=OPTIMIZERS, default="sgd")
    add("--schedule", choices=SCHEDULES, default="one-cycle")
    add("--lr-warmup-epochs", type=int, default=0, help="linear, before cosine and constant")
    add("--lr-warmup-decay", type=float, help="the part of lr to begin with; 0.01 if not given")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4)
    add("--label-smoothing", type=float, default=0.0)
    add("--model-ema", help="also keep and test a moving average of the weights", **_switch())
    add("--model-ema-decay", type=float, help="scaled by batch and epochs; 0.9999 if not given")
    add("--model-ema-steps", type=int, help="between two updates of it; 1 if not given")
    add("--amp", choices=AMP, default="off")
    add("--channels-last", help="memory format of the model and its images", **_switch())
    add("--compile", help="train the network as torch.compile has it", **_switch())
    add("--seed", type=int, default=0)

    add = parser.group("variation")
    add(
        "--augment",
        help="crops, and flips but of digits; without: images as they are",
        **_switch(True),
    )
    add(
        "--auto-augment",
        choices=AUTO_AUGMENT,
        help="RandAugment, TrivialAugment, AugMix, AutoAugment",
    )
    add("--ra-magnitude", type=int, help="of RandAugment, to 30; 9 if not given")
    add("--random-erase", type=float, default=0.0, help="probability of an erased rectangle")
    add("--mixup-alpha", type=float, default=0.0, help="of mixup; 0: none")
    add("--cutmix-alpha", type=float, default=0.0, help="of cutmix; 0: none")

    add = parser.group("output")
    add("--out", type=Path, default=Path("runs/train"), help="folder for checkpoint and logs")
    add("--save-every", type=int, default=1, metavar="EPOCHS", help="between checkpoints")
    add("--log-every", type=int, metavar="STEPS", help="also log means of so many, in steps.csv")
    add("--plots", help="pictures: curves.png, and ebqm.png where EBQM watches", **_switch())
    add("--tensorboard", help="logs for TensorBoard besides log.csv", **_switch())

    add = parser.group("run")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="options from JSON or TOML; the command line wins",
    )
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add(
        "--evaluate",
        type=Path,
        nargs="?",
        const=True,
        metavar="PATH",
        help="test the checkpoint in --out, or another, and train nothing",
    )
    add("--threads", type=int, help="CPU threads; PyTorch's choice if not given")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser
