"""The standard recipe of image classification, under the names of torchvision's reference script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ela_kernels.optional import optional
from ela_kernels.training.reading import Part, Read, seed_of, seeded

AUTO_AUGMENT = ("ra", "ta_wide", "augmix", "autoaugment")
# Magnitudes are entries of a table of 31.
_LARGEST_MAGNITUDE = 30
_LARGEST_ALPHA = 1000.0


@dataclass(frozen=True)
class Recipe:
    """What a run does beside the plain form. Without any of it runs are those of before there was a choice.

    Attributes:
        label_smoothing: of the loss that is trained on.
        mixup_alpha, cutmix_alpha: of the Beta distribution that shares of mixed images are drawn from; 0: none.
        auto_augment: `"ra"` (RandAugment), `"ta_wide"` (TrivialAugment), `"augmix"`, or `"autoaugment"` with the policy
            for the data; None: none.
        ra_magnitude: of RandAugment.
        random_erase: the probability that a rectangle of an image is erased.
        model_ema: also keep a moving average of the weights.
        model_ema_decay: of that average, for a batch of one image and a run of one epoch: see
            :mod:`ela_kernels.training.average`.
        model_ema_steps: the average takes in the weights once in so many steps.
        lr_warmup_epochs: the learning rate rises for so many epochs.
        lr_warmup_decay: the part of the learning rate that it rises from.
    """

    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    auto_augment: str | None = None
    ra_magnitude: int = 9
    random_erase: float = 0.0
    model_ema: bool = False
    model_ema_decay: float = 0.9999
    model_ema_steps: int = 1
    lr_warmup_epochs: int = 0
    lr_warmup_decay: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed, fits in (
            ("label_smoothing", "a number in [0, 1)", lambda x: 0 <= x < 1),
            *(
                (name, f"a number from 0 to {_LARGEST_ALPHA:g}", lambda x: 0 <= x <= _LARGEST_ALPHA)
                for name in ("mixup_alpha", "cutmix_alpha")
            ),
            (
                "auto_augment",
                ", ".join(map(repr, AUTO_AUGMENT)),
                lambda x: x is None or x in AUTO_AUGMENT,
            ),
            (
                "ra_magnitude",
                f"an int from 0 to {_LARGEST_MAGNITUDE}",
                lambda x: 0 <= x <= _LARGEST_MAGNITUDE,
            ),
            ("random_erase", "a number from 0 to 1", lambda x: 0 <= x <= 1),
            ("model_ema_decay", "a number in [0, 1)", lambda x: 0 <= x < 1),
            ("model_ema_steps", "an int of at least 1", lambda x: x >= 1),
            ("lr_warmup_epochs", "an int of at least 0", lambda x: x >= 0),
            ("lr_warmup_decay", "a number from 0 to 1", lambda x: 0 <= x <= 1),
        ):
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{_flag(name)}: got {value!r}; allowed is {allowed}")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def of_pictures(self) -> list[str]:
        """The options in use that vary pictures one by one."""
        used = {
            "auto_augment": self.auto_augment is not None,
            "random_erase": self.random_erase > 0,
        }
        return [name for name, is_used in used.items() if is_used]

    @property
    def of_images(self) -> list[str]:
        """The options in use that vary images in whatever way."""
        return [
            *self.of_pictures,
            *(name for name in ("mixup_alpha", "cutmix_alpha") if getattr(self, name) > 0),
        ]

    def as_dict(self) -> dict[str, Any]:
        """What is not as in a run without a recipe."""
        found = ((f, getattr(self, f.name)) for f in fields(self))
        return {f.name: value for f, value in found if value != f.default}


def mixed(read: Read, recipe: Recipe, classes: int) -> Read:
    """`read`, with the images of each varied part mixed as the recipe says, and their labels `[N, classes]` then.

    Raises:
        MissingLibraryError: torchvision is not installed.
    """
    return _Mixed(read, recipe, classes) if recipe.mixes else read


class _Mixed:
    """Reads a part and mixes it by mixup or cutmix, one of them by chance where there are both."""

    def __init__(self, read: Read, recipe: Recipe, classes: int) -> None:
        v2 = optional("torchvision.transforms.v2", "mixup and cutmix", "vision")
        kinds = ((v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha))
        mix = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha > 0]
        self._read = read
        self._mix: Callable[..., Any] = v2.RandomChoice(mix)

    def __call__(self, part: Part) -> tuple[Any, Any]:
        images, labels = self._read(part)
        if part.seed is None:
            return images, labels
        # Seeds of single images end in 0.
        with seeded(seed_of(part.seed, 0, 1)):
            images, labels = self._mix(images, labels)
        return images, labels


def _flag(name: str) -> str:
    return name.replace("_", "-")
