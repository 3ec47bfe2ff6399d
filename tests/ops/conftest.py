"""Every test of the operations runs with poisoned memory, and on one thread unless it asks for more."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import ela_kernels as ek
from ela_kernels.backends.dispatch import Refusal
from ela_kernels.backends.types import NormAct
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

    def layer(history: Any, x: Any, plan: Any, **options: Any) -> Any:
        made["block" if isinstance(options.get("epilogue"), NormAct) else "layer"] += 1
        return attend_layer(history, x, plan, **options)

    def light_layer(*args: Any) -> Any:
        is_block = any(isinstance(arg, NormAct) for arg in args)
        made["light_block" if is_block else "light_layer"] += 1
        return of_light(*args)

    attend_layer, of_light = ek.LayerHistory.attend_layer, light.light_layer
    provide = counted(ek.LayerHistory.provide_layer, "provide")
    monkeypatch.setattr(ek.LayerHistory, "attend_layer", layer)
    monkeypatch.setattr(ek.LayerHistory, "provide_layer", provide)
    for module in (light, residual):
        monkeypatch.setattr(module, "light_layer", light_layer)

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
            refusal = Refusal(("a test",), None)
            patch.setattr(ek.LayerHistory, "plan_layer", lambda *_, **__: refusal)
            patch.setattr(light, "plan_light_layer", lambda *_, **__: refusal)
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
