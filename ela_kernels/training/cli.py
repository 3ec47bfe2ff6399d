"""`python -m ela_kernels train`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ela_kernels.models import MODELS, build_model
from ela_kernels.models.blocks import ATTENTIONS
from ela_kernels.training.checkpoint import NAME, load_checkpoint, save_checkpoint
from ela_kernels.training.data import DATA, Task, load_task
from ela_kernels.training.logs import Logs, Progress, print_table
from ela_kernels.training.loop import Interrupted, Trainer
from ela_kernels.training.optional import MissingLibraryError
from ela_kernels.training.options import AMP, OPTIMIZERS, SCHEDULES, Options
from ela_kernels.training.processes import Processes, choose_device, join_processes


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say.

    Returns:
        Exit status: 0 when done, 1 for a file that fails in the middle of the run, 2 for arguments or data that do not
        fit, 130 or 143 when stopped by a signal.
    """
    arguments = _parser().parse_args(argv)
    processes = Processes()
    try:
        try:
            device = choose_device(arguments.device)
            processes = join_processes(device)
            trainer, logs = _prepare(arguments, device, processes)
        except (ValueError, TypeError, OSError, MissingLibraryError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            return _train(trainer, logs, arguments)
        except OSError as error:
            # A file of the data that cannot be read, a disk that is full.
            print(f"\nerror: {error}. A checkpoint that was saved before is whole", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print("\nStopped at once; a checkpoint that was saved before is whole.", file=sys.stderr)
        return 130
    finally:
        processes.leave()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ela_kernels train",
        description="Train a residual network with layer attention. Under torchrun: one process a GPU, or a CPU share.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=DATA, default="digits", help="digits are bundled with scikit-learn")
    add("--data-dir", type=Path, help="CIFAR's python pickles, or a folder with train/ and val/")
    add(
        "--side",
        "--image-size",
        type=int,
        help="height and width of the images; by the data if not given",
    )
    add("--model", choices=tuple(MODELS), default="resnet56")
    add("--block", choices=("basic", "bottleneck"), help="of the small networks")
    add("--attention", choices=ATTENTIONS, default="ela")
    add("--unfused", action="store_true", help="mrla as published, concatenating")
    add("--head-dim", type=int, help="channels of a head")
    add("--drop-path", type=float, default=0.0)
    add("--skip", choices=("retrieval", "layer"), default="retrieval", help="what is left out")
    add("--ebqm", nargs="*", metavar="NAME=NUMBER", help="e.g. warmup=500 ceiling=0.2")
    add("--no-ebqm", action="store_true", help="ela without it: every layer retrieves")
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


def _prepare(
    arguments: argparse.Namespace, device: torch.device, processes: Processes
) -> tuple[Trainer, Logs | None]:
    """The run as it starts or goes on, and its logs in the first process. Everything that can be refused is, here."""
    for name, least in (("save_every", 1), ("log_every", 1), ("threads", 1), ("workers", 0)):
        number = getattr(arguments, name)
        if number is not None and number < least:
            raise ValueError(
                f"{name.replace('_', '-')}: got {number}; allowed is an int of at least {least}"
            )
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    if not arguments.resume and (out / NAME).exists():
        raise ValueError(
            f"out: {out / NAME} is there already. Go on from it with --resume, or give another folder"
        )
    task = load_task(arguments.data, arguments.data_dir, arguments.side)
    options = _options(arguments, task)
    torch.manual_seed(options.seed)
    model = _model(arguments, task)
    trainer = Trainer(model, task, options, device, processes, workers=arguments.workers)
    if arguments.resume:
        trainer.load_state_dict(load_checkpoint(out))
    # All processes have looked for a checkpoint before one of them can write any.
    processes.wait()
    out.mkdir(parents=True, exist_ok=True)
    logs = Logs(out, arguments.tensorboard, trainer.steps) if processes.first else None
    return trainer, logs


def _train(trainer: Trainer, logs: Logs | None, arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    with _signals() as stopped:
        trainer.stopping = lambda: stopped[0]
        try:
            _epochs(trainer, logs, arguments)
        except Interrupted:
            _save(trainer, out)
            number = trainer.processes.any(stopped[0])
            if logs is not None:
                print(
                    f"\nStopped in epoch {trainer.epoch + 1} after step {trainer.steps}; "
                    f"the same command with --resume goes on from {out / NAME}.",
                    file=sys.stderr,
                )
            return 128 + number
        finally:
            if logs is not None:
                logs.close()
    if logs is not None:
        _print_result(trainer, arguments)
    # One that left while another is still at work would take the connection down.
    trainer.processes.wait()
    return 0


def _options(arguments: argparse.Namespace, task: Task) -> Options:
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
        **dict.fromkeys(
            (
                "low",
                "high",
                "ceiling",
                "max_share",
                "smoothing",
                "prior_count",
                "prior_concentration",
            ),
            float,
        ),
    }
    arguments: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            arguments[name] = allowed[name](number)
        except (KeyError, ValueError):
            raise ValueError(
                f"ebqm: got {pair!r}; allowed is NAME=NUMBER with a name of {', '.join(allowed)}"
            ) from None
    return arguments


def _model(arguments: argparse.Namespace, task: Task) -> nn.Module:
    options: dict[str, Any] = {
        "num_classes": len(task.classes),
        "in_chans": task.channels,
        "attention": arguments.attention,
        "fused": not arguments.unfused,
        "head_dim": arguments.head_dim,
        "drop_path": arguments.drop_path,
        "skip": arguments.skip,
        "checkpointing": arguments.checkpointing,
    }
    if arguments.block is not None:
        if arguments.model in ("resnet50", "resnet101"):
            raise ValueError(
                f"block: got {arguments.block!r} for {arguments.model}; allowed with resnet20/32/56/110 only"
            )
        options["block"] = arguments.block
    return build_model(arguments.model, **options)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM in a list of one number; a second one of a kind acts as usual."""
    stopped = [0]

    def note(number: int, frame: FrameType | None) -> None:
        stopped[0] = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for kind in (signal.SIGINT, signal.SIGTERM):
        before[kind] = signal.signal(kind, note)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _epochs(trainer: Trainer, logs: Logs | None, arguments: argparse.Namespace) -> None:
    every = arguments.log_every
    total = trainer.options.epochs * trainer.steps_per_epoch
    progress = Progress(total, trainer.steps, shown=logs is not None)

    def after_step() -> None:
        progress.step()
        if every is not None and trainer.steps % every == 0:
            row = trainer.latest()
            if logs is not None:
                logs.write_step(row)

    with closing(progress):
        while not trainer.done:
            row = trainer.run_epoch(after_step)
            progress.epoch(row)
            if logs is not None:
                logs.write(trainer.history)
            if trainer.done or trainer.epoch % arguments.save_every == 0:
                _save(trainer, arguments.out)


def _save(trainer: Trainer, out: Path) -> None:
    state = trainer.state_dict()
    if trainer.processes.first:
        save_checkpoint(state, out)
    trainer.processes.wait()


def _print_result(trainer: Trainer, arguments: argparse.Namespace) -> None:
    best = max(row["test_accuracy"] for row in trainer.history)
    last = trainer.history[-1]
    print_table(
        f"{arguments.model}, attention {arguments.attention}, on {arguments.data}",
        ("", "value"),
        [
            ("test accuracy, last epoch", f"{last['test_accuracy']:.2%}"),
            ("test accuracy, best epoch", f"{best:.2%}"),
            ("training time", f"{trainer.seconds:.1f} s"),
            ("time per step, mean", f"{1000 * trainer.seconds / trainer.steps:.1f} ms"),
            ("layers skipped", str(trainer.layers_skipped)),
        ],
    )
    if trainer.ebqm is not None:
        print(trainer.ebqm.report())
