"""Make decisions permanent."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ela_kernels.ebqm.stages import find_layers
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.layer_attention import LayerAttention

M = TypeVar("M", bound=nn.Module)


def prune(model: M) -> M:
    """Make the skipping of the layers skipped now permanent, and remove the parameters that no longer serve, in place.

    A layer skipped with `skip="retrieval"` loses the query's filter and the norm; it keeps the key's and the value's as
    long as anybody who reads them retrieves: another ELA layer that is not skipped, a `LayerAttention` of its own, or
    calls of :meth:`ela_kernels.LayerHistory.attend`. Who reads them is learnt from the forward passes that ran, in
    whatever order and branches; nothing is guessed. One skipped with `skip="layer"` loses everything. The output in
    eval mode stays the same, bit for bit.

    An optimizer made before holds the removed parameters on: they get no gradient and so are not updated, but their
    memory and that of their moments is freed only with a new optimizer. A checkpoint of the pruned model loads into a
    pruned copy, and into a model made anew, which it prunes in the same way.

    Args:
        model: a model with :class:`ela_kernels.ELA` layers that has run at least one forward pass in eager PyTorch
            (compiled ones learn nothing), or that was copied or loaded from the checkpoint of one that has, with the
            decisions of then or more layers skipped.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: no ELA layer in it, or a skipped one of which it is not known who reads its key and value; nothing
            is changed then.

    Source:
        Our definition.
    """
    layers = find_layers(model)
    serving = {name: _serves(name, layer, layers, model) for name, layer in layers.items()}
    for name, layer in layers.items():
        if layer.skipped:
            layer.remove_unused(provides=serving[name])
    return model


def _serves(name: str, layer: ELA, layers: dict[str, ELA], model: nn.Module) -> bool:
    """Whether the pair of a skipped layer is read."""
    if not layer.skipped or layer.skip != "retrieval" or layer.attn is None:
        return False
    inside = {m for ela in layers.values() if ela.attn is not None for m in ela.attn.modules()}
    if any(isinstance(m, LayerAttention) and m not in inside for m in model.modules()):
        # It may share a history with ELA layers, and may not have run yet.
        return True
    is_read = layer.is_read()
    if is_read is None:
        raise ValueError(
            f"model: got a skipped layer {name!r} that has never run, so that it is not known who reads its key and "
            "value; allowed is a model after one forward pass in eager PyTorch (a compiled pass learns nothing)"
        )
    if not layer.has_run:
        for other_name, other in layers.items():
            if other.was_skipped and not other.skipped:
                raise ValueError(
                    f"model: got a layer {other_name!r} that was skipped in the checkpoint or copy that this model "
                    f"comes from, and retrieves now, so that it is not known whether it reads what {name!r} gives; "
                    "allowed is a model after one forward pass"
                )
    return is_read
