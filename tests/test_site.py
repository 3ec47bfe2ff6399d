"""What the documentation's site is made of: its navigation, its pages of names and options, its links out of docs/."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import ela_kernels as ek
from build_tools import option_page, site_pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MKDOCS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
NAVIGATION = re.findall(
    r"^ +- (?:[^#\n]*: )?([\w/]+\.md)$", MKDOCS.split("\nnav:")[1], re.MULTILINE
)


# Those whose names are public; the package itself first.
MODULES = (
    "",
    "models",
    "ebqm",
    "modules",
    "analysis",
    "integrations",
    "integrations.timm",
    "integrations.torchvision",
)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    ours = [page for page in NAVIGATION if not page.startswith(site_pages.OUTSIDE)]
    assert sorted(ours) == sorted(pages)


def test_what_the_navigation_takes_from_elsewhere_is_there() -> None:
    outside = [page for page in NAVIGATION if page.startswith(site_pages.OUTSIDE)]
    assert sorted(outside) == sorted(map(site_pages.in_site, site_pages.ALWAYS))
    assert all((ROOT / path).is_file() for path in site_pages.ALWAYS)


def public(module: str) -> set[str]:
    """The names of a module's `__all__`, also of one that needs a library."""
    try:
        names: Iterable[str] = importlib.import_module(module).__all__
    except ImportError:
        source = ROOT / (module.replace(".", "/") + ".py")
        (names,) = (
            ast.literal_eval(node.value)
            for node in ast.parse(source.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_its_place_in_the_api(module: str) -> None:
    shown = set()
    for page in (DOCS / "api").glob("*.md"):
        found = re.findall(
            r"^::: ela_kernels\.([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE
        )
        shown |= set(found)
    prefix = f"{module}." if module else ""
    # Those of a subpackage that the package itself gives are shown as its own.
    missing = public(f"ela_kernels.{module}".rstrip(".")) - set(ek.__all__)
    if not module:
        missing = {name for name in ek.__all__ if not name.startswith("_")}
    assert {name for name in missing if prefix + name not in shown} == set()


def test_the_page_of_options_is_that_of_the_parser() -> None:
    """Written anew by `python -m build_tools.option_page`."""
    assert option_page.PAGE.read_text(encoding="utf-8") == option_page.page()


def test_links_are_replaced_and_code_is_left() -> None:
    text = "[a](x.md#y) `[b](x.md)`\n```\n[c](x.md)\n```\n![d](x.md) [e](https://x.md) [f](#here)"
    assert site_pages.with_links(text, str.upper) == text.replace(
        "[a](x.md#y)", "[a](X.MD#y)"
    ).replace("![d](x.md)", "![d](X.MD)")


@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("README.md", "repository/about.md"),
        ("docs/howto/profile.md", "howto/profile.md"),
        ("CHANGELOG.md", "repository/CHANGELOG.md"),
        ("benchmarks/gpu/README.md", "repository/benchmarks/gpu/about.md"),
        ("benchmarks/published/networks.py", "repository/benchmarks/published/networks.py.md"),
    ],
)
def test_files_have_a_place_in_the_site_and_back(path: str, page: str) -> None:
    assert site_pages.in_site(path) == page
    assert site_pages.in_repository(page) == path


def test_what_pages_link_to_is_found_with_what_that_links_to(tmp_path: Path) -> None:
    for name, text in {
        "docs/a.md": "[one](../one.md)",
        "one.md": "[two](more/two.py) [back](docs/b.md) [again](one.md)",
        "more/two.py": "",
        "more/three.md": "",
        "docs/b.md": "[three](../more/three.md)",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert site_pages.outside(["docs/a.md"], tmp_path) == ["more/two.py", "one.md"]
    assert site_pages.outside(["docs/a.md", "docs/b.md"], tmp_path) == [
        "more/three.md",
        "more/two.py",
        "one.md",
    ]


def test_what_a_page_loads_from_elsewhere_is_found() -> None:
    page = (
        '<a href="https://a.org">a</a><link rel="stylesheet" href="b.css"><img src="//c.org/c.png">'
    )
    assert site_pages.loaded_from_elsewhere(page) == ["//c.org/c.png"]
    page = (
        '<script src=https://d.org/d.js></script><link href="https://e.org/e.css" rel="stylesheet">'
    )
    assert site_pages.loaded_from_elsewhere(page) == ["https://d.org/d.js", "https://e.org/e.css"]
