"""Layer attention in torchvision's residual networks: in a model, and in the backbones of its detectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ela_kernels.integrations.torchvision_backbones import (
    FROZEN_NORM,
    OUT_CHANNELS,
    Attention,
    BackboneNorm,
    add_layer_attention,
    resnet_fpn_backbone,
    verified_weights,
)
from ela_kernels.optional import optional

# What torchvision is needed for, and the extra that brings it.
_NEEDED = ("ela_kernels.integrations.torchvision", "detection")

_resnet = optional("torchvision.models.resnet", *_NEEDED)
_detection = optional("torchvision.models.detection", *_NEEDED)
_pyramid = optional("torchvision.ops.feature_pyramid_network", *_NEEDED)

_OF_LAYERS = (
    "head_dim",
    "every",
    "drop_path",
    "skip",
    "tolerance",
    "history_dtype",
    "identity_init",
    "attention_norm",
)


class _Asked(NamedTuple):
    """What a detector is asked for, as torchvision's functions are."""

    weights: Any
    progress: bool
    num_classes: int | None
    weights_backbone: Any
    trainable_backbone_layers: int | None
    attention: Attention
    norm: BackboneNorm | None


def _detector(
    make: Callable[..., nn.Module],
    kind: Any,
    asked: _Asked,
    options: dict[str, Any],
    **of_backbone: Any,
) -> nn.Module:
    """A detector as torchvision makes it, around a backbone of ours; `kind`: the class of its weights."""
    weights = verified_weights("weights", kind, asked.weights)
    of_network = verified_weights(
        "weights_backbone", _resnet.ResNet50_Weights, asked.weights_backbone
    )
    classes, trainable = asked.num_classes, asked.trainable_backbone_layers
    if weights is not None:
        of_network = None
        count = len(weights.meta["categories"])
        if classes not in (None, count):
            raise ValueError(
                f"num_classes: got {classes} with weights for {count}; allowed is {count}, or None"
            )
        classes = count
    is_trained = weights is not None or of_network is not None
    if not is_trained:
        if trainable not in (None, 5):
            warnings.warn(
                f"trainable_backbone_layers: got {trainable} without weights, and all are trained, as torchvision does",
                stacklevel=3,
            )
        trainable = 5
    backbone = resnet_fpn_backbone(
        "resnet50",
        asked.attention,
        weights=of_network,
        norm=asked.norm or ("frozen" if is_trained else "batch"),
        trainable_layers=3 if trainable is None else trainable,
        progress=asked.progress,
        **of_backbone,
        **{name: options.pop(name) for name in _OF_LAYERS if name in options},
    )
    model = make(backbone, 91 if classes is None else classes, **options)
    if weights is not None:
        _load(model, weights, asked.progress, weights == kind.COCO_V1)
    return model


def _load(model: nn.Module, weights: Any, progress: bool, without_eps: bool) -> None:
    state = weights.get_state_dict(progress=progress, check_hash=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(name for name in missing if ".ela." not in name)]
    if wrong:
        raise ValueError(
            f"weights: got a state that does not fit in {', '.join(wrong[:3])}; allowed is that of the plain detector. "
            "Take norm='frozen', as it was trained"
        )
    if without_eps:
        # They were trained without.
        for module in model.modules():
            if isinstance(module, FROZEN_NORM):
                module.eps = 0.0  # type: ignore[assignment]


def fasterrcnn_resnet50_fpn(
    *,
    weights: Any = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Any = _resnet.ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    attention: Attention = "ela",
    norm: BackboneNorm | None = None,
    **options: Any,
) -> nn.Module:
    """torchvision's `fasterrcnn_resnet50_fpn` with layer attention in its backbone.

    Args:
        weights, progress, num_classes, weights_backbone, trainable_backbone_layers: as torchvision's; of `weights` only
            our layers are missing.
        attention: `"ela"`, `"mrla"`, `"mrla_light"` or `"none"`.
        norm: as of :func:`resnet_fpn_backbone`; if None as torchvision's, `"frozen"` with weights and else `"batch"`.
        **options: of the layers, as :func:`resnet_fpn_backbone` takes them, and of torchvision's `FasterRCNN`.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        Faster R-CNN (arXiv 1506.01497).
    """
    kind = _detection.FasterRCNN_ResNet50_FPN_Weights
    asked = _Asked(
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        attention,
        norm,
    )
    return _detector(_detection.FasterRCNN, kind, asked, options)


def maskrcnn_resnet50_fpn(
    *,
    weights: Any = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Any = _resnet.ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    attention: Attention = "ela",
    norm: BackboneNorm | None = None,
    **options: Any,
) -> nn.Module:
    """torchvision's `maskrcnn_resnet50_fpn` with layer attention in its backbone.

    Arguments and errors as of :func:`fasterrcnn_resnet50_fpn`; `options` also of torchvision's `MaskRCNN`.

    Source:
        Mask R-CNN (arXiv 1703.06870).
    """
    kind = _detection.MaskRCNN_ResNet50_FPN_Weights
    asked = _Asked(
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        attention,
        norm,
    )
    return _detector(_detection.MaskRCNN, kind, asked, options)


def retinanet_resnet50_fpn(
    *,
    weights: Any = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Any = _resnet.ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    attention: Attention = "ela",
    norm: BackboneNorm | None = None,
    **options: Any,
) -> nn.Module:
    """torchvision's `retinanet_resnet50_fpn` with layer attention in its backbone.

    Arguments and errors as of :func:`fasterrcnn_resnet50_fpn`; `options` also of torchvision's `RetinaNet`.

    Source:
        RetinaNet (arXiv 1708.02002).
    """
    kind = _detection.RetinaNet_ResNet50_FPN_Weights
    asked = _Asked(
        weights,
        progress,
        num_classes,
        weights_backbone,
        trainable_backbone_layers,
        attention,
        norm,
    )
    # Without the finest map, which would have too many anchors.
    return _detector(
        _detection.RetinaNet,
        kind,
        asked,
        options,
        returned_layers=[2, 3, 4],
        extra_blocks=_pyramid.LastLevelP6P7(OUT_CHANNELS, OUT_CHANNELS),
    )


__all__ = [
    "add_layer_attention",
    "fasterrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "resnet_fpn_backbone",
    "retinanet_resnet50_fpn",
]
