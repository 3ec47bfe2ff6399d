"""The networks that are compared: which there are, how each is made, and with which weights it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.models import CifarResNet, ResNet
from ela_kernels.models.blocks import StageAttention
from ela_kernels.modules.skipping import SKIP_MODES


@dataclass(frozen=True)
class Variant:
    """One of the networks.

    Attributes:
        name: as the command has it.
        attention: of :class:`ela_kernels.models.ResNet`, or `"self"` or `"uniform"`, which are made here.
        skip: the skip mode, of networks whose layers are skipped.
        chosen_by: `"ebqm"`, `"random"` or `"last"`; None: nothing is skipped.
        tolerance: of :class:`ela_kernels.LayerHistory`.
    """

    name: str
    attention: str
    skip: str | None = None
    chosen_by: str | None = None
    tolerance: float = 0.0

    @property
    def partner(self) -> str | None:
        """Whose number of skipped layers it takes over."""
        return f"ela-{self.skip}" if self.chosen_by in ("random", "last") else None


CHOICES = {"ela": "ebqm", "random": "random", "last": "last"}
_BASES = (
    Variant("plain", "none"),
    Variant("self", "self"),
    Variant("uniform", "uniform"),
    Variant("mrla", "mrla"),
    Variant("mrla-1e-3", "mrla", tolerance=1e-3),
    Variant("mrla_light", "mrla_light"),
)
_SKIPPING = tuple(
    Variant(f"{prefix}-{mode}", "ela", mode, chosen_by)
    for prefix, chosen_by in CHOICES.items()
    for mode in SKIP_MODES
)
VARIANTS = {variant.name: variant for variant in (*_BASES, *_SKIPPING)}
# One name for several.
GROUPS = {
    "all": tuple(VARIANTS),
    **{prefix: tuple(f"{prefix}-{mode}" for mode in SKIP_MODES) for prefix in CHOICES},
}


class OwnValue(nn.Module):
    """`x + act(norm(Wv(x)))`: the block of layer attention with the layer's own value, and none of the earlier ones."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = _Values(dim)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.ReLU(inplace=True)

    def retrieve(self, x: Tensor, history: RunningMean) -> Tensor:
        value: Tensor = self.attn(x)
        return value

    def forward(self, x: Tensor, history: RunningMean) -> Tensor:
        out: Tensor = x + self.act(self.norm(self.retrieve(x, history)))
        return out


class UniformMean(OwnValue):
    """The same block with the mean of all values of the stage so far: layer attention whose weights are all equal."""

    def retrieve(self, x: Tensor, history: RunningMean) -> Tensor:
        return history.add(self.attn(x))


class RunningMean:
    """The mean of the values of a stage in one forward pass."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> Tensor:
        """Take in one more value `[B, C, H, W]`; the mean of all of them."""
        self.total = value if self.total is None else self.total + value
        self.count += 1
        return self.total / self.count


class _Values(nn.Module):
    """The values of a layer of attention, by their name there."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.Wv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.Wv(x)
        return out


class _Stage(StageAttention):
    """Blocks of this file in the place of a stage's layers of attention."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        nn.ModuleList.__init__(self, blocks)

    def new_history(self) -> Any:
        return RunningMean()


_OWN: dict[str, Callable[[int], nn.Module]] = {"self": OwnValue, "uniform": UniformMean}


def make_network(
    attention: str,
    blocks: int,
    classes: int,
    channels: int,
    seed: int,
    **options: Any,
) -> ResNet:
    """A residual network of three stages with that attention.

    Of one seed all networks begin with the same weights wherever they have a parameter of the same name and shape: the
    whole residual network, and of the attention filters and norms. Random numbers of the caller are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        networks = []
        for kind, given in ((attention, options), ("none", {}), ("mrla", {})):
            torch.manual_seed(seed)
            networks.append(_make(kind, blocks, classes, channels, **given))
    network, *references = networks
    own = network.state_dict()
    with torch.no_grad():
        for reference in reversed(references):  # the residual network is that of the plain one
            for name, tensor in reference.state_dict().items():
                if name in own and own[name].shape == tensor.shape:
                    own[name].copy_(tensor)
    return network


def _make(attention: str, blocks: int, classes: int, channels: int, **options: Any) -> ResNet:
    kind: Any = "mrla" if attention in _OWN else attention
    network = CifarResNet(
        (blocks,) * 3, num_classes=classes, in_chans=channels, attention=kind, **options
    )
    if attention in _OWN:
        for i, stage in enumerate(network.attentions):
            norms = [m for m in stage.modules() if isinstance(m, nn.BatchNorm2d)]
            network.attentions[i] = _Stage([_OWN[attention](m.num_features) for m in norms])
    return network
