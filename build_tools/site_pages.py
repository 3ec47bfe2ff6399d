"""What the documentation's site needs of files outside of `docs/`, a hook of MkDocs (mkdocs.yml).

Pages of this repository link to each other as they lie in it, so that they can be read where the files are. A site is
made of `docs/` alone. So whatever a page links to elsewhere, the changelog or a table of results, comes into the site
under `repository/`, with what that links to in turn, and links are written as they are there. Markdown becomes a page,
so does Python source, and anything else a file. A link to what is not there stays as it is, and MkDocs, which is told
to be strict, stops at it. A built page that loads anything from another host ends the build.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS, OUTSIDE = "docs/", "repository/"
# A folder's README has another name there: MkDocs would take it for the front page of its part of the navigation.
ABOUT = "about.md"
# In the navigation, whether or not anything links to them.
ALWAYS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/gpu/README.md",
)

_FENCED = re.compile(r"^```.*?^```[^\n]*$|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def with_links(text: str, replaced: Callable[[str], str]) -> str:
    """A page with the target of each relative link replaced, its place in the page kept; code is left as it is."""
    pieces, end = [], 0
    for code in _FENCED.finditer(text):
        pieces += [_LINK.sub(lambda m: replaced(m[1]) + m[2], text[end : code.start()]), code[0]]
        end = code.end()
    return "".join((*pieces, _LINK.sub(lambda m: replaced(m[1]) + m[2], text[end:])))


def links(text: str) -> Iterator[str]:
    """The targets of a page's relative links."""
    found: list[str] = []
    with_links(text, lambda target: found.append(target) or target)  # type: ignore[func-returns-value]
    yield from found


def in_repository(page: str) -> str:
    """Where the source of a page of the site lies."""
    if not page.startswith(OUTSIDE):
        return DOCS + page
    path = re.sub(rf"(^|/){ABOUT}$", r"\1README.md", page.removeprefix(OUTSIDE))
    return path.removesuffix(".md") if path.endswith(".py.md") else path


def in_site(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    path = re.sub(r"(^|/)README\.md$", rf"\1{ABOUT}", path)
    return OUTSIDE + path + (".md" if path.endswith(".py") else "")


def resolved(link: str, path: str) -> str:
    """The file of the repository that a link in the file `path` is to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def outside(pages: Iterable[str], root: Path = ROOT) -> list[str]:
    """Files out of `docs/` that pages link to, and what these link to."""
    found: list[str] = []
    waiting = [*ALWAYS, *pages]
    while waiting:
        path = waiting.pop()
        if path in found or not (root / path).is_file():
            continue
        if not path.startswith(DOCS):
            found.append(path)
        if path.endswith(".md"):
            targets = links((root / path).read_text(encoding="utf-8"))
            new = (resolved(target, path) for target in targets)
            waiting += [target for target in new if not target.startswith(DOCS)]
    return sorted(found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What pages link to, added to the site."""
    from mkdocs.structure.files import File, InclusionLevel

    pages = [DOCS + file.src_uri for file in files.documentation_pages()]
    for path in outside(pages):
        if path.endswith(".py"):
            source = (ROOT / path).read_text(encoding="utf-8")
            content = f"# `{path}`\n\n````python\n{source}````\n"
            file = File.generated(config, in_site(path), content=content)
        else:
            file = File.generated(config, in_site(path), abs_src_path=str(ROOT / path))
        if path not in ALWAYS:
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text, with its links as they are in the site."""
    here = page.file.src_uri
    if here.endswith(".py.md"):
        return markdown
    folder = posixpath.dirname(here)

    def moved(link: str) -> str:
        target = in_site(resolved(link, in_repository(here)))
        if files.get_file_from_path(target) is None:
            return link
        return posixpath.relpath(target, folder or ".")

    return with_links(markdown, moved)


def loaded_from_elsewhere(html: str) -> list[str]:
    """Addresses at other hosts from which a page loads something: no links that a reader may follow."""
    return _LOADED.findall(html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Nothing of the site comes from other hosts, and names in the API are no modules."""
    from mkdocs.exceptions import PluginError

    if "doc-object doc-module" in output:
        raise PluginError(
            f"{page.file.src_uri}: shows a module, where a name of the package is meant"
        )
    found = loaded_from_elsewhere(output)
    if found:
        raise PluginError(
            f"{page.file.src_uri}: loads {', '.join(found)}; the site loads nothing from other hosts"
        )
    return output
