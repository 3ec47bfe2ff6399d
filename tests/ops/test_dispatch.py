"""Which backend serves a call, and what is said when none but eager can."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cases import DTYPES, evaluate, make_case
from support.oracle import assert_matches

import ela_kernels as ek
from ela_kernels.backends import dispatch, extension

MISSING = "the compiled extension was not built: there is no compiler here"


def forget_choices() -> None:
    dispatch._plan.cache_clear()
    dispatch._fallbacks.clear()


@pytest.fixture
def without_extension(monkeypatch):
    """As on a machine where the extension was not built."""
    monkeypatch.setattr(extension, "extension", lambda: None)
    monkeypatch.setattr(extension, "extension_problem", lambda: MISSING)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def fresh_log():
    forget_choices()
    yield
    forget_choices()


def weights_call(requires_grad=False):
    q = torch.randn(2, 6, requires_grad=requires_grad)
    return ek.layer_attention_weights(q, [torch.randn(2, 6)], 2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", ["auto", "cpp"])
def test_kernels_serve_cpu_tensors(setting, dtype, ran):
    with ek.use_backend(setting):
        evaluate(make_case(dtype=dtype))
        assert ran == ["cpp forward", "cpp backward"]
        ran.clear()
        weights_call()
        assert ran == ["cpp weights"]


def test_forced_eager_runs_no_kernel(ran):
    with ek.use_backend("eager"):
        evaluate(make_case())
        weights_call()
        history = ek.LayerHistory()
        q, k, v = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6, 4, requires_grad=True)
        history.attend(q, k, v, heads=2).sum().backward()
    assert ran == ["eager forward", "eager weights", "eager forward"]


@pytest.mark.usefixtures("kernels")
def test_a_weights_call_that_needs_gradients_runs_in_eager_without_a_warning(
    ran, fresh_log, caplog
):
    with ek.use_backend("auto"), caplog.at_level(logging.DEBUG, "ela_kernels"):
        assert weights_call(requires_grad=True).weights.requires_grad
        assert ran == ["eager weights"]
        ran.clear()
        with torch.no_grad():
            weights_call(requires_grad=True)
        assert ran == ["cpp weights"]
    assert not caplog.records


@pytest.mark.usefixtures("kernels")
def test_forced_kernels_refuse_a_weights_call_that_needs_gradients():
    with (
        ek.use_backend("cpp"),
        pytest.raises(
            ValueError, match=r"backend 'cpp' was forced.*no backward.*torch\.no_grad\(\)"
        ),
    ):
        weights_call(requires_grad=True)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_gpu_backends_say_why_not(name):
    with ek.use_backend(name), pytest.raises(ValueError) as caught:
        evaluate(make_case())
    message = str(caught.value)
    assert f"backend {name!r} was forced and cannot serve this layer_attention call" in message
    assert "torch.float32 on cpu, depth 3" in message
    assert "it serves tensors on cuda, and these are on cpu" in message
    assert ek.backend_status()[name] in message
    assert "use_backend('auto')" in message


def test_forced_kernels_refuse_another_device():
    meta = {"device": "meta"}
    q, v = torch.randn(2, 6, **meta), torch.randn(2, 6, 4, **meta)
    with (
        ek.use_backend("cpp"),
        pytest.raises(ValueError, match="it serves tensors on cpu, and these are on meta"),
    ):
        ek.layer_attention(q, [q], [v], 2)


def test_auto_falls_back_and_says_so_once(without_extension, ran, caplog):
    case = make_case()
    with ek.use_backend("auto"), caplog.at_level(logging.WARNING, "ela_kernels"):
        assert_matches(evaluate(case), case)
        evaluate(make_case(depth=2))
        evaluate(make_case(dtype=torch.float64))
    assert ran == ["eager forward"] * 3
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    message = caplog.text
    assert "layer attention on cpu runs in eager PyTorch" in message
    assert f"cpp: {MISSING}" in message
    assert "python -m ela_kernels info" in message


def test_forced_kernels_that_were_not_built_raise(without_extension):
    with ek.use_backend("cpp"), pytest.raises(ValueError, match=MISSING):
        evaluate(make_case())
    assert ek.backend_status()["cpp"] == MISSING
    assert ek.backend_status()["eager"] == "available"


@pytest.mark.usefixtures("kernels")
def test_kernels_that_serve_log_nothing(fresh_log, caplog):
    with ek.use_backend("auto"), caplog.at_level(logging.DEBUG, "ela_kernels"):
        evaluate(make_case())
    assert not caplog.records


def test_status_names_every_backend(kernels):
    status = ek.backend_status()
    assert list(status) == ["cuda", "triton", "cpp", "eager"]
    assert status["cpp"] == status["eager"] == "available"
    for name in ("cuda", "triton"):
        assert status[name] != "available"
        assert len(status[name].split()) > 3  # a sentence


def test_the_setting_as_context_nested_and_for_good():
    ek.use_backend("auto")
    with ek.use_backend("eager"):
        assert dispatch.current_setting() == "eager"
        with ek.use_backend("cpp"):
            assert dispatch.current_setting() == "cpp"
        assert dispatch.current_setting() == "eager"
        with pytest.raises(KeyError), ek.use_backend("cuda"):
            raise KeyError
        assert dispatch.current_setting() == "eager"
    assert dispatch.current_setting() == "auto"
    ek.use_backend("eager")
    assert dispatch.current_setting() == "eager"


def test_an_unknown_backend_is_refused_and_changes_nothing():
    before = dispatch.current_setting()
    with pytest.raises(
        ValueError,
        match=r"use_backend\(name\): got 'gpu'; allowed are auto, cpp, cuda, eager, triton",
    ):
        ek.use_backend("gpu")
    assert dispatch.current_setting() == before


@pytest.mark.parametrize("name", ["eager", "nonsense"])
def test_the_environment_variable(name):
    package = str(Path(ek.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    program = (
        "import torch, ela_kernels as ek; x = torch.ones(1, 2); "
        "ek.layer_attention(x, [x], [x[..., None]], 1); "
        "print(ek.backends.dispatch.current_setting())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"ELA_KERNELS_BACKEND": name, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if name == "eager":
        assert done.stdout.strip() == "eager"
    else:
        assert done.returncode != 0
        assert "ELA_KERNELS_BACKEND: got 'nonsense'; allowed are auto, cpp" in done.stderr
