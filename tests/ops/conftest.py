"""Every test of the operations runs with poisoned memory, and on one thread unless it asks for more."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import ela_kernels as ek
from ela_kernels.modules import light, residual


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def one_thread(settings_restored: None) -> None:
    # Tensors are small here, and waiting threads spin where the machine is busy. That results do not depend on the
    # number of threads is what test_determinism.py shows.
    torch.set_num_threads(1)


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs a function with the kernels of whole layers and without, and compares all tensors that it returns.

    What it called of them is compared with `calls`: a count for each of `layer`, `provide`, `block`, `light_layer` and
    `light_block`. An exception is compared by its type and its words.
    """
    made: collections.Counter[str] = collections.Counter()

    def counted(real: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made[what] += 1
            return real(*args, **kwargs)

        return call

    for owner, name, what in (
        (ek.LayerHistory, "attend_layer", "layer"),
        (ek.LayerHistory, "provide_layer", "provide"),
        (ek.LayerHistory, "attend_block", "block"),
        (light, "light_layer", "light_layer"),
        (residual, "light_block", "light_block"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), what))

    def outcome(run: Callable[[], Sequence[Any]]) -> list[Any]:
        try:
            return list(run())
        except (RuntimeError, TypeError, ValueError) as error:
            return [f"{type(error).__name__}: {error}"]

    def on_both(
        run: Callable[[], Sequence[Any]], rtol: float = 1e-8, atol: float = 1e-9, **calls: int
    ) -> list[Any]:
        made.clear()
        found = outcome(run)
        assert dict(made) == {what: n for what, n in calls.items() if n}, found
        with monkeypatch.context() as patch:
            patch.setattr(ek.LayerHistory, "serves_layer", lambda *_, **__: False)
            for module in (light, residual):
                patch.setattr(module, "choose_light_kernels", lambda *_: None)
            made.clear()
            expected = outcome(run)
            assert not made
        assert len(found) == len(expected), (found, expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                torch.testing.assert_close(
                    a,
                    b,
                    rtol=rtol,
                    atol=atol,
                    equal_nan=True,
                    msg=lambda m, i=i: f"{i}: {m}",
                )
            else:
                assert a == b, i
        return found

    return on_both
