"""The Triton kernels of a first run, compiled where there is no GPU for a machine whose time is short.

    python -m benchmarks.gpu.kernels make build/gpu/triton --capability 9.0   # by the Python and Triton of that machine
    python -m benchmarks.gpu.kernels put build/gpu/triton CACHE               # there, before TRITON_CACHE_DIR=CACHE

Triton names a kernel in its cache by a hash of the source, the arguments' types, the target, its own files and its
compiler. What is made here is found there if all of these are the same; `put` compares Triton's own files first, and a
kernel that is not found is compiled as ever. To fill the cache, the benchmarks and tests run on CPU tensors and every
launch is compiled, but not made: results are garbage, which is why tests fail here, and nothing looks at them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import pkgutil
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
MANIFEST, KERNELS = "manifest.json", "kernels.tar.xz"
# What the cache is filled from: the parts of `--plan first` and its tests; and of `--plan second`.
PARTS = ("sanitizer", "floor", "layers", "positions", "rivals")
TESTS = ("tests/gpu/test_first.py",)
WHOLE_PARTS = (*PARTS, "pieces", "stages", "memory", "networks")
WHOLE_TESTS = (*TESTS, "tests/gpu/test_light.py", "tests/conformance")


def triton_files() -> dict[str, str]:
    """The version, and a hash of Triton's own files, as they enter the name of each kernel."""
    import triton

    for module in ("triton.runtime.cache", "triton.compiler.compiler"):
        key = getattr(importlib.import_module(module), "triton_key", None)
        if key is not None:
            return {
                "triton": triton.__version__,
                "files": hashlib.sha256(key().encode()).hexdigest(),
            }
    raise RuntimeError(f"Triton {triton.__version__} has no triton_key, which names its kernels")


class _Driver:
    """In place of a device."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _launcher(kernel: Any) -> None:
    """Compile the C module that launches it, which Triton up to 3.6 has for each kernel, as before a first launch."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    # Without a driver it cannot be loaded, which Triton says each time; it is in the cache.
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError):
        driver.CudaLauncher(kernel.src, kernel.metadata)


def _stand_in_for_libcuda(folder: Path) -> None:
    """Such a module is linked with the driver's library, of which the name is enough."""
    library = folder / "libcuda.so.1"
    command = [
        "gcc",
        "-shared",
        f"-Wl,-soname,{library.name}",
        "-x",
        "c",
        os.devnull,
        "-o",
        library,
    ]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)


@contextmanager
def compiling_only(capability: int) -> Iterator[list[str]]:
    """Triton's launches are compiled for a device of this capability (90 for 9.0), and not made; their names."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ela_kernels.backends.triton.backend import TritonBackend

    made: list[str] = []
    seen: set[int] = set()
    run = JITFunction.run

    def compiled(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **(options | {"warmup": True}))
        if id(kernel) not in seen:
            seen.add(id(kernel))
            made.append(kernel.name)
            _launcher(kernel)
        return kernel

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(JITFunction, "run", compiled),
        # As under the interpreter, whose place this takes: tensors on the CPU are served.
        mock.patch.object(TritonBackend, "interprets", True),
    ):
        _stand_in_for_libcuda(Path(folder))
        driver.set_active(_Driver(capability))
        try:
            yield made
        finally:
            with contextlib.suppress(RuntimeError):  # there is no other without a device
                driver.reset_active()


class _OnTheCpu:
    """For pytest: the tests of the backend on a GPU take their tensors from the CPU, and ask for no device."""

    def pytest_collection_finish(self) -> None:
        import torch

        import ela_kernels as ek

        backends = importlib.import_module("support.backends")

        @contextmanager
        def forced(backend: Any) -> Iterator[None]:
            with ek.use_backend(backend.name):
                yield

        backends.OnDevice.device = torch.device("cpu")
        backends.OnDevice.forced = forced


def fill(capability: int, whole: bool) -> tuple[list[str], list[str]]:
    """Compile all; the kernels' names, and what could not be run."""
    import torch

    import ela_kernels.backends.triton as package
    from benchmarks.gpu import warm
    from benchmarks.gpu.setting import Setting

    # Before the tests do, which would have them interpreted.
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    os.environ["ELA_KERNELS_TEST_DEVICE"] = "cpu"
    setting = Setting(torch.device("cpu"), ("triton",), few=not whole)
    problems = []
    with compiling_only(capability) as made:
        for job in warm.jobs(setting, WHOLE_PARTS if whole else PARTS):
            problem = warm.run_job(job, setting, 1.0)
            print(f"{len(made)} kernels", flush=True)
            problems += [] if problem is None else [problem]
        import pytest

        tests = [str(ROOT / path) for path in (WHOLE_TESTS if whole else TESTS)]
        with redirect_stdout(io.StringIO()):  # all that it would say is that results are wrong
            arguments = ["-q", "-p", "no:cacheprovider", "--tb=no", "-m", "gpu", "-k", "triton"]
            pytest.main([*arguments, *tests], plugins=[_OnTheCpu()])
    return made, problems


def make(folder: Path, capability: str, whole: bool = False) -> int:
    """Fill `folder`; 1 where something could not be compiled."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as cache:
        # Read when Triton is imported, which nothing above has done.
        os.environ["TRITON_CACHE_DIR"] = cache
        os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
        made, problems = fill(int(capability.replace(".", "")), whole)
        pack(Path(cache), folder, {"capability": capability, "kernels": len(made)})
    for problem in problems:
        print(problem[:300], file=sys.stderr)
    size = (folder / KERNELS).stat().st_size / 2**20
    print(f"{len(made)} Triton kernels for {capability}, {size:.1f} MiB, in {folder}")
    return 1 if problems else 0


def pack(cache: Path, folder: Path, about: dict[str, Any]) -> None:
    """What a launch needs of a cache: not the text that a kernel was compiled from, most of all that there is."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name.endswith(".source") else entry

    with tarfile.open(folder / KERNELS, "w:xz") as packed:
        packed.add(cache, ".", filter=wanted)
    (folder / MANIFEST).write_text(json.dumps(triton_files() | about, indent=1) + "\n")


def put(folder: Path, cache: Path) -> str:
    """Add what was made to a cache; what was done, in one sentence."""
    about = json.loads((folder / MANIFEST).read_text())
    here = triton_files()
    if here["files"] != about["files"]:
        return (
            f"the Triton kernels in {folder} are left out: they are of Triton {about['triton']}, and here is "
            f"{here['triton']}, or one built otherwise"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / KERNELS) as packed:
        packed.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*"):  # lists its files by their whole paths
        names = json.loads(group.read_text())["child_paths"]
        paths = {name: str(group.parent / name) for name in names}
        group.write_text(json.dumps({"child_paths": paths}))
    return f"{about['kernels']} Triton kernels for {about['capability']} were brought along"


def main(argv: list[str] | None = None) -> int:
    """Make or put."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path, help="it is emptied first")
    making.add_argument("--capability", default="9.0")
    making.add_argument(
        "--whole", action="store_true", help="for all tests and parts: hours of one core"
    )
    putting = commands.add_parser("put")
    putting.add_argument("folder", type=Path)
    putting.add_argument("cache", type=Path)
    args = parser.parse_args(argv)
    if args.command == "make":
        return make(args.folder.resolve(), args.capability, args.whole)
    print(put(args.folder, args.cache))
    return 0


if __name__ == "__main__":
    sys.exit(main())
