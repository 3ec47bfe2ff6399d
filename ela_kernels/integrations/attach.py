"""Layer attention after the blocks of any network: `attach`, and `detach`, which undoes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ela_kernels.conversion.fused import InFront, names_taken, put_in_front, unfuse
from ela_kernels.integrations.stage import Stage
from ela_kernels.integrations.views import Maps
from ela_kernels.models.blocks import MRLA, MRLALight
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.query_key_value import check_count
from ela_kernels.ops.checks import check_tolerance
from ela_kernels.ops.layer_attention.held import check_history_dtype
from ela_kernels.torch_internals import own_child

M = TypeVar("M", bound=nn.Module)

CHILD = "ela"
"""What a block calls its layer, in names of parameters too."""


class Place(NamedTuple):
    """A block's place: its stage, and the number of its layer there; None for a block without one of its own."""

    stage: Stage
    number: int | None


class Attached(InFront):
    """In front of the class of a block: the block as it was written, and its layer after it."""

    fused_place: Place
    fused_prefix = "Attached"

    def __call__(self, *args: Any, **options: Any) -> Any:
        # Hooks exchange tensors (those of FSDP do), and with them what they carry: looked at before and after.
        if torch.compiler.is_compiling():
            return super().__call__(*args, **options)
        stage = self.fused_place.stage
        stage.receive(self, _first(args, options))
        try:
            out = super().__call__(*args, **options)
            stage.hand_on(out)
            return out
        except BaseException:
            stage.give_up()
            raise
        finally:
            stage.end_call()

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the block's own, and then its layer's."""
        stage, number = self.fused_place
        out = self.fused_original_forward(*args, **options)
        x = _first(args, options)
        if number is None:
            stage.pass_on(self, x, out)
            return out
        layer = self._modules[CHILD]
        assert layer is not None
        return stage.follow(self, layer, number, x, out)

    def fused_original_forward(self, *args: Any, **options: Any) -> Any:
        if self.fused_original.forward is not nn.Sequential.forward:
            return super().fused_original_forward(*args, **options)
        # A Sequential would call the layer as one of its own.
        x = _first(args, options)
        for name, module in self._modules.items():
            if name != CHILD and module is not None:
                x = module(x)
        return x

    def fused_release(self) -> None:
        super().fused_release()
        del self.fused_place


def _first(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(options.values()), None)


def attach(
    model: M,
    stages: Sequence[Sequence[str]],
    make_layer: Callable[[str], nn.Module],
    *,
    every: int | None = None,
    view: Maps | None = None,
    history_dtype: torch.dtype | None = None,
    tolerance: float = 0.0,
    operations_between: bool = False,
) -> M:
    """Put a layer of layer attention after the blocks of a network, in place; the layers of a stage share a history.

    Equivalent PyTorch, with a new `history` for each stage and forward pass: `x = block.ela(block(x), history)` instead
    of `x = block(x)`.

    A block gets its layer as its child `ela`, and a class that is made for it, of which its own is a base: names,
    weights, hooks, and what `isinstance` says stay, and whoever calls the blocks (a `Sequential`, a loop, a
    non-reentrant checkpoint) need not know. A checkpoint of the network loads with `strict=False`, with nothing missing
    but `ela`. Copies, pickles and `torch.save` work. :func:`detach` undoes it. The history travels with the maps from
    block to block, as an attribute of the tensors.

    Args:
        model: the network, not yet wrapped (for data parallelism, say) or compiled.
        stages: for each stage the names of its blocks (as `named_modules()` has them) in the order in which they run.
            The blocks of one stage give maps of one shape.
        make_layer: called with a block's name; gives an :class:`ela_kernels.ELA`, or an `MRLA` or `MRLALight` of
            `ela_kernels.models.blocks`. The layer goes to the device and dtype of its block.
        every: a layer after every `every`-th block of a stage, counted from its first; after each if None.
        view: what blocks give: `Maps()` for `[B, C, H, W]` (if None), `ChannelsLast()` for `[B, H, W, C]`, and
            `Tokens(grid, prefix)` for `[B, prefix + H * W, C]`, all of `ela_kernels.integrations.views`.
        history_dtype, tolerance: `dtype` and `tolerance` of the :class:`ela_kernels.LayerHistory` of each stage.
        operations_between: operations stand between the blocks of a stage (an activation, say), and what they give does
            not carry the history. That of the last block which ran in the thread is then taken where the place fits:
            right as long as every pass goes through all blocks of a stage, and none takes turns with another.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named; nothing is changed then. When the model runs:
            `ValueError` for maps of several shapes in a stage.
        RuntimeError: when the model runs: a block that its stage's history did not reach, since the blocks before it
            did not run, or under reentrant checkpointing.

    Source:
        MRLA (arXiv 2302.03985) and ELA (arXiv 2503.06473), whose layers stand after each block of a residual network.
        That they stand in other networks is our definition.

    Example:
        >>> import torch, ela_kernels as ek
        >>> from ela_kernels.integrations import attach
        >>> model = torch.nn.Sequential(*(torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)))
        >>> model = attach(model, [["0", "1", "2"]], lambda name: ek.ELA(32))
        >>> model(torch.randn(2, 32, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """
    blocks = _checked_blocks(model, stages)
    step = 1 if every is None else check_count("every", every)
    check_history_dtype(history_dtype, "history_dtype")
    check_tolerance(tolerance)
    if not isinstance(operations_between, bool):
        raise TypeError(
            f"operations_between: got {type(operations_between).__name__}; allowed is a bool"
        )
    _check_maker(make_layer)
    _check_view(view)
    planned: list[tuple[nn.Module, Place, nn.Module | None]] = []
    for names in stages:
        chosen = tuple(names)[step - 1 :: step]
        if not chosen:
            continue
        layers = {name: _checked_layer(make_layer(name), name, blocks[name]) for name in chosen}
        is_light = isinstance(layers[chosen[0]], MRLALight)
        if any(isinstance(layer, MRLALight) is not is_light for layer in layers.values()):
            raise ValueError(
                f"make_layer: got light and other layers for the stage of {chosen[0]}; allowed is one form in a stage"
            )
        if is_light and (history_dtype is not None or tolerance > 0):
            raise ValueError(
                "history_dtype, tolerance: got one for layers of the light form, which have no LayerHistory; allowed "
                "are None and 0"
            )
        stage = Stage(
            chosen,
            Maps() if view is None else view,
            is_light,
            history_dtype,
            tolerance,
            operations_between,
        )
        first, last = names.index(chosen[0]), names.index(chosen[-1])
        for name in names[first : last + 1]:
            number = chosen.index(name) if name in layers else None
            planned.append((blocks[name], Place(stage, number), layers.get(name)))
    if not planned:
        longest = max(map(len, stages))
        raise ValueError(
            f"every: got {every}, for stages of at most {longest} blocks; allowed is an int of 1 to {longest}, so that "
            "there is a layer at all"
        )
    for block, place, layer in planned:
        if layer is not None:
            block.add_module(CHILD, layer)
        put_in_front(block, Attached, fused_place=place)
    return model


def detach(model: M) -> M:
    """Undo :func:`attach`, in place: blocks are of their own classes again, and their layers are gone.

    Args:
        model: any model; one without layers that were attached stays as it is.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
    """
    for block in attached_blocks(model).values():
        unfuse(block)
        if own_child(block, CHILD) is not None:
            delattr(block, CHILD)
    return model


def attached_blocks(model: nn.Module) -> dict[str, Attached]:
    """The blocks that layers were attached to, or that stand between such, by name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a torch.nn.Module")
    return {name: m for name, m in model.named_modules() if isinstance(m, Attached)}


def refuse_attached(model: nn.Module) -> None:
    """Refuse a model that has such layers already."""
    there = attached_blocks(model)
    if there:
        raise ValueError(
            f"model: got {type(model).__name__} with layers already, at {', '.join(list(there)[:3])}"
            f"{' and others' if len(there) > 3 else ''}; allowed is a model without. Call "
            "ela_kernels.integrations.detach(model) first"
        )


def _checked_blocks(model: nn.Module, stages: Sequence[Sequence[str]]) -> dict[str, nn.Module]:
    refuse_attached(model)
    if isinstance(stages, str) or not isinstance(stages, Sequence):
        raise TypeError(
            f"stages: got {type(stages).__name__}; allowed is a sequence of sequences of names"
        )
    for names in stages:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(
                f"stages: got {names!r} in it; allowed is a sequence of names for each stage"
            )
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name in (name for names in stages for name in names):
        if name not in modules:
            raise ValueError(
                f"stages: got {name!r}; allowed are names of modules, as model.named_modules() has them"
            )
        block = modules[name]
        if name in found or any(block is other for other in found.values()):
            raise ValueError(
                f"stages: got {name!r}, which is there twice; allowed is each block once, since its layer has one "
                "place in one stage"
            )
        _check_block(name, block)
        found[name] = block
    if not found:
        raise ValueError("stages: got no block; allowed is at least one")
    _refuse_nested(found)
    return found


def _check_block(name: str, block: nn.Module) -> None:
    if "forward" in vars(block):
        raise ValueError(
            f"stages: got {name!r}, which has a forward of its own in the instance; allowed are blocks whose class has "
            "their forward, since a layer is put after that"
        )
    kind = type(block)
    is_own_sequential = (
        isinstance(block, nn.Sequential) and kind.forward is not nn.Sequential.forward
    )
    if is_own_sequential or isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"stages: got {name!r}, a {kind.__name__}, a container that would take the layer for one of its own "
            "modules; allowed are blocks with a forward that calls its parts by name, and plain nn.Sequential"
        )
    if hasattr(block, CHILD):
        raise ValueError(
            f"stages: got {name!r}, a {type(block).__name__} with an attribute {CHILD!r} of its own; allowed are "
            "blocks without, since the layer is called so"
        )
    taken = [n for n in names_taken(block, Attached) if n not in ("forward", "__call__")]
    if taken:
        raise ValueError(
            f"stages: got {name!r}, a {type(block).__name__} with {', '.join(taken)}; allowed are blocks without these "
            "names, which ours needs"
        )


def _refuse_nested(blocks: dict[str, nn.Module]) -> None:
    for name in blocks:
        parts: Iterable[str] = name.split(".")
        around = ""
        for part in list(parts)[:-1]:
            around = f"{around}.{part}" if around else part
            if around in blocks:
                raise ValueError(
                    f"stages: got {name!r}, which is inside of {around!r}; allowed are blocks that stand beside each "
                    "other"
                )


def _check_maker(make_layer: object) -> None:
    allowed = (
        "allowed is a function that is called with a block's name and returns its layer. Give lambda name: "
        "ela_kernels.ELA(dim), with the channels of that block"
    )
    if isinstance(make_layer, nn.Module):
        raise TypeError(
            f"make_layer: got a layer, {type(make_layer).__name__}, where each block has one of its own; {allowed}"
        )
    if not callable(make_layer):
        raise TypeError(f"make_layer: got {type(make_layer).__name__}; {allowed}")
    # A class of ours, its options given or not, would take the name for its first argument.
    maker: Any = make_layer.func if isinstance(make_layer, partial) else make_layer
    ours = (kind.__init__ for kind in (ELA, MRLA, MRLALight))
    if isinstance(maker, type) and any(maker.__init__ is init for init in ours):  # type: ignore[misc]
        raise TypeError(
            f"make_layer: got the class {maker.__name__}, which takes no name; {allowed}"
        )
    try:
        signature = inspect.signature(make_layer)
    except ValueError:  # of what is written in C
        return
    try:
        signature.bind("name")
    except TypeError:
        raise TypeError(
            f"make_layer: got one that takes {signature}, and not one argument; {allowed}"
        ) from None


def _check_view(view: object) -> None:
    if view is None or isinstance(view, Maps):
        return
    is_class = isinstance(view, type) and issubclass(view, Maps)
    got = f"the class {view.__name__}" if is_class else type(view).__name__  # type: ignore[attr-defined]
    raise TypeError(
        f"view: got {got}; allowed is None or an object of ela_kernels.integrations.views. Give Maps(), "
        "ChannelsLast() or Tokens(grid, prefix)"
    )


def _checked_layer(layer: object, name: str, block: nn.Module) -> nn.Module:
    if not isinstance(layer, (ELA, MRLA, MRLALight)):
        raise TypeError(
            f"make_layer: got {type(layer).__name__} for {name}; allowed are ELA, MRLA and MRLALight"
        )
    like = next((p for p in block.parameters() if p.is_floating_point()), None)
    if like is not None:
        layer.to(device=like.device, dtype=like.dtype)
    return layer.train(block.training)
