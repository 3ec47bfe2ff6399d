"""The forms of one stage that are compared, and the check that each must pass before it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.shapes import StageShape
from ela_kernels.modules.published import ConcatHistory, ConcatLayerAttention
from ela_kernels.ops.layer_attention.reference import layer_attention_reference

StageForward = Callable[[Tensor], Tensor]

EAGER, COMPILED, LAYER, PULL, PUSH = "eager", "compiled", "layer", "pull", "push"
DESCRIPTIONS = {
    EAGER: "eager, concatenating (as published)",
    COMPILED: "torch.compile of it, the whole stage",
    LAYER: "ours: a layer in one call a direction, x added inside",
    PULL: "ours: PyTorch's convolutions, fused op, LayerHistory",
    PUSH: "ours: the same with the functional op",
}

# Relative L2 distance of an output or gradient from float64. Float32 rounds at 6e-8; a stage adds up to 23 layers and
# their convolutions, and the gradient of a filter sums up to 1e5 products with cancellation. Eager PyTorch, the
# compiled form and the kernels are all measured at 1e-6 to 4e-6; a wrong weight, layer or head is off by 1e-2 and more.
TOLERANCE = 2e-5


class Stage:
    """Layers, input and output gradient of one stage, shared by all contenders."""

    def __init__(self, shape: StageShape, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        size = (shape.batch, shape.channels, shape.size, shape.size)
        self.shape = shape
        self.layers = nn.ModuleList(
            ConcatLayerAttention(shape.channels, shape.head_dim) for _ in range(shape.depth)
        )
        self.fused = nn.ModuleList(
            ek.LayerAttention(shape.channels, shape.head_dim) for _ in range(shape.depth)
        )
        for ours, theirs in zip(self.fused, self.layers, strict=True):
            ours.Wq, ours.Wk, ours.Wv = theirs.Wq, theirs.Wk, theirs.Wv
            # There is no norm here: without this the maps would grow with depth, and rounding errors with them.
            nn.init.normal_(theirs.Wv.weight, std=1 / (3 * shape.depth))
        # Channels with means of their own, as activations have: else all queries are zero and all weights alike.
        means = torch.randn(shape.batch, shape.channels, 1, 1, generator=generator)
        self.x = (torch.randn(size, generator=generator) + means).requires_grad_()
        self.dout = torch.randn(size, generator=generator)
        self.inputs: list[Tensor] = [self.x, *self.layers.parameters()]

    def eager(self, x: Tensor) -> Tensor:
        """The published form: concatenates at every layer."""
        history = ConcatHistory()
        for layer in self.layers:
            x = x + layer(x, history)
        return x

    def layer(self, x: Tensor) -> Tensor:
        """The kernels of a whole layer."""
        history = ek.LayerHistory()
        for layer in self.fused:
            x = layer(x, history, residual=True)
        return x

    def pull(self, x: Tensor) -> Tensor:
        """The fused op alone, each value's gradient gathered once."""
        history = ek.LayerHistory()
        for layer in self.fused:
            q, k, v = layer.query_key_value(x)
            x = x + history.attend(q, k, v, heads=layer.heads)
        return x

    def push(self, x: Tensor) -> Tensor:
        """The fused op without a history, a gradient for every value at every layer."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        weights: Tensor | None = None
        for layer in self.fused:
            q, k, v = layer.query_key_value(x)
            keys.append(k)
            values.append(v)
            found = ek.layer_attention(q, keys, values, layer.heads, prev_weights=weights)
            weights = found.weights
            x = x + found.out
        return x

    def forms(self, names: Sequence[str]) -> dict[str, StageForward]:
        """The named contenders' forward passes."""
        known: dict[str, Callable[[], StageForward]] = {
            EAGER: lambda: self.eager,
            COMPILED: lambda: torch.compile(self.eager, fullgraph=True, dynamic=False),
            LAYER: lambda: self.layer,
            PULL: lambda: self.pull,
            PUSH: lambda: self.push,
        }
        return {name: known[name]() for name in names}

    def step(self, forward: StageForward) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the input and of every parameter."""
        return torch.autograd.grad(forward(self.x), self.inputs, self.dout)

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients in float64, by the reference op and autograd."""
        with torch.no_grad():
            inputs = [t.detach().double().requires_grad_() for t in self.inputs]
        x, filters = inputs[0], inputs[1:]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        scale = self.shape.head_dim**-0.5
        out = x
        for t in range(self.shape.depth):
            wq, wk, wv = filters[3 * t : 3 * t + 3]
            y = out.mean((2, 3)).unsqueeze(1)
            pad = wq.shape[-1] // 2
            keys.append(nn.functional.conv1d(y, wk, padding=pad).squeeze(1))
            values.append(depthwise(out, wv))
            q = nn.functional.conv1d(y, wq, padding=pad).squeeze(1)
            o, _, _ = layer_attention_reference(q, keys, values, self.shape.heads, scale)
            out = out + o
        return out.detach(), list(torch.autograd.grad(out, inputs, self.dout.double()))


def depthwise(x: Tensor, filters: Tensor) -> Tensor:
    """Depthwise 3x3 convolution as nine shifted sums: PyTorch's own is twenty times slower in float64."""
    rows, columns = x.shape[2:]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    total = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            shifted = padded[:, :, i : i + rows, j : j + columns]
            total = total + filters[:, 0, i, j, None, None] * shifted
    return total


class WrongResultError(RuntimeError):
    """A contender whose numbers are wrong; its time would mean nothing."""


def check_forms(stage: Stage, forms: dict[str, StageForward]) -> dict[str, dict[str, float]]:
    """Refuse a contender whose output or gradients differ from the reference; return how far each is off.

    Also measures the first call of each, which for the compiled one is the compilation.
    """
    expected_out, expected_grads = stage.expected()
    names = ["x", *(name for name, _ in stage.layers.named_parameters())]
    report = {}
    for contender, forward in forms.items():
        start = time.perf_counter()
        out = forward(stage.x)
        grads = torch.autograd.grad(out, stage.inputs, stage.dout)
        first_call = time.perf_counter() - start
        worst = check_close(f"{contender}: output", out, expected_out)
        for name, got, want in zip(names, grads, expected_grads, strict=True):
            worst = max(worst, check_close(f"{contender}: gradient of {name}", got, want))
        report[contender] = {"first_call_seconds": first_call, "largest_error": worst}
    return report


def check_close(what: str, got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> float:
    """Relative L2 distance of `got` from a float64 `want`; raises where it is beyond the tolerance."""
    norm = want.norm()
    found = float((got.detach().double() - want).norm() / norm) if norm > 0 else float(got.norm())
    if not found <= tolerance:
        raise WrongResultError(
            f"{what} is {found:.2e} away from the reference (relative L2 norm); allowed is {tolerance:.0e}. "
            "A wrong result is not timed"
        )
    return found
