"""The detectors that the training program knows."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ela_kernels.models import ResNet
from ela_kernels.optional import optional
from ela_kernels.training.arguments import of_layers
from ela_kernels.training.detection.tasks import DetectionTask

# What a library is needed for, and the extra that brings it.
_NEEDED = ("--task detection", "detection")


class Pyramid(nn.Module):
    """A network of `features_only`, and a feature pyramid on the maps of its stages.

    Args:
        body: gives a list of maps; of `channels` each.
        channels: of the stages.
        out_channels: of every map of the pyramid.

    Source:
        Feature pyramid networks (arXiv 1612.03144), as in torchvision.
    """

    def __init__(self, body: nn.Module, channels: list[int], out_channels: int) -> None:
        super().__init__()
        self.body = body
        ops = optional("torchvision.ops", *_NEEDED)
        self.fpn = ops.FeaturePyramidNetwork(channels, out_channels)
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps by their numbers, from the largest on."""
        maps = self.body(images)
        found: dict[str, Tensor] = self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))
        return found


def fasterrcnn_small(
    num_classes: int, min_size: int = 96, max_size: int = 160, **options: Any
) -> nn.Module:
    """Faster R-CNN on a small residual network, for objects of some tens of pixels; trains on a CPU.

    Args:
        num_classes: with the background.
        min_size, max_size: images are resized so that the shorter side has the first, and the longer at most the
            second.
        **options: of :class:`ela_kernels.models.ResNet`: `attention`, `skip` and the others.

    Source:
        Faster R-CNN (arXiv 1506.01497) in torchvision's form; the sizes are ours.
    """
    detection = optional("torchvision.models.detection", *_NEEDED)
    faster, anchors = detection.faster_rcnn, detection.anchor_utils
    blocks, widths = (4, 6, 4), (32, 64, 128)
    body = ResNet(blocks, widths, "basic", stem="imagenet", features_only=True, **options)
    backbone = Pyramid(body, list(widths), 64)
    sizes = ((12,), (20,), (32,))
    pool = optional("torchvision.ops", *_NEEDED).MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    network: nn.Module = faster.FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        image_mean=[0.2] * 3,
        image_std=[0.25] * 3,
        rpn_anchor_generator=anchors.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_train=400,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=128,
        box_roi_pool=pool,
        box_head=faster.TwoMLPHead(64 * 7**2, 256),
        box_predictor=faster.FastRCNNPredictor(256, num_classes),
        box_batch_size_per_image=64,
    )
    return network


def make_model(arguments: argparse.Namespace, task: DetectionTask) -> nn.Module:
    """The network that the arguments name.

    Raises:
        ValueError: an argument is for classifiers alone.
    """
    for name, given in (("block", arguments.block), ("patch-size", arguments.patch_size)):
        if given is not None:
            raise ValueError(
                f"{name}: got {given!r} for --task detection; allowed is none, since each detector has its own"
            )
    if arguments.model == "fasterrcnn_small":
        return _small(arguments, task)
    for name, value in (("unfused", arguments.unfused), ("checkpointing", arguments.checkpointing)):
        if value:
            raise ValueError(
                f"{name}: got it with {arguments.model}; allowed is it with fasterrcnn_small"
            )
    make = getattr(optional("ela_kernels.integrations.torchvision", *_NEEDED), arguments.model)
    options: dict[str, Any] = {} if arguments.pretrained else {"weights_backbone": None}
    # What was not asked for is left to the function, which refuses what is not for its attention.
    of_layer = of_layers(arguments)
    for name in ("head_dim", "drop_path", "history_dtype", "tolerance"):
        if of_layer[name]:
            options[name] = of_layer[name]
    if arguments.attention == "ela":
        options["skip"] = arguments.skip
    options |= _size(arguments)
    network: nn.Module = make(
        num_classes=len(task.classes) + 1, attention=arguments.attention, **options
    )
    return network


def _small(arguments: argparse.Namespace, task: DetectionTask) -> nn.Module:
    if arguments.pretrained:
        raise ValueError(
            "pretrained: got it with fasterrcnn_small, for which there are no weights; allowed is it with "
            "fasterrcnn_resnet50_fpn and retinanet_resnet50_fpn"
        )
    options = {**of_layers(arguments), **_size(arguments), "fused": not arguments.unfused}
    return fasterrcnn_small(len(task.classes) + 1, **options)


def _size(arguments: argparse.Namespace) -> dict[str, int]:
    """The sides that images are resized to, where one was given."""
    side = arguments.side
    return {} if side is None else {"min_size": side, "max_size": 2 * side}
