"""What importing does to a process, and what the backends say of calls that are not theirs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support.cases import evaluate, make_case
from support.on_gpu import BACKENDS, DEVICE, case_on, evaluate_on
from support.oracle import assert_matches

import ela_kernels as ek
from ela_kernels.backends.contract import Request
from ela_kernels.backends.dispatch import plan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_only")]

ROOT = Path(__file__).resolve().parents[2]


def run_apart(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_a_call_on_the_cpu_initialise_no_gpu():
    run_apart(
        """
        import torch
        import ela_kernels as ek
        import ela_kernels.modules, ela_kernels.models
        assert not torch.cuda.is_initialized()
        q, v = torch.randn(2, 8), torch.randn(2, 8, 4)
        ek.layer_attention(q, [q], [v], 2)
        ek.LayerHistory().attend(q, q, v, heads=2)
        assert not torch.cuda.is_initialized()
        """
    )


def test_a_child_of_a_process_that_only_imported_can_use_the_gpu():
    # A process whose parent has initialised the driver cannot; data loaders fork like this.
    out = run_apart(
        """
        import os, sys
        import torch
        import ela_kernels as ek
        q, v = torch.randn(2, 8), torch.randn(2, 8, 4)
        ek.layer_attention(q, [q], [v], 2)
        child = os.fork()
        if child == 0:
            q, v = q.cuda(), v.cuda()
            print(ek.layer_attention(q, [q], [v], 2).out.shape, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
        """
    )
    assert "torch.Size([2, 8, 4])" in out


def test_float64_is_refused_when_forced_and_left_to_eager_otherwise(backend):
    case = make_case(dtype=torch.float64)
    there = case_on(case)
    with pytest.raises(ValueError, match=f"backend '{backend}' was forced.*torch.float64"):
        evaluate(there)
    with ek.use_backend("auto"):
        assert_matches({n: x.cpu() for n, x in evaluate(there).items()}, case)


def test_tensors_on_the_cpu_are_refused_when_forced(backend):
    case = make_case()
    with pytest.raises(ValueError, match=f"backend '{backend}' was forced.*on cpu"):
        evaluate(case)


def test_auto_takes_a_kernel(kernels_ran, backend):
    with ek.use_backend("auto"):
        evaluate_on(make_case())
        chosen = plan(Request("layer_attention", torch.device("cuda", 0), torch.float32, 3))
    assert chosen.name in BACKENDS
    assert kernels_ran == (["forward", "backward"] if backend == chosen.name else [])


def test_auto_serves_a_history_that_is_too_deep():
    case = make_case((1, 2, 3), 257, 1)
    with ek.use_backend("auto"):
        assert_matches(evaluate_on(case), case)


def test_mixed_devices_are_refused_by_name(backend):
    there = case_on(make_case())
    with pytest.raises(ValueError, match=r"keys\[1\]: got device cpu"):
        ek.layer_attention(there.q, [there.keys[0], there.keys[1].cpu()], there.values[:2], 3)


def test_the_device_is_described():
    from ela_kernels.info import collect_report

    devices = collect_report()["devices"]
    assert devices["torch"][0]["name"] == torch.cuda.get_device_name(0)
    if ek.backend_status()["cuda"] == "available":
        assert devices["extension"][0]["kernel"] == "ran"


def test_warmup_leaves_nothing_to_compile(backend):
    seconds = ek.warmup([(2, 16, 8, 8)], depth=3, device=DEVICE)
    assert seconds > 0
    assert ek.warmup([(2, 16, 8, 8)], depth=3, device=DEVICE) < max(seconds, 1.0)
