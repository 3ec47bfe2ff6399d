"""What is measured of a checkout: short steps that use public names alone, so that older checkouts run them too."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.shapes import OVERHEAD_STAGE, StageShape

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PLANAR, INTERLEAVED = "planar", "channels_last"
FORWARD, STEP = "forward", "step"

# Of a network's third stage, a CIFAR network, and a deep stage.
MIDDLE = StageShape(6, 4, 256, 14, 16)
WIDE = StageShape(12, 8, 64, 16, 32)
DEEP = StageShape(23, 2, 256, 7, 16)


class Prepared(NamedTuple):
    """A row that is ready to run: `step` is timed, `numbers` are its output and gradients by kind."""

    step: Callable[[], object]
    numbers: Callable[[], dict[str, Tensor]]


class Row(NamedTuple):
    """Something to measure.

    Attributes:
        name: parts with slashes between them; what, of which size, in which dtype and layout.
        make: makes it, always of the same numbers.
        outputs, gradients: how far two checkouts may be apart, in relative L2 norm.
    """

    name: str
    make: Callable[[], Prepared]
    outputs: float
    gradients: float


def drawn(name: str, size: Sequence[int]) -> Tensor:
    """Normal numbers that depend on the name alone, and not on what else a checkout draws."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(size), generator=generator)


def filled(module: nn.Module) -> nn.Module:
    """The module with parameters and running statistics by their names: checkouts may draw theirs in another order."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            numbers = drawn(name, p.shape)
            if p.dim() < 2:  # scales and shifts of norms, and the classifier's shift
                p.copy_(0.1 * numbers + (1.0 if name.endswith("weight") else 0.0))
            else:
                # Half of what keeps the size of a map: without a norm, stages of whole layers would grow with depth.
                p.copy_(0.5 * numbers / math.sqrt(p[0].numel()))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * drawn(name, buffer.shape))
            elif name.endswith("running_var"):
                buffer.copy_(1 + 0.1 * drawn(name, buffer.shape).abs())
    return module


def kind_of(name: str) -> str:
    """A parameter's name without its place: what a single filter's gradient holds may be all cancellation."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def in_layout(x: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """A map `[B, C, H, W]` as it is to be measured."""
    form = torch.channels_last if layout == INTERLEAVED else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=form)


class Stage:
    """A stage of one kind: its layers, inputs and output gradients."""

    def __init__(
        self, kind: str, mode: str, shape: StageShape, dtype: torch.dtype, layout: str
    ) -> None:
        size = (shape.batch, shape.channels, shape.size, shape.size)

        def map_of(name: str) -> Tensor:
            # Channels with means of their own, as activations have: else all queries are zero.
            numbers = drawn(name, size) + drawn(f"means of {name}", (*size[:2], 1, 1))
            return in_layout(numbers, dtype, layout)

        self.shape, self.mode = shape, mode
        self.forward: Callable[[], list[Tensor]] = {
            "op": self.op,
            "functional": self.functional,
            "layer": self.layer,
            "light": self.light,
            "block": self.block,
        }[kind]
        self.named: dict[str, Tensor] = {}
        self.layers = nn.ModuleList()
        if kind in ("op", "functional"):
            for t in range(shape.depth):
                self.named |= {f"{t}.{n}": drawn(f"{t}.{n}", size[:2]).to(dtype) for n in "qk"}
                self.named[f"{t}.v"] = map_of(f"{t}.v")
        else:
            make = {"layer": ek.LayerAttention, "light": ek.LightLayerAttention, "block": ek.ELA}
            layers = (make[kind](shape.channels, shape.head_dim) for _ in range(shape.depth))
            self.layers = nn.ModuleList(layers)
            filled(self.layers).to(dtype).train(mode == STEP)
            self.named = {"x": map_of("x"), **dict(self.layers.named_parameters())}
        if mode == STEP:
            for tensor in self.named.values():
                tensor.requires_grad_()
        self.inputs = list(self.named.values())
        count = shape.depth if kind in ("op", "functional") else 1
        self.douts = [map_of(f"gradient {i}") for i in range(count)]

    def op(self) -> list[Tensor]:
        """The op with a history, each value's gradient gathered once."""
        history, heads = ek.LayerHistory(), self.shape.heads
        three = range(0, len(self.inputs), 3)
        return [history.attend(*self.inputs[i : i + 3], heads=heads) for i in three]

    def functional(self) -> list[Tensor]:
        """The op without a history, a gradient for every value at every layer."""
        q, k, v = (self.inputs[i::3] for i in range(3))
        weights: Tensor | None = None
        outs = []
        for t in range(self.shape.depth):
            pairs = k[: t + 1], v[: t + 1]
            found = ek.layer_attention(q[t], *pairs, self.shape.heads, prev_weights=weights)
            weights = found.weights
            outs.append(found.out)
        return outs

    def layer(self) -> list[Tensor]:
        x, history = self.inputs[0], ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history, residual=True)
        return [x]

    def light(self) -> list[Tensor]:
        x = out = self.inputs[0]
        for layer in self.layers:
            out = layer(x, out)
            x = x + out
        return [x]

    def block(self) -> list[Tensor]:
        x, history = self.inputs[0], ek.LayerHistory()
        for layer in self.layers:
            x = layer(x, history)
        return [x]

    def step(self) -> object:
        """The forward pass, without gradients or with all of them."""
        if self.mode == FORWARD:
            with torch.no_grad():
                return self.forward()
        # Allowing for unused inputs: a first layer has one key only, so that its query has no influence.
        return torch.autograd.grad(self.forward(), self.inputs, self.douts, allow_unused=True)

    def numbers(self) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self.mode == STEP):
            outs = self.forward()
        found = {"output": torch.cat([out.detach().flatten() for out in outs])}
        if self.mode == STEP:
            gradients = torch.autograd.grad(outs, self.inputs, self.douts, allow_unused=True)
            found |= by_kind(self.named, gradients)
        return found


def by_kind(named: dict[str, Tensor], gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """All gradients of a kind in one tensor; of what has no influence zeros."""
    kinds: dict[str, list[Tensor]] = {}
    for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
        flat = torch.zeros_like(tensor) if gradient is None else gradient
        kinds.setdefault(f"gradients of {kind_of(name)}", []).append(flat.detach().flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


class Network:
    """One training step of a whole network without its optimizer, which is PyTorch's."""

    def __init__(self, name: str, attention: str, size: Sequence[int], layout: str) -> None:
        from ela_kernels import models

        network = filled(models.build_model(name, attention=attention, num_classes=10))
        form = torch.channels_last if layout == INTERLEAVED else torch.contiguous_format
        self.forward: Callable[[Tensor], Tensor] = network.train().to(memory_format=form)  # type: ignore[call-overload]
        self.images = in_layout(drawn("images", size), FLOAT32, layout)
        self.labels = torch.arange(size[0]) % 10
        self.parameters = [p for p in network.parameters() if p.requires_grad]

    def step(self) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(self.forward(self.images), self.labels)
        return torch.autograd.grad(loss, self.parameters)

    def numbers(self) -> dict[str, Tensor]:
        out = self.forward(self.images)
        gradients = torch.autograd.grad(F.cross_entropy(out, self.labels), self.parameters)
        return {"output": out.detach(), "gradients": torch.cat([g.flatten() for g in gradients])}


# How far two checkouts of which neither is wrong may be apart, in relative L2 norm. In float32 twice what a stage is
# held to against float64 (benchmarks/contenders.py). Kernels and eager PyTorch, which round in other places, are
# measured on these rows at 2e-6 in float32, and at 6e-3 (outputs) and 1e-2 (gradients) in bfloat16, which rounds at
# 2e-3. A ReLU whose input is within rounding of zero passes a whole gradient or none: measured at 3e-4 and 3e-2 in
# blocks, at 9e-3 in networks, which have norms over few numbers after many of them.
_OUTPUTS = {FLOAT32: 4e-5, BFLOAT16: 2e-2}
_GRADIENTS = {FLOAT32: 4e-5, BFLOAT16: 2e-2}
_GRADIENTS_OF_BLOCKS = {FLOAT32: 1e-2, BFLOAT16: 5e-2}
_OF_NETWORKS = 1e-3, 3e-2


def stage_row(
    kind: str,
    mode: str,
    shape: StageShape,
    dtype: torch.dtype = FLOAT32,
    layout: str = PLANAR,
    compiled: bool = False,
    group: str | None = None,
) -> Row:
    """A stage of layers of one kind, in one mode."""

    def make() -> Prepared:
        stage = Stage(kind, mode, shape, dtype, layout)
        if compiled:
            stage.forward = torch.compile(stage.forward, fullgraph=True, dynamic=False)
        return Prepared(stage.step, stage.numbers)

    name = f"{kind}/{mode}" if group is None else f"{group}/{kind}"
    name = f"{name}/{shape.name}/{str(dtype).removeprefix('torch.')}/{layout}"
    gradients = (_GRADIENTS_OF_BLOCKS if kind == "block" else _GRADIENTS)[dtype]
    return Row(f"compiled/{name}" if compiled else name, make, _OUTPUTS[dtype], gradients)


def network_row(
    name: str, attention: str, size: Sequence[int], layout: str = PLANAR, compiled: bool = False
) -> Row:
    """A training step of a network."""

    def make() -> Prepared:
        network = Network(name, attention, size, layout)
        if compiled:
            network.forward = torch.compile(network.forward, fullgraph=True, dynamic=False)
        return Prepared(network.step, network.numbers)

    of_size = "x".join(map(str, size))
    found = f"network/{name}-{attention}/{of_size}/float32/{layout}"
    return Row(f"compiled/{found}" if compiled else found, make, *_OF_NETWORKS)


def all_rows(compiled: bool = False) -> list[Row]:
    """The rows in the order in which they are measured; `compiled`: those of torch.compile as well."""
    rows = []
    for kind in ("op", "layer", "block"):
        rows += [
            stage_row(kind, FORWARD, MIDDLE),
            stage_row(kind, FORWARD, WIDE, BFLOAT16, INTERLEAVED),
            stage_row(kind, STEP, MIDDLE),
            stage_row(kind, STEP, MIDDLE, FLOAT32, INTERLEAVED),
            stage_row(kind, STEP, MIDDLE, BFLOAT16),
            stage_row(kind, STEP, WIDE, BFLOAT16, INTERLEAVED),
            stage_row(kind, STEP, DEEP),
        ]
    rows += [
        stage_row("functional", STEP, MIDDLE),
        stage_row("light", FORWARD, MIDDLE),
        stage_row("light", STEP, MIDDLE),
        stage_row("light", STEP, WIDE, BFLOAT16, INTERLEAVED),
    ]
    kinds = ("op", "layer", "light", "block")
    rows += [stage_row(kind, STEP, OVERHEAD_STAGE, group="overhead") for kind in kinds]
    for is_compiled in (False, True) if compiled else (False,):
        if is_compiled:
            rows += [stage_row(k, STEP, MIDDLE, compiled=True) for k in ("layer", "block")]
        rows += [
            network_row("resnet20", "ela", (16, 3, 32, 32), compiled=is_compiled),
            network_row("resnet20", "mrla_light", (16, 3, 32, 32), compiled=is_compiled),
            network_row("resnet50", "ela", (2, 3, 64, 64), INTERLEAVED, compiled=is_compiled),
        ]
    return rows
