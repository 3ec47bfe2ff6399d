"""Installs a wheel into an empty virtual environment and uses it there, as somebody does who has nothing else.

python -m build_tools.try_wheel dist/ela_kernels-*.whl [--torch torch==2.13.0]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

# What is run there: the compiled kernels are in use, and say what eager PyTorch says.
PROGRAM = """
import importlib.metadata, pathlib, torch, ela_kernels as ek

assert "site-packages" in ek.__file__, ek.__file__
assert importlib.metadata.version("ela-kernels") == ek.__version__
assert (pathlib.Path(ek.__file__).parent / "py.typed").is_file()
assert ek.backend_status()["cpp"] == "available", ek.backend_status()
found = []
for backend in ("cpp", "eager"):
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(ek.ELA(32) for _ in range(4))
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    with ek.use_backend(backend):
        y, history = x, ek.LayerHistory()
        for layer in layers:
            y = layer(y, history)
        y.square().sum().backward()
    found.append((y.detach(), x.grad))
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
print("ela_kernels", ek.__version__, "with PyTorch", torch.__version__, "from", ek.__file__)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default="torch", help="what pip installs beside it")
    arguments = parser.parse_args()
    wheel: Path = arguments.wheel.resolve()
    vendored = vendored_libraries(wheel)
    if vendored:
        print(f"{wheel.name} brings libraries that PyTorch has: {', '.join(vendored)}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", arguments.torch, str(wheel)]
        subprocess.run(install, check=True)
        # Nothing of this checkout may be on the path.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        for command in (["-c", PROGRAM], ["-m", "ela_kernels", "info"]):
            done = subprocess.run([str(python), *command], cwd=folder, env=environment, check=False)
            if done.returncode:
                return done.returncode
    return 0


def vendored_libraries(wheel: Path) -> list[str]:
    """Shared libraries in a wheel other than the extension."""
    with zipfile.ZipFile(wheel) as archive:
        return [
            name
            for name in archive.namelist()
            if ".so" in Path(name).name and not Path(name).name.startswith("_C.")
        ]


if __name__ == "__main__":
    sys.exit(main())
