"""What is measured: stages of layer attention and a network, each as published in eager PyTorch, and by the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.models import build_model
from ela_kernels.models.blocks import StageAttention

EAGER, OURS, COMPILED = "eager", "ours", "compiled"
FORWARD, TRAINING = "forward", "training"
Make = Callable[[bool], nn.Module]


class Workload(NamedTuple):
    """One thing to measure.

    Attributes:
        name: of it, to be read.
        shape: of the input.
        make: the module, by the kernels (True) or as published, concatenating.
    """

    name: str
    shape: tuple[int, ...]
    make: Make


class Stage(nn.Module):
    """A stage of residual blocks around layer attention, `x <- x + relu(norm(layer(x)))`."""

    def __init__(self, depth: int, channels: int, head_dim: int, fused: bool) -> None:
        super().__init__()
        drop_paths = [0.0] * depth
        self.layers = StageAttention("mrla", channels, drop_paths, head_dim, fused, "reuse")

    def forward(self, x: Tensor) -> Tensor:
        history = self.layers.new_history()
        for layer in self.layers:
            x = layer(x, history)
        return x


def stage(depth: int, shape: tuple[int, ...], head_dim: int) -> Workload:
    """A stage of `depth` layers on maps of `shape`."""
    name = f"{depth} layers {'x'.join(map(str, shape))}"
    return Workload(name, shape, lambda fused: Stage(depth, shape[1], head_dim, fused))


def network(name: str, shape: tuple[int, ...]) -> Workload:
    """A network of :mod:`ela_kernels.models` on images of `shape`."""
    title = f"{name} {'x'.join(map(str, shape))}"
    return Workload(
        title, shape, lambda fused: build_model(name, attention="mrla", fused=fused, num_classes=10)
    )


# Stages as in ResNet-50 at 224 pixels (its first and its third) and in a network for CIFAR, and such a network.
FULL: Sequence[Workload] = (
    stage(3, (8, 256, 56, 56), 16),
    stage(6, (8, 1024, 14, 14), 16),
    stage(12, (32, 64, 32, 32), 32),
    network("resnet56", (32, 3, 32, 32)),
)
QUICK: Sequence[Workload] = (
    stage(6, (4, 256, 14, 14), 16),
    stage(8, (8, 64, 16, 16), 32),
    network("resnet20", (8, 3, 32, 32)),
)


class Pair:
    """A workload's modules with the same weights, on the same input.

    Attributes:
        modules: by the names of the contenders.
    """

    def __init__(self, workload: Workload, device: torch.device, compiled: bool = False) -> None:
        torch.manual_seed(0)
        eager, ours = workload.make(False).to(device), workload.make(True).to(device)
        ours.load_state_dict(eager.state_dict())
        self.modules: dict[str, nn.Module] = {EAGER: eager, OURS: ours}
        # Means of their own, as activations have: else all queries are nearly zero, and all weights alike.
        means = torch.randn(*workload.shape[:2], *[1] * (len(workload.shape) - 2), device=device)
        self.x = (torch.randn(workload.shape, device=device) + means).requires_grad_()
        self.dout = torch.randn_like(eager(self.x.detach())).detach()
        self.forms: dict[str, nn.Module] = dict(self.modules)
        if compiled:
            self.forms[COMPILED] = torch.compile(eager)  # type: ignore[assignment]

    def in_mode(self, mode: str) -> Callable[[str], object]:
        """What a contender is called by in this mode, which its module is now in."""
        for module in self.modules.values():
            module.train(mode == TRAINING)
        return self.step if mode == TRAINING else self.infer

    def step(self, name: str) -> tuple[Tensor, ...]:
        """Output, and the gradients of the input and of every parameter."""
        out = self.forms[name](self.x)
        inputs = [self.x, *self.modules[OURS if name == OURS else EAGER].parameters()]
        return (out, *torch.autograd.grad(out, inputs, self.dout))

    def infer(self, name: str) -> Tensor:
        """The output, nothing kept for a backward."""
        with torch.no_grad():
            out: Tensor = self.forms[name](self.x)
        return out
