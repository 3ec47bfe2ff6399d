"""`python -m ela_kernels train`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ela_kernels.ebqm import Report
from ela_kernels.optional import MissingLibraryError
from ela_kernels.training import config
from ela_kernels.training.checkpoint import NAME, load_checkpoint, save_checkpoint
from ela_kernels.training.dry_run import dry_run
from ela_kernels.training.failures import NotFiniteError, sentence
from ela_kernels.training.files import UnwritableFileError, printing
from ela_kernels.training.logs import Logs, Progress, print_table
from ela_kernels.training.loop import Interrupted, Trainer
from ela_kernels.training.making import begin, load_run, make_trainer
from ela_kernels.training.processes import Processes, choose_device, join_processes


def main(argv: Sequence[str] | None = None) -> int:
    """Train, or evaluate, as the arguments say.

    Returns:
        Exit status: 0 when done, 1 for something that fails in the middle of the run (a file, memory, a loss that is
        not finite), 2 for arguments or data that do not fit, 130 or 143 when stopped by a signal.
    """
    try:
        arguments = config.parse(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    processes = Processes()
    try:
        try:
            device = choose_device(arguments.device)
            processes = join_processes(device)
            if arguments.evaluate is not None:
                return _evaluate(arguments, device, processes)
            if arguments.dry_run:
                trainer = _start(arguments, device, processes)
                _check_writable(arguments.out)
            else:
                trainer, logs = _prepare(arguments, device, processes)
        except (UnwritableFileError, BrokenPipeError):
            raise
        except (ValueError, TypeError, OSError, MissingLibraryError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if arguments.dry_run:
            dry_run(trainer, arguments)
            return 0
        return _train(trainer, logs, arguments)
    except KeyboardInterrupt:
        print(f"\nStopped at once; {_saved_before(arguments)}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        text = sentence(error)
        if text is None:
            raise
        diverged = isinstance(error, NotFiniteError)
        if processes.first or not diverged:
            print(f"\nerror: {text}; {_saved_before(arguments)}", file=sys.stderr)
        if diverged:
            # All processes stop here, and torchrun ends those that come later than the first.
            processes.wait()
        return 1
    finally:
        processes.leave()


def _saved_before(arguments: argparse.Namespace) -> str:
    if arguments.evaluate is not None or arguments.dry_run:
        return "nothing was written"
    out: Path = arguments.out
    try:
        there = (out / NAME).is_file()
    except OSError:
        there = False
    if there:
        return f"the checkpoint that was saved before, {out / NAME}, is whole"
    return "no checkpoint was saved before"


def _prepare(
    arguments: argparse.Namespace, device: torch.device, processes: Processes
) -> tuple[Trainer, Logs | None]:
    """The run as it starts or goes on, and its logs in the first process. Everything that can be refused is, here."""
    out: Path = arguments.out
    trainer = _start(arguments, device, processes)
    # All processes have looked for a checkpoint before one of them can write any.
    processes.wait()
    _make_folder(out)
    logs = None
    if processes.first:
        columns = trainer.columns, trainer.step_columns
        logs = Logs(out, arguments.tensorboard, trainer.steps, *columns, pictures=arguments.plots)
        config.write_config(arguments, out)
    return trainer, logs


def _start(arguments: argparse.Namespace, device: torch.device, processes: Processes) -> Trainer:
    """The run as it starts or goes on; nothing is written."""
    begin(arguments)
    out: Path = arguments.out
    _check_out(out, arguments.resume)
    trainer = make_trainer(arguments, device, processes)
    if arguments.resume:
        trainer.load_state_dict(load_checkpoint(out), str(out / NAME))
    if processes.first:
        _warn_of_dead_norms(trainer)
    return trainer


def _evaluate(arguments: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    """Print what a checkpoint reaches on the test images."""
    asked: Path = arguments.out if arguments.evaluate is True else arguments.evaluate
    trainer, path = load_run(arguments, asked, device, processes)
    head, *rows = trainer.evaluation()
    if processes.first:
        size = "" if arguments.side is None else f" of side {arguments.side}"
        title = f"{path}, on {arguments.data}, {len(trainer.task.test)} test images{size}"
        with printing():
            print_table(title, head, rows)
    processes.wait()
    return 0


def _warn_of_dead_norms(trainer: Trainer) -> None:
    dead = trainer.dead_norms()
    if dead:
        listed = [f"{name} ({channels})" for name, channels in dead.items()]
        more = f" and {len(listed) - 6} more" if len(listed) > 6 else ""
        print(
            f"warning: norms with a scale of zero before a ReLU: {', '.join(listed[:6])}{more}. No gradient "
            "reaches them or what stands before them, so that they stay at zero; begin with another scale, or leave "
            "out that ReLU",
            file=sys.stderr,
        )


def _check_out(out: Path, resume: bool) -> None:
    try:
        there = out.exists()
        if there and not out.is_dir():
            raise ValueError(
                f"out: got {out}, which is a file; allowed is a folder, which is made if it is not there"
            )
        if not resume and (out / NAME).exists():
            raise ValueError(
                f"out: {out / NAME} is there already. Go on from it with --resume, or give another folder"
            )
    except OSError as error:
        raise _unusable(out, error) from error


def _make_folder(out: Path) -> None:
    """Make the folder, and see that files can be made in it: an epoch later would be too late."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        raise _unusable(out, error) from error


def _check_writable(out: Path) -> None:
    """The same without a trace, as far as it can be seen so."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise _unusable(out, ValueError(f"{there} cannot be written to"))


def _unusable(out: Path, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or error
    return ValueError(
        f"out: got {out}, where no file can be made ({reason}); allowed is a folder that can be written to"
    )


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
            progress.epoch(row, trainer.epoch_text(row))
            if logs is not None:
                logs.write(trainer.history, _report(trainer))
            if trainer.done or trainer.epoch % arguments.save_every == 0:
                _save(trainer, arguments.out)
                if logs is not None:
                    logs.plot(trainer.history, _report(trainer))


def _report(trainer: Trainer) -> Report | None:
    return None if trainer.ebqm is None else trainer.ebqm.report()


def _save(trainer: Trainer, out: Path) -> None:
    trainer.check_finite()
    state = trainer.state_dict()
    if trainer.processes.first:
        save_checkpoint(state, out)
    trainer.processes.wait()


def _print_result(trainer: Trainer, arguments: argparse.Namespace) -> None:
    with printing():
        _print_rows(trainer, arguments)


def _print_rows(trainer: Trainer, arguments: argparse.Namespace) -> None:
    print_table(
        f"{arguments.model}, attention {arguments.attention}, on {arguments.data}",
        ("", "value"),
        [
            *trainer.results(),
            ("training time", f"{trainer.seconds:.1f} s"),
            ("time per step, mean", f"{1000 * trainer.seconds / trainer.steps:.1f} ms"),
            ("layers skipped", str(trainer.layers_skipped)),
        ],
    )
    if trainer.ebqm is not None:
        print(trainer.ebqm.report())
