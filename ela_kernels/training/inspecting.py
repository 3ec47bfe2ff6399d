"""`python -m ela_kernels explain` and `analyze`: a look at the network of a run, on the run's own images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ela_kernels.analysis import Analysis, analyze
from ela_kernels.command_line import Parser, Row
from ela_kernels.explaining import Explanation, explain
from ela_kernels.optional import MissingLibraryError
from ela_kernels.training import config
from ela_kernels.training.checkpoint import load_checkpoint
from ela_kernels.training.failures import sentence
from ela_kernels.training.files import UnwritableFileError, named, printing
from ela_kernels.training.loop import Trainer
from ela_kernels.training.making import load_run, place_of
from ela_kernels.training.processes import Processes, choose_device
from ela_kernels.training.reading import Part

# Of the settings of EBQM those that say when it decides, which an analysis has no use for.
_OF_STEPS = ("warmup", "interval", "probe_interval")


def batch_of(trainer: Trainer, testing: bool = False, first: int = 0) -> tuple[Any, Any]:
    """Images and labels of a batch as they are, without variation, as the model takes them."""
    images = trainer.task.test if testing else trainer.task.train
    last = min(first + trainer.options.batch_size, len(images))
    part = Part(torch.arange(first, last, device="cpu"), testing=testing)
    return trainer.place(*trainer.task.read(part))


def explained(trainer: Trainer, training: bool = True, testing: bool = False) -> Explanation:
    """Which kernels serve the layers on a batch: as a step of training has them, or inference."""
    images, labels = batch_of(trainer, testing)
    before = trainer.model.training
    trainer.model.train(training)
    try:
        with torch.set_grad_enabled(training), trainer.autocast():
            return explain(trainer.model, *_inputs(trainer, images, labels, training))
    finally:
        trainer.model.train(before)


def analyzed(trainer: Trainer, batches: int, training: bool = True) -> Analysis:
    """What the layers retrieve on test images, and what EBQM would skip with the settings of the run."""

    def forward(model: nn.Module, batch: Any) -> Any:
        images, labels = batch
        with trainer.autocast():
            return model(*_inputs(trainer, images, labels, training))

    settings = {k: v for k, v in (trainer.options.ebqm or {}).items() if k not in _OF_STEPS}
    return analyze(
        trainer.model,
        _test_batches(trainer),
        batches,
        forward=forward,
        training=training,
        **settings,
    )


def _inputs(trainer: Trainer, images: Any, labels: Any, training: bool) -> tuple[Any, ...]:
    return (images, labels) if training and trainer.takes_labels else (images,)


def _test_batches(trainer: Trainer) -> Iterator[tuple[Any, Any]]:
    for first in range(0, len(trainer.task.test), trainer.options.batch_size):
        yield batch_of(trainer, testing=True, first=first)


class RefusedError(ValueError):
    """A network that cannot be looked at as it is asked for."""


def explain_run(argv: Sequence[str] | None = None) -> int:
    """`python -m ela_kernels explain`; its exit status."""
    parser = _parser(
        "explain",
        "Which kernels serve each layer of a network that was trained by this program, and why not better ones.",
        (
            ("explain runs/digits", "in a step of training"),
            ("explain runs/digits --inference --batch-size 1", "for one image, without gradients"),
        ),
    )
    return _inspect(parser.parse_args(argv), _print_explanation)


def analyze_run(argv: Sequence[str] | None = None) -> int:
    """`python -m ela_kernels analyze`; its exit status."""
    parser = _parser(
        "analyze",
        "What the layers of a network that was trained by this program retrieve on the run's test images, and which of "
        "them EBQM would skip, with the settings of the run.",
        (
            ("analyze runs/digits --plot layers.png", "a table, and a picture beside it"),
            ("analyze runs/digits --batches 2 --json > layers.json", "for another program"),
        ),
    )
    add = parser.group("output")
    add("--batches", type=int, default=8, help="at most so many are looked at")
    add("--json", action="store_true", help="print all of it as JSON in place of the table")
    add("--plot", type=Path, help="also draw it, PNG or by the suffix; needs matplotlib")
    asked = parser.parse_args(argv)
    if asked.batches < 1:
        parser.error(f"--batches: got {asked.batches}; allowed is an int of at least 1")
    return _inspect(asked, _print_analysis)


def _parser(command: str, description: str, examples: Sequence[Row]) -> Parser:
    parser = Parser(command, description, "[run] [options]", examples)
    add = parser.group("what is looked at")
    add(
        "run",
        nargs="?",
        type=Path,
        metavar="run",
        default=Path("runs/train"),
        help="folder of a run, or a checkpoint with the config.json of its run beside it",
    )
    add("--inference", action="store_true", help="in evaluation mode, not as in training")
    add("--batch-size", type=int, help="images of a batch; those of the run if not given")
    add("--data-dir", type=Path, help="where the data are now, if not where they were")
    add("--threads", type=int, help="of the CPU; if not given, those of the run")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return parser


def _inspect(
    asked: argparse.Namespace, show: Callable[[Trainer, Path, argparse.Namespace], None]
) -> int:
    try:
        try:
            trainer, path = _load(asked)
        except UnwritableFileError:
            raise
        except (ValueError, TypeError, OSError, MissingLibraryError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        show(trainer, path, asked)
    except BrokenPipeError:
        raise
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


def _load(asked: argparse.Namespace) -> tuple[Trainer, Path]:
    """The network of a run, with all that its `config.json` says but what is of the machine it ran on."""
    path = place_of(asked.run)
    options = path.parent / config.NAME
    if not options.is_file():
        load_checkpoint(
            path.parent, name=path.name, argument="run"
        )  # it says what is wrong with that
        raise ValueError(
            f"run: {path} has no {config.NAME} beside it, which says what it was trained on; allowed is the folder of "
            "a run as it was written"
        )
    words = ["--config", str(options), "--device", asked.device, "--workers", "0", "--no-compile"]
    for name in ("batch-size", "data-dir", "threads"):
        value = getattr(asked, name.replace("-", "_"))
        if value is not None:
            words += [f"--{name}", str(value)]
    arguments = config.parse(words)
    device = choose_device(arguments.device)
    return load_run(arguments, path, device, Processes(), "run")


def _print_explanation(trainer: Trainer, path: Path, asked: argparse.Namespace) -> None:
    found = explained(trainer, not asked.inference, testing=True)
    with printing():
        print(f"{path}, {_mode(asked)}, {trainer.device}\n{found}")


def _print_analysis(trainer: Trainer, path: Path, asked: argparse.Namespace) -> None:
    try:
        found = analyzed(trainer, asked.batches, not asked.inference)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if asked.plot is not None:
        try:
            with named(asked.plot):
                found.plot(asked.plot)
        except ValueError as error:
            raise RefusedError(f"plot: {str(error).removeprefix('path: ')}") from error
    shown = f"{path}, {_mode(asked)}\n{found}"
    with printing():
        print(json.dumps(found.to_dict(), indent=2) if asked.json else shown)


def _mode(asked: argparse.Namespace) -> str:
    return "in inference" if asked.inference else "in training"
