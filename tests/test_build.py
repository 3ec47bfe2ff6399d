"""What is built by what: the compilers found, the ninja file, and what a build says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from build_tools import compilers, progress
from build_tools.compilers import (
    BuildError,
    CudaCompiler,
    CxxCompiler,
    find_cuda,
    find_cxx,
    first_error,
)
from build_tools.ninja_file import AVX2_FLAGS, AVX512_FLAGS, Plan, environment_flags, ninja_text
from build_tools.options import Architecture, BuildOptionError

pytest.importorskip("setuptools")
pytest.importorskip("ninja")
pytest.importorskip("pybind11")

needs_cxx = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")), reason="no C++ compiler here"
)


# The ninja file
def fake_cxx(target: str = "x86_64-linux-gnu") -> CxxCompiler:
    return CxxCompiler(["ccache", "g++", "-m64"], "g++ 12", target, ["-fopenmp"], ["-fopenmp"])


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    for name in (
        "binding/module.cpp",
        "binding/cuda_devices.cpp",
        "binding/cuda_norm.cpp",
        "cpu/op_baseline.cpp",
        "cpu/op_avx2.cpp",
        "cpu/op_avx512.cpp",
        "cpu/op_avx512_bf16.cpp",
        "cpu/select.cpp",
        "cuda/common/device_query.cu",
    ):
        path = tmp_path / "with space, $c: cuda" / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "with space, $c: cuda"


def lines_of(text: str) -> list[str]:
    """The lines of a ninja file, those that it continues on the next one put together."""
    return re.sub(r"\$\n *", "", text).splitlines()


def variable_of(text: str, name: str, source: str | None = None) -> list[str]:
    """A variable's words: at the top of the file, or under the edge that builds from `source`."""
    lines = lines_of(text)
    if source is not None:
        start = next(
            i for i, line in enumerate(lines) if line.startswith("build") and source in line
        )
        lines = [line for line in lines[start + 1 : start + 2] if line.startswith(" ")]
    for line in lines:
        if line.strip().startswith(f"{name} = "):
            return shlex.split(line.partition(" = ")[2].replace("$$", "$"))
    return []


def test_ninja_file_cpu(source_tree: Path) -> None:
    plan = Plan(source_tree, source_tree / "out" / "_C.so", fake_cxx(), None)
    text = ninja_text(plan)
    flags = variable_of(text, "cxxflags")
    assert {"-std=c++17", "-O3", "-fPIC", "-fopenmp", "-DELA_X86_SIMD"} <= set(flags)
    assert not {"-march=native", "-ffast-math", "-Ofast"} & set(flags)
    assert "-Icsrc" in flags
    assert source_tree.name not in text  # ninja and nvcc need not take what a user calls a folder
    assert variable_of(text, "flags", "op_avx2.cpp") == AVX2_FLAGS
    assert variable_of(text, "flags", "op_avx512.cpp") == AVX512_FLAGS
    assert variable_of(text, "flags", "op_baseline.cpp") == []
    assert "-DELA_WITH_CUDA" not in text
    # Of the objects alone: a folder of this machine's headers may have any name.
    edges = [
        match.groups()
        for line in lines_of(text)
        if (match := re.match(r"build (.+?): (\w+) ", line))
    ]
    assert {rule for _, rule in edges} == {"cxx", "link"}
    assert not any("cuda" in target for target, rule in edges if rule == "cxx")
    assert not any("cudart" in flag for flag in variable_of(text, "ldflags"))
    assert any(flag.startswith("-isystem") for flag in variable_of(text, "flags", "module.cpp"))


def test_ninja_file_cuda(source_tree: Path) -> None:
    cuda = CudaCompiler("/opt/nvcc", "13.0", [Architecture("9.0", ptx=True)], ["-L/opt/lib"])
    text = ninja_text(Plan(source_tree, source_tree / "_C.so", fake_cxx(), cuda))
    flags = variable_of(text, "nvccflags")
    assert flags[flags.index("-ccbin") + 1] == "g++"
    assert "-gencode=arch=compute_90,code=compute_90" in flags
    assert not {"--use_fast_math", "-use_fast_math"} & set(flags)
    assert "-DELA_WITH_CUDA" in variable_of(text, "flags", "module.cpp")
    assert {"-L/opt/lib", "-lcudart_static"} <= set(variable_of(text, "ldflags"))
    assert "device_query.cu.o: nvcc" in text.replace("$\n", "")


def test_hardware_bfloat16_is_compiled_where_the_compiler_knows_it(source_tree: Path) -> None:
    without = Plan(source_tree, source_tree / "_C.so", fake_cxx(), None)
    assert without.simd_levels() == ["baseline", "avx2", "avx512"]
    assert "op_avx512_bf16.cpp" not in [source.name for source in without.sources()]
    assert "-DELA_X86_BF16" not in without.common_flags()
    plan = replace(without, cxx=replace(fake_cxx(), has_avx512_bf16=True))
    assert plan.simd_levels()[-1] == "avx512_bf16"
    assert "-DELA_X86_BF16" in plan.common_flags()
    text = ninja_text(plan)
    assert variable_of(text, "flags", "op_avx512_bf16.cpp") == [*AVX512_FLAGS, "-mavx512bf16"]
    assert variable_of(text, "flags", "op_avx512.cpp") == AVX512_FLAGS


def test_other_processors_get_the_baseline_alone(source_tree: Path) -> None:
    plan = Plan(source_tree, source_tree / "_C.so", fake_cxx("aarch64-linux-gnu"), None)
    assert [source.name for source in plan.sources()] == [
        "module.cpp",
        "op_baseline.cpp",
        "select.cpp",
    ]
    assert "-DELA_X86_SIMD" not in plan.common_flags()
    assert plan.simd_levels() == ["baseline"]


def test_darwin_links_a_bundle(source_tree: Path) -> None:
    cxx = CxxCompiler(["clang++"], "clang 17", "arm64-apple-darwin24", [], [])
    plan = Plan(source_tree, source_tree / "_C.so", cxx, None)
    assert plan.link_flags() == ["-bundle", "-undefined", "dynamic_lookup"]
    assert not cxx.has_openmp


def test_sanitizers_reach_compiler_and_linker(source_tree: Path) -> None:
    plan = Plan(source_tree, source_tree / "_C.so", fake_cxx(), None, ["address", "undefined"])
    assert "-fsanitize=address,undefined" in plan.common_flags()
    assert "-fsanitize=address,undefined" in plan.link_flags()


def test_environment_flags() -> None:
    environ = {"CPPFLAGS": "-DA='x y'", "CXXFLAGS": "-g", "LDFLAGS": "-Wl,-z,now"}
    assert environment_flags(environ) == (["-DA=x y", "-g"], ["-Wl,-z,now"])
    for name in environ:
        with pytest.raises(
            BuildOptionError, match=rf"{name}=\"it's\": No closing quotation; allowed"
        ):
            environment_flags({name: "it's"})


@pytest.mark.parametrize(
    "flag", ["-DA=$HOME $(x) `y`", "-DA='\"", "-DA=b  c #d", "-DA=e; f & g | h > i"]
)
def test_flags_are_what_the_user_wrote(source_tree: Path, flag: str) -> None:
    plan = Plan(source_tree, source_tree / "_C.so", fake_cxx(), None, [], [flag], [flag])
    text = ninja_text(plan)
    assert variable_of(text, "cxxflags").count(flag) == 1
    assert variable_of(text, "ldflags").count(flag) == 1


@pytest.mark.parametrize("character", ["\n", "\r"])
def test_a_line_break_is_refused(source_tree: Path, character: str) -> None:
    command = [f"/opt/a{character}b/g++"]
    plan = Plan(source_tree, source_tree / "_C.so", replace(fake_cxx(), command=command), None)
    with pytest.raises(
        BuildError, match=r"b/g\+\+' holds a line break, which ninja cannot take; all"
    ):
        ninja_text(plan)


@pytest.mark.parametrize("character", ["$", "`", '"', "\\"])
def test_what_nvcc_cannot_take_is_refused(
    source_tree: Path, tmp_path: Path, character: str
) -> None:
    cuda = CudaCompiler("/opt/nvcc", "13.0", [], [])
    cxx = replace(fake_cxx(), command=[f"/opt/a{character}b/g++"])
    plan = Plan(source_tree, source_tree / "_C.so", cxx, cuda)
    with pytest.raises(BuildError, match=r"nvcc cannot start a C\+\+ compiler of this name"):
        ninja_text(plan)
    ninja_text(replace(plan, cuda=None))
    nvcc = script(
        tmp_path / f"a{character}b/bin/nvcc",
        'case "$1" in --dryrun) printf "#\\$ TOP=%s/..\\n" "${0%/*}" >&2;; esac',
    )
    with pytest.raises(BuildError, match=r"cannot work in the folder .*b/bin/\.\..: it would have"):
        find_cuda({"CUDA_HOME": str(nvcc.parents[1])})


@pytest.mark.skipif(sys.platform != "linux", reason="needs a toolkit for Linux")
def test_a_toolkit_in_a_folder_that_nvcc_cannot_take(tmp_path: Path) -> None:
    """What the real one says of itself: it is refused before it fails for a reason that nobody understands."""
    try:
        nvcc = find_cuda({}).nvcc
        home = re.search(r"#\$ TOP=(.*)", compilers.run([nvcc, "--dryrun", "x.cu"]).stdout)
    except BuildError as error:
        pytest.skip(str(error))
    assert home is not None
    (tmp_path / "a$b").symlink_to(Path(home[1]).resolve())
    with pytest.raises(BuildError, match=r"cannot work in the folder .*a\$b/bin/\.\..: it"):
        find_cuda({"CUDA_HOME": str(tmp_path / "a$b")})


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_missing_compilers_are_named() -> None:
    with pytest.raises(BuildError, match="named by CXX, '/nonexistent', was not found"):
        find_cxx({"CXX": "/nonexistent"})
    with pytest.raises(BuildError, match="CUDA_HOME=/nonexistent holds no bin/nvcc"):
        find_cuda({"CUDA_HOME": "/nonexistent"})
    with pytest.raises(BuildError, match="named by CUDACXX, '/nonexistent/nvcc', was not found"):
        find_cuda({"CUDACXX": "/nonexistent/nvcc"})


def test_a_compiler_that_cannot_compile_is_refused(tmp_path: Path) -> None:
    broken = script(tmp_path / "broken-cxx", "echo 'fatal error: no standard library' >&2; exit 1")
    with pytest.raises(
        BuildError, match="cannot build an empty program: fatal error: no standard lib"
    ):
        find_cxx({"CXX": shlex.quote(str(broken))})


@needs_cxx
def test_a_compiler_without_openmp_is_used_without(tmp_path: Path) -> None:
    real = shlex.quote(find_cxx(os.environ).executable)
    plain = script(
        tmp_path / "cxx", f'case "$*" in *-fopenmp*|*-lomp*) exit 1;; esac\nexec {real} "$@"'
    )
    found = find_cxx({"CXX": shlex.quote(str(plain))})
    assert not found.has_openmp
    assert found.openmp_compile == []


@needs_cxx
def test_a_compiler_without_hardware_bfloat16_is_used_without(tmp_path: Path) -> None:
    real = shlex.quote(find_cxx(os.environ).executable)
    old = script(tmp_path / "cxx", f'case "$*" in *-mavx512bf16*) exit 1;; esac\nexec {real} "$@"')
    assert not find_cxx({"CXX": shlex.quote(str(old))}).has_avx512_bf16


@needs_cxx
def test_a_compiler_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shlex.quote(find_cxx(os.environ).executable)
    cxx = script(tmp_path / "it's a $(compiler)" / "g++", f'exec {real} "$@"')
    for text in (str(cxx), shlex.quote(str(cxx)), f"{shlex.quote(str(cxx))} -O1"):
        assert find_cxx({"CXX": text}).executable == str(cxx)
    monkeypatch.chdir(cxx.parent)  # ninja runs it from another one
    assert find_cxx({"CXX": "./g++"}).command == [str(cxx)]
    with pytest.raises(BuildOptionError, match=r"CXX=.*No closing quotation"):
        find_cxx({"CXX": "it's g++"})


def test_nvcc_is_asked_for_its_architectures(tmp_path: Path) -> None:
    nvcc = script(
        tmp_path / "bin/nvcc",
        'case "$1" in\n'
        '--version) echo "Cuda compilation tools, release 12.4, V12.4.131";;\n'
        "--list-gpu-arch) printf 'compute_80\\ncompute_90\\n';;\n"
        "--dryrun) echo '#$ LIBRARIES= \"-L/a b/lib\"' >&2;;\n"
        "esac",
    )
    found = find_cuda({"CUDA_HOME": str(tmp_path)})
    assert (found.nvcc, found.version) == (str(nvcc), "12.4.131")
    assert [str(architecture) for architecture in found.architectures] == ["8.0", "9.0+PTX"]
    assert found.library_flags == ["-L/a b/lib"]
    chosen = find_cuda({"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "8.0+PTX"})
    assert [str(architecture) for architecture in chosen.architectures] == ["8.0+PTX"]


def test_first_error_finds_the_telling_line() -> None:
    output = "[1/2] g++ a.cpp\nFAILED: a.o\na.cpp:3:1: error: 'x' was not declared\n    3 | x\nninja: stopped"
    assert first_error(output) == "a.cpp:3:1: error: 'x' was not declared"
    assert first_error("/usr/bin/ld: cannot find -lomp\ncollect2: ld returned 1") == (
        "/usr/bin/ld: cannot find -lomp"
    )
    fatal = "nvcc fatal   : Unsupported gpu architecture 'compute_37'"
    assert first_error(f"FAILED: a.o\n{fatal}\nninja: build stopped: subcommand failed.") == fatal
    assert first_error("") == "it printed nothing"


# What a build says
def test_a_forecast(source_tree: Path, tmp_path: Path) -> None:
    for name in ("layer_attention_baseline", "layer_attention_avx2", "layer_attention_avx512"):
        (source_tree / f"csrc/cpu/{name}.cpp").write_text("")
    plan = Plan(source_tree, tmp_path / "_C.so", fake_cxx(), None)
    count = len(plan.sources())
    assert 120 < 3 * 40 + (count - 3) * 7 < 200
    assert progress.forecast(plan, 1, 8) == (
        f"compiling {count} objects, 1 at once: about 3 minutes if none is there yet"
    )
    # Never less than the longest takes, and no faster by more jobs than cores.
    assert "8 at once: about 1 minute if" in progress.forecast(plan, 8, 8)
    assert "8 at once: about 3 minutes if" in progress.forecast(plan, 8, 1)
    carried = dict.fromkeys(plan.sources(), tmp_path / "x.o")
    assert "compiling 0 objects, 2 at once: less than a minute" in progress.forecast(
        replace(plan, carried=carried), 2, 2
    )
