"""What all commands of `python -m ela_kernels` have in common: how help looks, what is said of a slip, how they end."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = "python -m ela_kernels"
# Of signals 2 and 13, as shells count them.
INTERRUPTED, NOBODY_READS = 130, 141

_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}
# Columns of help: the least and the most, and how far to the right a description begins at most.
_NARROWEST, _WIDEST, _MOST_LEFT = 40, 100, 28
_JOINED = "\N{NO-BREAK SPACE}"  # a blank where no line ends
Row = tuple[str, str]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What was probably meant, or None."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return found[0] if found else None


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def counted(count: int, one: str, several: str = "") -> str:
    """`1 step`, `2,000 steps`; `several` where that is no `s` at the end of `one`."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


class OneOf:
    """The type of an option that takes one of some names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    def __call__(self, text: str) -> str:
        if text in self.names:
            return text
        near = nearest(text, self.names)
        meant = f"did you mean {near}? Allowed" if near else "allowed"
        raise argparse.ArgumentTypeError(
            f"got {text!r}; {meant} {'are' if len(self.names) > 1 else 'is'} {', '.join(self.names)}"
        )


class Parser(argparse.ArgumentParser):
    """As :class:`argparse.ArgumentParser`, with help in groups that fits a terminal, and a word on what was meant.

    Args:
        command: its name, after that of the program.
        description: what it does.
        takes: what stands behind its name.
        examples: command lines without the program's name, each with what it does.

    Attributes:
        options: an option's action by its name, with dashes, for files that hold options.
    """

    def __init__(
        self,
        command: str,
        description: str,
        takes: str = "[options]",
        examples: Sequence[Row] = (),
    ) -> None:
        prog = f"{PROGRAM} {command}".rstrip()
        usage = f"{prog} {takes}"
        super().__init__(prog=prog, usage=usage, description=description, add_help=False)
        self.options: dict[str, argparse.Action] = {}
        self._sections: list[tuple[str, list[Row]]] = []
        self._examples = examples
        self.add_argument("-h", "--help", action="help")

    def section(self, title: str, rows: Iterable[Row] = ()) -> list[Row]:
        """A part of the help, to which rows may be added."""
        self._sections.append((title, list(rows)))
        return self._sections[-1][1]

    def group(self, title: str) -> Callable[..., None]:
        """A function that adds options to a group of the help: as `add_argument`, with what it takes in the help."""
        rows = self.section(title)

        def add(*names: str, **arguments: Any) -> None:
            text, choices = arguments.pop("help", ""), arguments.pop("choices", None)
            if choices is not None:
                arguments |= {"type": OneOf(choices), "metavar": arguments.get("metavar", "NAME")}
                text += f"{': ' if text else ''}{either(arguments['type'].names)}"
            if "metavar" not in arguments and arguments.get("type") in _METAVARS:
                arguments["metavar"] = _METAVARS[arguments["type"]]
            action = self.add_argument(*names, **arguments)
            action.choices = choices
            rows.append((_invocation(action, names), text + _default(action)))
            self.options |= {name[2:]: action for name in names if name.startswith("--")}

        return add

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        parsed: tuple[argparse.Namespace, list[str]] = self.parse_known_args(args, namespace)
        found, left = parsed
        if left:
            self.error(self._unknown(left))
        return found

    def _unknown(self, left: Sequence[str]) -> str:
        wrong = next((word for word in left if word.startswith("-")), None)
        if wrong is None:
            return f"got {left[0]!r}, which belongs to no option"
        name = wrong.partition("=")[0]
        near = nearest(name, (f"--{option}" for option in self.options))
        return f"{name} is no option" + (f"; did you mean {near}?" if near else "")

    def error(self, message: str) -> NoReturn:
        """End the program with exit status 2."""
        text = message.removeprefix("argument ")
        self.exit(2, f"error: {text}\n{self.prog} --help lists what there is.\n")

    def format_help(self) -> str:
        width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
        sections = [*self._sections]
        if self.options:
            title, rows = sections[-1]
            sections[-1] = title, [*rows, ("-h, --help", "this text")]
        lefts = [len(left) for _, rows in sections for left, _ in rows]
        indent = min(max(lefts, default=0) + 4, _MOST_LEFT)
        lines = [f"usage: {self.usage}", "", *textwrap.wrap(self.description or "", width)]
        for title, rows in sections:
            lines += ["", f"{title}:"]
            for left, text in rows:
                lines += _row(left, text, indent, width)
        if self._examples:
            lines += ["", "examples:"]
            for command, text in self._examples:
                lines += textwrap.wrap(text, width, initial_indent="  # ", subsequent_indent="  # ")
                lines.append(f"  {PROGRAM} {command}")
        return "\n".join(lines) + "\n"


def _invocation(action: argparse.Action, names: Sequence[str]) -> str:
    """How an option is written."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return f"--[no-]{names[0][2:]}"
    value = action.metavar or ""
    if not action.option_strings:
        return str(value)
    if action.nargs == "*":
        value = f"[{value} ...]"
    elif action.nargs == "?":
        value = f"[{value}]"
    return f"{', '.join(names)} {value if action.nargs != 0 else ''}".rstrip()


def _default(action: argparse.Action) -> str:
    """Switches are off, and what has no default says itself what happens."""
    default = action.default
    if isinstance(action, argparse.BooleanOptionalAction):
        return f" (default:{_JOINED}on)" if default else ""
    if default is None or isinstance(default, bool):
        return ""
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f" (default:{_JOINED}{shown})"


def _row(left: str, text: str, indent: int, width: int) -> list[str]:
    lines = textwrap.wrap(text, width - indent, break_on_hyphens=False) or [""]
    lines = [line.replace(_JOINED, " ") for line in lines]
    first = f"  {left}"
    if len(first) + 2 > indent:
        return [first, *(" " * indent + line for line in lines)]
    return [f"{first:<{indent}}{lines[0]}".rstrip(), *(" " * indent + line for line in lines[1:])]


def ended(run: Callable[[], int]) -> int:
    """Run a command; its exit status, also where it is interrupted, or where its output cannot be written."""
    try:
        try:
            return run()
        finally:
            # Here, where it may fail: when Python ends it would say so in its own way.
            sys.stdout.flush()
    except BrokenPipeError:
        forget_output()
        return NOBODY_READS
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        # Of files the commands say it themselves.
        if error.errno not in (errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        forget_output()
        print(f"error: the output could not be written: {error.strerror}", file=sys.stderr)
        return 1


def forget_output() -> None:
    """Have what is left to be printed go nowhere: Python prints it when it ends, and would fail again."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
