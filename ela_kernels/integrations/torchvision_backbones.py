"""Layer attention in torchvision's residual networks, and in backbones made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ela_kernels.integrations.attach import refuse_attached
from ela_kernels.integrations.layers import (
    FORMS,
    Form,
    Norm,
    NormMaker,
    Options,
    add_layers,
    group_norm,
)
from ela_kernels.modules.skipping import SkipMode
from ela_kernels.optional import optional
from ela_kernels.torch_internals import BATCH_NORM

# What torchvision is needed for, and the extra that brings it.
_NEEDED = ("ela_kernels.integrations.torchvision", "detection")

_resnet = optional("torchvision.models.resnet", *_NEEDED)
_models = optional("torchvision.models", *_NEEDED)
_fpn = optional("torchvision.models.detection.backbone_utils", *_NEEDED)
_pyramid = optional("torchvision.ops.feature_pyramid_network", *_NEEDED)
FROZEN_NORM: type[nn.Module] = optional("torchvision.ops", *_NEEDED).FrozenBatchNorm2d

M = TypeVar("M", bound=nn.Module)
Attention = Literal["none", "ela", "mrla", "mrla_light"]
BackboneNorm = Literal["batch", "frozen", "sync", "group"]

_NORMS: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FROZEN_NORM,
    "sync": nn.SyncBatchNorm,
    "group": group_norm,
}
# What each network has, from its end.
_PARTS = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")
_STAGES = ("layer1", "layer2", "layer3", "layer4")
OUT_CHANNELS = 256


def add_layer_attention(
    model: M,
    form: Form = "ela",
    *,
    every: int | None = None,
    head_dim: int = 16,
    norm: Norm | None = None,
    drop_path: float = 0.0,
    skip: SkipMode | None = None,
    tolerance: float = 0.0,
    history_dtype: torch.dtype | None = None,
    identity_init: bool = True,
) -> M:
    """Put a layer of layer attention after the blocks of a torchvision `ResNet`, in place.

    Each of `layer1` to `layer4` is a stage. Otherwise as :func:`ela_kernels.integrations.attach`: weights and names
    stay, and only `ela` is new.

    Equivalent PyTorch, with a new `history` for each stage and forward pass: `x = block.ela(block(x), history)` instead
    of `x = block(x)`.

    Args:
        model: a `torchvision.models.ResNet` (ResNeXt and wide ones are).
        norm: of what is retrieved: `"batch"`, `"layer"`, `"group"` (16 channels each), `"sync"`, or a function of the
            channels. If None that of the blocks, and `"group"` where theirs are frozen: new layers have no statistics
            that could be frozen, and networks are frozen where a batch is too small for its own.
        form, every, head_dim, drop_path, skip, tolerance, history_dtype, identity_init: as of
            `ela_kernels.integrations.timm.add_layer_attention`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named; nothing is changed then.

    Source:
        MRLA (arXiv 2302.03985); ELA (arXiv 2503.06473). The norm beside frozen ones is our definition.
    """
    if not isinstance(model, _resnet.ResNet):
        raise TypeError(
            f"model: got {type(model).__name__}; allowed is a torchvision.models.ResNet. For any other network name "
            "the blocks of each stage: ela_kernels.integrations.attach(model, stages, make_layer)"
        )
    refuse_attached(model)
    stages, dims = [], {}
    for name in _STAGES:
        blocks = {
            f"{name}.{child}": block for child, block in model.get_submodule(name).named_children()
        }
        for block_name, block in blocks.items():
            if not isinstance(block, (_resnet.BasicBlock, _resnet.Bottleneck)):
                raise ValueError(
                    f"model: got {block_name}, a {type(block).__name__}; allowed are torchvision's BasicBlock and "
                    "Bottleneck"
                )
            found: Any = block
            dims[block_name] = (
                found.conv2 if isinstance(block, _resnet.BasicBlock) else found.conv3
            ).out_channels
        stages.append(list(blocks))
    given = _usual_norm(model) if norm is None else norm
    options = Options.checked(form, head_dim, given, drop_path, skip, identity_init)
    return add_layers(
        model,
        stages,
        dims,
        options,
        every,
        history_dtype=history_dtype,
        tolerance=tolerance,
    )


def _usual_norm(model: nn.Module) -> Norm:
    modules = list(model.modules())
    if any(isinstance(m, nn.SyncBatchNorm) for m in modules):
        return "sync"
    return "batch" if any(isinstance(m, BATCH_NORM) for m in modules) else "group"


def resnet_fpn_backbone(
    backbone_name: str = "resnet50",
    attention: Attention = "ela",
    *,
    weights: Any = None,
    norm: BackboneNorm = "batch",
    trainable_layers: int = 3,
    returned_layers: Sequence[int] | None = None,
    extra_blocks: nn.Module | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """torchvision's residual network with a feature pyramid, and layer attention after its blocks.

    Equivalent PyTorch: `torchvision.models.detection.backbone_utils.resnet_fpn_backbone` of a network with
    :func:`add_layer_attention`.

    Args:
        backbone_name: of a residual network in torchvision: `"resnet18"`, `"resnext50_32x4d"`, ...
        attention: `"ela"`, `"mrla"`, `"mrla_light"`, or `"none"` for torchvision's own backbone.
        weights: of torchvision, for the network; not with `norm="group"`, for which there are none.
        norm: of the network: `"batch"`, `"frozen"` (statistics and scales of the weights stay), `"sync"` or `"group"`
            (16 channels each). That of our layers is the same, and `"group"` where the network's is frozen, since new
            layers have nothing to freeze; the option `attention_norm` names another.
        trainable_layers: how many parts of the network are trained, from its end, 0 to 5; layers of ours in a part that
            is not trained are not either. Of `identity_init=True` these stay without any effect.
        returned_layers: numbers of the stages whose maps go into the pyramid, 1 to 4; all if None.
        extra_blocks: what adds maps to the pyramid; `LastLevelMaxPool()` if None.
        progress: show how far a download is.
        **options: of :func:`add_layer_attention`: `head_dim`, `every`, `drop_path`, `skip`, `tolerance`,
            `history_dtype`, `identity_init`; and `attention_norm`, its `norm`.

    Returns:
        A `BackboneWithFPN`, as torchvision's detectors take one.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        Feature pyramids (arXiv 1612.03144). The norm beside frozen ones is our definition.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm: got {norm!r}; allowed are {', '.join(map(repr, _NORMS))}")
    if norm == "group" and weights is not None:
        raise ValueError(
            "weights: got some with norm='group'; allowed is None, since torchvision's are of batch norms. Take "
            "norm='frozen'"
        )
    _check_attention(attention, options)
    of_layers = options.pop("attention_norm", None)
    if of_layers is not None:
        of_layers = NormMaker.checked("attention_norm", of_layers)
    network = _network(backbone_name, weights, _NORMS[norm], progress)
    if attention != "none":
        add_layer_attention(network, attention, norm=of_layers, **options)
    _freeze(network, trainable_layers)
    returned = _check_returned(returned_layers)
    first: Any = network.inplanes // 8
    return _fpn.BackboneWithFPN(  # type: ignore[no-any-return]
        network,
        {f"layer{number}": str(i) for i, number in enumerate(returned)},
        [first * 2 ** (number - 1) for number in returned],
        OUT_CHANNELS,
        extra_blocks=_pyramid.LastLevelMaxPool() if extra_blocks is None else extra_blocks,
    )


def _network(name: str, weights: Any, norm: Callable[..., nn.Module], progress: bool) -> Any:
    make = (
        getattr(_resnet, name, None) if isinstance(name, str) and name in _resnet.__all__ else None
    )
    if not callable(make) or isinstance(make, type):
        allowed = [n for n in _resnet.__all__ if n.islower()]
        raise ValueError(f"backbone_name: got {name!r}; allowed are {', '.join(allowed)}")
    if not isinstance(weights, bool):  # which torchvision still takes, with a warning
        weights = verified_weights("weights", _models.get_model_weights(name), weights)
    return make(weights=weights, progress=progress, norm_layer=norm)


def verified_weights(argument: str, kind: Any, weights: object) -> Any:
    """Weights of torchvision's class `kind`, by their name too, or an error that names the argument."""
    try:
        return kind.verify(weights)
    except (KeyError, TypeError):
        raise ValueError(
            f"{argument}: got {weights!r}; allowed are None and {', '.join(map(repr, kind.__members__))} (of "
            f"torchvision's {kind.__name__}). Give None for no weights"
        ) from None


def _check_attention(attention: object, options: dict[str, Any]) -> None:
    allowed = ("none", *FORMS)
    if attention not in allowed:
        raise ValueError(
            f"attention: got {attention!r}; allowed are {', '.join(map(repr, allowed))}"
        )
    if attention == "none" and options:
        raise ValueError(
            f"{next(iter(options))}: got an option of the layers with attention='none', which has none; allowed is it "
            "with another attention"
        )


def _freeze(network: nn.Module, trainable: int) -> None:
    if isinstance(trainable, bool) or not isinstance(trainable, int) or not 0 <= trainable <= 5:
        raise ValueError(f"trainable_layers: got {trainable!r}; allowed is an int of 0 to 5")
    trained = _PARTS if trainable == 5 else _PARTS[:trainable]
    for name, parameter in network.named_parameters():
        if not name.startswith(trained):
            parameter.requires_grad_(False)


def _check_returned(numbers: Sequence[int] | None) -> list[int]:
    found = [1, 2, 3, 4] if numbers is None else list(numbers)
    if not found or any(n not in (1, 2, 3, 4) for n in found):
        raise ValueError(f"returned_layers: got {numbers!r}; allowed are numbers of 1 to 4")
    return found
