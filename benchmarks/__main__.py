"""The programs in this folder, by name.

python -m benchmarks run --quick --out results/bench     what layer attention costs, against its rivals
python -m benchmarks compare HEAD~1                      what a change did to it: two checkouts in turns
python -m benchmarks study run --plan two-hours ...      what it buys: networks trained with and without it
python -m benchmarks pages                               tables and pictures in README and docs, from files of results
"""

from __future__ import annotations

import importlib
import sys

# Imported when asked for: of one program's libraries the others have no need.
PROGRAMS = {
    "run": "benchmarks.run",
    "compare": "benchmarks.compare.command",
    "study": "benchmarks.study.__main__",
    "pages": "benchmarks.pages.command",
}


def main(argv: list[str] | None = None) -> int:
    """Hand what follows the name to the program; its exit status, 2 for a name that is none."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if name not in PROGRAMS:
        allowed = ", ".join(PROGRAMS)
        print(
            f"program: got {name!r}; allowed are {allowed}. For instance: python -m benchmarks compare HEAD~1",
            file=sys.stderr,
        )
        return 2
    status = importlib.import_module(PROGRAMS[name]).main(rest[:-1])
    return 0 if status is None else int(status)


if __name__ == "__main__":
    sys.exit(main())
