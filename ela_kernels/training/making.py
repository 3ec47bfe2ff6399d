"""A run as its options describe it: a trainer that has done nothing yet, or one with the weights of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ela_kernels.training.arguments import check_numbers, make_model, make_options, make_recipe
from ela_kernels.training.checkpoint import NAME, load_checkpoint
from ela_kernels.training.data import load_task
from ela_kernels.training.loop import Trainer
from ela_kernels.training.processes import Processes


def begin(arguments: argparse.Namespace) -> None:
    """Refuse options that do not fit each other, and take the threads that they ask for.

    Raises:
        ValueError: one does not fit.
    """
    check_numbers(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def make_trainer(
    arguments: argparse.Namespace, device: torch.device, processes: Processes
) -> Trainer:
    """Data, network and all else of a run.

    Raises:
        ValueError, TypeError, OSError, MissingLibraryError: something does not fit, is not there, or cannot be read.
    """
    kind: type[Trainer] = Trainer
    load: Callable[..., Any] = load_task
    make: Callable[..., nn.Module] = make_model
    if arguments.task == "detection":
        # It needs torchvision, which takes seconds to import.
        from ela_kernels.training.detection import networks, tasks, trainer

        kind, load, make = trainer.DetectionTrainer, tasks.load_task, networks.make_model
    recipe = make_recipe(arguments)
    more = () if arguments.task == "detection" else (recipe,)
    task = load(arguments.data, arguments.data_dir, arguments.side, *more)
    options = make_options(arguments, task)
    torch.manual_seed(options.seed)
    model = make(arguments, task)
    ahead = {"workers": arguments.workers, "compiled": arguments.compile}
    return kind(model, task, options, device, processes, **ahead)


def place_of(asked: Path) -> Path:
    """The checkpoint that is asked for by its path, or by the folder of its run."""
    return asked if asked.is_file() else asked / NAME


def load_run(
    arguments: argparse.Namespace,
    asked: Path,
    device: torch.device,
    processes: Processes,
    argument: str = "evaluate",
) -> tuple[Trainer, Path]:
    """A trainer with the weights of a checkpoint, which has to be of the network that the options describe.

    Args:
        arguments: the options.
        asked: the checkpoint, or the folder of its run.
        device, processes: of the trainer.
        argument: that asks for it; errors name it.

    Raises:
        ValueError, TypeError, OSError, MissingLibraryError: as :func:`make_trainer`; there is no such checkpoint, it is
            damaged, or of another network or other classes.
    """
    begin(arguments)
    path = place_of(asked)
    state = load_checkpoint(path.parent, name=path.name, argument=argument)
    # An average is taken where the checkpoint has one, whatever the options say, which are of the training.
    arguments.model_ema = "average" in state and arguments.task == "classification"
    arguments.model_ema_decay = arguments.model_ema_steps = None
    trainer = make_trainer(arguments, device, processes)
    try:
        trainer.load_weights(state, str(path))
    except ValueError as error:
        raise ValueError(f"{argument}: {str(error).removeprefix('evaluate: ')}") from error
    return trainer, path
