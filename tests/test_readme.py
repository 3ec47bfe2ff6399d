"""The pages' code runs, what they call equivalent is, the files that they name are there, and names have a page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ela_kernels as ek

ROOT = Path(__file__).parents[1]


def pages(*patterns: str) -> dict[str, str]:
    """Pages of docs/ by their place from the root."""
    found = [path for pattern in patterns for path in sorted((ROOT / "docs").glob(pattern))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in found}


# For whoever learns: pages whose blocks stand alone, and pages that are one program each.
GUIDES = pages("index.md", "howto/*.md", "concepts/*.md", "kernels/*.md")
PROGRAMS = pages("getting_started.md", "tutorials/*.md")
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/backends.md",
        "docs/benchmarks.md",
        "docs/cli.md",
        "docs/demo.md",
        "docs/depth_mix.md",
        "docs/distributed.md",
        "docs/dropin.md",
        "docs/ebqm.md",
        "docs/integrations.md",
        "docs/export.md",
        "docs/history_dtype.md",
        "docs/models.md",
        "docs/position_attention.md",
        "docs/skipping.md",
        "docs/tolerance.md",
        "docs/training.md",
    )
}
CONTENTS = "docs/backends.md"
COMPARED = "docs/benchmarks.md"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.parametrize(
    "block",
    [block for page in (PAGES | GUIDES).values() for block in blocks_of(page)],
    ids=lambda b: b.strip().splitlines()[-1][:40],
)
def test_a_block_runs(block):
    import_libraries_of(block)
    exec(compile(block, "a page", "exec"), {})


def import_libraries_of(code: str) -> None:
    """Leave a test out where a library is missing that its code names."""
    for library in ("timm", "torchvision", "sklearn"):
        if re.search(rf"\b{library}\b", code):
            pytest.importorskip(library)


@pytest.mark.parametrize("name", [name for name, page in PROGRAMS.items() if blocks_of(page)])
def test_a_program_of_several_blocks_runs(name, tmp_path):
    """In a process of its own, as a reader runs it, who may start others from it."""
    code = "\n".join(blocks_of(PROGRAMS[name]))
    import_libraries_of(code)
    program = tmp_path / "program.py"
    program.write_text(code, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(program)]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr


def paths_in(page: str) -> set[str]:
    """Links to files, and whatever is written like a path from the root; not patterns and places like `NAME`."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    words = set(re.findall(r"(?<![\w/.])[\w.]+/[\w./<>*-]+", re.sub(r"\]\([^)]*\)", "]", page)))
    roots = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named = {word.rstrip(".") for word in words if word.split("/")[0] in roots}
    return {path for path in links | named if not re.search(r"[<*]|NAME", path)}


def missing_in(page: str, name: str) -> set[str]:
    """Paths count from the root or from the page's folder."""
    places = ROOT, (ROOT / name).parent
    return {path for path in paths_in(page) if not any((place / path).exists() for place in places)}


def test_a_missing_file_is_found():
    page = "see `docs/nowhere.md`, [this](docs/architecture.md) and\n```\n  step   csrc/gone.h\n```"
    assert missing_in(page, "README.md") == {"docs/nowhere.md", "csrc/gone.h"}


def test_paths_are_found():
    assert all(len(paths_in(PAGES[name])) > 5 for name in ("README.md", "docs/architecture.md"))


@pytest.mark.parametrize("name", PAGES | GUIDES | PROGRAMS)
def test_the_files_that_a_page_names_are_there(name):
    assert missing_in((PAGES | GUIDES | PROGRAMS)[name], name) == set()


def test_the_eager_lines_are_equivalent_to_the_module():
    names: dict[str, type] = {}
    (block,) = (b for b in blocks_of(PAGES[COMPARED]) if "class Eager" in b)
    exec(compile(block, COMPARED, "exec"), names)
    torch.manual_seed(0)
    fused = [ek.ELA(dim=32, head_dim=16, kernel_size=3) for _ in range(3)]
    x = y = torch.randn(2, 32, 6, 5)
    history, keys, values = ek.LayerHistory(), [], []
    for layer in fused:
        eager = names["Eager"](dim=32, head_dim=16)
        eager.load_state_dict(
            {k.removeprefix("attn."): v for k, v in layer.state_dict().items()}, strict=False
        )
        x, y = layer(x, history), eager(y, keys, values)
        # float32: a mean over 30 positions, dot products of 16, sums of 3; below 1e-5 relative to values near 1.
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_the_readme_stays_a_page():
    assert len(PAGES["README.md"].splitlines()) <= 120


def test_every_public_name_is_in_the_table_of_what_there_is():
    (table,) = re.findall(r"## What is in it\n\n((?:\|.*\n)+)", PAGES[CONTENTS])
    in_code = " ".join(re.findall(r"`([^`]+)`", table))
    missing = [
        n
        for n in ek.__all__
        if not re.search(rf"\b{re.escape(n)}\b", in_code)
        and not n.startswith(("_", "LayerAttentionO", "LayerAttentionW"))
    ]
    assert missing == []
