"""The tables in a page of documentation, written from the files of results that the page names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study.loss import loss_table
from benchmarks.study.records import read
from benchmarks.study.steps import time_table
from benchmarks.study.tables import accuracy_tables, decision_tables

TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": lambda path: accuracy_tables(read([path])),
    "decisions": lambda path: decision_tables(read([path])),
    "time": lambda path: time_table(read_results(path, "steps", "time")),
    "loss": lambda path: loss_table(read_results(path, "runs", "loss")),
}
_SECTION = re.compile(r"<!-- table: (\S+) (\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


def read_results(path: Path, name: str, command: str) -> dict[str, Any]:
    """The results of `command --measure`, which hold `name`.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"file: got {path}, which cannot be read ({error}); allowed is a file that `{command} --measure` wrote"
        ) from error
    if not isinstance(found, dict) or not {"machine", name} <= found.keys():
        raise ValueError(
            f"file: got {path}, which has no 'machine' and {name!r}; allowed is a file that `{command} --measure` wrote"
        )
    return found


def filled(text: str, root: Path) -> str:
    """The page with the tables as the files have them, each between its two marks.

    A table begins with `<!-- table: KIND FILE -->`, the file relative to `root`, and ends with `<!-- end of table -->`.
    Where the file is not there yet the page says so.

    Raises:
        ValueError: a kind of table that there is not, or a file that holds something else.
    """

    def table(match: re.Match[str]) -> str:
        kind, name, _ = match.groups()
        if kind not in TABLES:
            raise ValueError(f"page: got the table {kind!r}; allowed are {', '.join(TABLES)}")
        path = root / name
        content = TABLES[kind](path) if path.is_file() else "Not measured yet.\n"
        return f"<!-- table: {kind} {name} -->\n\n{content}\n<!-- end of table -->"

    return _SECTION.sub(table, text)
