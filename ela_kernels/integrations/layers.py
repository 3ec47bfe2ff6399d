"""The layers that are put after the blocks of a network, by the options of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ela_kernels.integrations.attach import attach
from ela_kernels.integrations.views import Maps
from ela_kernels.models.blocks import MRLA, MRLALight
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.ela import ELA
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.light import LightLayerAttention
from ela_kernels.modules.parts import made_part
from ela_kernels.modules.query_key_value import check_count
from ela_kernels.modules.skipping import SkipMode, check_skip

M = TypeVar("M", bound=nn.Module)
Form = Literal["ela", "mrla", "mrla_light"]
FORMS: tuple[str, ...] = get_args(Form)
Norm = Literal["batch", "layer", "group", "sync"] | Callable[[int], nn.Module]
GROUP = 16  # channels of a group


class LayerNorm2d(nn.LayerNorm):
    """`nn.LayerNorm(dim)` over the channels of each position of `[B, dim, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape of `x`, in the memory format of channels last."""
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


def group_norm(dim: int) -> nn.GroupNorm:
    """Groups of 16 channels, or of the largest divisor of `dim` that 16 has in common with it."""
    return nn.GroupNorm(dim // gcd(dim, GROUP), dim)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": LayerNorm2d,
    "group": group_norm,
    "sync": nn.SyncBatchNorm,
}


@dataclass(frozen=True)
class NormMaker:
    """Makes norms of a number of channels, and knows which argument asked for it."""

    argument: str
    make: Callable[[int], nn.Module]

    @classmethod
    def checked(cls, argument: str, norm: object) -> NormMaker:
        """Of one of :data:`NORMS` or a function, or an error that names the argument."""
        if isinstance(norm, str) and norm in NORMS:
            return cls(argument, NORMS[norm])
        if isinstance(norm, (str, nn.Module)) or not callable(norm):
            raise ValueError(
                f"{argument}: got {norm!r}; allowed are {', '.join(map(repr, NORMS))}, and a function of the channels "
                "that makes a norm"
            )
        return cls(argument, norm)

    def __call__(self, dim: int) -> nn.Module:
        return made_part(self.argument, self.make, dim)


class Options(NamedTuple):
    """Of the layers of a model; see :func:`ela_kernels.integrations.timm.add_layer_attention`."""

    form: Form
    head_dim: int
    norm: NormMaker
    drop_path: float
    skip: SkipMode
    identity_init: bool

    @classmethod
    def checked(
        cls,
        form: object,
        head_dim: int,
        norm: object,
        drop_path: float,
        skip: object,
        identity_init: object,
    ) -> Options:
        """The options, or an error that names the one that does not fit."""
        if form not in FORMS:
            raise ValueError(f"form: got {form!r}; allowed are {', '.join(map(repr, FORMS))}")
        check_count("head_dim", head_dim)
        maker = norm if isinstance(norm, NormMaker) else NormMaker.checked("norm", norm)
        DropPath(drop_path)
        if not isinstance(identity_init, bool):
            raise TypeError(f"identity_init: got {type(identity_init).__name__}; allowed is a bool")
        mode = check_skip("reuse" if skip is None else skip)
        if skip is not None and form != "ela":
            raise ValueError(
                f"skip: got {skip!r} with form={form!r}, whose layers cannot be skipped; allowed is None. Leave it "
                "out, or take form='ela'"
            )
        return cls(form, head_dim, maker, drop_path, mode, identity_init)  # type: ignore[arg-type]

    def layer(self, dim: int, drop_path: float) -> nn.Module:
        """A layer for maps of `dim` channels."""
        if self.form == "ela":
            act: Callable[[], nn.Module] = nn.Identity if self.identity_init else nn.ReLU
            layer: Any = ELA(
                dim,
                self.head_dim,
                norm_layer=self.norm,
                act_layer=act,
                drop_path=drop_path,
                skip=self.skip,
            )
        elif self.form == "mrla":
            attn = LayerAttention(dim, self.head_dim)
            layer = MRLA(attn, drop_path, relu=not self.identity_init)
            layer.norm = self.norm(dim)
        else:
            light = LightLayerAttention(dim, self.head_dim)
            layer = MRLALight(light, drop_path, relu=not self.identity_init)
            layer.norm = self.norm(dim)
        if self.identity_init:
            weight = getattr(layer.norm, "weight", None)
            if not isinstance(weight, nn.Parameter):
                raise ValueError(
                    f"{self.norm.argument}: got one that gives a {type(layer.norm).__name__} without a parameter "
                    "`weight`, with identity_init=True; allowed is one with such a scale, which starts at zero, or "
                    "identity_init=False"
                )
            nn.init.zeros_(weight)
        made: nn.Module = layer
        return made


def add_layers(
    model: M,
    stages: list[list[str]],
    dims: dict[str, int],
    options: Options,
    every: int | None = None,
    view: Maps | None = None,
    history_dtype: torch.dtype | None = None,
    tolerance: float = 0.0,
) -> M:
    """:func:`ela_kernels.integrations.attach` with layers by `options`; `dims`: the channels of each block's maps.

    `drop_path` is that of the last layer, and grows linearly from 0 at the first.
    """
    step = 1 if every is None else check_count("every", every)
    chosen = [name for stage in stages for name in stage[step - 1 :: step]]
    check_head_dim(options.head_dim, {name: dims[name] for name in chosen} or dims)
    last = max(len(chosen) - 1, 1)
    rates = {name: options.drop_path * i / last for i, name in enumerate(chosen)}
    return attach(
        model,
        stages,
        lambda name: options.layer(dims[name], rates[name]),
        every=every,
        view=view,
        history_dtype=history_dtype,
        tolerance=tolerance,
    )


def check_head_dim(head_dim: int, dims: dict[str, int]) -> None:
    """Refuse a `head_dim` that does not divide the channels of all stages; `dims` by what has them."""
    wrong = {name: dim for name, dim in dims.items() if dim % head_dim}
    if wrong:
        name, dim = next(iter(wrong.items()))
        common = gcd(*dims.values())
        allowed = [n for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"head_dim: got {head_dim}, which does not divide the {dim} channels of {name}; allowed for this model are "
            f"{', '.join(map(str, allowed))}"
        )
