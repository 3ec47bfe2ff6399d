"""Write the tables of README and docs from the files of results that they name.

python -m benchmarks pages            all pages that have tables
python -m benchmarks pages --check    exit status 1 where a page has other numbers than its files
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages.filling import filled, has_tables

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """README and the pages of docs/ that have tables."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in candidates if has_tables(path.read_text(encoding="utf-8"))]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pages", nargs="*", type=Path, help="such pages only")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args(argv)
    stale = False
    for path in arguments.pages or pages():
        try:
            before = path.read_text(encoding="utf-8")
            after = filled(before, ROOT)
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        if before == after:
            continue
        stale = True
        print(f"{path}: {'has other numbers than its files' if arguments.check else 'written'}")
        if not arguments.check:
            path.write_text(after, encoding="utf-8")
    return 1 if stale and arguments.check else 0
