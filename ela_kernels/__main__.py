"""`python -m ela_kernels`: the report on this installation, a benchmark, and the training program."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ela_kernels import interrupts
from ela_kernels.command_line import PROGRAM, Parser, ended, nearest


class _Command(NamedTuple):
    """What a command does, and the function that runs it: imported when it is asked for."""

    text: str
    module: str
    function: str = "main"


COMMANDS = {
    "info": _Command(
        "what is installed, how it was built, and which backends can run",
        "ela_kernels.info",
    ),
    "bench": _Command(
        "measure this machine, in two minutes or in fifteen seconds: ours against eager PyTorch",
        "ela_kernels.benching.command",
    ),
    "train": _Command(
        "train a classifier or a detector with layer attention",
        "ela_kernels.training.cli",
    ),
    "explain": _Command(
        "of a trained network: which kernels serve each layer, and why not better ones",
        "ela_kernels.training.inspecting",
        "explain_run",
    ),
    "analyze": _Command(
        "of a trained network: what its layers retrieve, and which of them EBQM would skip",
        "ela_kernels.training.inspecting",
        "analyze_run",
    ),
}


def _parser() -> Parser:
    parser = Parser(
        "",
        "Fused kernels for layer attention, and ELA, which skips the retrievals that repeat themselves.",
        "command [options]",
        [
            (
                "train --epochs 16 --out runs/digits",
                "train on the handwritten digits of scikit-learn",
            ),
            ("analyze runs/digits", "what the layers of that network retrieve"),
        ],
    )
    parser.section("commands", [(name, command.text) for name, command in COMMANDS.items()])
    add = parser.group("options")
    add("--version", action="store_true", help="print the version and leave")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        Its exit status: 0 when done, 1 for something that failed on the way, 2 for a command line or data that do not
        fit, and of signals what a shell makes of them: 130 for Ctrl-C, 141 where nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ended(lambda: _run(arguments))


def program() -> int:
    """:func:`main` for a process that does nothing else, which Ctrl-C ends in one line at any time."""
    interrupts.raise_as_usual()
    try:
        return main()
    finally:
        interrupts.leave_to_the_system()


def _run(arguments: Sequence[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in COMMANDS:
        command = COMMANDS[name]
        run: Any = getattr(importlib.import_module(command.module), command.function)
        return int(run(rest) or 0)
    if name and not name.startswith("-"):
        near = nearest(name, COMMANDS)
        meant = f"did you mean {near}? Allowed" if near else "allowed"
        print(f"error: command: got {name!r}; {meant} are {', '.join(COMMANDS)}", file=sys.stderr)
        print(f"{PROGRAM} --help lists what there is.", file=sys.stderr)
        return 2
    parser = _parser()
    if parser.parse_args(arguments).version:
        from ela_kernels import __version__

        print(__version__)
        return 0
    parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(program())
