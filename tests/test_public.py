"""What `dir()` shows of the package and its public subpackages, and what is there without an import of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ela_kernels as ek

SUBPACKAGES = ("analysis", "ebqm", "integrations", "models", "modules")


@pytest.mark.parametrize(
    "name", ["ela_kernels.backends", *(f"ela_kernels.{n}" for n in SUBPACKAGES)]
)
def test_a_subpackage_shows_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)
    for entry in module.__all__:
        assert getattr(module, entry) is not None
        assert not entry.startswith("_")


def test_the_package_shows_what_it_offers() -> None:
    assert dir(ek) == sorted([*ek.__all__, *SUBPACKAGES])
    for entry in dir(ek):
        assert getattr(ek, entry) is not None
    assert not hasattr(ek, "annotations")
    with pytest.raises(AttributeError, match="module 'ela_kernels' has no attribute 'nothing'"):
        ek.nothing  # noqa: B018


def test_networks_are_there_without_an_import_of_their_own() -> None:
    program = """
import sys, ela_kernels
assert "ela_kernels.models" not in sys.modules
assert "models" in dir(ela_kernels)
assert ela_kernels.models.resnet20 is sys.modules["ela_kernels.models"].resnet20
assert ela_kernels.ebqm.fit_beta and ela_kernels.modules.ConcatHistory
from ela_kernels import *
assert layer_attention is ela_kernels.layer_attention
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(ek.__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
