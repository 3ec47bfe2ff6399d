"""What a case is made of: everything is drawn from its name, so that a case can be run alone."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)

# How a map of a shape lies in memory.
MAPS = (
    "contiguous",
    "contiguous",
    "channels_last",
    "channels_last",
    "batch_slice",
    "channel_slice",
    "channel_step",
    "width_slice",
    "interleaved_slice",
    "transposed",
    "one_batch",
    "one_channel",
    "one_number",
)
TOKENS = (
    "contiguous",
    "contiguous",
    "planar",
    "batch_slice",
    "channel_slice",
    "width_slice",
    "one_batch",
)
CHANNELS = (1, 2, 6, 8, 12, 16, 24, 33, 64)


def laid_out(shape: Sequence[int], dtype: torch.dtype, layout: str) -> Tensor:
    """Normal numbers in a tensor `[B, C, ...]` of that layout; one of too few dimensions for it is contiguous."""
    shape = tuple(shape)

    def normal(*size: int) -> Tensor:
        return torch.randn(size).to(dtype)

    if layout == "batch_slice":
        return normal(2 * shape[0] + 1, *shape[1:])[1::2][: shape[0]]
    if layout == "channel_slice":
        return normal(shape[0], shape[1] + 5, *shape[2:])[:, 3 : 3 + shape[1]]
    if layout == "channel_step":
        return normal(shape[0], 2 * shape[1], *shape[2:])[:, ::2]
    if layout == "one_batch":
        return normal(1, *shape[1:]).expand(shape)
    if layout == "one_channel":
        return normal(shape[0], 1, *shape[2:]).expand(shape)
    if layout == "one_number":
        return normal().expand(shape)
    if len(shape) > 2:
        if layout in ("channels_last", "planar"):
            return normal(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        if layout == "width_slice":
            return normal(*shape[:-1], shape[-1] + 4)[..., 2:-2]
        if layout == "interleaved_slice":
            return normal(shape[0], *shape[2:], shape[1] + 3)[..., 1:-2].movedim(-1, 1)
        if layout == "transposed":
            return normal(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    return normal(*shape)


class Draw:
    """The choices of one case, and the tensors whose gradients it asks for."""

    def __init__(self, name: str, backend: str) -> None:
        self.random = random.Random(name)
        self.backend = backend
        self.notes: list[str] = []
        self.leaves: dict[str, Tensor] = {}
        torch.manual_seed(zlib.crc32(name.encode()))
        torch.set_num_threads(self.of("threads", 1, 2))

    def of(self, what: str, *choices: T) -> T:
        """One of some choices, noted for the report."""
        value = self.random.choice(choices)
        self.notes.append(f"{what}={str(value).removeprefix('torch.')}")
        return value

    def chance(self, what: str, probability: float) -> bool:
        found = self.random.random() < probability
        if found:
            self.notes.append(what)
        return found

    def heads(self, channels: int) -> int:
        return self.of("heads", *(g for g in range(1, channels + 1) if channels % g == 0))

    def spatial(self, dimensions: int) -> tuple[int, ...]:
        if dimensions == 2 and self.random.random() < 0.1:
            return self.of("spatial", (28, 28), (31, 17))  # enough for two threads
        most = {0: 0, 1: 60, 2: 13, 3: 5}[dimensions]
        return tuple(self.random.randint(1, most) for _ in range(dimensions))

    def leaf(self, name: str, tensor: Tensor, probability: float = 0.75) -> Tensor:
        """An input, of which most want a gradient."""
        wants = tensor.dtype.is_floating_point and self.random.random() < probability
        self.leaves[name] = tensor.detach().requires_grad_(wants)
        return self.leaves[name]

    def parameters(self, module: torch.nn.Module, prefix: str = "") -> None:
        """The parameters of a module as leaves, some of them frozen."""
        some_frozen = self.chance("some frozen", 0.2)
        for name, p in module.named_parameters():
            if some_frozen and self.random.random() < 0.5:
                p.requires_grad_(False)
            self.leaves[prefix + name] = p

    def autocast(self, dtype: torch.dtype, probability: float = 0.2) -> Any:
        """Autocast around a call in `dtype`, or nothing; no two kinds of half precision."""
        if self.random.random() >= probability:
            return contextlib.nullcontext()
        halves = (dtype,) if dtype in (BF16, F16) else (BF16, F16)
        return torch.autocast("cpu", self.of("autocast", *halves))

    def grad_mode(self) -> Any:
        mode = self.of("mode", *["grad"] * 8, "no_grad", "inference")
        if mode == "grad":
            return contextlib.nullcontext()
        return torch.no_grad() if mode == "no_grad" else torch.inference_mode()

    def gradient_of(self, out: Tensor) -> Tensor:
        """What a backward pass may hand over for an output."""
        layout = self.random.choice(("contiguous", "channels_last", "one_number", "transposed"))
        if not out.dim():
            layout = "contiguous"
        return laid_out(out.shape, out.dtype, layout)

    def finish(self, outputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """The outputs, and the gradients of the leaves for some of the outputs."""
        found = {n: t for n, t in outputs.items() if t is not None}
        wanted = {n: t for n, t in self.leaves.items() if t.requires_grad}
        targets = [n for n, t in found.items() if t.requires_grad]
        results = {n: t.detach() for n, t in found.items()}
        if not targets or not wanted:
            return results
        chosen = [n for n in targets if self.random.random() < 0.6]
        chosen = chosen or [self.random.choice(targets)]
        self.notes.append(f"backward of {', '.join(chosen)}")
        douts = [self.gradient_of(found[n]) for n in chosen]
        turns = 1 + self.chance("backward twice", 0.1)
        for turn in range(turns):
            gradients = torch.autograd.grad(
                [found[n] for n in chosen],
                list(wanted.values()),
                douts,
                allow_unused=True,
                retain_graph=turn < turns - 1,
            )
            for name, g in zip(wanted, gradients, strict=True):
                if g is not None:
                    results[f"gradient of {name}" + " again" * turn] = g
        return results
