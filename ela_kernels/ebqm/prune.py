"""Make decisions permanent."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ela_kernels.ebqm.stages import find_layers
from ela_kernels.modules.attention_residual import AttentionResidual
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.layer_attention import LayerAttention

M = TypeVar("M", bound=nn.Module)


def prune(model: M) -> M:
    """Make the skipping of the layers skipped now permanent, and remove the parameters that no longer serve, in place.

    A layer skipped with `skip="retrieval"` loses the query's filter and the norm, one with `skip="reuse"` the query's
    filter alone; it keeps the key's and the value's (where it gives them at all) as long as anybody who reads them
    retrieves: another ELA layer that is not skipped, a `LayerAttention` of its own, or calls of
    :meth:`ela_kernels.LayerHistory.attend`. Who reads them is learnt from the forward passes that ran, in any order
    and branches; nothing is guessed: they are kept where a layer that retrieves did not run, or in compiled graphs
    alone. One skipped with `skip="layer"` loses everything, and so does an
    :class:`ela_kernels.AttentionResidual`: query and norm weight. The output in eval mode stays the same, bit for bit.

    An optimizer made before holds the removed parameters on: they get no gradient and so are not updated, but their
    memory and that of their moments is freed only with a new optimizer. A checkpoint of the pruned model loads into a
    pruned copy, and into a model made anew, which it prunes in the same way.

    Args:
        model: a model with :class:`ela_kernels.ELA` or :class:`ela_kernels.AttentionResidual` layers that has run at
            least one forward pass in eager PyTorch (compiled ones learn nothing of who reads a pair), or that was
            copied or loaded from the checkpoint of one that has: then a pair is kept that anybody may read, skipped or
            not, until a pass shows who.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: no such layer in it; a skipped one of which it is not known who reads its key and value; a skipped
            `AttentionResidual` that comes first in its history, or has not run in one. Nothing is changed then.

    Source:
        Our definition.
    """
    found = find_layers(model)
    residuals = {n: m for n, m in found.items() if isinstance(m, AttentionResidual) and m.skipped}
    for name, module in residuals.items():
        _check_reuses(name, module)
    layers = {name: layer for name, layer in found.items() if isinstance(layer, ELA)}
    outside = _outside(model)
    serving = {name: _serves(name, layer, layers, outside) for name, layer in layers.items()}
    retrieving = outside.union(*(_attentions(ela) for ela in layers.values() if not ela.skipped))
    for name, layer in layers.items():
        if layer.skipped:
            keeps_query = not retrieving.isdisjoint(_attentions(layer))
            layer.remove_unused(provides=serving[name], keeps_query=keeps_query)
    for module in residuals.values():
        module.remove_unused()
    return model


def _check_reuses(name: str, module: AttentionResidual) -> None:
    """Refuse one that retrieves, though it is to be skipped, or of which that is not known."""
    if module.place is None:
        raise ValueError(
            f"model: got a skipped AttentionResidual {name!r} that has never run with a PositionHistory, so that it is "
            "not known whether it comes first there and retrieves; allowed is a model after one forward pass"
        )
    if module.is_first:
        raise ValueError(
            f"model: got a skipped AttentionResidual {name!r} that comes first in its history, where it has nothing to "
            "take over and retrieves; allowed are later ones. Set skipped = False"
        )


def _attentions(layer: ELA) -> set[nn.Module]:
    """What the layer retrieves with; a wrapper may be around it."""
    return set() if layer.attn is None else {m for m in layer.attn.modules() if _retrieves(m)}


def _retrieves(module: nn.Module) -> bool:
    return isinstance(module, LayerAttention)


def _outside(model: nn.Module) -> set[nn.Module]:
    """The `LayerAttention` modules that stand anywhere but in an ELA layer, also those that stand in one as well."""
    named = list(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, m in named if isinstance(m, ELA))
    lent: set[nn.Module] = set().union(
        *(_attentions(m) for _, m in named if isinstance(m, ELA) and m.lent)
    )
    return {
        m for name, m in named if _retrieves(m) and m not in lent and not name.startswith(inside)
    }


def _serves(name: str, layer: ELA, layers: dict[str, ELA], outside: set[nn.Module]) -> bool:
    """Whether the pair of a skipped layer is read, as far as is known."""
    if not layer.skipped or not layer.provides or layer.attn is None:
        return False
    if outside:
        # It may share a history with ELA layers, and may not have run yet.
        return True
    is_read = layer.is_read()
    if is_read is None:
        raise ValueError(
            f"model: got a skipped layer {name!r} that has never run, so that it is not known who reads its key and "
            "value; allowed is a model after one forward pass in eager PyTorch (a compiled pass learns nothing)"
        )
    # Of one that never ran, or in compiled graphs alone, it is not known what it reads.
    is_known = [
        other.readers.came_by if layer.readers.known else other.place is not None
        for other in layers.values()
        if not other.skipped
    ]
    return is_read or not all(is_known)
