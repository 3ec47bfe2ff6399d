"""A page with its tables as the files of results have them.

A table begins with `<!-- table: KIND FILE -->`, the file relative to the root of the repository, and ends with
`<!-- end of table -->`. What stands between is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.pages import speed
from benchmarks.pages.demo import demo
from benchmarks.pages.detection import detection
from benchmarks.study.loss import loss_table
from benchmarks.study.records import read, read_results
from benchmarks.study.steps import time_table
from benchmarks.study.tables import accuracy_tables, decision_tables
from benchmarks.tables import Results

Maker = Callable[[Path], str]


def _of_run(make: Callable[[Results], Iterator[str]]) -> Maker:
    """From the `results.json` of a run.

    Raises:
        ValueError: the file holds something else, or not the part of a run that the table is of.
    """

    def table(path: Path) -> str:
        try:
            return "\n".join(make(json.loads(path.read_text(encoding="utf-8")))) + "\n"
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"file: got {path}, which does not hold what the table needs ({error!r}); allowed is a results.json of "
                "`python -m benchmarks run`, with that part"
            ) from error

    return table


TABLES: dict[str, Maker] = {
    "accuracy": lambda path: accuracy_tables(read([path])),
    "decisions": lambda path: decision_tables(read([path])),
    "time": lambda path: time_table(read_results(path, "steps", "time")),
    "loss": lambda path: loss_table(read_results(path, "runs", "loss")),
    "demo": _of_run(demo),
    "detection": _of_run(detection),
    **{name: _of_run(make) for name, make in speed.TABLES.items()},
}
_SECTION = re.compile(r"<!-- table: (\S+) (\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


def has_tables(text: str) -> bool:
    """Whether a page has a table to fill."""
    return _SECTION.search(text) is not None


def filled(text: str, root: Path) -> str:
    """The page with its tables. Where a file is not there yet the page says so.

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
