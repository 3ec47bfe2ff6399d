"""Layer attention in timm's networks: in a model, and as models of their own that `timm.create_model` knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ela_kernels.integrations.attach import refuse_attached
from ela_kernels.integrations.layers import Form, Norm, Options, add_layers
from ela_kernels.integrations.trial import Ran, trial
from ela_kernels.integrations.views import ChannelsLast, Grid, Maps, Tokens
from ela_kernels.modules.query_key_value import check_count
from ela_kernels.modules.skipping import SkipMode
from ela_kernels.optional import optional
from ela_kernels.torch_internals import BATCH_NORM

# What timm is needed for, and the extra that brings it.
_NEEDED = ("ela_kernels.integrations.timm", "timm")

timm = optional("timm", *_NEEDED)
_models = optional("timm.models", *_NEEDED)

M = TypeVar("M", bound=nn.Module)

HEAD_DIM = 16

# The blocks whose outputs are known: by timm's module the names of their classes.
_MAPS: dict[str, tuple[str, ...]] = {
    "resnet": ("BasicBlock", "Bottleneck"),
    "resnetv2": ("PreActBasic", "PreActBottleneck", "Bottleneck"),
    "regnet": ("Bottleneck", "PreBottleneck"),
    "convnext": ("ConvNeXtBlock",),
}
_CHANNELS_LAST: dict[str, tuple[str, ...]] = {
    "swin_transformer": ("SwinTransformerBlock",),
    "swin_transformer_v2": ("SwinTransformerV2Block",),
}
_TOKENS: dict[str, tuple[str, ...]] = {
    "vision_transformer": ("Block", "ResPostBlock", "ParallelScalingBlock", "ParallelThingsBlock"),
}
FAMILIES = (
    "ResNet (ResNeXt, SE and others of its blocks), ResNetV2, RegNet, ConvNeXt, VisionTransformer (DeiT), "
    "SwinTransformer and SwinTransformerV2"
)


def _classes(table: dict[str, tuple[str, ...]]) -> tuple[type[nn.Module], ...]:
    """Those that this version of timm has."""
    modules = {name: optional(f"timm.models.{name}", *_NEEDED) for name in table}
    found = (getattr(modules[m], name, None) for m, names in table.items() for name in names)
    return tuple(kind for kind in found if kind is not None)


class Kind(NamedTuple):
    """Blocks of which it is known what they give."""

    blocks: tuple[type[nn.Module], ...]
    view: type[Maps]


_KINDS = tuple(
    Kind(_classes(table), view)
    for table, view in ((_MAPS, Maps), (_CHANNELS_LAST, ChannelsLast), (_TOKENS, Tokens))
)
_VIT: type[nn.Module] = optional("timm.models.vision_transformer", *_NEEDED).VisionTransformer


def add_layer_attention(
    model: M,
    form: Form = "ela",
    *,
    every: int | None = None,
    head_dim: int = HEAD_DIM,
    norm: Norm | None = None,
    drop_path: float = 0.0,
    skip: SkipMode | None = None,
    tolerance: float = 0.0,
    history_dtype: torch.dtype | None = None,
    identity_init: bool = True,
    grid: Grid | None = None,
) -> M:
    """Put a layer of layer attention after the blocks of a timm model, in place.

    The blocks that give maps of one shape, and stand in one container, are a stage: those of `layer1` in a ResNet, of
    `stages.0` in a ConvNeXt, all of a vision transformer. A class token and registers pass by; where the class token
    alone is classified, the layer after the last block has no effect, since its map goes nowhere. Otherwise as
    :func:`ela_kernels.integrations.attach`: weights and names stay, and only `ela` is new.

    Equivalent PyTorch, with a new `history` for each stage and forward pass: `x = block.ela(block(x), history)` instead
    of `x = block(x)`.

    Args:
        model: one of timm with blocks of ResNet, ResNetV2, RegNet, ConvNeXt, VisionTransformer (DeiT),
            SwinTransformer or SwinTransformerV2, also made with `features_only=True`.
        form: `"ela"`, whose layers :class:`ela_kernels.EBQM` can skip, `"mrla"` or `"mrla_light"`.
        every: a layer after every `every`-th block of a stage; after each if None.
        head_dim: channels of a head; a divisor of the channels of every stage.
        norm: of what is retrieved: `"batch"`, `"layer"` (over the channels of a position), `"group"` (16 channels
            each), `"sync"`, or a function of the channels. If None `"batch"` where the blocks have batch norms,
            `"group"` where they have group norms, and otherwise `"layer"`. Kernels do the whole block in one call with
            `"batch"` alone, and otherwise all of it but norm, activation and sum.
        drop_path: probability of dropping a retrieval in training: of the last layer, growing linearly from 0 at the
            first.
        skip: as of :class:`ela_kernels.ELA`, `"reuse"` if None; for `form="ela"` alone.
        tolerance, history_dtype: `tolerance` and `dtype` of the :class:`ela_kernels.LayerHistory` of each stage.
        identity_init: the scale of each norm starts at zero, and there is no activation after it, so that the network
            gives at first what it gave without. False: a ReLU after the norm, as published.
        grid: `(H, W)` of a vision transformer's tokens, or `"square"`; needed where the model takes images of several
            sizes, and otherwise that of its patch embedding.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named, and a model without blocks that are known; nothing
            is changed then.

    Source:
        MRLA (arXiv 2302.03985), which has its layers in residual networks and vision transformers; ELA (arXiv
        2503.06473). Which norm, and that the tokens before those of the map pass by, is our definition.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; allowed is a model of timm")
    refuse_attached(model)
    if every is not None:
        check_count("every", every)
    kind, groups = _known_blocks(model)
    blocks = {name: block for group in groups for name, block in group.items()}
    view = _view(model, kind, grid)
    ran = trial(model, blocks, _input_size(model))
    stages, dims = _stages(groups, ran, view)
    given = _usual_norm(blocks.values()) if norm is None else norm
    options = Options.checked(form, head_dim, given, drop_path, skip, identity_init)
    return add_layers(model, stages, dims, options, every, view, history_dtype, tolerance)


def _known_blocks(model: nn.Module) -> tuple[Kind, list[dict[str, nn.Module]]]:
    """The blocks of the model by their containers, all of one kind."""
    for kind in _KINDS:
        groups = []
        for name, parent in model.named_modules():
            if isinstance(parent, kind.blocks):
                continue
            prefix = f"{name}." if name else ""
            children = parent.named_children()
            found = {prefix + n: m for n, m in children if isinstance(m, kind.blocks)}
            if found:
                groups.append(found)
        if groups:
            return kind, groups
    raise ValueError(
        f"model: got {type(model).__name__}, without blocks that are known; allowed are timm's {FAMILIES}. For any "
        "other network name the blocks of each stage: ela_kernels.integrations.attach(model, stages, make_layer)"
    )


def _view(model: nn.Module, kind: Kind, grid: Grid | None) -> Maps:
    if kind.view is not Tokens:
        if grid is not None:
            raise ValueError(
                f"grid: got {grid!r} for a {type(model).__name__}, whose blocks give maps; allowed is None"
            )
        return kind.view()
    owners: list[Any] = [m for m in model.modules() if isinstance(m, _VIT)]
    if len(owners) != 1:
        raise ValueError(
            f"model: got {type(model).__name__} with blocks of a vision transformer and {len(owners)} modules "
            "VisionTransformer around them; allowed is one, which says where the map's tokens are. Name the blocks: "
            "ela_kernels.integrations.attach(model, stages, make_layer, view=Tokens(grid, prefix))"
        )
    (owner,) = owners
    if type(owner.patch_drop) is not nn.Identity:
        raise ValueError(
            f"model: got {type(owner).__name__} with patch_drop_rate, so that tokens are missing from the map in "
            "training; allowed is patch_drop_rate=0"
        )
    embed = owner.patch_embed
    if grid is None:
        size = getattr(embed, "grid_size", None)
        is_fixed = getattr(embed, "strict_img_size", True)
        is_fixed = is_fixed and not getattr(embed, "dynamic_img_pad", False)
        if size is None or owner.dynamic_img_size or not is_fixed:
            raise ValueError(
                f"grid: got None for a {type(owner).__name__} that takes images of several sizes; allowed are (H, W), "
                "for one size, and 'square', for images that are all squares"
            )
        grid = (int(size[0]), int(size[1]))
    return Tokens(grid, owner.num_prefix_tokens)


def _input_size(model: nn.Module) -> tuple[int, ...]:
    """Of a batch of one image that the model takes."""
    channels, height, width = 3, 224, 224
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if config.get("input_size"):
        channels, height, width = config["input_size"]
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, (tuple, list)) and len(size) == 2:
            height, width = size
            break
    convolutions = (m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return 1, next(convolutions, channels), height, width


def _stages(
    groups: list[dict[str, nn.Module]], ran: list[Ran], view: Maps
) -> tuple[list[list[str]], dict[str, int]]:
    """The blocks that ran, in stages of one shape, and the channels of each."""
    names = [found.name for found in ran]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            f"model: got the block {min(twice)}, which runs several times in a pass; allowed are blocks that run once"
        )
    stages: list[list[str]] = []
    dims: dict[str, int] = {}
    last: tuple[int, tuple[int, ...]] | None = None
    number = {name: i for i, group in enumerate(groups) for name in group}
    for name, shape in ran:
        shape_of_map = _shape_of_map(name, shape, view)
        dims[name] = shape_of_map[0]
        here = number[name], shape_of_map
        if here != last:
            stages.append([])
        stages[-1].append(name)
        last = here
    return stages, dims


def _shape_of_map(name: str, shape: tuple[int, ...] | None, view: Maps) -> tuple[int, ...]:
    out = None if shape is None else torch.empty(shape, device="meta")
    if isinstance(view, Tokens) and out is not None and out.dim() == 3:
        # Those of an image of the trial, which may be of another grid.
        view = Tokens((1, out.shape[1] - view.prefix), view.prefix)
    return tuple(view.map_of(out, name).shape[1:])


def _usual_norm(blocks: Any) -> Norm:
    modules = [m for block in blocks for m in block.modules()]
    if any(isinstance(m, BATCH_NORM) for m in modules):
        return "batch"
    return "group" if any(isinstance(m, nn.GroupNorm) for m in modules) else "layer"


_OPTIONS = tuple(
    name
    for name, found in inspect.signature(add_layer_attention).parameters.items()
    if found.kind is found.KEYWORD_ONLY
)


def _checked_options(layer_attention: object, model: str) -> dict[str, Any]:
    """The options of a model's layers, or an error that names the one that is none."""
    if layer_attention is None:
        return {}
    allowed = f"allowed is a dict of options of the layers: {', '.join(_OPTIONS)}"
    if not isinstance(layer_attention, dict):
        raise TypeError(
            f"layer_attention: got {layer_attention!r}; {allowed}. The form of the layers is in the model's name, "
            f"{model}"
        )
    unknown = [name for name in layer_attention if name not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"layer_attention: got {unknown[0]!r} in it; {allowed}. The form of the layers is in the model's name, "
            f"{model}"
        )
    return layer_attention


def _model(base: str, form: Form) -> Callable[..., nn.Module]:
    name = f"{base}_{form}"

    def create(
        pretrained: bool = False, layer_attention: dict[str, Any] | None = None, **options: Any
    ) -> nn.Module:
        given = _checked_options(layer_attention, name)
        model: nn.Module = timm.create_model(base, pretrained=pretrained, **options)
        add_layer_attention(model, form, **given)
        config = getattr(model, "pretrained_cfg", None)
        if config:
            # Of this model, so that what is saved with it is loaded into one like it.
            own: Any = {**config, "architecture": name}
            model.pretrained_cfg = model.default_cfg = own
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = (
        f"timm's `{base}` with {form} layers; `layer_attention`: options of `add_layer_attention`."
    )
    return create


__all__ = ["add_layer_attention"]


def _register() -> tuple[str, ...]:
    """Make the models known to `timm.create_model`; their names."""
    names = []
    for base, form in (
        ("resnet50", "ela"),
        ("resnet50", "mrla"),
        ("resnet50", "mrla_light"),
        ("vit_tiny_patch16_224", "ela"),
    ):
        function = _model(base, form)  # type: ignore[arg-type]
        globals()[function.__name__] = function
        _models.register_model(function)
        names.append(function.__name__)
    return tuple(names)


MODELS = _register()
