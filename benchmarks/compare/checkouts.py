"""The two checkouts that are compared: found, described, and for a revision made, built and removed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILD = ("setup.py", "build_ext", "--inplace")
# What the measured code is made of.
_MEASURED = ("ela_kernels", "csrc", "build_tools", "setup.py")
# Set where git runs a hook; they would have it look at that repository, whatever the folder.
_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
# Lines of a failed build's log that are shown.
_LINES = 25


class CheckoutError(ValueError):
    """A name that stands for no checkout that can be measured."""


class Checkout(NamedTuple):
    """A folder with the package and its built extension.

    Attributes:
        path: the folder, absolute.
        commit: what it has checked out, shortened; None where it is none of git's.
        is_dirty: something that is measured, or that builds it, is not as in that commit.
    """

    path: Path
    commit: str | None
    is_dirty: bool

    def __str__(self) -> str:
        commit = "not of git" if self.commit is None else f"commit {self.commit}"
        return f"{self.path} ({commit}{', with changes' if self.is_dirty else ''})"


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    command = ["git", "-C", str(folder), *arguments]
    environment = {n: v for n, v in os.environ.items() if n not in _OF_A_HOOK}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def is_checkout(folder: Path) -> bool:
    return (folder / "ela_kernels" / "__init__.py").is_file()


def describe_checkout(folder: Path) -> Checkout:
    """The folder with what git says of it, where the folder itself is git's."""
    path = folder.resolve()
    top = git(path, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != path:
        return Checkout(path, None, False)
    changes = git(path, "status", "--porcelain", "--", *_MEASURED)
    return Checkout(path, git(path, "rev-parse", "--short", "HEAD"), bool(changes))


def built_checkout(name: str, folder: Path) -> Checkout:
    """A checkout that is there, with its extension.

    Raises:
        CheckoutError: no folder of the package, or no extension for this Python in it; begins with `name`.
    """
    if not is_checkout(folder):
        raise CheckoutError(
            f"{name}: got {str(folder)!r}; allowed is the folder of a checkout, which has ela_kernels/__init__.py"
        )
    if extension_in(folder) is None:
        raise CheckoutError(
            f"{name}: got {str(folder)!r}, where no extension is built for this Python; allowed is a checkout with "
            f"ela_kernels/_C{EXTENSION_SUFFIXES[0]}. Build it there: "
            f"ELA_KERNELS_BUILD=cpu {sys.executable} {' '.join(BUILD)}"
        )
    return describe_checkout(folder)


def extension_in(folder: Path) -> Path | None:
    paths = (folder / "ela_kernels" / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def is_older_than_sources(checkout: Checkout) -> bool:
    """Whether a native source was written after the extension: it may be of other sources than those that are there."""
    built = extension_in(checkout.path)
    sources = (path for path in (checkout.path / "csrc").rglob("*") if path.is_file())
    newest = max((path.stat().st_mtime for path in sources), default=0.0)
    return built is not None and built.stat().st_mtime < newest


def commit_of(text: str, root: Path) -> str | None:
    """The whole name of the commit that a revision is, in the repository at `root`; None where it is none."""
    arguments = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    return git(root, *arguments)


@contextlib.contextmanager
def base_checkout(text: str, root: Path) -> Iterator[Checkout]:
    """What BASE stands for: a checkout's folder as it is, or else a revision of the repository at `root`.

    A revision is checked out as a worktree in a temporary folder and built there by its own `setup.py`; both are gone
    afterwards, also after an exception.

    Raises:
        CheckoutError: neither of them, a folder without extension, or a revision that cannot be built.
    """
    if is_checkout(Path(text)):
        yield built_checkout("BASE", Path(text))
        return
    commit = commit_of(text, root)
    if commit is None:
        raise CheckoutError(
            f"BASE: got {text!r}; allowed is a revision of the git repository {root}, such as HEAD~1, or the folder of "
            "a checkout that is built"
        )
    prefix = "ela-compare-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        path = Path(folder).resolve() / "base"
        try:
            if git(root, "worktree", "add", "--detach", "--quiet", str(path), commit) is None:
                raise CheckoutError(f"BASE: got {text!r}, of which git makes no worktree in {path}")
            build(text, path)
            yield describe_checkout(path)
        finally:
            # Twice forced: one that was cut off while it was made is locked.
            git(root, "worktree", "remove", "--force", "--force", str(path))


def build(text: str, folder: Path) -> None:
    """Build the extension for the CPU in its place, as that checkout does it.

    Raises:
        CheckoutError: it fails or leaves no extension; with the end of what it printed.
    """
    if not is_checkout(folder):
        raise CheckoutError(f"BASE: got {text!r}, a commit without the package ela_kernels")
    start = time.perf_counter()
    print(f"building {text} in {folder}", file=sys.stderr)
    log = folder.parent / "build.log"
    environment = os.environ | {"ELA_KERNELS_BUILD": "cpu", "PYTHONPATH": str(folder)}
    with log.open("w") as out:
        code = run_to_its_end([sys.executable, *BUILD], folder, environment, out.fileno())
    if code or extension_in(folder) is None:
        end = "\n".join(log.read_text().splitlines()[-_LINES:])
        raise CheckoutError(f"BASE: got {text!r}, whose extension cannot be built here:\n{end}")
    print(f"built in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def run_to_its_end(
    command: list[str], folder: Path, environment: dict[str, str], output: int
) -> int:
    """Exit status of a command; where this process is stopped meanwhile, so are the command and what it started."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait()
    except BaseException:
        stop_group(process)
        raise


def stop_group(process: subprocess.Popen[bytes], seconds: float = 5.0) -> None:
    """End a process and its group; kindly first, so that ninja ends its compilers, which are in groups of their own."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
