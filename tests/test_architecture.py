"""What the folders promise: which of them may import which, that no two import each other, and who names a backend."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ela_kernels as ek
from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import BACKENDS, KERNELS
from ela_kernels.backends.setting import NAMES
from ela_kernels.backends.types import Filters

PACKAGE = Path(ek.__file__).resolve().parent


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(nodes: Iterator[ast.AST] | list[ast.stmt], known: dict[str, Path]) -> set[str]:
    """The package's own modules that are imported by these statements."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


KNOWN = modules()
# What runs when a module is imported, and all that is imported anywhere in it.
AT_IMPORT = {n: imports(ast.parse(p.read_text()).body, KNOWN) for n, p in KNOWN.items()}
ANYWHERE = {n: imports(ast.walk(ast.parse(p.read_text())), KNOWN) for n, p in KNOWN.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; none where there is no such circle."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            found = follow(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := follow(name, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other() -> None:
    assert len(KNOWN) > 100
    assert circle(AT_IMPORT) == []


@pytest.mark.parametrize(
    ("folder", "may_import"),
    [
        ("backends", {"backends", "torch_internals"}),
        ("ops", {"ops", "backends", "explaining", "torch_internals"}),
        ("modules", {"modules", "ops", "backends", "explaining", "torch_internals"}),
        (
            "conversion",
            {"conversion", "modules", "ops", "backends", "explaining", "torch_internals"},
        ),
        (
            "ebqm",
            {"ebqm", "drawing", "modules", "ops", "backends", "optional", "torch_internals"},
        ),
        ("models", {"models", "modules", "ops", "torch_internals"}),
        (
            "integrations",
            {
                "integrations",
                "models",
                "conversion",
                "ebqm",
                "modules",
                "ops",
                "optional",
                "torch_internals",
            },
        ),
        (
            "analysis",
            {
                "analysis",
                "drawing",
                "ebqm",
                "modules",
                "ops",
                "explaining",
                "optional",
                "torch_internals",
            },
        ),
    ],
)
def test_folders_import_what_is_below_them(folder: str, may_import: set[str]) -> None:
    inside = [name for name in KNOWN if name.startswith(f"ela_kernels.{folder}")]
    assert inside
    wrong = {
        (name, other)
        for name in inside
        for other in ANYWHERE[name]
        if other != "ela_kernels" and other.split(".")[1] not in may_import
    }
    assert not wrong


def test_operations_name_no_backend_and_no_device() -> None:
    """Neither in code nor in comments: what they know of backends is the contract."""
    words = re.compile(r"\b(cuda|cpp|triton|gpu|cpu|mps|hip)\b", re.IGNORECASE)
    found = [
        f"{path.name}:{i}: {line.strip()}"
        for path in (PACKAGE / "ops").rglob("*.py")
        for i, line in enumerate(path.read_text().splitlines(), start=1)
        if words.search(line)
    ]
    assert not found


def test_only_the_table_and_a_backend_itself_import_its_class() -> None:
    users = {
        name
        for name, others in ANYWHERE.items()
        for other in others
        if re.fullmatch(r"ela_kernels\.backends\.\w+\.backend", other)
    }
    assert users == {"ela_kernels.backends.dispatch"}


def test_one_table() -> None:
    assert tuple(BACKENDS) == NAMES == tuple(ek.backend_status())
    for name, backend in KERNELS.items():
        assert isinstance(backend, KernelBackend)
        assert BACKENDS[name] is backend
        assert backend.name == name
        folder = PACKAGE / "backends" / name
        assert (folder / "backend.py").is_file()
    folders = {path.parent.name for path in (PACKAGE / "backends").glob("*/backend.py")}
    assert folders == set(KERNELS)


def test_a_backend_without_one_of_the_kernels_cannot_be_made() -> None:
    class Half(KernelBackend):
        name = "half"

        def weights(self, *_: object) -> object:  # type: ignore[override]
            return None

    with pytest.raises(TypeError, match="abstract method"):
        Half()  # type: ignore[abstract]


def test_a_backend_that_does_not_say_what_it_contributes_cannot_be_made() -> None:
    silent = type("Silent", (type(KERNELS["cpp"]),), {})
    assert silent().contributes is KERNELS["cpp"].contributes
    methods = {n: getattr(KernelBackend, n) for n in KernelBackend.__abstractmethods__}
    mute = type("Mute", (KernelBackend,), {n: lambda self, f=f: f for n, f in methods.items()})
    with pytest.raises(TypeError, match="Mute: got no `contributes`"):
        mute()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_an_epilogue_that_a_backend_does_not_know_is_refused(backend: str) -> None:
    class Scaled(NamedTuple):
        factor: float

    x, one = torch.randn(1, 4, 3, 3), torch.ones(1, 1, 1)
    filters = Filters(one, one, torch.randn(4, 1, 3, 3))
    with pytest.raises(TypeError, match=r"^epilogue: got Scaled; allowed is one of NoneType, Res"):
        KERNELS[backend].layer(x, filters, (), (), 2, 1.0, None, Scaled(2.0))  # type: ignore[arg-type]


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in KNOWN.items()}
    assert {name: n for name, n in lengths.items() if n > 420} == {}
