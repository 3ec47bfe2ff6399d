"""What a comparison takes for BASE: a revision is made, built and removed, whatever happens; what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from benchmarks.__main__ import main as programs
from benchmarks.compare.checkouts import (
    ROOT,
    Checkout,
    CheckoutError,
    base_checkout,
    describe_checkout,
    extension_in,
    git,
    is_older_than_sources,
)
from benchmarks.compare.command import main
from benchmarks.compare.rows import all_rows

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not there")

SETUP = """\
import pathlib, sys
assert sys.argv[1:] == ["build_ext", "--inplace"], sys.argv
assert pathlib.Path.cwd() == pathlib.Path(__file__).resolve().parent
{more}
pathlib.Path("ela_kernels/_C{suffix}").write_text("built")
"""


def commit(folder: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for arguments in (["add", "--all"], [*who, "commit", "--quiet", "--message", "a change"]):
        assert git(folder, *arguments) is not None


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits with a package; the built extension is ignored, as here."""
    folder = (tmp_path / "repository").resolve()
    folder.mkdir()
    assert git(folder, "init", "--quiet") is not None
    setup = SETUP.format(more="", suffix=EXTENSION_SUFFIXES[0])
    (folder / ".gitignore").write_text("_C*\n")
    (folder / "ela_kernels").mkdir()
    (folder / "ela_kernels" / "__init__.py").write_text("# first\n")
    (folder / "setup.py").write_text(setup)
    commit(folder)
    (folder / "ela_kernels" / "__init__.py").write_text("# second\n")
    commit(folder)
    (folder / "ela_kernels" / f"_C{EXTENSION_SUFFIXES[0]}").write_text("built")
    return folder


def worktrees(repository: Path) -> int:
    return (git(repository, "worktree", "list") or "").count("\n") + 1


@needs_git
def test_a_revision_is_built_apart_and_removed(repository: Path) -> None:
    with base_checkout("HEAD~1", repository) as base:
        assert base.commit == git(repository, "rev-parse", "--short", "HEAD~1")
        assert not base.is_dirty
        assert (base.path / "ela_kernels" / "__init__.py").read_text() == "# first\n"
        assert (base.path / "ela_kernels" / f"_C{EXTENSION_SUFFIXES[0]}").read_text() == "built"
        assert worktrees(repository) == 2
    assert not base.path.parent.exists()
    assert worktrees(repository) == 1
    with pytest.raises(KeyboardInterrupt), base_checkout("HEAD", repository) as base:
        raise KeyboardInterrupt
    assert not base.path.parent.exists()
    assert worktrees(repository) == 1


@needs_git
def test_a_revision_that_cannot_be_built_is_refused(repository: Path) -> None:
    (repository / "setup.py").write_text("raise SystemExit('no compiler')")
    commit(repository)
    with (
        pytest.raises(CheckoutError, match=r"BASE: got 'HEAD', whose ext.*\nno compiler"),
        base_checkout("HEAD", repository),
    ):
        pass
    (repository / "setup.py").write_text("")  # builds nothing
    (repository / "ela_kernels" / "__init__.py").rename(repository / "ela_kernels" / "other.py")
    commit(repository)
    with (
        pytest.raises(CheckoutError, match="BASE: got 'HEAD', a commit without the package"),
        base_checkout("HEAD", repository),
    ):
        pass
    assert worktrees(repository) == 1


@needs_git
def test_an_end_by_a_signal_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    wait = f"""\
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path({str(told) + ".part"!r}).write_text(f"{{child.pid}} {{pathlib.Path.cwd()}}")
pathlib.Path({str(told) + ".part"!r}).rename({str(told)!r})
child.wait()"""
    (repository / "setup.py").write_text(SETUP.format(more=wait, suffix=EXTENSION_SUFFIXES[0]))
    commit(repository)
    command = [sys.executable, "-m", "benchmarks", "compare", "HEAD", "--new", str(repository)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(3000):
            if told.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        assert told.exists(), process.stderr.read() if process.stderr else ""
        child, folder = told.read_text().split(" ", 1)
        assert Path(folder).is_dir()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)  # while it removes
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.endswith("stopped\n")
    assert not Path(folder).parent.exists()
    assert worktrees(repository) == 1
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@needs_git
def test_what_git_says_of_a_folder(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(repository, "rev-parse", "--short", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))  # as in a hook
    assert describe_checkout(repository) == Checkout(repository, head, False)
    (repository / "notes").write_text("of nothing that is measured")
    assert not describe_checkout(repository).is_dirty
    (repository / "ela_kernels" / "more.py").write_text("")
    assert describe_checkout(repository).is_dirty
    assert str(describe_checkout(repository)) == f"{repository} (commit {head}, with changes)"
    assert describe_checkout(repository / "ela_kernels").commit is None


def test_an_extension_older_than_its_sources_is_seen(tmp_path: Path) -> None:
    for name in ("csrc/a/kernel.cpp", f"ela_kernels/_C{EXTENSION_SUFFIXES[0]}"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (100, 100))
    checkout = Checkout(tmp_path, None, False)
    assert not is_older_than_sources(checkout)
    os.utime(tmp_path / "csrc/a/kernel.cpp", (200, 200))
    assert is_older_than_sources(checkout)


# What does not fit.


@pytest.mark.skipif(extension_in(ROOT) is None, reason="this checkout is refused itself")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "BASE: got nothing; allowed is"),
        ([""], "BASE: got nothing; allowed is"),
        (["no-such-revision"], "BASE: got 'no-such-revision'; allowed is a revision of the git"),
        (["{unbuilt}"], "BASE: got '{unbuilt}', where no extension is built for this Python"),
        ([".", "--new", "{empty}"], "--new: got '{empty}'; allowed is the folder of a checkout"),
        ([".", "--new", "{unbuilt}"], "--new: got '{unbuilt}', where no extension is built"),
        ([".", "--rows", "op/*", "--rows", "opp/*"], "--rows: got 'opp/*', which no row matches"),
        ([".", "--rounds", "10"], "--rounds: got 10; allowed is an int of at least 11 for 32 rows"),
        ([".", "--starts", "0"], "--starts: got 0; allowed is an int of at least 1"),
        ([".", "--starts", "40"], "--rounds: got 18; allowed is an int of at least 40"),
        ([".", "--threads", "0"], "--threads: got 0; allowed is an int of at least 1"),
        ([".", "--margin", "3"], "--margin: got 3.0; allowed is a number from 0 up to 1"),
        ([".", "--margin", "nan"], "--margin: got nan; allowed is a number from 0 up to 1"),
        ([".", "--json", "{empty}/a/b"], "--json: got '{empty}/a/b', which cannot be written"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = {name: tmp_path / name for name in ("empty", "unbuilt")}
    folders["empty"].mkdir()
    (folders["unbuilt"] / "ela_kernels").mkdir(parents=True)
    (folders["unbuilt"] / "ela_kernels" / "__init__.py").write_text("")
    monkeypatch.chdir(ROOT)
    assert main([a.format(**folders) for a in arguments]) == 2
    assert f"error: {said.format(**folders)}" in capsys.readouterr().err


def test_programs_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs(["compare", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [row.name for row in all_rows()]
    assert programs(["compare", "--list", "--compile", "--rows", "compiled/layer/*"]) == 0
    assert capsys.readouterr().out == "compiled/layer/step/6x4x256x14x16/float32/planar\n"
    assert programs(["comparison"]) == 2
    assert "program: got 'comparison'; allowed are run, compare, study" in capsys.readouterr().err
    assert programs([]) == 2
    assert programs(["--help"]) == 0
