"""What a release has beside code: one version, a changelog, what is public, what to do where something is wrong."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import ela_kernels as ek

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def versions_in(changelog: str) -> list[tuple[str, str]]:
    return re.findall(r"^## \[(\S+)\] - (\S+)$", changelog, flags=re.MULTILINE)


def test_one_version() -> None:
    (version, date), *_ = versions_in(read("CHANGELOG.md"))
    assert version == ek.__version__
    citation = read("CITATION.cff")
    assert f"\nversion: {version}\n" in citation
    assert f"\ndate-released: {date}\n" in citation


def test_the_changelog_has_its_form() -> None:
    changelog = read("CHANGELOG.md")
    found = versions_in(changelog)
    assert len(found) == changelog.count("\n## ")
    numbers = [tuple(map(int, version.split("."))) for version, _ in found]
    assert numbers == sorted(set(numbers), reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in found)
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    for heading in re.findall(r"^### (\w+)", changelog, flags=re.MULTILINE):
        assert heading in kinds


@pytest.mark.parametrize(
    "name", ["CHANGELOG.md", "SECURITY.md", "docs/cli.md", "docs/deprecation.md"]
)
def test_files_that_a_page_links_to_are_there(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", read(name))
    assert links or name == "SECURITY.md"
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


def test_what_is_public_is_told() -> None:
    page = read("docs/deprecation.md")
    for name in dir(ek):
        if name not in ek.__all__:
            assert f"`{name}`" in page


def test_nothing_is_deprecated_without_the_page_that_says_how() -> None:
    """Whoever deprecates something adds it to the page, which says that there is nothing."""
    warned = [
        path.name
        for path in (ROOT / "ela_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id in ("DeprecationWarning", "FutureWarning")
    ]
    assert ("Nothing is deprecated in this version." in read("docs/deprecation.md")) == (not warned)


def test_a_report_asks_for_what_is_needed() -> None:
    bug = read(".github/ISSUE_TEMPLATE/bug.yml")
    assert "python -m ela_kernels info" in bug
    assert "python -m ela_kernels bench --quick" in bug
    for name in ("bug", "feature"):
        template = read(f".github/ISSUE_TEMPLATE/{name}.yml")
        assert re.match(r"name: .+\ndescription: .+\nbody:\n", template)
        for part in ("type: textarea", "label: "):
            assert template.count(part) >= 3
    assert "CHANGELOG.md" in read(".github/pull_request_template.md")


def test_the_source_archive_has_what_pages_name() -> None:
    manifest = read("MANIFEST.in")
    assert "recursive-include docs *.md\n" in manifest
    included = next(line for line in manifest.splitlines() if line.startswith("include ")).split()
    assert {path.name for path in ROOT.glob("*.md")} <= set(included)
    assert {"CITATION.cff", "LICENSE", "Makefile"} <= set(included)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="no tomllib")
def test_links_of_the_project_are_links() -> None:
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert all(url.startswith("https://") for url in project["urls"].values())
