"""The high-level block: layer attention, norm, activation, residual, and the means to be skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.residual import residual_block
from ela_kernels.ops.layer_attention import LayerHistory

SkipMode = Literal["retrieval", "layer"]
SKIP_MODES: tuple[str, ...] = get_args(SkipMode)

# Micro-batches of one step whose divergence is kept: a bound for a model that trains on without EBQM.step().
_MOST_OBSERVATIONS = 64


def check_skip(skip: object) -> SkipMode:
    """A skip mode, or an error that names the argument."""
    if skip not in SKIP_MODES:
        raise ValueError(f"skip: got {skip!r}; allowed are 'retrieval' and 'layer'")
    return skip  # type: ignore[return-value]


class ELA(nn.Module):
    """Efficient layer attention: a residual retrieval from the stage's history, skipped when it is redundant.

    Equivalent PyTorch: `x + drop_path(act(norm(LayerAttention(dim)(x, history))))`, or `x` when skipped.

    :class:`ela_kernels.EBQM` decides which layers are skipped; `skipped` can be set by hand too. It is part of the
    state dict, with the skip mode and the layer's place in its stage; a checkpoint without it loads as a layer that
    retrieves.

    Args:
        dim: number of channels C.
        head_dim: channels of a head; a divisor of `dim`.
        kernel_size: odd size of the filters over the channel axis; `int(|log2(C) + 1| / 2)`, made odd, if None.
        norm_layer: called with `dim`; makes the norm of the retrieval.
        act_layer: called without arguments; makes the activation. `nn.ReLU` is made to work in place.
        drop_path: probability of dropping the retrieval for a sample in training, in [0, 1].
        skip: what a skipped layer leaves out. `"retrieval"`: it retrieves nothing, `x` passes on unchanged, and its key
            and value still go to the later layers. `"layer"`: it gives none either.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        ELA (arXiv 2503.06473); the block in a residual network as in MRLA (arXiv 2302.03985). The skip modes are our
        definition.

    Example:
        >>> import torch, ela_kernels as ek
        >>> layers = [ek.ELA(32) for _ in range(3)]
        >>> x, history = torch.randn(2, 32, 8, 8), ek.LayerHistory()
        >>> for layer in layers:
        ...     x = layer(x, history)
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 16,
        kernel_size: int | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        drop_path: float = 0.0,
        skip: SkipMode = "retrieval",
    ) -> None:
        super().__init__()
        self.attn: LayerAttention | None = LayerAttention(dim, head_dim, kernel_size)
        self.norm: nn.Module | None = norm_layer(dim)
        self.act = nn.ReLU(inplace=True) if act_layer is nn.ReLU else act_layer()
        self.drop_path = DropPath(drop_path)
        self.skip: SkipMode = check_skip(skip)
        self.skipped = False
        self.pruned = False  # skipped for good, its unused parameters removed
        # What EBQM needs: the divergences of this step (None when none is attached), and whether to look again.
        self.observations: list[Tensor] | None = None
        self.probe_next = False
        self.place: int | None = None

    def forward(self, x: Tensor, history: LayerHistory) -> Tensor:
        """The block's output, shape and dtype of `x`.

        Args:
            x: feature map `[B, C, H, W]`, in any memory format.
            history: the :class:`ela_kernels.LayerHistory` of this stage and forward pass.
        """
        if not isinstance(history, LayerHistory):
            raise TypeError(
                f"history: got {type(history).__name__}; allowed is the LayerHistory of this stage and forward pass"
            )
        place = history.position
        recomputing = history.recomputing
        if not recomputing:
            # Not compared with the old one first: torch.compile would guard on that, and compile anew.
            self.place = place
        watched = self.training and self.observations is not None and not recomputing
        if self.skipped:
            self._pass(x, history, watched and self.probe_next)
            return x
        if self.attn is None or self.norm is None:
            raise RuntimeError(
                "ELA: this layer was pruned, and cannot retrieve; skipped must stay True"
            )
        out = residual_block(self.attn, self.norm, self.act, self.drop_path, x, history)
        if watched:
            self._observe(history.kl)
        return out

    def _pass(self, x: Tensor, history: LayerHistory, probe: bool) -> None:
        """Leave out the retrieval; give key and value where the skip mode says so."""
        attn = self.attn
        if attn is not None and probe:
            with torch.no_grad():
                q, k = attn.query_key(x)
            self._observe(history.probe(q, k, heads=attn.heads).kl)
            self.probe_next = False
        if attn is None or self.skip == "layer":
            history.pass_by(caller=self)
        else:
            attn.provide(x, history)

    def _observe(self, kl: Tensor | None) -> None:
        if kl is None or self.observations is None:
            return
        if len(self.observations) < _MOST_OBSERVATIONS:
            self.observations.append(kl.detach())

    def remove_unused(self, provides: bool) -> None:
        """Remove, for good, the parameters that a skipped layer does not need.

        Args:
            provides: keep what makes the key and the value. Otherwise the layer is empty from then on.
        """
        self.norm = None
        if not provides:
            self.attn = None
        elif self.attn is not None:
            self.attn.register_module("Wq", None)
        self.skipped = self.pruned = True
        self.probe_next = False

    def get_extra_state(self) -> Tensor:
        """One tensor: skipped, index of the skip mode, place in the stage (-1 if unknown), pruned (2: emptied)."""
        place = -1 if self.place is None else self.place
        pruned = 0 if not self.pruned else 2 if self.attn is None else 1
        return torch.tensor([int(self.skipped), SKIP_MODES.index(self.skip), place, pruned])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        skipped, mode, place, _ = (int(s) for s in state.tolist())
        if self.pruned and not skipped:
            raise ValueError(
                "state_dict: got a layer that retrieves for an ELA layer that was pruned; allowed is the state of a "
                "model with the same layers skipped. Load into a model that was not pruned"
            )
        self.skipped = bool(skipped)
        self.skip = check_skip(SKIP_MODES[mode])
        self.place = None if place < 0 else place

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "_extra_state"
        if key in state_dict:
            pruned = int(state_dict[key][3])
            if pruned:
                # Before the children are loaded, so that none of them misses its parameters.
                self.remove_unused(provides=pruned == 1)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key in missing_keys:
            missing_keys.remove(key)
            self.skipped = self.pruned

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without the observations of the step under way, and with no EBQM attached.
        state = self.__dict__.copy()
        state["observations"] = None
        state["probe_next"] = False
        return state

    def extra_repr(self) -> str:
        return f"skip={self.skip!r}, skipped={self.skipped}, pruned={self.pruned}"
