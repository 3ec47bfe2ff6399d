"""Every tensor that the package makes says on which device.

Under `torch.set_default_device`, or in a `with torch.device(...)`, one that does not say so is made where the user's
default is, and a kernel would be given an address of another device.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import ela_kernels

PACKAGE = Path(ela_kernels.__file__).resolve().parent
# Those whose device PyTorch itself takes from the default, where the call names none.
FACTORIES = frozenset(f.__name__.removeprefix("fft_") for f in _device_constructors())

# By file and function: why the user's default device is right there.
ALLOWED = {
    ("modules/skipping.py", "Skipping.__init__"): (
        "a buffer is made beside the parameters, which are made on the default device"
    ),
    ("modules/light.py", "LightLayerAttention.__init__"): (
        "parameters are made on the default device, as PyTorch's own modules make theirs"
    ),
    ("models/vit.py", "VisionTransformer.__init__"): (
        "parameters are made on the default device, as PyTorch's own modules make theirs"
    ),
}


class Calls(ast.NodeVisitor):
    """The calls of PyTorch's factories without a device: line, function that they stand in, and name."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str, str]] = []
        self._where: list[str] = []
        self._imported: dict[str, str] = {}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module == "torch":
            self._imported |= {a.asname or a.name: a.name for a in node.names}

    def _inside(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._where.append(node.name)
        self.generic_visit(node)
        self._where.pop()

    visit_ClassDef = visit_FunctionDef = visit_AsyncFunctionDef = _inside  # noqa: N815

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = self._factory(node.func)
        if name is not None and not any(k.arg == "device" for k in node.keywords):
            self.found.append((node.lineno, ".".join(self._where), name))

    def _factory(self, function: ast.expr) -> str | None:
        name = None
        if isinstance(function, ast.Attribute) and ast.unparse(function).startswith("torch."):
            name = function.attr
        elif isinstance(function, ast.Name):
            name = self._imported.get(function.id)
        is_factory = name is not None and (name in FACTORIES or name.endswith("Tensor"))
        return name if is_factory else None


def calls_in(source: str) -> list[tuple[int, str, str]]:
    calls = Calls()
    calls.visit(ast.parse(source))
    return calls.found


def calls_of_package() -> Iterator[tuple[str, int, str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for line, where, name in calls_in(path.read_text(encoding="utf-8")):
            yield path.relative_to(PACKAGE).as_posix(), line, where, name


def test_every_factory_is_given_a_device() -> None:
    found = [
        f"ela_kernels/{file}:{line}: torch.{name} without device= in {where or 'the module'}"
        for file, line, where, name in calls_of_package()
        if (file, where) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def test_what_is_allowed_is_still_there() -> None:
    assert ALLOWED.keys() <= {(file, where) for file, _, where, _ in calls_of_package()}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("torch.empty(3)", "empty"),
        ("torch.fft.fftfreq(3)", "fftfreq"),
        ("x = [torch.tensor(i) for i in y]", "tensor"),
        ("ones((2, 3), dtype=x.dtype)", "ones"),
        ("noise(4)", "randn"),
        ("torch.FloatTensor(2, 3)", "FloatTensor"),
        ("isinstance(x, torch.Tensor)", None),
        ("torch.randperm(4, **options)", "randperm"),
        ("torch.empty_like(x)", None),
        ("x.new_empty(3)", None),
        ("torch.zeros(3, device=x.device)", None),
        ("numpy.empty(3)", None),
        ("empty(3)", None),
    ],
)
def test_what_is_found(call: str, name: str | None) -> None:
    source = f"from torch import ones, randn as noise\nclass A:\n    def f(self):\n        {call}\n"
    assert calls_in(source) == ([] if name is None else [(4, "A.f", name)])


def test_these_are_factories() -> None:
    for name in ("empty", "zeros", "ones", "full", "arange", "tensor", "linspace", "eye", "rand"):
        assert name in FACTORIES
    for name in ("randn", "randint", "randperm", "empty_strided", "as_tensor", "asarray"):
        assert name in FACTORIES
