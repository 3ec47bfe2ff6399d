"""Train the variants of layer attention side by side over seeds, and make the tables and the picture.

python -m benchmarks.study run --plan two-hours --out runs.jsonl    again after a cut-off: goes on
python -m benchmarks.study accuracy runs.jsonl                      with paired differences
python -m benchmarks.study decisions runs.jsonl                     of EBQM, over time
python -m benchmarks.study picture runs.jsonl --png accuracy.png    accuracy against training time
python -m benchmarks.study time steps.json --measure                what kernels save, what skipping saves
python -m benchmarks.study loss loss.json --measure                 what skipping one layer does to the loss
python -m benchmarks pages                                          write the tables into docs/study.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.data import load
from benchmarks.study.loss import loss_table, measure_loss
from benchmarks.study.picture import draw
from benchmarks.study.plans import PLANS, runs_of
from benchmarks.study.records import read, read_results
from benchmarks.study.runs import run_all
from benchmarks.study.settings import DATA, ORDERS, Settings
from benchmarks.study.steps import DEPTHS, measure_all, time_table
from benchmarks.study.tables import accuracy_tables, decision_tables
from benchmarks.study.variants import GROUPS, VARIANTS
from ela_kernels.optional import MissingLibraryError
from ela_kernels.training.processes import choose_device

# Of ints in a row: far more than anybody trains.
_MOST = 1000
_LISTS = ("seeds", "depths", "variants")
_SHARED = [
    name for name in Settings.__dataclass_fields__ if name not in ("variant", "depth", "seed")
]


def numbers(name: str, text: str) -> list[int]:
    """Ints of `0-4` or `20,56` or both.

    Raises:
        ValueError: something else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            row = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            row = range(0)
        if not 0 < len(row) <= _MOST:
            raise ValueError(
                f"{name}: got {text!r}; allowed are ints such as 0-4 or 0,2,5, at most {_MOST} in a row"
            )
        found += row
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not trained yet")
    add = run.add_argument
    add("--out", type=Path, required=True, help="file of finished runs, a line of JSON each")
    add("--plan", choices=tuple(PLANS), help="what the options below are unless given")
    add("--data", choices=DATA)
    add("--root", type=Path, help="folder with the data; Fashion-MNIST: Debian's if not given")
    add("--seeds", help="such as 0-4")
    add("--depths", help="such as 20,56,110")
    add("--variants", help=f"of {', '.join(VARIANTS)}; groups: {', '.join(GROUPS)}")
    add("--order", choices=ORDERS, help="what is outermost; variants are always innermost")
    add("--side", type=int, help="average the images down to it; as they are if not given")
    add("--epochs", type=int)
    add("--batch", type=int)
    add("--lr", type=float, help="the highest of a one-cycle schedule")
    add("--weight-decay", type=float)
    add("--momentum", type=float)
    add("--train-images", type=int, help="so many, chosen by the seed; all if not given")
    add("--test-images", type=int, help="the first so many; all if not given")
    add("--test-every", type=int, metavar="EPOCHS", help="the last one is always tested")
    add("--low", type=float, help="of EBQM, as the next three")
    add("--high", type=float)
    add("--max-share", type=float)
    add("--max-row", type=int)
    add("--threads", type=int, help="CPU threads; PyTorch's choice if not given")
    add("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    add("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads")
    add("--minutes", type=float, help="begin no run after so many")
    add("--list", action="store_true", help="print the runs and their settings, and train nothing")
    for name, what in (
        ("accuracy", "table: means over seeds, and paired differences"),
        ("decisions", "table: what EBQM skipped when"),
        ("picture", "accuracy against training time"),
    ):
        table = commands.add_parser(name, help=what)
        table.add_argument("files", type=Path, nargs="+", help="what `run` wrote")
        if name == "picture":
            table.add_argument("--png", type=Path, required=True, help="the picture's file")
    steps = commands.add_parser("time", help="table: what kernels and what skipping save of a step")
    steps.add_argument("file", type=Path, help="results of --measure")
    steps.add_argument("--measure", action="store_true", help="measure first, and write the file")
    steps.add_argument("--layers", help="layers of a stage, such as 9,18")
    steps.add_argument("--batch", type=int, default=128)
    steps.add_argument("--side", type=int, default=28)
    steps.add_argument("--rounds", type=int, default=11)
    steps.add_argument("--threads", type=int)
    loss = commands.add_parser("loss", help="what skipping one layer does to the loss")
    loss.add_argument("file", type=Path, help="results of --measure")
    loss.add_argument("--measure", action="store_true", help="train and measure first")
    loss.add_argument("--plan", choices=tuple(PLANS), default="two-hours")
    loss.add_argument("--data", choices=DATA)
    loss.add_argument("--root", type=Path)
    loss.add_argument("--seeds", default="0-2")
    loss.add_argument("--depth", type=int, default=56)
    loss.add_argument("--epochs", type=int)
    loss.add_argument("--train-images", type=int)
    loss.add_argument("--images", type=int, default=2000, help="test images")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command says.

    Returns:
        Exit status: 0 when done, 1 where runs are left that there was no time for, 2 for arguments or files that do
        not fit, 130 when stopped.
    """
    arguments = make_parser().parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run,
        "accuracy": lambda a: _print(accuracy_tables(read(a.files))),
        "decisions": lambda a: _print(decision_tables(read(a.files))),
        "picture": _picture,
        "time": _time,
        "loss": _loss,
    }
    try:
        return commands[arguments.command](arguments)
    except (ValueError, TypeError, OSError, MissingLibraryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on with what is not finished.", file=sys.stderr)
        return 130


def planned(arguments: argparse.Namespace) -> list[Settings]:
    """The runs of a command, in their order."""
    given = {name: getattr(arguments, name) for name in (*_LISTS, *_SHARED, "order")}
    for name in ("seeds", "depths"):
        if given[name] is not None:
            given[name] = numbers(name, given[name])
    if given["variants"] is not None:
        given["variants"] = [name.strip() for name in given["variants"].split(",")]
    return runs_of(arguments.plan, given)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.threads is not None:
        _at_least("threads", arguments.threads, 1)
        torch.set_num_threads(arguments.threads)
    _at_least("jobs", arguments.jobs, 1)
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ValueError(f"minutes: got {arguments.minutes}; allowed is a positive number")
    runs = planned(arguments)
    if arguments.list:
        return _print("".join(f"{json.dumps(run.as_dict())}\n" for run in runs))
    device = choose_device(arguments.device)
    task = load(runs[0].data, arguments.root)
    left = run_all(runs, task, arguments.out, device, arguments.minutes, arguments.jobs)
    if left:
        print(f"{left} runs are left; the same command goes on with them.", file=sys.stderr)
    return 1 if left else 0


def _picture(arguments: argparse.Namespace) -> int:
    draw(read(arguments.files), arguments.png)
    return 0


def _time(arguments: argparse.Namespace) -> int:
    if arguments.measure:
        layers = DEPTHS if arguments.layers is None else numbers("layers", arguments.layers)
        for name, least in (("batch", 2), ("side", 4), ("rounds", 1), ("threads", 1)):
            _at_least(name, getattr(arguments, name), least)
        _at_least("layers", min(layers), 1)
        with arguments.file.open("a"):  # what cannot be written shows before it is measured
            pass
        a = arguments
        found = measure_all(tuple(layers), a.batch, a.side, a.rounds, a.threads)
        a.file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return _print(time_table(read_results(arguments.file, "steps", "time")))


def _loss(arguments: argparse.Namespace) -> int:
    if arguments.measure:
        a = arguments
        _at_least("images", a.images, 2)
        given = {name: getattr(a, name) for name in ("data", "epochs", "train_images")}
        seeds = numbers("seeds", a.seeds)
        given |= {"seeds": seeds, "depths": [a.depth], "variants": ["mrla"]}
        runs = runs_of(a.plan, given)
        with a.file.open("a"):  # what cannot be written shows before it is measured
            pass
        found = measure_loss(runs, load(runs[0].data, a.root), a.images)
        a.file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return _print(loss_table(read_results(arguments.file, "runs", "loss")))


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name}: got {value}; allowed is an int of at least {least}")


def _print(text: Any) -> int:
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
