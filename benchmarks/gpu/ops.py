"""One layer's operations, called as the autograd functions call them, and the check that each must pass first."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import WrongResultError
from benchmarks.gpu.shapes import Case
from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import KERNELS
from ela_kernels.backends.types import Saved
from ela_kernels.ops.layer_attention.reference import (
    layer_attention_backward_reference,
    layer_attention_reference,
)

# Relative L2 distance from float64. Sums of T products in float32 are within 1e-6; a dot product over a map and the
# difference of such cancel a digit or two, so that gradients of queries and keys are allowed 2e-5, as on the CPU.
# A result in a half type is rounded to it once: by at most 2^-8 (bfloat16) and 2^-11 (float16) of its size.
_FLOAT32_TOLERANCE = 2e-5
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative L2 distance of one result in `dtype` that was rounded once."""
    return _FLOAT32_TOLERANCE + ROUNDING[dtype]


def distance(what: str, got: Tensor | None, want: Tensor, allowed: float) -> float:
    """Relative L2 distance, refused beyond `allowed`; NaN never passes."""
    if got is None:
        raise WrongResultError(f"{what} is missing. A wrong result is not timed")
    norm = want.norm()
    off = (got.detach().double() - want).norm()
    found = float(off / norm) if norm > 0 else float(off)
    if not found <= allowed:
        raise WrongResultError(
            f"{what} is {found:.2e} away from the reference (relative L2 norm); allowed is {allowed:.1e}. "
            "A wrong result is not timed"
        )
    return found


@contextlib.contextmanager
def refusing(what: str, refused: list[str]) -> Iterator[None]:
    """Whatever goes wrong inside is written down, and the other contenders are measured all the same."""
    try:
        yield
    except Exception as error:
        refused.append(f"{what}: {type(error).__name__}: {error}")


class LayerOps:
    """The last layer of a stage of `depth` layers: inputs on the device, and its operations by name.

    `seed` makes another set of inputs: several sets are timed in turn where one would stay in the cache.
    """

    def __init__(self, case: Case, depth: int, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = case.shape
        self.case, self.depth, self.device = case, depth, device
        self.heads, self.scale = shape.heads, shape.head_dim**-0.5
        self.queries = [case.new_row(device, generator) for _ in range(depth)]
        self.keys = [case.new_row(device, generator) for _ in range(depth)]
        self.values = [case.new_map(device, generator) for _ in range(depth)]
        self.douts = [case.new_map(device, generator) for _ in range(depth)]
        self.weights = [
            torch.randn(
                shape.batch, shape.heads, j + 1, generator=generator, device=device
            ).softmax(-1)
            for j in range(depth)
        ]
        self.dscores = [
            torch.randn(shape.batch, shape.heads, j + 1, generator=generator, device=device)
            for j in range(depth)
        ]
        self._generator = generator
        self._retrieved: dict[str, list[Any]] = {}

    @property
    def prev_weights(self) -> Tensor | None:
        """Weights of the layer before; None for the first."""
        return self.weights[-2] if self.depth > 1 else None

    def forward(
        self, kernels: KernelBackend, prev_weights: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Scores, softmax and aggregation, and with `prev_weights` the divergence."""
        found = kernels.attend(
            self.queries[-1], self.keys, self.values, self.heads, self.scale, prev_weights, False
        )
        return tuple(x for x in found if x is not None)

    def weights_only(self, kernels: KernelBackend) -> Tensor:
        """Scores and softmax."""
        return kernels.weights(self.queries[-1], self.keys, self.heads, self.scale, None)[0]

    def _saved(self) -> Saved:
        return Saved(
            self.queries[-1],
            self.keys,
            self.values,
            self.heads,
            self.scale,
            None,
            self.weights[-1],
            False,
        )

    def dots(self, kernels: KernelBackend) -> tuple[Tensor | None, ...]:
        """Gradients of scores and query: the pull form's backward of a layer."""
        found = kernels.attend_backward(self._saved(), self.douts[-1], None, None, True, False)
        return found.dscores, found.dq

    def push(self, kernels: KernelBackend) -> tuple[Tensor | None, ...]:
        """Gradients of the query and of every key and value."""
        every = [True] * self.depth
        found = kernels.attend_backward(
            self._saved(), self.douts[-1], None, None, True, False, every, every
        )
        return found.dscores, found.dq, *found.dkeys, *found.dvalues

    def gather(self, kernels: KernelBackend) -> tuple[Tensor | None, ...]:
        """Key's and value's gradient of the first layer, from all layers."""
        contributions = [
            kernels.contribution(q, w, ds, dout, False)
            for q, w, ds, dout in zip(
                self.queries, self.weights, self.dscores, self.douts, strict=True
            )
        ]
        return kernels.gather(contributions, 0, self.heads, False, True, True)

    def operation(self, name: str, backend: str) -> Callable[[], object]:
        """One operation of one backend, as something to time."""
        kernels = KERNELS[backend]
        run = {
            "forward": self.forward,
            "dots": self.dots,
            "gather": self.gather,
            "push": self.push,
            "weights": self.weights_only,
        }[name]
        return lambda: run(kernels)

    def check(self, name: str, backend: str) -> float:
        """See :func:`check_operation`."""
        return check_operation(self, name, backend)

    def expected(self, name: str) -> dict[str, Tensor]:
        """What :meth:`found` has to be, in float64."""
        q, keys, values = (
            self.queries[-1].double(),
            [k.double() for k in self.keys],
            [v.double() for v in self.values],
        )
        if name in ("forward", "weights"):
            out, weights, _ = layer_attention_reference(q, keys, values, self.heads, self.scale)
            return {"weights": weights} if name == "weights" else {"out": out, "weights": weights}
        if name == "gather":
            per_head = [w[:, :, 0].double() for w in self.dscores]
            dims = self.case.shape.head_dim
            dk = sum(
                (
                    w.repeat_interleave(dims, dim=1) * r.double()
                    for w, r in zip(per_head, self.queries, strict=True)
                ),
                start=torch.zeros_like(q),
            )
            dv = torch.zeros_like(values[0])
            for w, dout in zip(self.weights, self.douts, strict=True):
                per_channel = w[:, :, 0].double().repeat_interleave(dims, dim=1)
                dv += per_channel[:, :, None, None] * dout
            return {"dk": dk, "dv": dv}
        weights = self.weights[-1].double()
        dq, dkeys, dvalues, _ = layer_attention_backward_reference(
            q,
            keys,
            values,
            self.heads,
            self.scale,
            None,
            weights,
            self.douts[-1].double(),
            None,
            None,
            False,
        )
        found = {"dq": dq}
        if name == "push":
            found |= {f"dkeys[{j}]": d for j, d in enumerate(dkeys)}
            found |= {f"dvalues[{j}]": d for j, d in enumerate(dvalues)}
        return found

    def found(self, name: str, backend: str) -> dict[str, Tensor | None]:
        """What one operation gives, named as in :meth:`expected`."""
        kernels = KERNELS[backend]
        if name == "forward":
            out, weights = self.forward(kernels)
            return {"out": out, "weights": weights}
        if name == "weights":
            return {"weights": self.weights_only(kernels)}
        if name == "gather":
            dk, dv = self.gather(kernels)
            return {"dk": dk, "dv": dv}
        if name == "dots":
            return {"dq": self.dots(kernels)[1]}
        _, dq, *rest = self.push(kernels)
        named = {f"dkeys[{j}]": rest[j] for j in range(self.depth)}
        named |= {f"dvalues[{j}]": rest[self.depth + j] for j in range(self.depth)}
        return {"dq": dq} | named


def check_operation(layer: LayerOps, name: str, backend: str) -> float:
    """Refuse an operation whose results differ from float64; return how far the worst is off.

    Freed memory is filled with NaN before, so that a result that nothing wrote shows.
    """
    poison_free_memory(layer)
    found = layer.found(name, backend)
    worst = 0.0
    for key, want in layer.expected(name).items():
        got = found[key]
        allowed = tolerance(torch.float32 if got is None else got.dtype)
        worst = max(worst, distance(f"{backend} {name}: {key}", got, want, allowed))
    assert math.isfinite(worst)
    return worst


def poison_free_memory(layer: LayerOps) -> None:
    """Leave NaN where the next results will likely be allocated."""
    poisoned = [torch.full_like(v, float("nan")) for v in layer.values[: min(layer.depth, 3)]]
    poisoned += [torch.full_like(q, float("nan")) for q in layer.queries]
    poisoned += [torch.full_like(w, float("nan")) for w in layer.weights]
    del poisoned
