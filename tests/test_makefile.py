"""Which of make's targets install what, and when again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or not (ROOT / "Makefile").exists(), reason="no make here"
)

# In place of an environment's Python: writes down what it is asked for, and what of a build.
PYTHON = """#!/bin/sh
echo "${ELA_KERNELS_BUILD:-auto}: $*" >> "$CALLS"
"""


class Checkout:
    """The Makefile in a folder with a space, with an environment whose Python does nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        for name in ("csrc/cpu/kernels.cpp", "pyproject.toml", "setup.py", "build_tools/x.py"):
            self.touch(name, 1000)
        shutil.copy(ROOT / "Makefile", folder)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)

    def touch(self, name: str, seconds: int) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (seconds, seconds))

    def make(self, *words: str, **environ: str) -> list[str]:
        """What Python was asked for by `make WORDS`."""
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("ELA_", "TORCH", "MAKE", "MFLAGS"))
        }
        self.calls.write_text("")
        done = subprocess.run(
            ["make", *words],
            cwd=self.folder,
            env={**kept, "CALLS": str(self.calls), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.calls.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    folder = tmp_path / "a checkout"
    folder.mkdir()
    return Checkout(folder)


def modes(calls: list[str], words: str) -> list[str]:
    """The modes of the build in the calls that hold these words."""
    return [call.partition(": ")[0] for call in calls if words in call]


def test_the_demo_alone_installs_what_it_needs(checkout: Checkout) -> None:
    calls = checkout.make("demo")
    assert modes(calls, "build_ext --inplace") == ["cpu"]
    assert modes(calls, "--editable .[demo]") == ["cpu"]
    assert modes(calls, "triton") == modes(calls, "[demo,dev]") == []
    assert len(modes(calls, "--quiet torch==")) == 1
    assert calls[-1].endswith("examples/digits_demo.py")
    assert checkout.make("demo") == [calls[-1]]


def test_what_tests_need_is_added_to_what_the_demo_needs(checkout: Checkout) -> None:
    checkout.make("demo")
    calls = checkout.make("test")
    assert modes(calls, "build_ext --inplace") == modes(calls, "--editable .[demo,dev]") == ["auto"]
    assert "pytest" in calls[-1]
    assert checkout.make("test") == [calls[-1]]


def test_the_demo_takes_what_is_installed_in_full_and_keeps_it_so(checkout: Checkout) -> None:
    checkout.make("install")
    (demo,) = checkout.make("demo")
    assert demo.endswith("examples/digits_demo.py")
    checkout.touch("csrc/cpu/kernels.cpp", 2**32)
    calls = checkout.make("demo")
    assert modes(calls, "build_ext --inplace") == modes(calls, "--editable .[demo,dev]") == ["auto"]


def test_a_source_that_changed_is_compiled_for_the_demo_too(checkout: Checkout) -> None:
    checkout.make("demo")
    checkout.touch("csrc/cpu/kernels.cpp", 2**32)
    assert modes(checkout.make("demo"), "build_ext --inplace") == ["cpu"]


@pytest.mark.parametrize("target", ["demo", "install"])
def test_a_build_that_is_named_is_that(checkout: Checkout, target: str) -> None:
    calls = checkout.make(target, ELA_KERNELS_BUILD="none")
    assert modes(calls, "build_ext --inplace") == modes(calls, "--editable") == ["none"]


def test_another_environment_and_pytorch(checkout: Checkout) -> None:
    shutil.copytree(checkout.folder / ".venv", checkout.folder / ".venv-newest")
    calls = checkout.make("install", "TORCH=torch==2.14.1", "VENV=.venv-newest")
    assert len(modes(calls, "--quiet torch==2.14.1 triton")) == 1
    assert (checkout.folder / ".venv-newest" / ".installed").exists()
    assert not (checkout.folder / ".venv" / ".installed").exists()
