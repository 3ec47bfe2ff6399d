"""The options of the training program, as they stand on a command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ela_kernels.command_line import Parser, Row
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


def _switch(default: bool = False) -> dict[str, Any]:
    """An option that can be turned on, and off again where a file turns it on."""
    return {"action": argparse.BooleanOptionalAction, "default": default}


_EXAMPLES: tuple[Row, ...] = (
    ("train --epochs 16 --out runs/digits", "on digits that scikit-learn brings along"),
    (
        "train --data cifar10 --data-dir DATA --dry-run",
        "what a run would be: model, data, kernels, the time of an epoch; nothing is written",
    ),
    ("train --config runs/digits/config.json --resume", "go on with a run that was interrupted"),
)


def make_parser() -> Parser:
    parser = Parser(
        "train",
        "Train a classifier or a detector with layer attention; under torchrun with one process a GPU.",
        examples=_EXAMPLES,
    )
    add = parser.group("data")
    add("--task", choices=TASKS, default="classification", help="what is learnt")
    add(
        "--data",
        choices=(*DATA, "coco"),
        default="digits",
        help="digits come with scikit-learn; all others need torchvision",
    )
    add("--data-dir", type=Path, help="CIFAR's python version, or a folder with train/ and val/")
    add(
        "--side",
        "--image-size",
        type=int,
        help="height and width of the images; if not given, by the data",
    )
    add("--workers", type=int, default=0, help="processes that read the next batches ahead")

    add = parser.group("model")
    add(
        "--model",
        choices=tuple(name for names in TASKS.values() for name in names),
        help=f"network; if not given, {USUAL_MODEL}, for detection {TASKS['detection'][0]}",
    )
    add("--block", choices=("basic", "bottleneck"), help="of resnet20 to resnet110")
    add(
        "--patch-size",
        type=int,
        help="of vision transformers; if not given, up to 16, with 7 patches a side or more",
    )
    add("--pretrained", help="detectors: torchvision's weights of the backbone", **_switch())

    add = parser.group("attention")
    add("--attention", choices=ATTENTIONS, default="ela", help="form of layer attention")
    add("--unfused", help="mrla as published, concatenating", **_switch())
    add("--head-dim", type=int, help="channels of a head")
    add(
        "--drop-path",
        type=float,
        default=0.0,
        help="probability that a sample's retrieval is left out",
    )
    add("--history-dtype", choices=HELD, help="hold the values of earlier layers so")
    add("--tolerance", type=float, default=0.0, help="leave out retrievals that weigh less")
    add("--checkpointing", help="recompute blocks in the backward pass", **_switch())

    add = parser.group("EBQM")
    add("--skip", choices=SKIP_MODES, default="reuse", help="what a skipped layer leaves out")
    add(
        "--ebqm",
        nargs="*",
        metavar="NAME=NUMBER",
        help="its settings, such as warmup=500 quantile=0.8",
    )
    add("--no-ebqm", action="store_true", help="ela without it: every layer retrieves")

    add = parser.group("optimisation")
    add("--epochs", type=int, default=30, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images of a step, in each process")
    add("--lr", type=float, default=0.03, help="learning rate, the highest of a schedule")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="the first with Nesterov's momentum")
    add("--schedule", choices=SCHEDULES, default="one-cycle", help="of the learning rate, by steps")
    add("--lr-warmup-epochs", type=int, default=0, help="linear, before cosine and constant")
    add("--lr-warmup-decay", type=float, help="the part of --lr to begin with; 0.01 if not given")
    add("--momentum", type=float, default=0.9, help="of sgd")
    add("--weight-decay", type=float, default=5e-4, help="of weights; norms and biases have none")
    add("--label-smoothing", type=float, default=0.0, help="in the loss that is trained on")
    add("--model-ema", help="also keep and test a moving average of the weights", **_switch())
    add("--model-ema-decay", type=float, help="scaled by batch and epochs; 0.9999 if not given")
    add("--model-ema-steps", type=int, help="between two updates of it; 1 if not given")
    add("--amp", choices=AMP, default="off", help="mixed precision")
    add("--channels-last", help="memory format of the model and its images", **_switch())
    add("--compile", help="train the network as torch.compile has it", **_switch())
    add("--seed", type=int, default=0, help="of weights, order and variation")

    add = parser.group("variation")
    add(
        "--augment",
        help="crops, and flips but of digits",
        **_switch(True),
    )
    add(
        "--auto-augment",
        choices=AUTO_AUGMENT,
        help="a policy of torchvision",
    )
    add("--ra-magnitude", type=int, help="of --auto-augment ra, to 30; 9 if not given")
    add("--random-erase", type=float, default=0.0, help="probability of an erased rectangle")
    add("--mixup-alpha", type=float, default=0.0, help="of mixup; 0: none")
    add("--cutmix-alpha", type=float, default=0.0, help="of cutmix; 0: none")

    add = parser.group("output")
    add("--out", type=Path, default=Path("runs/train"), help="folder for checkpoint and logs")
    add("--save-every", type=int, default=1, metavar="EPOCHS", help="between checkpoints")
    add("--log-every", type=int, metavar="STEPS", help="also log means over so many, in steps.csv")
    add("--plots", help="pictures: curves.png, and ebqm.png where EBQM watches", **_switch())
    add("--tensorboard", help="logs for TensorBoard besides log.csv", **_switch())

    add = parser.group("run")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="take options from JSON or TOML; the command line wins",
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
    add(
        "--dry-run",
        action="store_true",
        help="say what a run would be, take a few steps, and write nothing",
    )
    add("--threads", type=int, help="of the CPU; if not given, PyTorch's choice")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    return parser
