"""What names and shapes of weights do not say: whether a network computes what the published one does with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ela_kernels.models.blocks import MRLA, MRLALight, StageAttention
from ela_kernels.models.options import HEAD_DIM
from ela_kernels.models.resnet import PUBLISHED_HEAD_DIM, ResNet
from ela_kernels.models.vit import VisionTransformer
from ela_kernels.modules import ELA


def is_light(names: Mapping[str, object]) -> bool:
    """Whether a checkpoint, by the names here, has the light form of attention."""
    return any(name.endswith(".lambda_t") for name in names)


def difference_from_published(model: ResNet, light: bool) -> str | None:
    """What the attention of a model does otherwise than MRLA's published network of this form; None where nothing."""
    form, other = ("light", "base") if light else ("base", "light")
    for stage in model.attentions:
        assert isinstance(stage, StageAttention)
        if (stage.kind == "mrla_light") != light:
            wanted = "'mrla_light'" if light else "'mrla' or 'ela'"
            return f"the model has the {other} form of attention; build it with attention={wanted}"
        if stage.takes_shortcut != light:
            return (
                "the model's light form is not the published one; build it with variant='published'"
            )
        for layer in stage:
            assert isinstance(layer, (MRLA, MRLALight, ELA))
            if isinstance(layer.act, nn.ReLU) == light:
                wanted = "no activation" if light else "a ReLU"
                return (
                    f"the model has {type(layer.act).__name__} after the norm of its attention, where the published "
                    f"{form} form has {wanted}; build it without identity_init, and with variant='published'"
                )
    sizes = set(_published_sizes(light, len(model.attentions)))
    for dim, size in _heads(model):
        if size not in {min(allowed, dim) for allowed in sizes}:
            allowed = " or ".join(map(str, sorted(sizes)))
            return (
                f"the model has head_dim={size} for {dim} channels, where the published {form} form has {allowed}; "
                f"build it with that head_dim"
            )
    return None


def note_on_options(model: ResNet | VisionTransformer) -> str:
    """What the model was built with, and no checkpoint says."""
    sizes = sorted({size for _, size in _heads(model)})
    return (
        f"head_dim, {' and '.join(map(str, sizes))} in the model, variant and identity_init are in no checkpoint, and "
        "have to be those that it was trained with"
    )


def _published_sizes(light: bool, stages: int) -> tuple[int, ...]:
    """For large images, with four stages, 1 is the base form's option to work by channels."""
    if stages != 4:
        return HEAD_DIM, PUBLISHED_HEAD_DIM
    return (PUBLISHED_HEAD_DIM,) if light else (1, HEAD_DIM)


def _heads(model: ResNet | VisionTransformer) -> Iterator[tuple[int, int]]:
    """Channels and head size of every layer."""
    for layer in (layer for stage in model.attentions for layer in stage.children()):
        assert isinstance(layer, (MRLA, MRLALight, ELA))
        if layer.attn is not None:
            yield layer.attn.dim, layer.attn.head_dim
