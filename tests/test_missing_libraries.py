"""An optional library that is not there is told in a sentence, with the extra that has it."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("lightning", "lightning.pytorch.callbacks"),
        ("transformers", "transformers.trainer_callback"),
    ],
)
def test_a_missing_library_names_its_extra(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"ela_kernels.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"^{module}: got no .*ela-kernels\[{name}\]"):
        importlib.import_module(module)
