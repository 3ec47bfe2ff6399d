"""Tensors whose memory is gone, as FSDP leaves parameters outside of their module's forward, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ela_kernels as ek

CHANNELS, HEADS = 8, 2


def free(tensor: Tensor) -> None:
    """What FSDP does with a parameter that is not in use."""
    tensor.untyped_storage().resize_(0)


def empty(tensor: Tensor) -> None:
    """What other libraries do; autograd does not notice."""
    tensor.data = torch.empty(0, device="cpu")


def shorten(tensor: Tensor) -> None:
    """As :func:`empty`, with an address that is not 0."""
    tensor.data = torch.empty(1, device="cpu")


def a_map() -> Tensor:
    return torch.randn(2, CHANNELS, 3, 5, requires_grad=True)


def a_row() -> Tensor:
    return torch.randn(2, CHANNELS, requires_grad=True)


def op_arguments() -> dict[str, Any]:
    return {
        "q": a_row(),
        "keys": [a_row(), a_row()],
        "values": [a_map(), a_map()],
        "heads": HEADS,
        "prev_weights": torch.ones(2, HEADS, 1),
    }


def chosen(arguments: dict[str, Any], name: str) -> Tensor:
    found = arguments[name]
    return found[1] if isinstance(found, list) else found


def make(kind: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A module, and a call of it."""
    module: nn.Module
    if kind == "light":
        module = ek.LightLayerAttention(CHANNELS, CHANNELS // HEADS)
        return module, lambda x: module(x, x)
    make_module = {"layer": ek.LayerAttention, "block": ek.ELA}[kind]
    module = make_module(CHANNELS, CHANNELS // HEADS)
    history = ek.LayerHistory()
    return module, lambda x: module(x, history)


PARAMETERS = {
    "layer": ("Wq.weight", "Wk.weight", "Wv.weight"),
    "block": ("attn.Wq.weight", "attn.Wk.weight", "attn.Wv.weight", "norm.weight", "norm.bias"),
    "light": ("Wq.weight", "Wk.weight", "Wv.weight", "lambda_t"),
}
ALL_PARAMETERS = [(kind, name) for kind, names in PARAMETERS.items() for name in names]


def replace_by_view(module: nn.Module, name: str) -> nn.Parameter:
    """Make a parameter a part of a larger tensor, as flattened parameters are; given back."""
    owner, _, attribute = name.rpartition(".")
    old = module.get_parameter(name)
    new = nn.Parameter(torch.randn(4, *old.shape)[3])
    setattr(module.get_submodule(owner), attribute, new)
    return new
