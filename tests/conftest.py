"""Fixtures of all tests: seeds, threads, backends, poisoned memory."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Before torch._dynamo, which imports Triton: Triton reads the variable where it defines its own functions as well.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    _interpret = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")

    if _interpret is None:
        del os.environ["TRITON_INTERPRET"]

# `support`, the tests' own helpers; pytest's import mode puts nothing on the path.
sys.path.append(str(Path(__file__).resolve().parent))

from support import exhaustive

import ela_kernels as ek
from ela_kernels import explaining
from ela_kernels.backends import dispatch
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.extension import extension, extension_problem
from ela_kernels.backends.types import NormAct
from ela_kernels.ops.layer_attention import autograd, interface, places


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m` selects."""
    exhaustive.mark(items)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20230203)


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """A test may set threads and backend; the next one finds them as before."""
    threads, setting = torch.get_num_threads(), dispatch.current_setting()
    yield
    torch.set_num_threads(threads)
    ek.use_backend(setting)


@pytest.fixture
def one_thread(settings_restored: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that an output that nothing wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_graph_was_compiled() -> Iterator[None]:
    """As in a process that compiled no layer: in others no pair of a skipped layer waits for somebody to read it."""
    before = list(places.graphs_seen)
    places.graphs_seen.clear()
    yield
    places.graphs_seen[:] = before


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled before the test, and what it compiled is gone afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def fresh_log() -> Iterator[None]:
    """Nothing of what is logged once has been logged yet."""
    explaining._told.clear()
    yield
    explaining._told.clear()


@pytest.fixture
def kernels() -> Any:
    """The compiled extension; skips where there is none."""
    if extension() is None:
        pytest.skip(extension_problem())
    return extension()


@pytest.fixture(params=["eager", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn, forced."""
    if request.param == "cpp" and extension() is None:
        pytest.skip(extension_problem())
    with ek.use_backend(request.param):
        yield request.param


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the calls made so far ran: the backend, and `forward`, `backward`, `weights` or `gather`."""
    record: list[str] = []

    def spy(owner: Any, function: str, what: str) -> None:
        original: Callable[..., Any] = getattr(owner, function)

        @functools.wraps(original)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            is_block = any(type(a) is NormAct for a in args)
            record.append(what.replace("layer", "block") if is_block else what)
            return original(*args, **kwargs)

        # On the instance, and gone from there afterwards.
        monkeypatch.setitem(vars(owner), function, recorded)

    for backend in ("cpp", "cuda"):
        for function, what in (
            ("attend", "forward"),
            ("attend_backward", "backward"),
            ("weights", "weights"),
            ("gather", "gather"),
            ("layer", "layer"),
            ("layer_backward", "layer backward"),
        ):
            spy(KERNELS[backend], function, f"{backend} {what}")
    spy(interface, "log_weights_reference", "eager weights")
    for module in (autograd, interface):
        spy(module, "layer_attention_reference", "eager forward")
    return record
