"""The networks that have a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ela_kernels.models.resnet import BLOCKS, Block, ResNet
from ela_kernels.models.vit import VisionTransformer


def CifarResNet(  # noqa: N802 - makes a ResNet, and reads as one
    blocks: Sequence[int] = (3, 3, 3),
    widths: Sequence[int] = (16, 32, 64),
    block: Block = "basic",
    num_classes: int = 10,
    **options: Any,
) -> ResNet:
    """A residual network for small images, of any depth; options as :class:`ResNet`."""
    return ResNet(blocks, widths, block, num_classes, stem="small", **options)


def _cifar(depth: int) -> Callable[..., ResNet]:
    def make(num_classes: int = 10, block: Block = "basic", **options: Any) -> ResNet:
        if block not in BLOCKS:
            raise ValueError(f"block: got {block!r}; allowed are {', '.join(map(repr, BLOCKS))}")
        convolutions = 2 if block == "basic" else 3
        count, rest = divmod(depth - 2, 3 * convolutions)
        if rest:
            raise ValueError(
                f"block: got {block!r} for resnet{depth}; allowed is a block whose {convolutions} convolutions make up "
                f"{depth - 2} layers in 3 equal stages"
            )
        return CifarResNet((count,) * 3, (16, 32, 64), block, num_classes, **options)

    make.__name__ = make.__qualname__ = f"resnet{depth}"
    make.__doc__ = f"""ResNet-{depth} for 32x32 images: 3 stages of widths 16, 32, 64; basic blocks, or bottlenecks.

    Args:
        num_classes: outputs of the classifier.
        block: `"basic"` or `"bottleneck"`{"" if (depth - 2) % 9 == 0 else " (not at this depth)"}.
        **options: as :class:`ResNet`.

    Source: ResNet (arXiv 1512.03385), section 4.2.
    """
    return make


def _imagenet(
    depth: int, blocks: tuple[int, ...], block: Block, source: str
) -> Callable[..., ResNet]:
    def make(num_classes: int = 1000, **options: Any) -> ResNet:
        return ResNet(blocks, (64, 128, 256, 512), block, num_classes, **options)

    kind = {"basic": "basic blocks", "bottleneck": "bottlenecks"}[block]
    make.__name__ = make.__qualname__ = f"resnet{depth}"
    make.__doc__ = f"""ResNet-{depth}: 4 stages of {blocks} {kind}, for images of about 224x224.

    Args:
        num_classes: outputs of the classifier.
        **options: as :class:`ResNet`.

    Source: {source}
    """
    return make


def _vit(name: str, dim: int, heads: int) -> Callable[..., VisionTransformer]:
    def make(num_classes: int = 1000, **options: Any) -> VisionTransformer:
        return VisionTransformer(dim, 12, heads, num_classes=num_classes, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"""Vision transformer of 12 blocks of {dim} channels, {heads} heads, on patches of 16.

    Args:
        num_classes: outputs of the classifier.
        **options: `img_size` and `patch_size` for other images, `attention` and the others, as
            :class:`VisionTransformer`.

    Source: DeiT (arXiv 2012.12877), table 1, without its token to distil with.
    """
    return make


_TABLE = "ResNet (arXiv 1512.03385), table 1"
_BOTTLENECKS = f"{_TABLE}; the stride is in the 3x3 convolution."
resnet20 = _cifar(20)
resnet32 = _cifar(32)
resnet56 = _cifar(56)
resnet110 = _cifar(110)
resnet18 = _imagenet(18, (2, 2, 2, 2), "basic", f"{_TABLE}.")
resnet26 = _imagenet(
    26, (2, 2, 2, 2), "bottleneck", "ResNet-18 (arXiv 1512.03385) with bottlenecks, as in timm."
)
resnet34 = _imagenet(34, (3, 4, 6, 3), "basic", f"{_TABLE}.")
resnet50 = _imagenet(50, (3, 4, 6, 3), "bottleneck", _BOTTLENECKS)
resnet101 = _imagenet(101, (3, 4, 23, 3), "bottleneck", _BOTTLENECKS)
vit_tiny = _vit("vit_tiny", 192, 3)
vit_small = _vit("vit_small", 384, 6)

MODELS: dict[str, Callable[..., ResNet | VisionTransformer]] = {
    make.__name__: make
    for make in (
        resnet20,
        resnet32,
        resnet56,
        resnet110,
        resnet18,
        resnet26,
        resnet34,
        resnet50,
        resnet101,
        vit_tiny,
        vit_small,
    )
}


def build_model(name: str, **options: Any) -> ResNet | VisionTransformer:
    """A model by name; options as the function of that name.

    Args:
        name: `"resnet20"`, `"resnet32"`, `"resnet56"`, `"resnet110"` for 32x32 images; `"resnet18"`, `"resnet26"`,
            `"resnet34"`, `"resnet50"`, `"resnet101"` for about 224x224, `"vit_tiny"`, `"vit_small"` for 224x224 unless
            `img_size` and `patch_size` say otherwise.
        **options: `attention`, `identity_init` and the others.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"name: got {name!r}; allowed are {', '.join(MODELS)}")
    return MODELS[name](**options)
