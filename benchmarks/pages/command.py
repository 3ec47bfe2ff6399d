"""Write the tables and pictures of README and docs from the files of results that they name.

python -m benchmarks pages            all pages that have some; a picture that shows something else is drawn anew
python -m benchmarks pages --check    exit status 1 where a page or a picture has other numbers than its files
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages.filling import filled, has_tables
from benchmarks.pages.pictures import has_pictures, pictures

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """README and the pages of docs/ that have tables or pictures."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = ((path, path.read_text(encoding="utf-8")) for path in candidates)
    return [path for path, text in texts if has_tables(text) or has_pictures(text)]


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
            drawn = [p for p in pictures(before, path.parent, ROOT) if p.is_stale]
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        said = "has other numbers than its files" if arguments.check else "written"
        for picture in drawn:
            print(f"{picture.path}: {said}")
            if not arguments.check:
                picture.write()
        if before != after:
            print(f"{path}: {said}")
            if not arguments.check:
                path.write_text(after, encoding="utf-8")
        stale = stale or bool(drawn) or before != after
    return 1 if stale and arguments.check else 0
