"""A stage of residual blocks, `x <- x + relu(norm(layer(x)))`: a training step, inference, and bfloat16."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.contenders import COMPILED, EAGER, Stage, check_close, depthwise
from benchmarks.measure import interleave, ratio, summarize
from benchmarks.shapes import StageShape
from ela_kernels.modules.published import ConcatHistory
from ela_kernels.ops.layer_attention.reference import layer_attention_reference

# A ReLU whose input is within rounding of zero passes a whole gradient or none, and sums that cancel show it: eager,
# compiled and ours are measured at 4e-7 to 2e-3. Outputs are held to the stages' own tolerance.
GRADIENT_TOLERANCE = 1e-2

OURS, HALF = "block", "block bfloat16"


class Blocks(ABC):
    """Layers with a norm each, and ours with the same parameters; input and output gradient of their stage."""

    def __init__(
        self, plain: Stage, layers: nn.ModuleList, blocks: nn.ModuleList, dtype: torch.dtype
    ) -> None:
        self.shape = plain.shape
        self.x = plain.x.detach().to(dtype).requires_grad_()
        self.dout = plain.dout.to(dtype)
        self.layers, self.blocks = layers.to(dtype), blocks.to(dtype)
        self.norms = nn.ModuleList(block.norm for block in blocks)
        self.inputs: list[Tensor] = [self.x, *self.layers.parameters(), *self.norms.parameters()]

    @abstractmethod
    def eager(self, x: Tensor) -> Tensor:
        """The published form in PyTorch."""

    @abstractmethod
    def ours(self, x: Tensor) -> Tensor:
        """The kernels of a whole block."""

    @abstractmethod
    def expected(self) -> list[Tensor]:
        """Output and gradients of a training step in float64."""

    def train(self, is_training: bool) -> None:
        self.norms.train(is_training)
        self.blocks.train(is_training)

    def forms(self, with_compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
        """The contenders' forward passes."""
        forms: dict[str, Callable[[Tensor], Tensor]] = {EAGER: self.eager}
        if with_compiled:
            forms[COMPILED] = torch.compile(self.eager, fullgraph=True, dynamic=False)
        return forms | {OURS: self.ours}

    def step(self, forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the input and of every parameter."""
        return torch.autograd.grad(forward(self.x), self.inputs, self.dout)

    def infer(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Forward alone, nothing kept for a backward."""
        with torch.no_grad():
            return forward(self.x)


class BaseBlocks(Blocks):
    """The base form; the published one concatenates at every layer."""

    def __init__(self, shape: StageShape, dtype: torch.dtype = torch.float32) -> None:
        plain = Stage(shape)
        blocks = nn.ModuleList(ek.ELA(shape.channels, shape.head_dim) for _ in plain.layers)
        for block, layer in zip(blocks, plain.layers, strict=True):
            block.attn.Wq, block.attn.Wk, block.attn.Wv = layer.Wq, layer.Wk, layer.Wv
        super().__init__(plain, plain.layers, blocks, dtype)

    def eager(self, x: Tensor) -> Tensor:
        history = ConcatHistory()
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + norm(layer(x, history)).relu()
        return x

    def ours(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype`: of what the history holds."""
        history = ek.LayerHistory(dtype=dtype)
        for block in self.blocks:
            x = block(x, history)
        return x

    def expected(self, attended: list[Tensor] | None = None) -> list[Tensor]:
        """As of every form; weights and divergence of every layer are added to `attended`."""
        x, *parameters = (t.detach().double().requires_grad_() for t in self.inputs)
        count, scale = self.shape.depth, self.shape.head_dim**-0.5
        filters, norms = parameters[: 3 * count], parameters[3 * count :]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        out, weights = x, None
        for t in range(count):
            (wq, wk, wv), (gamma, beta) = filters[3 * t : 3 * t + 3], norms[2 * t : 2 * t + 2]
            y, pad = out.mean((2, 3)).unsqueeze(1), wq.shape[-1] // 2
            keys.append(nn.functional.conv1d(y, wk, padding=pad).squeeze(1))
            values.append(depthwise(out, wv))
            q = nn.functional.conv1d(y, wq, padding=pad).squeeze(1)
            o, weights, kl = layer_attention_reference(
                q, keys, values, self.shape.heads, scale, weights
            )
            if attended is not None:
                attended += [t.detach() for t in (weights, kl) if t is not None]
            normed = nn.functional.batch_norm(o, None, None, gamma, beta, training=True)
            out = out + normed.relu()
        return [out.detach(), *torch.autograd.grad(out, [x, *parameters], self.dout.double())]


def measure_blocks(shape: StageShape, contenders: list[str], rounds: int) -> dict[str, Any]:
    """A training step and inference of every contender, all checked first; ours in bfloat16 as well."""
    return measure_form(BaseBlocks, shape, contenders, rounds)


def measure_form(
    form: Callable[..., Blocks], shape: StageShape, contenders: list[str], rounds: int
) -> dict[str, Any]:
    """:func:`measure_blocks` of one form of layer attention: called with a shape, and a dtype."""
    stage = form(shape)
    forms = stage.forms(COMPILED in contenders)
    errors = _check(stage, forms)
    steps = {name: partial(stage.step, forward) for name, forward in forms.items()}
    half = form(shape, torch.bfloat16)
    steps[HALF] = partial(half.step, half.ours)
    training = _times(interleave(steps, rounds))
    stage.train(False)
    half.train(False)
    calls = {name: partial(stage.infer, forward) for name, forward in forms.items()}
    calls[HALF] = partial(half.infer, half.ours)
    return {
        "largest_error": errors,
        "training": training,
        "inference": _times(interleave(calls, rounds)),
    }


def _times(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "ms": {name: summarize(times)._asdict() for name, times in seconds.items()},
        "times_ours": {
            name: ratio(times, seconds[OURS]) for name, times in seconds.items() if name != OURS
        },
        "times_bfloat16": ratio(seconds[OURS], seconds[HALF]),
    }


def kinds_of_inputs(stage: Blocks) -> dict[str, list[int]]:
    """Which of the stage's inputs are of one kind; a single filter's gradient may be all cancellation."""
    names = ["x", *(name for name, _ in stage.layers.named_parameters(prefix="layers"))]
    names += [name for name, _ in stage.norms.named_parameters(prefix="norms")]
    kinds: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        kinds.setdefault(kind, []).append(i)
    return kinds


def _check(stage: Blocks, forms: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, float]:
    expected = stage.expected()
    kinds = kinds_of_inputs(stage)
    errors = {}
    for contender, forward in forms.items():
        out = forward(stage.x)
        found = torch.autograd.grad(out, stage.inputs, stage.dout)
        worst = check_close(f"{contender}: output", out, expected[0])
        for kind, which in kinds.items():
            got, want = (torch.cat([g[i].flatten() for i in which]) for g in (found, expected[1:]))
            what = f"{contender}: gradients of {kind}"
            worst = max(worst, check_close(what, got, want, GRADIENT_TOLERANCE))
        errors[contender] = worst
    with torch.no_grad():
        stage.train(False)
        want = stage.eager(stage.x)
        for contender, forward in forms.items():
            check_close(f"{contender}: inference", forward(stage.x), want.double())
        stage.train(True)
    return errors
