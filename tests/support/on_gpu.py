"""Calls moved to a GPU as they lie in memory.

`ELA_KERNELS_TEST_DEVICE=cpu` runs what needs no CUDA of these tests on the cpp backend, and with `TRITON_INTERPRET=1`
on the interpreted triton one: to see without a GPU that the tests themselves are right. `cuda_on_cpu` runs them on the
CUDA kernels, built by the host compiler against a stand-in for their runtime, which takes minutes at first.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from support.cases import Case, evaluate
from torch import Tensor

import ela_kernels as ek
from ela_kernels.backends.dispatch import KERNELS

_NAME = os.environ.get("ELA_KERNELS_TEST_DEVICE", "cuda")
IS_STAND_IN = _NAME == "cuda_on_cpu"
DEVICE = torch.device("cpu" if IS_STAND_IN else _NAME)
BACKENDS = ("cuda", "triton") if DEVICE.type == "cuda" else ("cpp", "triton")
if IS_STAND_IN:
    BACKENDS = ("cuda",)

# What a backend on a GPU takes; float64 is left to eager PyTorch.
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def synchronize() -> None:
    """Wait for the device, so that a fault shows in the test that caused it.

    After a fault of a kernel every call of this process fails. A worker of pytest-xdist ends then, which is reported as
    this test's failure, and another one takes over: the tests after it are to say something of themselves.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        os._exit(70)


def serving(backend: str, attention: str) -> str:
    """`backend`, or eager PyTorch where it has no kernels of the light form: forced, it would refuse such a layer."""
    has_light = "light_layer" in (KERNELS[backend].ops or ())
    return backend if has_light or attention != "mrla_light" else "eager"


def moved(tensor: Tensor, device: torch.device = DEVICE) -> Tensor:
    """`tensor` on the device with the same strides and offset: gaps, steps and zero strides stay what they are."""
    if tensor.is_neg():
        return torch._neg_view(moved(torch._neg_view(tensor), device))
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.as_strided((elements,), (1,), 0).to(device)
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, list):
        return [_moved(x, device) for x in value]
    return value


def case_on(case: Case, device: torch.device = DEVICE) -> Case:
    """`case` with all its tensors on the device."""
    fields = {f.name: _moved(getattr(case, f.name), device) for f in dataclasses.fields(case)}
    return Case(**fields)


def evaluate_on(
    case: Case, device: torch.device = DEVICE, op: Any = ek.layer_attention
) -> dict[str, Tensor]:
    """Outputs and wanted gradients of `case` on the device, brought back."""
    return {name: x.cpu() for name, x in evaluate(case_on(case, device), op).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, NaN and the sign of zero included."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def captured(
    step: Callable[[], list[Tensor]], warmup: int = 3
) -> tuple[Callable[[], None], list[Tensor]]:
    """`step` in a CUDA graph, after warm-up calls on a side stream: the replay, and the results that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results
