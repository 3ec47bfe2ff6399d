"""Write the page of the training program's options, docs/api/command_line.md, from its parser.

python -m build_tools.option_page
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api" / "command_line.md"

_HEAD = """# Options of the training program

```
python -m ela_kernels train [options]
```

What they are for, and recipes: [training](../training.md), [detection](../detection.md). This page is written by
`python -m build_tools.option_page`; `--help` says the same. In brackets stands what is taken if nothing is given.
"""

# An option's names, and what its parser was told of it.
Option = tuple[tuple[str, ...], dict[str, Any]]


def options() -> list[tuple[str, list[Option]]]:
    """The options in their groups, as they are handed to the parser."""
    from ela_kernels.training import parser

    found: list[tuple[str, list[Option]]] = []

    class Recording(parser.Parser):
        def group(self, title: str) -> Callable[..., None]:
            add, rows = super().group(title), []
            found.append((title, rows))

            def recorded(*names: str, **arguments: Any) -> None:
                rows.append((names, dict(arguments)))
                add(*names, **arguments)

            return recorded

    with mock.patch.object(parser, "Parser", Recording):
        parser.make_parser()
    return found


def _row(names: tuple[str, ...], told: dict[str, Any]) -> str:
    """An option's line: its names, what it takes, what it is for."""
    is_switch = told.get("action") is argparse.BooleanOptionalAction
    if is_switch:
        names = *names, *(f"--no-{name[2:]}" for name in names)
    takes = [str(choice) for choice in told.get("choices") or ()]
    if not takes and told.get("action") is None:
        usual = {int: "N", float: "X", Path: "PATH"}
        takes = [told.get("metavar") or usual.get(told.get("type"), "TEXT")]
    what, default = told.get("help", ""), told.get("default")
    if is_switch and default:
        what += " (on)"
    elif default is not None and not isinstance(default, bool):
        what += f" ({default})"
    cells = (", ".join(f"`{word}`" for word in words) for words in (names, takes))
    return f"| {' | '.join(cells)} | {what.strip()} |".replace("|  |", "| |")


def page() -> str:
    """The page's text."""
    pieces = [_HEAD]
    for title, rows in options():
        lines = "\n".join(_row(*row) for row in rows)
        pieces.append(f"\n## {title}\n\n| option | takes | what |\n|---|---|---|\n{lines}\n")
    return "".join(pieces)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
