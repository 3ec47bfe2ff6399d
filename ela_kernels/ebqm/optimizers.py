"""Parameters of skipped layers, which an optimizer is to leave as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ela_kernels.modules.watched import Watched
from ela_kernels.torch_internals import all_modules


def idle_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that take no part in a training pass, since their layers are skipped.

    Of a layer that is skipped the query, whatever the mode; the norm, but with `skip="reuse"`; key and value, where the
    layer gives no pair, or where nobody who read it in the passes before retrieves now. Of an `AttentionResidual` that
    is skipped and not the first of its history all. What another module or layer has too is left out.
    """
    idle: dict[nn.Parameter, None] = {}
    used: dict[nn.Parameter, int] = {}
    modules = all_modules(model)
    if not any(isinstance(module, Watched) and module.skipped for module in modules):
        return []
    for module in modules:
        for parameter in module.parameters(recurse=False):
            used[parameter] = used.get(parameter, -1) + 1
    for layer in modules:
        if isinstance(layer, Watched):
            for parameter, is_idle in layer.parts():
                if is_idle:
                    idle[parameter] = None
                else:
                    used[parameter] = used.get(parameter, 0) + 1
    return [parameter for parameter in idle if not used.get(parameter, 0)]


def spare_skipped(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Have an optimizer leave the idle parameters of skipped layers as they are, and their moments too.

    Without a gradient (`.grad` None) an optimizer passes by. But skipped layers have gradients of zeros under
    `DistributedDataParallel`, in compiled graphs and after `zero_grad(set_to_none=False)`, and then momentum and weight
    decay go on moving them. Equivalent PyTorch, before each step::

        for parameter in idle_parameters(model):
            parameter.grad = None

    Args:
        optimizer: any optimizer of `torch.optim`, or one with its hooks.
        model: the model that it trains, or a wrapper around it.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        TypeError: `optimizer` has no hooks before its steps, or `model` is no module.
        ValueError: `model` has no :class:`ela_kernels.ELA` or :class:`ela_kernels.AttentionResidual` in it.

    Source:
        Our definition: a layer that is skipped comes back as it was.

    Example:
        >>> import torch, ela_kernels as ek
        >>> from ela_kernels.ebqm import spare_skipped
        >>> model = ek.ELA(32)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> handle = spare_skipped(optimizer, model)
    """
    if isinstance(optimizer, type) or not callable(
        getattr(optimizer, "register_step_pre_hook", None)
    ):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"optimizer: got {got}; allowed is a torch.optim.Optimizer, or one with its register_step_pre_hook. Give "
            "the optimizer before the model"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: got {type(model).__name__}; allowed is a torch.nn.Module. Give the model that the optimizer trains"
        )
    if not any(isinstance(module, Watched) for module in all_modules(model)):
        raise ValueError(
            f"model: got {type(model).__name__} without an ELA layer, so that there is nothing to spare; allowed is a "
            "model with some, or with an AttentionResidual. Leave the call out, or give the model that has them"
        )

    def forget(*_: Any) -> None:
        for parameter in idle_parameters(model):
            parameter.grad = None

    return optimizer.register_step_pre_hook(forget)
