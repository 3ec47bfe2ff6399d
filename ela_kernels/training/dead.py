"""Norms behind which nothing can be learnt, or that cannot train on one image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.backends.setting import use_backend
from ela_kernels.torch_internals import BATCH_NORM


def dead_norms(model: nn.Module, image: Tensor) -> dict[str, str]:
    """The norms that scale channels by zero right before a ReLU, by name, with how many channels they do that to.

    Such a channel is zero or its shift for every input. Where the shift is not above zero, the ReLU's derivative is
    zero too, so that no gradient reaches scale, shift, or what stands before them: it stays so for good.

    Args:
        model: the network; run once in evaluation mode, if any norm has such channels.
        image: an input, `[1, C, H, W]`.
    """
    found = {module: channels for module in model.modules() if (channels := _dead_channels(module))}
    if not found:
        return {}
    # Whose output it is; the tensors too, since the address of one that is gone is used again.
    outputs: list[tuple[Tensor, nn.Module]] = []
    dead: set[nn.Module] = set()

    def after_norm(norm: nn.Module, _: Any, output: Any) -> None:
        outputs.append((output, norm))

    def before_relu(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # By their memory: of a norm over the channels a view comes here.
        where = inputs[0].data_ptr()
        dead.update(norm for output, norm in outputs if output.data_ptr() == where)

    hooks = [norm.register_forward_hook(after_norm) for norm in found]
    hooks += [
        m.register_forward_pre_hook(before_relu) for m in model.modules() if type(m) is nn.ReLU
    ]
    try:
        _run_watched(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    return {names[norm]: channels for norm, channels in found.items() if norm in dead}


def _dead_channels(module: nn.Module) -> str:
    """How many of a norm's channels are zero before a ReLU whatever comes in, in words; nothing where none is."""
    scale, shift = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(module, (BATCH_NORM, nn.GroupNorm, nn.LayerNorm)) or not isinstance(
        scale, Tensor
    ):
        return ""
    dead = scale.detach() == 0
    if isinstance(shift, Tensor):
        dead &= shift.detach() <= 0
    count = int(dead.sum())
    return f"{count} of {dead.numel()} channels" if count else ""


@torch.no_grad()
def run_once(model: nn.Module, images: Any) -> None:
    """Run a network in evaluation mode, for what is seen on the way, and leave it in its own."""
    training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)


def _run_watched(model: nn.Module, images: Any) -> None:
    """The same of one with hooks: kernels would run a block without calling its modules, or warn that they may not."""
    with use_backend("eager"):
        run_once(model, images)


def check_single_image(model: nn.Module, image: Tensor) -> None:
    """Refuse batches of one image where the network shrinks it to one value a channel: batch norms cannot train on it.

    A pass over one image tells, as maps become smaller in many ways.
    """
    single: list[nn.Module] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            single.append(norm)

    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        _run_watched(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    if single:
        raise ValueError(
            f"batch-size: got 1 with images of side {image.shape[-1]}, whose last maps are 1x1, where a batch norm has "
            "a single value a channel; allowed is a batch-size of at least 2, or a larger side"
        )
