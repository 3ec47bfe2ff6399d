"""`python -m ela_kernels`: the report on this installation, and the training program."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ela_kernels")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="command")
    info = commands.add_parser(
        "info", help="what is installed, how it was built, and which backends can run"
    )
    info.add_argument("--json", action="store_true", help="print the report as JSON")
    commands.add_parser("train", help="train a network with layer attention", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        from ela_kernels.training.cli import main as train

        return train(arguments[1:]) or 0
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.version:
        from ela_kernels import __version__

        print(__version__)
        return 0
    if options.command == "info":
        from ela_kernels.info import print_report

        print_report(as_json=options.json)
        return 0
    parser.print_help()
    return 2


if __name__ == "__main__":
    sys.exit(main())
