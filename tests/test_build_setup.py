"""Whole builds by setup.py, with compilers that are there, missing, or fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("ninja")
pytest.importorskip("pybind11")

from build_tools.commands import build
from build_tools.compilers import BuildError, find_cuda
from build_tools.options import BuildOptionError

ROOT = Path(__file__).resolve().parent.parent

needs_cxx = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler here"
)

# A whole extension module that needs nothing but Python's own header, so that it compiles in no time.
TINY_MODULE = """
#include <Python.h>
#include "cpu/tiny.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's own build files around a tiny extension."""
    return make_project(tmp_path / "project")


def make_project(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("A tiny project.\n")
    shutil.copytree(ROOT / "build_tools", folder / "build_tools")
    for name, text in (
        ("csrc/binding/module.cpp", TINY_MODULE),
        ("csrc/cpu/tiny.h", ""),
        ("csrc/binding/cuda_devices.cpp", ""),
        ("csrc/cuda/common/device_query.cu", ""),
        ("ela_kernels/__init__.py", '__version__ = "0.1.0"\n'),
        ("ela_kernels/py.typed", ""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def build_project(
    project: Path, *arguments: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ELA_", "TORCH_", "CUDA"))}
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ("build", "--build-lib", "out"))],
        cwd=project,
        env={**kept, "CUDA_HOME": "/nonexistent", **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def record_of(folder: Path) -> dict[str, object]:
    record = json.loads((folder / "ela_kernels/_build_info.json").read_text())
    assert isinstance(record, dict)
    return record


def binaries(folder: Path) -> list[Path]:
    return list((folder / "ela_kernels").glob("_C*"))


@needs_cxx
def test_auto_without_nvcc_builds_for_the_cpu_and_says_so(project: Path) -> None:
    done = build_project(project)
    assert done.returncode == 0, done.stderr
    assert "built without CUDA, because CUDA_HOME=/nonexistent holds no bin/nvcc." in done.stderr
    record = record_of(project / "out")
    assert record["built"] is True
    assert record["cuda"] is False
    assert record["cuda_problem"] == "CUDA_HOME=/nonexistent holds no bin/nvcc"
    assert str(project) not in json.dumps(record)
    loaded = subprocess.run(
        [sys.executable, "-c", "import ela_kernels._C as c; print(c.__file__)"],
        cwd=project / "out",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(loaded.stdout.strip()).samefile(binaries(project / "out")[0])


def test_auto_without_a_compiler_installs_pure_python_and_says_why(project: Path) -> None:
    done = build_project(project, CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    sentence = "the C++ compiler named by CXX, '/nonexistent', was not found"
    assert f"installed without its compiled extension, because {sentence}" in done.stderr
    assert record_of(project / "out")["problem"] == sentence
    assert record_of(project / "out")["built"] is False
    assert (project / "out/ela_kernels/__init__.py").exists()
    assert binaries(project / "out") == []


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_forced_build_without_a_compiler_fails(project: Path, mode: str) -> None:
    done = build_project(project, ELA_KERNELS_BUILD=mode, CXX="/nonexistent")
    assert done.returncode != 0
    assert (
        f"ELA_KERNELS_BUILD={mode} was asked for, but the C++ compiler named by CXX" in done.stderr
    )


@needs_cxx
def test_a_forced_cuda_build_without_nvcc_fails(project: Path) -> None:
    done = build_project(project, ELA_KERNELS_BUILD="cuda")
    assert done.returncode != 0
    assert (
        "ELA_KERNELS_BUILD=cuda was asked for, but CUDA_HOME=/nonexistent holds no bin"
        in done.stderr
    )


@needs_cxx
def test_source_that_does_not_compile(project: Path) -> None:
    (project / "csrc/binding/module.cpp").write_text("int broken(\n")
    forced = build_project(project, ELA_KERNELS_BUILD="cpu")
    assert forced.returncode != 0
    assert "module.cpp:1:" in forced.stderr
    auto = build_project(project)
    assert auto.returncode == 0, auto.stderr
    assert str(record_of(project / "out")["problem"]).startswith("compiling failed: ")
    assert binaries(project / "out") == []


@needs_cxx
def test_cuda_that_does_not_compile_leaves_the_cpu_part(project: Path) -> None:
    script(
        project / "toolkit/bin/nvcc",
        'case "$1" in --version) echo "release 13.0, V13.0.1";; --list-gpu-arch|--dryrun) ;;\n'
        "*) echo 'error: unsupported GNU version' >&2; exit 1;; esac",
    )
    auto = build_project(project, CUDA_HOME=str(project / "toolkit"))
    assert auto.returncode == 0, auto.stderr
    record = record_of(project / "out")
    assert (record["built"], record["cuda"]) == (True, False)
    assert record["cuda_problem"] == "compiling failed: error: unsupported GNU version"
    assert len(binaries(project / "out")) == 1
    forced = build_project(project, CUDA_HOME=str(project / "toolkit"), ELA_KERNELS_BUILD="cuda")
    assert forced.returncode != 0
    assert "unsupported GNU version" in forced.stderr


@needs_cxx
def test_in_place_build_replaces_and_removes_the_binary(project: Path) -> None:
    in_place = ("build_ext", "--inplace")
    assert build_project(project, *in_place).returncode == 0
    assert len(binaries(project)) == 1
    assert build_project(project, *in_place, CXX="/nonexistent").returncode == 0
    assert binaries(project) == []
    assert record_of(project)["built"] is False


@needs_cxx
def test_a_build_says_how_long_it_takes_and_what_is_done(project: Path) -> None:
    done = build_project(project, "--quiet", "build", "--build-lib", "out")
    lines = done.stdout.splitlines()
    assert "compiling 1 objects, " in lines[1]
    assert lines[1].endswith(" at once: less than a minute if none is there yet")
    assert re.fullmatch(r"\[1/2\] csrc/binding/module\.cpp, after \d+ s", lines[2])
    assert re.fullmatch(r"\[2/2\] linked\.\S+, after \d+ s", lines[3])
    assert "-fPIC" not in done.stdout


@needs_cxx
def test_warnings_of_a_compiler_are_not_lost(project: Path) -> None:
    with (project / "csrc/binding/module.cpp").open("a") as file:
        file.write("static int nobody_calls_this() { return 1; }\n")
    assert "nobody_calls_this" in build_project(project).stdout


@needs_cxx
def test_a_second_build_compiles_only_what_changed(project: Path) -> None:
    (project / "csrc/binding/other.cpp").write_text("int other() { return 1; }\n")
    assert build_project(project).returncode == 0
    (project / "csrc/binding/other.cpp").write_text("int other() { return 2; }\n")
    again = build_project(project)
    assert "] csrc/binding/other.cpp, after " in again.stdout
    assert "] csrc/binding/module.cpp, after " not in again.stdout


NVCC_CAN = "$HOME a  b'c:d&e(f)#g;h%i*[j]~k|l=ä"
ALL_AT_ONCE = NVCC_CAN + '`m"n\\o$(p)'


@needs_cxx
@pytest.mark.parametrize(
    "name",
    [
        ALL_AT_ONCE,
        "a$c",
        "a\nb",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("a b", "a:b", "a'b", "a&b", "ä", "a(b)", "a#b", "a;b", "$HOME", "a%b")
        ),
    ],
)
def test_a_build_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    project = make_project(tmp_path / name)
    temporary = tmp_path / name / "tmp"
    temporary.mkdir()
    environ = {"ELA_KERNELS_BUILD": "cpu", "TMPDIR": str(temporary)}
    done = build_project(project, **environ)
    assert done.returncode == 0, done.stderr
    assert len(binaries(project / "out")) == 1
    compiles = "] csrc/binding/module.cpp, after "
    assert compiles in done.stdout
    # The compiler writes down what a source includes, and ninja reads it.
    assert compiles not in build_project(project, **environ).stdout
    (project / "csrc/cpu/tiny.h").write_text("int other();\n")
    assert compiles in build_project(project, **environ).stdout


@needs_cxx
def test_objects_of_another_checkout_are_not_taken(tmp_path: Path) -> None:
    here, there = (make_project(tmp_path / name) for name in ("here", "there"))
    for project in (here, there):
        done = build_project(
            project, "build", "--build-lib", "out", "--build-temp", str(tmp_path / "shared")
        )
        assert "] csrc/binding/module.cpp, after " in done.stdout


@needs_cxx
@pytest.mark.parametrize("name", ["project", NVCC_CAN])
def test_cuda_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    try:
        find_cuda({})
    except BuildError as error:
        pytest.skip(str(error))
    project = make_project(tmp_path / name)
    (project / "csrc/cuda/common/device_query.cu").write_text(
        '#include "cuda/tiny.cuh"\n__global__ void set(int* x) { *x = 1; }\n'
    )
    (project / "csrc/cuda/tiny.cuh").write_text("int other();\n")
    (project / "tmp").mkdir()
    environ = {"ELA_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": ""}
    done = build_project(project, **environ, TMPDIR=str(project / "tmp"))
    assert done.returncode == 0, done.stderr
    assert record_of(project / "out")["cuda"] is True
    (folder,) = project.glob("build/temp*")
    assert not list(folder.glob("tmpxft*"))  # what nvcc writes meanwhile


@needs_cxx
@pytest.mark.parametrize("characters", ["`", '"', "\\", "$(", "${"])
def test_a_folder_where_nvcc_would_run_a_command(tmp_path: Path, characters: str) -> None:
    """The name is refused, and the part for the CPU built all the same."""
    toolkit = script(
        tmp_path / "bin/nvcc",
        'case "$1" in --version) echo "release 13.0, V13.0.1";; --list-gpu-arch|--dryrun) ;;\n'
        "*) echo 'it was run' >&2; exit 1;; esac",
    )
    project = make_project(tmp_path / f"a{characters}b")
    done = build_project(project, CUDA_HOME=str(toolkit.parents[1]))
    assert done.returncode == 0, done.stderr
    record = record_of(project / "out")
    assert (record["built"], record["cuda"]) == (True, False)
    assert str(record["cuda_problem"]).startswith("nvcc cannot compile in ")
    assert f"a shell read {characters!r}; allowed is a folder" in str(record["cuda_problem"])


def test_an_environment_in_a_folder_with_a_dollar(tmp_path: Path) -> None:
    """setuptools reads `$name` in the path of the interpreter's environment, and knows no such variable."""
    venv.create(tmp_path / "a$c$HOME" / "venv", symlinks=True)
    python = tmp_path / "a$c$HOME" / "venv" / "bin" / "python"
    project = make_project(tmp_path / "a$c$HOME" / "project")
    program = f"""
import sys
sys.path[1:1] = {[p for p in sys.path if p]!r}
sys.argv = ["setup.py", "-q", "install", "--root", "out", "--single-version-externally-managed"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {{"__file__": "setup.py", "__name__": "__main__"}})
"""
    done = subprocess.run(
        [python, "-c", program],
        cwd=project,
        env={**os.environ, "ELA_KERNELS_BUILD": "none"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((project / "out").rglob("ela_kernels/__init__.py"))


def test_none_builds_nothing(project: Path) -> None:
    done = build_project(project, ELA_KERNELS_BUILD="none", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert record_of(project / "out")["problem"] == "it was left out by ELA_KERNELS_BUILD=none"


def test_unknown_options_are_errors(project: Path) -> None:
    done = build_project(project, ELA_KERNELS_BUILD="fast")
    assert done.returncode != 0
    assert "ELA_KERNELS_BUILD='fast'; allowed are auto, cpu, cuda, none" in done.stderr


@needs_cxx
def test_a_bad_job_count_is_an_error_even_under_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildOptionError, match="MAX_JOBS='many'"):
        build("auto", tmp_path / "_C.so", tmp_path)


@pytest.mark.slow
@needs_cxx
def test_wheel_of_the_real_sources_from_an_sdist(tmp_path: Path) -> None:
    """The sdist holds all that a build needs, and the wheel holds the module and no sources."""
    clone = tmp_path / "clone"
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("build_tools", "csrc", "ela_kernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, clone)
    environ = {**os.environ, "ELA_KERNELS_BUILD": "cpu"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path / "sdist")],
        cwd=clone,
        env=environ,
        check=True,
    )
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")],
        cwd=unpacked,
        env=environ,
        check=True,
    )
    package = tmp_path / "lib/ela_kernels"
    assert (package / "py.typed").exists()
    assert len(binaries(tmp_path / "lib")) == 1
    assert not list(package.rglob("*.cpp"))
    expected = {str(p.relative_to(clone)) for p in clone.glob("ela_kernels/**/*.py")}
    assert {str(p.relative_to(package.parent)) for p in package.rglob("*.py")} == expected


def test_a_missing_build_package_is_named(project: Path) -> None:
    for name in ("ninja", "pybind11"):
        (project / f"{name}.py").write_text(f"raise ImportError('hidden', name='{name}')\n")
        done = build_project(project, PYTHONPATH=str(project))
        assert done.returncode == 0, done.stderr
        expected = f"the Python package {name}, which a build needs, is missing"
        assert record_of(project / "out")["problem"] == expected
        (project / f"{name}.py").unlink()
