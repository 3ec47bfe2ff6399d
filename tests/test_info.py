"""The report on the installation, the loading of the extension, and what importing the package brings along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import ela_kernels
from ela_kernels import info
from ela_kernels.__main__ import main
from ela_kernels.backends import extension as loader

PACKAGE = Path(info.__file__).resolve().parent
PARTS = {
    "versions",
    "system",
    "build",
    "extension",
    "threads",
    "backends",
    "devices",
    "environment",
}


def run_python(*arguments: str, folder: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A folder with the package's Python files, but no binary and no record of a build."""
    skipped = shutil.ignore_patterns("_C*", "_build_info.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "ela_kernels", ignore=skipped)
    return tmp_path


def report_from(folder: Path) -> dict[str, dict[str, object]]:
    # An editable install looks for submodules in the source folder as well; the copy has to stand alone.
    program = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
from ela_kernels.__main__ import main
sys.exit(main(["info", "--json"]))
"""
    done = run_python("-c", program, folder=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == PARTS
    return report


def test_report_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in PARTS:
        assert f"{part}:" in printed
    assert "failed:" not in printed


def test_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == PARTS
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["backends"]["eager"] == "available"
    assert set(report["backends"]) == {"eager", "cpp", "triton", "cuda"}
    assert report["threads"]["torch"] >= 1


def test_as_a_command() -> None:
    done = run_python("-m", "ela_kernels", "info")
    assert done.returncode == 0, done.stderr
    assert "eager" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == ela_kernels.__version__


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert "info" in printed
    assert "train" in printed


@pytest.mark.parametrize(
    "probe", ["_versions", "_build", "_extension", "_threads", "_backends", "_devices"]
)
def test_a_failing_probe_becomes_a_value(
    probe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise RuntimeError("the probe broke")

    monkeypatch.setattr(info, probe, fails)
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == PARTS
    assert report[probe.removeprefix("_")] == "failed: RuntimeError: the probe broke"
    assert main(["info"]) == 0
    assert "failed: RuntimeError: the probe broke" in capsys.readouterr().out


def test_a_source_folder_never_installed(package_copy: Path) -> None:
    report = report_from(package_copy)
    problem = str(report["extension"]["problem"])
    assert report["extension"]["loaded"] is False
    assert problem.startswith("the compiled extension was not built: ")
    assert "pip install" in problem
    assert report["backends"]["eager"] == "available"
    assert problem in str(report["backends"]["cpp"])


def test_the_reason_of_the_build_is_kept(package_copy: Path) -> None:
    record = {"mode": "auto", "built": False, "problem": "no C++ compiler was found: g++"}
    (package_copy / "ela_kernels/_build_info.json").write_text(json.dumps(record))
    report = report_from(package_copy)
    expected = "the compiled extension was not built: no C++ compiler was found: g++"
    assert report["extension"]["problem"] == expected
    assert report["build"] == record


def test_a_binary_that_does_not_load(package_copy: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (package_copy / f"ela_kernels/_C{suffix}").write_text("no shared library")
    (package_copy / "ela_kernels/_build_info.json").write_text("{ cut off")
    report = report_from(package_copy)
    problem = str(report["extension"]["problem"])
    assert problem.startswith("the compiled extension was built but failed to load: ImportError: ")
    assert report["build"] == {}
    assert problem in str(report["backends"]["cpp"])


def test_extension_in_this_process() -> None:
    module, problem = loader.extension(), loader.extension_problem()
    assert (module is None) != (problem is None)
    assert loader.extension() is module
    if module is not None:
        assert loader.build_info()["built"] is True
        assert module.simd_level() in loader.build_info()["simd_levels"]
        assert isinstance(module.has_cuda, bool)


def test_openmp_in_a_folder_with_blanks() -> None:
    lines = [
        "7f1c2a000000-7f1c2a001000 r--p 00000000 08:01 1234    /a  b/c d/libgomp.so.1\n",
        "7f1c2a001000-7f1c2a002000 r-xp 00001000 08:01 1234    /a  b/c d/libgomp.so.1\n",
        "7f1c2b000000-7f1c2b001000 r--p 00000000 08:01 1235    /usr/lib/libm.so.6\n",
        "7f1c2c000000-7f1c2c001000 rw-p 00000000 00:00 0\n",
        "7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0       [stack]\n",
    ]
    assert info.openmp_libraries_in(lines) == ["/a  b/c d/libgomp.so.1"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_is_shared_with_torch() -> None:
    if loader.extension() is None:
        pytest.skip(str(loader.extension_problem()))
    if "clang" in loader.build_info()["compiler"]:
        pytest.skip("clang's OpenMP code needs libomp, and PyTorch brings libgomp on Linux")
    done = run_python(
        "-c",
        "import json, ela_kernels.info as i; print(json.dumps(i.collect_report()['threads']))",
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["openmp_libraries"]) == 1


@pytest.mark.skipif(
    not getattr(loader.extension(), "has_cuda", False), reason="the extension has no CUDA part"
)
class TestCudaPart:
    def test_devices_or_the_reason_why_not(self) -> None:
        module = loader.extension()
        assert module is not None
        found = module.cuda_devices()
        assert (found["code"] == 0) == (found["problem"] is None)
        if found["code"] != 0:
            assert found["devices"] == []
            assert found["problem"].startswith(f"error {found['code']} (cuda")

    def test_launch_returns_a_code_and_does_not_crash(self) -> None:
        module = loader.extension()
        assert module is not None
        present = len(module.cuda_devices()["devices"])
        code, _ = module.cuda_increment(present, value=1)
        assert code != 0

    @pytest.mark.gpu
    def test_launch_on_every_device(self) -> None:
        module = loader.extension()
        assert module is not None
        found = module.cuda_devices()
        if not found["devices"]:
            pytest.skip(found["problem"] or "no CUDA device")
        for device in found["devices"]:
            assert module.cuda_increment(device["index"], value=-8) == (0, -7)


def test_importing_the_package_brings_nothing_along_and_starts_no_gpu() -> None:
    program = """
import json, sys
import torch
before = set(sys.modules)
import ela_kernels
print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    done = run_python("-c", program)
    assert done.returncode == 0, done.stderr
    modules, cuda_started = json.loads(done.stdout)
    assert "ela_kernels" in modules
    brought = {name.partition(".")[0] for name in modules}
    optional = {"matplotlib", "tqdm", "sklearn", "triton", "rich", "tensorboard", "PIL", "pandas"}
    assert not brought & optional
    assert not cuda_started
