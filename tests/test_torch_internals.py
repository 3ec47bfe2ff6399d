"""PyTorch's private names stand in one file, and each of them says why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import ela_kernels
from ela_kernels import torch_internals

PACKAGE = Path(ela_kernels.__file__).parent
# Of named tuples, whose methods begin so in order not to be fields.
NAMED_TUPLES = {"_asdict", "_replace", "_fields"}
# Of Python itself, which documents it by this name.
DOCUMENTED = {"_exit"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """What the package itself defines: functions, classes, variables and attributes that it sets."""
    found = NAMED_TUPLES | DOCUMENTED
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def foreign_names(tree: ast.Module, own: set[str]) -> list[str]:
    """Private names that are not the package's own; of a base class a subclass may use them on itself."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_protected = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if is_private(node.attr) and node.attr not in own and not is_protected:
                found.append(f"{ast.unparse(node)}, line {node.lineno}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getattr", "getter")):
            for argument in node.args:
                name = argument.value if isinstance(argument, ast.Constant) else ""
                if isinstance(name, str) and is_private(name) and name not in own:
                    found.append(f"{ast.unparse(node)}, line {node.lineno}")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            names = [*module.split("."), *(p for a in node.names for p in a.name.split("."))]
            is_own = module.startswith("ela_kernels") or getattr(node, "level", 0)
            if not is_own and any(map(is_private, names)):
                found.append(f"{ast.unparse(node)}, line {node.lineno}")
    return found


def test_no_other_file_uses_private_names():
    trees = {p: ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
    own = own_names(list(trees.values()))
    at = Path(torch_internals.__file__)
    assert foreign_names(trees.pop(at), own)
    found = {str(p.relative_to(PACKAGE)): foreign_names(tree, own) for p, tree in trees.items()}
    assert {p: names for p, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._current_graph_task_id()",
        "tensor._version",
        "getattr(nn.Module, '_hidden', None)",
        "operator.attrgetter('_version')",
        "from torch._dynamo import config",
        "import torch._inductor.config",
        "from torch.nn.modules.module import _global_hooks",
        "module._parameters",
    ],
)
def test_private_names_are_found(line):
    assert foreign_names(ast.parse(line), set())
    assert not foreign_names(ast.parse("self._buffers; r._replace(a=1); __name__"), {"_replace"})


def test_each_name_says_why():
    """What follows a name that is bound, or is a function's docstring."""
    tree = ast.parse(Path(torch_internals.__file__).read_text())
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            text, name = ast.get_docstring(node), node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            name = ast.unparse(target)
            is_said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = after.value.value if is_said else None
        else:
            continue
        if name != "F" and not name.startswith("_"):
            assert text, name
            assert any(word in text for word in ("Always", "hold")), name


def test_all_modules_are_those_that_pytorch_names():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.ModuleList([shared, nn.Sequential(shared, nn.ReLU())]), nn.Identity())
    model.register_module("none", None)
    model[0].append(model[1])
    assert torch_internals.all_modules(model) == list(model.modules())


def test_hooks_on_all_modules():
    layer = nn.Linear(2, 2)
    assert not torch_internals.has_hooks(layer)
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert torch_internals.has_hooks(layer)
        handle.remove()
        assert not torch_internals.has_hooks(layer)


def test_a_compiled_graph_is_not_taken_for_an_exported_one():
    """EBQM sees nothing of an exported graph; the compiler of PyTorch 2.10 takes the public question for true."""

    def ask(x):
        return x + (2 if torch_internals.is_exporting() else 1)

    class Asks(nn.Module):
        def forward(self, x):
            return ask(x)

    x = torch.zeros(1)
    assert torch.compile(ask, backend="eager", fullgraph=True)(x) == 1
    assert torch.export.export(Asks(), (x,)).module()(x) == 2
    assert ask(x) == 1
