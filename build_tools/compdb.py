"""Writes compile_commands.json, from which editors and clang's tools learn how each source is compiled.

The commands are those of the ninja file that a build here would write. They run in the root of the checkout, whose
`csrc` has the name that it has in the folder of a build. Without nvcc the CUDA sources are left out, and it is said.

    python -m build_tools.compdb
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from build_tools.compilers import NVCC_TMPDIR, BuildError, find_cuda, find_cxx
from build_tools.ninja_file import Plan, environment_flags, ninja_text

ROOT = Path(__file__).resolve().parent.parent
NAME = "compile_commands.json"


def compile_commands(plan: Plan) -> list[dict[str, str]]:
    """One entry for each source of a plan, as the JSON compilation database format has them."""
    import ninja

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "build.ninja").write_bytes(os.fsencode(ninja_text(plan)))
        entries: list[dict[str, str]] = json.loads(
            subprocess.run(
                [str(Path(ninja.BIN_DIR, "ninja")), "-t", "compdb", "cxx", "nvcc"],
                cwd=folder,
                capture_output=True,
                check=True,
            ).stdout
        )
    # Tools take the first word for the compiler.
    prefix = f"TMPDIR={NVCC_TMPDIR} "
    return [
        entry | {"directory": str(plan.root), "command": entry["command"].removeprefix(prefix)}
        for entry in entries
    ]


def main(root: Path = ROOT) -> int:
    try:
        cxx = find_cxx(os.environ)
    except BuildError as error:
        print(f"{NAME} was not written, because {error}", file=sys.stderr)
        return 1
    try:
        cuda = find_cuda(os.environ)
    except BuildError as error:
        print(f"{NAME}: without the CUDA sources, because {error}", file=sys.stderr)
        cuda = None
    compile_flags, link_flags = environment_flags(os.environ)
    plan = Plan(root, root / "unused.so", cxx, cuda, [], compile_flags, link_flags)
    entries = compile_commands(plan)
    (root / NAME).write_text(json.dumps(entries, indent=2) + "\n")
    print(f"{NAME}: {len(entries)} sources")
    return 0


if __name__ == "__main__":
    sys.exit(main())
