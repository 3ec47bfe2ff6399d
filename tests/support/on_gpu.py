"""Calls moved to a GPU as they lie in memory, and stages of leaves to differentiate there.

`ELA_KERNELS_TEST_DEVICE=cpu` runs what needs no CUDA of these tests on the cpp backend, and with `TRITON_INTERPRET=1`
on the interpreted triton one: to see without a GPU that the tests themselves are right.
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

DEVICE = torch.device(os.environ.get("ELA_KERNELS_TEST_DEVICE", "cuda"))
BACKENDS = ("cuda", "triton") if DEVICE.type == "cuda" else ("cpp", "triton")

# What a backend on a GPU takes; float64 is left to eager PyTorch.
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


class LeafStage:
    """A stage whose queries, keys and values are given: out_t = attend(q_t, k_t, v_t) for every layer.

    Nothing is chained from layer to layer but the history, so that every result is rounded to the dtype once.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        depth: int,
        heads: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
        skip: tuple[int, ...] = (),
        channels_last: bool = False,
    ) -> None:
        rows = shape[0], shape[-1 if channels_last else 1]
        self.heads, self.skip, self.channels_last = heads, skip, channels_last
        self.queries, self.keys = (
            [torch.randn(rows).to(dtype) for _ in range(depth)] for _ in range(2)
        )
        self.values = [
            torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
            for _ in range(depth)
        ]
        self.douts = [
            torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
            for _ in range(depth)
        ]
        self.dkl = torch.randn(shape[0], heads)

    def results(
        self,
        device: torch.device,
        backend: str,
        dtype: torch.dtype | None = None,
        used: tuple[int, ...] | None = None,
    ) -> list[Tensor]:
        """All outputs and divergences, then the gradients of all queries, keys and values; on the CPU, in float64.

        `used` are the layers whose output has a gradient; the others' is missing.
        """

        def leaf(x: Tensor) -> Tensor:
            return x.to(device, dtype or x.dtype, copy=True).requires_grad_()

        queries, keys, values = (
            [leaf(x) for x in xs] for xs in (self.queries, self.keys, self.values)
        )
        roots, gradients, outputs = [], [], []
        history = ek.LayerHistory()
        with ek.use_backend(backend):
            for i, (q, k, v, dout) in enumerate(
                zip(queries, keys, values, self.douts, strict=True)
            ):
                if i in self.skip:
                    history.provide(k, v, heads=self.heads, channels_last=self.channels_last)
                    continue
                out = history.attend(q, k, v, heads=self.heads, channels_last=self.channels_last)
                outputs.append(out)
                if used is None or i in used:
                    roots.append(out)
                    gradients.append(dout.to(device, out.dtype))
                    if history.kl is not None:
                        outputs.append(history.kl)
                        roots.append(history.kl)
                        gradients.append(self.dkl.to(device, history.kl.dtype))
            leaves = [*queries, *keys, *values]
            grads = torch.autograd.grad(roots, leaves, gradients, allow_unused=True)
        found = [*(o.detach() for o in outputs)]
        found += [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        return [x.double().cpu() for x in found]


def assert_as_close_as_rounding(
    found: list[Tensor], expected: list[Tensor], dtype: torch.dtype
) -> None:
    """Each within one rounding to `dtype` of float64, in relative L2 norm.

    Half an ulp is `eps / 2` of an element. The float32 sums before it, and differences of dot products over a map, are
    within 2e-5 of what the largest result of the kind is: the bound that eager PyTorch in float32 keeps as well.
    """
    assert len(found) == len(expected)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    sizes: dict[torch.Size, float] = {}
    for want in expected:
        sizes[want.shape] = max(sizes.get(want.shape, 0.0), float(want.norm()))
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got.shape == want.shape, i
        off = float((got - want).norm())
        allowed = rounding * float(want.norm()) + 2e-5 * sizes[want.shape]
        assert off <= allowed, f"result {i}: {off:.3e} away, allowed {allowed:.3e}"
