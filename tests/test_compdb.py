"""The compilation database that `make compdb` writes for editors."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("ninja")
pytest.importorskip("pybind11")

from build_tools import compdb
from build_tools.compilers import BuildError, CudaCompiler, CxxCompiler, find_cxx
from build_tools.ninja_file import AVX2_FLAGS, Plan
from build_tools.options import parse_architectures

ROOT = Path(__file__).resolve().parent.parent
CXX = CxxCompiler(["g++"], "g++ 12", "x86_64-linux-gnu", has_avx512_bf16=True)
CUDA = CudaCompiler("/cuda/bin/nvcc", "13.0", parse_architectures("9.0"), [])


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for x in patterns for p in (ROOT / "csrc").rglob(x))


@pytest.mark.parametrize("cuda", [CUDA, None])
def test_every_source_once_with_its_command(cuda: CudaCompiler | None) -> None:
    entries = compdb.compile_commands(Plan(ROOT, ROOT / "unused.so", CXX, cuda))
    files = sorted(entry["file"] for entry in entries)
    if cuda is None:
        expected = [name for name in sources("*.cpp") if "binding/cuda" not in name]
    else:
        expected = sources("*.cpp", "*.cu")
        assert len([name for name in files if name.endswith(".cu")]) > 10
    assert files == sorted(expected)
    for entry in entries:
        words = shlex.split(entry["command"])
        assert words[0] == ("/cuda/bin/nvcc" if entry["file"].endswith(".cu") else "g++")
        assert words[words.index("-c") + 1] == entry["file"]
        assert Path(entry["directory"], entry["file"]).is_file()
        assert set(AVX2_FLAGS) <= set(words) or "avx" not in entry["file"]


def test_a_command_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in the written file, in the folder that it names."""
    try:
        find_cxx(os.environ)
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    assert compdb.main(tmp_path) == 0
    entries = {entry["file"]: entry for entry in json.loads((tmp_path / compdb.NAME).read_text())}
    entry = entries["csrc/cpu/select.cpp"]
    command = [*shlex.split(entry["command"]), "-fsyntax-only"]
    (tmp_path / entry["output"]).parent.mkdir(parents=True)
    done = subprocess.run(
        command, cwd=entry["directory"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not any(name.endswith(".cu") for name in entries)


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("CXX", "/nonexistent")
    assert compdb.main(Path("/nonexistent")) == 1
    assert "'/nonexistent', was not found" in capsys.readouterr().err
