"""Ctrl-C in the commands before they begin and after they are done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ela_kernels import __main__ as commands
from ela_kernels import interrupts

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

# In place of PyTorch: somebody presses Ctrl-C while it is imported, and it catches what that raises.
INTERRUPTED_TORCH = """
import os, signal, sys, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
except KeyboardInterrupt:
    print("as an exception", file=sys.stderr)
sys.exit(7)
"""


def end_of(tmp_path: Path, *arguments: str | Path, ignored: bool = False) -> tuple[int, str]:
    """Exit status and errors of a Python whose PyTorch is interrupted."""
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "ela_kernels"),
        ("-m", "ela_kernels", "train", "--out", "-m"),
        ("-Wdefault", "-mela_kernels", "info"),
    ],
)
def test_while_pytorch_is_imported(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert end_of(tmp_path, *words) == (130, "\nStopped.\n")


def test_the_installed_script(tmp_path: Path) -> None:
    script = tmp_path / "ela-kernels"
    script.write_text("from ela_kernels.__main__ import program\nprogram()\n")
    assert end_of(tmp_path, script, "info") == (130, "\nStopped.\n")


def test_programs_that_import_the_package_are_left_as_they_are(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "__init__.py").write_text("import ela_kernels\n")
    for words in (("-c", "import ela_kernels"), ("-m", "other", "ela_kernels")):
        assert end_of(tmp_path, *words) == (7, "as an exception\n")


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    assert end_of(tmp_path, "-m", "ela_kernels", "info", ignored=True) == (7, "")


@pytest.fixture
def handler_restored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, interrupts._end)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler_restored")
def test_a_command_ends_in_its_own_way_and_the_system_ends_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def main() -> int:
        seen.append(signal.getsignal(signal.SIGINT))
        return 3

    monkeypatch.setattr(commands, "main", main)
    assert commands.program() == 3
    assert seen == [signal.default_int_handler]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
