"""Make decisions permanent."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ela_kernels.ebqm.stages import find_layers, stage_numbers
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.layer_attention import LayerAttention

M = TypeVar("M", bound=nn.Module)


def prune(model: M) -> M:
    """Make the skipping of the layers skipped now permanent, and remove the parameters that no longer serve, in place.

    A layer skipped with `skip="retrieval"` loses the query's filter and the norm; it keeps the key's and the value's as
    long as a later layer of its stage retrieves. One skipped with `skip="layer"` loses everything. The output in eval
    mode stays the same, bit for bit.

    An optimizer made before holds the removed parameters on: they get no gradient and so are not updated, but their
    memory and that of their moments is freed only with a new optimizer. A checkpoint of the pruned model loads into a
    pruned copy, and into a model made anew, which it prunes in the same way.

    Args:
        model: a model with :class:`ela_kernels.ELA` layers that has run at least one forward pass, or was loaded from
            the checkpoint of one that has: the stages are learnt from it.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: no ELA layer in it, or a skipped one whose place in its stage is not known; nothing is changed then.

    Source:
        Our definition.
    """
    layers = find_layers(model)
    for name, layer in layers.items():
        if layer.skipped and layer.place is None:
            raise ValueError(
                f"model: got a skipped layer {name!r} that has never run, so that its stage is not known; allowed is a "
                "model after one forward pass"
            )
    modules = list(layers.values())
    stages = stage_numbers([layer.place for layer in modules])
    # Attention layers outside of ELA may share a history with it, and then read what skipped layers provide.
    inside = {layer.attn for layer in modules}
    others = any(isinstance(m, LayerAttention) and m not in inside for m in model.modules())
    for i, layer in enumerate(modules):
        if layer.skipped:
            serves = others or _is_read(i, modules, stages)
            layer.remove_unused(provides=serves and layer.skip == "retrieval")
    return model


def _is_read(i: int, layers: list[ELA], stages: list[int]) -> bool:
    """Whether a later layer of the stage retrieves."""
    return any(
        not later.skipped
        for later, stage in zip(layers[i + 1 :], stages[i + 1 :], strict=True)
        if stage == stages[i]
    )
