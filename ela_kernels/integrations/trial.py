"""One pass of a network without numbers, which shows the order in which its blocks run and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Ran(NamedTuple):
    """A block that ran: its name, and the shape of what it gave; None where that is no tensor."""

    name: str
    shape: tuple[int, ...] | None


def trial(model: nn.Module, blocks: Mapping[str, nn.Module], size: tuple[int, ...]) -> list[Ran]:
    """Run `model` on an input of `size` and say which of `blocks` ran, in their order.

    On the meta device, where only shapes are worked out, and where a network cannot run there, once with numbers. In
    evaluation mode, in which nothing changes but the counter of the random numbers.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            try:
                return _watched(model, blocks, size, torch.device("meta"))
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                like = next(model.parameters())
                return _watched(model, blocks, size, like.device)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _watched(
    model: nn.Module, blocks: Mapping[str, nn.Module], size: tuple[int, ...], device: torch.device
) -> list[Ran]:
    found: list[Ran] = []

    def watch(name: str) -> Any:
        def ran(_: nn.Module, __: object, out: object) -> None:
            found.append(Ran(name, tuple(out.shape) if isinstance(out, Tensor) else None))

        return ran

    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    x = torch.zeros(size, device=device, dtype=next(floats, torch.float32))
    hooks = [block.register_forward_hook(watch(name)) for name, block in blocks.items()]
    try:
        if device.type == "meta":
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            functional_call(model, {name: t.to("meta") for name, t in tensors.items()}, (x,))
        else:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
