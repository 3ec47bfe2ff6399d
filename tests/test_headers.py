"""Headers compile alone, and include only what lies below them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("pybind11")

from build_tools import headers
from build_tools.compilers import BuildError, find_cxx

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# What a folder's files may include besides their own: the bindings know the kernels, and no kernel those of another
# device, so that a change to the one does not rebuild the other.
BELOW = {
    "": set(),
    "cpu": {""},
    "cuda/common": {""},
    "cuda/attention": {"", "cuda/common"},
    "cuda/layer": {"", "cuda/common", "cuda/attention"},
    "cuda/norm": {"", "cuda/common"},
    "cuda/position": {"", "cuda/common"},
    "cuda/instances": {"cuda/attention", "cuda/layer", "cuda/norm", "cuda/position"},
    "binding": {
        "",
        "cpu",
        "cuda/common",
        "cuda/attention",
        "cuda/layer",
        "cuda/norm",
        "cuda/position",
    },
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of four headers, of which two do not compile alone."""
    try:
        find_cxx(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    for name, text in (
        ("views.h", "#pragma once\n#include <cstdint>\nstruct View { int64_t batch; };\n"),
        (
            "cpu/uses_what_it_does_not_include.h",
            "#pragma once\ninline View view() { return {}; }\n",
        ),
        ("cpu/has_no_guard.h", '#include "views.h"\nstruct Shape { View view; };\n'),
        (
            "cuda/common/kernel.cuh",
            '#pragma once\n#include <cuda_runtime.h>\n#include "views.h"\n'
            "template <class T> __global__ void kernel(T* x) { x[threadIdx.x] = 0; }\n",
        ),
    ):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copytree(ROOT / headers.STAND_IN, tmp_path / headers.STAND_IN)
    return tmp_path


def test_a_header_that_does_not_compile_alone_is_named(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert headers.main(os.environ, tree) == 1
    said = capsys.readouterr().err
    assert re.findall(r"^(\S+) does not compile alone", said, flags=re.MULTILINE) == [
        "csrc/cpu/has_no_guard.h",
        "csrc/cpu/uses_what_it_does_not_include.h",
    ]
    assert "redefinition of" in said
    assert "'View' does not name a type" in said or "unknown type name 'View'" in said

    (tree / "csrc/cpu/has_no_guard.h").write_text("#pragma once\n")
    (tree / "csrc/cpu/uses_what_it_does_not_include.h").write_text('#include "views.h"\n')
    assert headers.main(os.environ, tree) == 0


def test_nothing_to_look_at_is_no_success(tmp_path: Path) -> None:
    assert headers.main(os.environ, tmp_path) == 1


def test_every_header_is_looked_at() -> None:
    folders = (CSRC, ROOT / "tests" / "native")
    every = {
        path.relative_to(ROOT)
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in {".h", ".cuh", ".hpp", ".hh"}
    }
    assert len(every) > 40
    assert set(headers.headers(ROOT)) == every


def sources(folder: str) -> list[Path]:
    return [path for path in (CSRC / folder).iterdir() if path.is_file()]


def test_every_source_lies_in_a_known_folder() -> None:
    known = {path for folder in BELOW for path in sources(folder)}
    assert {path for path in CSRC.rglob("*") if path.is_file()} == known


@pytest.mark.parametrize("folder", BELOW)
def test_a_source_includes_only_what_lies_below(folder: str) -> None:
    assert sources(folder)
    for source in sources(folder):
        for name in re.findall(r'^ *# *include "(.+)"', source.read_text(), flags=re.MULTILINE):
            assert (CSRC / name).is_file(), f"{source}: {name} is not named by its place in csrc"
            parent = str(Path(name).parent).removeprefix(".")
            assert parent in {folder, *BELOW[folder]}, f"{source} includes {name}"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_lint_formats_every_native_source() -> None:
    done = subprocess.run(
        ["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    every = {
        str(path.relative_to(ROOT))
        for folder in (CSRC, ROOT / "tests" / "native")
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert every <= set(done.stdout.split())
    assert "-m build_tools.headers" in done.stdout
