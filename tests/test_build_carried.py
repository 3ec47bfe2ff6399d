"""Objects that were compiled elsewhere: taken while nothing that they are made from has changed."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("ninja")
pytest.importorskip("pybind11")

from build_tools import carried, options
from build_tools.carried import carried_in, carried_names
from build_tools.compilers import CudaCompiler, CxxCompiler, find_cxx
from build_tools.ninja_file import Plan, compile_plan, ninja_text, object_of
from build_tools.options import Architecture, BuildOptionError

MODULE = """
#include <Python.h>
#include "cpu/tiny.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
SOURCES = {
    "binding/module.cpp": MODULE,
    "cpu/select.cpp": "",
    "cpu/tiny.h": "",
    "cuda/norm/parts.cu": "",
    "cuda/norm/parts.cuh": "",
}
CXX = CxxCompiler(["g++"], "g++ 12", "x86_64-linux-gnu", ["-fopenmp"], ["-fopenmp"])
CUDA = CudaCompiler("/opt/nvcc", "13.0.88", [Architecture("9.0")], [])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        path = tmp_path / "tree" / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "tree"


def plan_of(tree: Path) -> Plan:
    return Plan(tree, tree / "_C.so", CXX, CUDA)


def filled(plan: Plan, folder: Path) -> Path:
    folder.mkdir()
    for name in carried_names(plan).values():
        (folder / name).touch()
    return folder


def stale(plan: Plan, folder: Path) -> set[str]:
    """The sources that `plan` compiles all the same."""
    return {source.name for source in set(plan.sources()) - set(carried_in(plan, folder))}


ALL = {"module.cpp", "select.cpp", "parts.cu"}


def test_what_an_object_is_made_from(tree: Path, tmp_path: Path) -> None:
    plan = plan_of(tree)
    folder = filled(plan, tmp_path / "objects")
    assert stale(plan, folder) == set()
    newer = replace(CUDA, architectures=[Architecture("9.0"), Architecture("10.0")])
    assert stale(replace(plan, cuda=newer), folder) == {"parts.cu"}
    assert stale(replace(plan, cuda=replace(CUDA, version="13.1.5")), folder) == {"parts.cu"}
    assert stale(replace(plan, extra_compile=["-g"]), folder) == {"module.cpp", "select.cpp"}
    assert stale(replace(plan, cxx=replace(CXX, target="aarch64-linux-gnu")), folder) == ALL
    assert stale(replace(plan, cuda=None), folder) == {"module.cpp"}  # without -DELA_WITH_CUDA
    (tree / "csrc/cuda/norm/parts.cuh").write_text("// changed\n")
    assert stale(plan, folder) == ALL


def test_where_the_compilers_lie_does_not_matter(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tree)
    folder = filled(plan, tmp_path / "objects")
    moved = shutil.copytree(tree, tmp_path / "elsewhere")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: f"/elsewhere/{name}")
    other = CxxCompiler(["/opt/g++-14"], "g++ 14", CXX.target, ["-fopenmp"], ["-fopenmp"])
    nvcc = CudaCompiler("/elsewhere/nvcc", "13.0.48", CUDA.architectures, ["-L/elsewhere"])
    assert stale(Plan(moved, moved / "_C.so", other, nvcc), folder) == set()


def test_the_binding_is_for_one_python(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tree)
    folder = filled(plan, tmp_path / "objects")
    monkeypatch.setattr(carried.sysconfig, "get_config_var", lambda name: ".cpython-399.so")
    assert stale(plan, folder) == {"module.cpp"}


def test_carried_objects_are_linked_and_not_compiled(tree: Path, tmp_path: Path) -> None:
    plan = plan_of(tree)
    folder = filled(plan, tmp_path / "objects")
    (folder / carried_names(plan)[tree / "csrc/cpu/select.cpp"]).unlink()
    text = ninja_text(replace(plan, carried=carried_in(plan, folder)))
    edges = [line for line in text.splitlines() if line.startswith("build ")]
    assert len(edges) == 2
    assert edges[0].startswith("build objects/cpu/select.cpp.o: cxx")
    assert edges[1].count(" carried/") == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_a_build_of_carried_objects(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(tree, tmp_path / "_C.so", find_cxx({"CXX": "g++"}), None)
    compile_plan(plan, tmp_path / "there", 1)
    folder = tmp_path / "objects $HOME"
    folder.mkdir()
    for source, name in carried_names(plan).items():
        shutil.copy(tmp_path / "there" / object_of(plan, source), folder / name)
    plan.output.unlink()
    capsys.readouterr()
    here = tmp_path / "here"
    compile_plan(replace(plan, carried=carried_in(plan, folder)), here, 1)
    assert plan.output.exists()
    assert "[1/1]" in capsys.readouterr().out
    assert not (here / "objects").exists()
    (tree / "csrc/cpu/tiny.h").write_text("// changed\n")
    compile_plan(replace(plan, carried=carried_in(plan, folder)), here, 1)
    assert "[3/3]" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert options.carried_objects({}) is None
    assert options.carried_objects({"ELA_KERNELS_OBJECTS": str(tmp_path)}) == tmp_path
    with pytest.raises(BuildOptionError, match=r"ELA_KERNELS_OBJECTS='nowhere'; allowed is"):
        options.carried_objects({"ELA_KERNELS_OBJECTS": "nowhere"})
