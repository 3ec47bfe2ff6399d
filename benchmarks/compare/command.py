"""Whether a change made something slower: the short rows of two checkouts, measured in turns.

python -m benchmarks compare HEAD~1                       that commit, built in a temporary worktree, and this checkout
python -m benchmarks compare ../before                    a checkout that is built
python -m benchmarks compare main --rows 'block/*'        such rows only; --list prints them
python -m benchmarks compare . --json same.json           A/A: nothing should be marked

Ratios are NEW over BASE: above 1 is slower. Exit status: 0, nothing is slower; 1, a row is, beyond noise; 2, arguments
that do not fit, or a row that was not measured though both should run it with the same numbers, or none at all; 130,
stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.compare.checkouts import (
    ROOT,
    Checkout,
    base_checkout,
    built_checkout,
    is_older_than_sources,
)
from benchmarks.compare.judging import SLOWER, Judgement, judge, least_rounds, level_for
from benchmarks.compare.measuring import Found, Plan, measure
from benchmarks.compare.processes import BASE, NEW, Options, ProcessError, RowError
from benchmarks.compare.rows import Row, all_rows
from benchmarks.environment import MALLOC_SETTINGS, describe
from benchmarks.tables import table

# Of the last minute: a machine that does nothing else is well below it, and one process that always runs is above.
MOST_LOAD = 0.7


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("base", nargs="?", metavar="BASE", help="a revision of git, or a checkout that is built")
    add("--new", type=Path, default=ROOT, metavar="PATH", help="another checkout than this one")
    add("--rows", action="append", metavar="PATTERN", help="such rows only, as in a shell; again")
    add("--list", action="store_true", help="print the names of the rows, and measure nothing")
    add("--rounds", type=int, default=18, help="of each row, in all (default: %(default)s)")
    add("--starts", type=int, default=3, help="of both processes (default: %(default)s)")
    add("--margin", type=float, default=0.03, help="that counts as noise (default: %(default)s)")
    add("--threads", type=int, help="torch.set_num_threads; PyTorch's choice if not given")
    add(
        "--malloc",
        choices=tuple(MALLOC_SETTINGS),
        default="kept",
        help="kept: memory is not given back, without which page faults are most of the noise (default: %(default)s)",
    )
    add("--compile", action="store_true", help="rows of torch.compile too: minutes more")
    add("--json", type=Path, metavar="FILE", help="write every sample and the machine")
    return parser


def chosen_rows(patterns: Sequence[str] | None, compiled: bool) -> list[Row]:
    """The rows whose names match.

    Raises:
        ValueError: a pattern that matches none.
    """
    rows = all_rows(compiled)
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            kinds = ", ".join(dict.fromkeys(row.name.split("/")[0] + "/*" for row in rows))
            raise ValueError(
                f"--rows: got {pattern!r}, which no row matches; allowed are patterns such as {kinds}. See --list"
            )
    return [r for r in rows if any(fnmatch.fnmatchcase(r.name, p) for p in patterns or ("*",))]


def check_numbers(arguments: argparse.Namespace, rows: int) -> None:
    """Refuse counts and a margin with which nothing could be found.

    Raises:
        ValueError: the argument, by name.
    """
    least = {"starts": 1, "rounds": max(least_rounds(rows), arguments.starts)}
    if arguments.threads is not None:
        least["threads"] = 1
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value < lowest:
            why = f" for {rows} row{'s' * (rows != 1)}" if name == "rounds" else ""
            raise ValueError(f"--{name}: got {value}; allowed is an int of at least {lowest}{why}")
    if not 0 <= arguments.margin < 1:
        raise ValueError(
            f"--margin: got {arguments.margin}; allowed is a number from 0 up to 1, such as 0.03"
        )


def check_can_write(file: Path) -> None:
    """What cannot be written shows before anything is measured.

    Raises:
        ValueError: the file cannot be opened.
    """
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise ValueError(
            f"--json: got {str(file)!r}, which cannot be written ({error.strerror}); allowed is a file in a folder "
            "that is there"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print the table; the exit status, as the module says."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        rows = chosen_rows(arguments.rows, arguments.compile)
        if arguments.list:
            print("\n".join(row.name for row in rows))
            return 0
        if not arguments.base:
            raise ValueError(
                "BASE: got nothing; allowed is a revision of git or the folder of a checkout that is built"
            )
        check_numbers(arguments, len(rows))
        if arguments.json is not None:
            check_can_write(arguments.json)
        with ended_by_signals():
            return _compare(arguments, rows)
    except (ValueError, OSError, ProcessError, RowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ends as after Ctrl-C when this process is told to; told again, it goes on to remove what it has made."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compare(arguments: argparse.Namespace, rows: list[Row]) -> int:
    plan = Plan(arguments.rounds, arguments.starts)
    options = Options(arguments.threads, arguments.malloc, arguments.compile)
    machine, begin = describe(arguments.threads), time.perf_counter()
    busy = note_on_load(machine["load_before"][0])
    if busy:
        print(busy, file=sys.stderr)
    new = built_checkout("--new", arguments.new)
    with base_checkout(arguments.base, new.path) as base:
        for side, checkout in ((BASE, base), (NEW, new)):
            print(f"{side}: {checkout}", file=sys.stderr)
            if is_older_than_sources(checkout):
                print(f"{side}: csrc/ changed after its extension was built", file=sys.stderr)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="ela-compare-") as folder:
            found = measure(base, new, rows, plan, Path(folder).resolve(), options)
    measured = time.perf_counter() - start
    level = level_for(len(rows))
    judged = {n: judge(t.ratios(), level, arguments.margin) for n, t in found.times.items()}
    print(report(base, new, found, judged, arguments.margin))
    if busy:
        print(busy)
    print(
        f"measured in {measured:.0f} s, {time.perf_counter() - begin:.0f} s in all", file=sys.stderr
    )
    if arguments.json is not None:
        settings = plan._asdict() | options._asdict() | {"margin": arguments.margin, "level": level}
        results = as_json(base, new, found, judged) | {"machine": machine, "settings": settings}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return status(found, judged)


def note_on_load(load: float) -> str:
    """A sentence where other processes had the cores before the first of ours; empty otherwise."""
    if load < MOST_LOAD:
        return ""
    return (
        f"The load was {load:.2f} before the start. Where other processes run, intervals are wide, and what is slower "
        "is not found: measure on a machine that does nothing else."
    )


def status(found: Found, judged: dict[str, Judgement]) -> int:
    """The exit status: something is slower, or was not measured though it should, or neither."""
    if any(judgement.mark == SLOWER for judgement in judged.values()):
        return 1
    return 2 if not judged or any(left.is_fault for left in found.left_out.values()) else 0


def report(
    base: Checkout, new: Checkout, found: Found, judged: dict[str, Judgement], margin: float
) -> str:
    """A table of all rows, and a sentence on those that are marked."""
    cells = []
    for name, row in judged.items():
        times = [time_text(found.times[name].median(side)) for side in (BASE, NEW)]
        interval = f"{row.low:.3f} to {row.high:.3f}"
        starts = " ".join(f"{ratio:.3f}" for ratio in row.starts)
        cells.append([name, *times, f"{row.ratio:.3f}", interval, starts, row.mark])
    head = ["row", "BASE", "NEW", "NEW / BASE", "interval", "by start", ""]
    lines = [f"BASE: {base}", f"NEW: {new}", ""]
    if is_same(base, new):
        lines.insert(2, "The same code twice: what is marked is noise.")
    lines += [*table(head, cells), ""] if cells else []
    lines += [f"{name} is not measured: {left.why}" for name, left in found.left_out.items()]
    marked = [f"{n} is {j.mark}: {j.ratio:.3f}" for n, j in judged.items() if j.mark]
    beyond = f"beyond noise and {100 * margin:g} %"
    lines += [f"{len(marked)} of {len(judged)} rows differ {beyond}.", *marked]
    return "\n".join(lines)


def is_same(base: Checkout, new: Checkout) -> bool:
    """Whether both are the same code: one folder, or one commit without changes."""
    is_commit = base.commit is not None and not (base.is_dirty or new.is_dirty)
    return base.path == new.path or (is_commit and base.commit == new.commit)


def time_text(seconds: float) -> str:
    """Microseconds below a millisecond, else milliseconds."""
    return f"{1e6 * seconds:.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def as_json(
    base: Checkout, new: Checkout, found: Found, judged: dict[str, Judgement]
) -> dict[str, Any]:
    """Everything that was measured; seconds by side, start and round, each a measurement's median step."""
    checkouts = {
        side: checkout._asdict() | {"path": str(checkout.path)} | found.facts[side]
        for side, checkout in ((BASE, base), (NEW, new))
    }
    rows = {name: found.times[name]._asdict() | row._asdict() for name, row in judged.items()}
    left_out = {name: left._asdict() for name, left in found.left_out.items()}
    return {"checkouts": checkouts, "rows": rows, "left_out": left_out}
