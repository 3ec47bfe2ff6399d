"""Docstrings as the documentation's site shows them, an extension of griffe (mkdocs.yml).

In the sources they hold a few things that are not Markdown: roles (`:class:`), and a double colon before code. A role
becomes a link where the site has a page of that name, and code elsewhere. A section `Example:` is one that griffe calls
`Examples:`. And a function that a package takes from its module of the same name is what that name means, as it is when
the package is imported; griffe takes the module for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

API = Path(__file__).resolve().parent.parent / "docs" / "api"


def names_with_pages(folder: Path = API) -> set[str]:
    """The names that pages of the site are made for."""
    pages = (page.read_text(encoding="utf-8") for page in folder.glob("*.md"))
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)}


def readable(text: str, names: set[str]) -> str:
    """A docstring in Markdown."""

    def link(match: re.Match[str]) -> str:
        name = match[1].lstrip("~")
        full = next((n for n in names if n == name or n == f"ela_kernels.{name}"), None)
        shown = f"`{name.removeprefix('ela_kernels.')}`"
        return f"[{shown}][{full}]" if full else shown

    text = re.sub(r":(?:class|func|meth|mod|attr):`([^`]+)`", link, text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"(?<=\S)::$", ":", text, flags=re.MULTILINE)


def name_functions_before_modules(package: griffe.Module) -> None:
    """In a package and those below it, what is imported from a module of the same name takes that module's place."""
    for name, inside in list(package.members.items()):
        if not isinstance(inside, griffe.Module):
            continue
        name_functions_before_modules(inside)
        if package.imports.get(name) == f"{inside.path}.{name}":
            for other, path in package.imports.items():
                if path == f"{inside.path}.{other}":
                    package.members[other] = inside.members[other]
                    package.members[other].parent = package
    # Those that were looked up before, and found the module, are looked up anew.
    for name, path in package.imports.items():
        if isinstance(package.members.get(name), griffe.Alias):
            package.members[name] = griffe.Alias(name, path, parent=package)


class Readable(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.names = names_with_pages()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value, self.names)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        name_functions_before_modules(pkg)
