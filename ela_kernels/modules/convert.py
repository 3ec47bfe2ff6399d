"""Replace concatenating layers of a model by fused ones, in place, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.published import ConcatLayerAttention
from ela_kernels.modules.query_key_value import QueryKeyValue

M = TypeVar("M", bound=nn.Module)

_MARK = "_converted"


def convert(model: M) -> M:
    """Make every concatenating layer of `model` a fused `LayerAttention`, in place.

    The very instances are rebound: parameters, their names, hooks, optimizers and state_dict stay, and no memory is
    taken. A model goes on making its `ConcatHistory`, which serves fused layers as well. :func:`unconvert` undoes it.

    Args:
        model: a model with `ela_kernels.modules.published.ConcatLayerAttention` layers; may itself be one.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module, or holds a module that has layer attention's parameters but whose way of
            calling is not known, for instance a published one; nothing is changed then.
    """
    _check_module(model)
    found = []
    for name, module in model.named_modules():
        if type(module) is ConcatLayerAttention:
            found.append(module)
        elif not isinstance(module, QueryKeyValue) or isinstance(module, ConcatLayerAttention):
            _refuse_lookalike(name, module)
    for module in found:
        module.__class__ = LayerAttention  # type: ignore[assignment]
        setattr(module, _MARK, True)
    return model


def unconvert(model: M) -> M:
    """Undo :func:`convert`: the layers that it changed, and no others, become concatenating ones again.

    Args:
        model: a converted model.

    Returns:
        `model`.
    """
    _check_module(model)
    for module in model.modules():
        if type(module) is LayerAttention and getattr(module, _MARK, False):
            delattr(module, _MARK)
            module.__class__ = ConcatLayerAttention  # type: ignore[assignment]
    return model


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")


def _refuse_lookalike(name: str, module: nn.Module) -> None:
    """Refuse a module with the parameters of layer attention: a guess at its forward could change results silently."""
    query, key, value = (getattr(module, n, None) for n in ("Wq", "Wk", "Wv"))
    if not (
        isinstance(query, nn.Conv1d)
        and isinstance(key, nn.Conv1d)
        and isinstance(value, nn.Conv2d)
        and value.groups == value.in_channels
    ):
        return
    raise TypeError(
        f"model: got {type(module).__module__}.{type(module).__qualname__} at {name or '(the model itself)'!r}, which "
        "has the parameters of layer attention but a forward that convert() does not know; allowed are "
        "ConcatLayerAttention layers. Replace it by hand with ela_kernels.LayerAttention(dim, head_dim), called as "
        "layer(x, history); its state_dict has the same keys (Wq.weight, Wk.weight, Wv.weight)"
    )
