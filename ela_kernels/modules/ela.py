"""The high-level block: layer attention, norm, activation, residual, and the means to be skipped."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ela_kernels.explaining import is_explaining, served_without_kernels
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.layer_attention import LayerAttention, Turn
from ela_kernels.modules.observations import Totals, outside_of_transforms, refuse_static_graph
from ela_kernels.modules.query_key_value import passed_on
from ela_kernels.modules.residual import residual_block
from ela_kernels.modules.skipping import SKIP_MODES, SkipMode, Skipping, check_skip
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.readers import Readers
from ela_kernels.torch_internals import has_hooks, is_exporting

# Micro-batches of one step whose divergence is kept: a bound for a model that trains on without EBQM.step().
MOST_OBSERVATIONS = 64

_numbers = itertools.count(1)


def _take_no_note(_: Tensor | None) -> None:
    """Of a probe that is for somebody who looks on, who is told by the history."""


class ELA(Skipping):
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

    # Whether its parts are those of a converted block, and stand elsewhere in the model.
    lent = False
    # Whether `drop_path`, of whatever class, is known to multiply each sample with a number.
    samples = False
    # Whether the weights of its next training pass are kept, for EBQM's report; and those, `[B, G, t]`.
    weights_next = False
    kept_weights: Tensor | None = None

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
        super().__init__(skip)
        self.attn: LayerAttention | None = LayerAttention(dim, head_dim, kernel_size)
        self.norm: nn.Module | None = norm_layer(dim)
        self.act = nn.ReLU(inplace=True) if act_layer is nn.ReLU else act_layer()
        self.drop_path = DropPath(drop_path)
        self._begin()

    def _begin(self) -> None:
        """What a layer starts with that nobody has run or watched."""
        # What EBQM needs: whether it watches, the divergences of this step, and whether to look again.
        self.watched = False
        self.watchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.observations: list[Tensor] = []
        self.totals = Totals()
        self.probe_next = False
        # Learnt from the passes: the number of the stage's first layer, the place in it, and who reads this one's pair.
        self.number = next(_numbers)
        self.stage: int | None = None
        self.place: int | None = None
        self.is_first = False  # in any of its stages
        self.readers = Readers()
        self._had_readers: bool | None = None  # before it was copied or saved; None: not known

    def forward(self, x: Tensor, history: LayerHistory, copy: bool = True) -> Tensor:
        """The block's output, shape and dtype of `x`.

        Args:
            x: feature map `[B, C, H, W]`, in any memory format.
            history: the :class:`ela_kernels.LayerHistory` of this stage and forward pass.
            copy: the output is new memory, skipped or not. With False it is a view of `x` where the layer is skipped,
                which saves the copy, for a caller that changes neither of them in place.
        """
        if not isinstance(history, LayerHistory):
            raise TypeError(
                f"history: got {type(history).__name__}; allowed is the LayerHistory of this stage and forward pass"
            )
        place = history.position
        recomputing = history.recomputing
        turns = history.turns
        turns.begin(self, self.number, recomputing)
        gives = False
        try:
            # A compiled graph would be made for what they were; setting them takes longer than to look.
            is_new = torch.compiler.is_compiling() or self.place != place
            if not recomputing and (is_new or self.stage != turns.stage):
                self.place, self.stage = place, turns.stage
                if place == 0:
                    self.is_first = True
            watched = self.training and torch.is_grad_enabled()
            watched = watched and not (recomputing or is_exporting() or is_explaining())
            if watched:
                watched = self.watched or turns.watched
                turns.watched = watched
            if self.pruned or not self.decides_as_data():
                if self.skipped:
                    gives = self.attn is not None and self.skip == "retrieval"
                    return self._pass(x, history, watched and self.probe_next, copy)
                attn, norm = self.attn, self.norm
                if attn is None or norm is None:
                    raise RuntimeError(
                        "ELA: this layer was pruned, and cannot retrieve; skipped must stay True"
                    )
                gives = True
                out = residual_block(attn, norm, self.act, self.drop_path, x, history, self.lent)
                if watched:
                    self._observe(history.kl, history.has_divergence)
                    if self.weights_next:
                        self._keep_weights(history.weights)
                return out
            gives = True
            return self._decided(x, history, watched)
        finally:
            turns.end(self.readers if gives and not recomputing else None)

    def _pass(self, x: Tensor, history: LayerHistory, probe: bool, copy: bool) -> Tensor:
        """Leave out the retrieval; give key and value where the skip mode says so."""
        attn, provides = self.attn, self.skip == "retrieval"
        # A pruned layer has nothing left to make a query with.
        is_looked_at = probe or (history.is_observed and not self.pruned)
        if attn is None or not (provides or is_looked_at):
            served_without_kernels(self, "skipped")
            history.pass_by(caller=self)
            return passed_on(x, copy or (not torch.compiler.is_compiling() and has_hooks(self)))
        # By its call, not by a method of it: wrappers and hooks work there.
        # Hooks may change what they get in place; a compiled graph copies where that needs it.
        copy = copy or (not torch.compiler.is_compiling() and has_hooks(self, attn))
        look = self._observe if probe else _take_no_note if is_looked_at else None
        turn = Turn(provides=provides, probe=look, copy=copy)
        out: Tensor = attn(x, history, turn=turn)
        if out.dtype != x.dtype and out.dtype != torch.promote_types(out.dtype, x.dtype):
            # A wrapper (mixed precision of FSDP, say) cast what went in. Not x alone: backward hooks are on `out`.
            out = torch.where(x.new_zeros((), dtype=torch.bool), out, x)
        if probe:
            self.probe_next = False
        if not provides:
            history.pass_by(caller=self)
        return out

    def _decided(self, x: Tensor, history: LayerHistory, watched: bool) -> Tensor:
        """The block where the decision is data: worked out either way, and `x` where the layer is skipped."""
        assert self.attn is not None
        assert self.norm is not None
        active = ~(self.decision[0] > 0.5)  # as in eager PyTorch, at the half and at NaN too
        turn = Turn(active, active if self.skip == "layer" else None)
        o = self.attn(x, history, turn=turn)
        # Inside a transform of torch.func the layer is one of several models.
        if watched and history.kl is not None and torch.compiler.is_compiling():
            self.totals.add(history.kl, history.has_divergence)
        # The norm of a skipped layer keeps its running statistics: it works on copies.
        buffers = dict(self.norm.named_buffers())
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        out = x + self.drop_path(self.act(functional_call(self.norm, copies, (o,))))
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(torch.where(active, copies[name], buffer))
        return torch.where(active, out, x)

    def _observe(self, kl: Tensor | None, is_seen: Tensor | None = None) -> None:
        """Keep a divergence; `is_seen`: whether it is one, where that is data, after layers that are compiled."""
        if kl is None:
            return
        refuse_static_graph()
        found = outside_of_transforms(kl.detach())
        if found is None:
            return
        if is_seen is not None:
            self.totals.add(found, is_seen)
        elif len(self.observations) < MOST_OBSERVATIONS:
            self.observations.append(found)

    def _keep_weights(self, weights: Tensor | None) -> None:
        """Keep the weights of one pass, as they are: what is worked out of them is not the forward's to wait for."""
        self.weights_next = False
        self.kept_weights = None if weights is None else outside_of_transforms(weights.detach())

    def is_read(self) -> bool | None:
        """Whether somebody who retrieves now reads this layer's pair; None where it is not known.

        Learnt from the passes. After a copy or a checkpoint, until the next pass: whether anybody may read it at all,
        since it is not known who.
        """
        return self.readers.retrieve() if self.readers.known else self._had_readers

    def _has_readers(self) -> bool | None:
        """Whether anybody may read the pair, whatever the decisions, by all passes of this model and its originals."""
        if not self.readers.known:
            return self._had_readers
        return bool(self._had_readers) or self.readers.exist()

    def remove_unused(self, provides: bool, keeps_query: bool = False) -> None:
        """Remove, for good, the parameters that a skipped layer does not need.

        Args:
            provides: keep what makes the key and the value. Otherwise the layer is empty from then on.
            keeps_query: keep what makes the query too, for somebody else who retrieves with the same module.
        """
        self.norm = None
        if not provides:
            self.attn = None
        elif self.attn is not None and not keeps_query:
            for module in self.attn.modules():  # a wrapper may be around it
                if isinstance(module, LayerAttention):
                    module.register_module("Wq", None)
        self.make_permanent()
        self.probe_next = self.weights_next = False

    def reset_parameters(self) -> None:
        """Forget the decision, for memory that was never written. The parts reset themselves."""
        self.skipped = self.pruned

    def get_extra_state(self) -> Tensor:
        """One tensor: skipped, number of the skip mode, place in the stage, pruned (2: emptied), whether it is read.

        Place and the last are -1 where they are not known.
        """
        place = -1 if self.place is None else self.place
        pruned = 0 if not self.pruned else 2 if self.attn is None else 1
        has_readers = self._has_readers()
        numbers = [
            int(self.skipped),
            SKIP_MODES.index(self.skip),
            place,
            pruned,
            -1 if has_readers is None else int(has_readers),
        ]
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave, now or in an earlier version, without the last."""
        skipped, mode, place, _, *later = (int(s) for s in state.tolist())
        if not 0 <= mode < len(SKIP_MODES):
            raise ValueError(
                f"state_dict: got the skip mode number {mode} for an ELA layer; allowed are those of "
                f"{', '.join(map(repr, SKIP_MODES))}, from 0. The state is damaged, or of a later version"
            )
        if self.pruned and not skipped:
            raise ValueError(
                "state_dict: got a layer that retrieves for an ELA layer that was pruned; allowed is the state of a "
                "model with the same layers skipped. Load into a model that was not pruned"
            )
        # Only what differs: the buffer may be that of a moving average, between two decisions.
        if bool(skipped) != self.skipped:
            self.skipped = bool(skipped)
        if SKIP_MODES[mode] != self.skip:
            self.skip = check_skip(SKIP_MODES[mode])
        if self.stage is None:  # what this model's own passes have shown counts for more
            self.place, self.is_first = None if place < 0 else place, place == 0
        self._had_readers = bool(later[0]) if later and later[0] >= 0 else None

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
        key, decision = prefix + "_extra_state", prefix + "decision"
        if key in state_dict:
            extra = state_dict[key]
            pruned = int(extra[3])
            if pruned:
                # Before the children are loaded, so that none of them misses its parameters.
                self.remove_unused(pruned == 1, keeps_query=self._has_query(state_dict, prefix))
            elif decision in state_dict:
                # In an average of checkpoints the buffer was averaged, and the rest is that of one of them.
                mine = (state_dict[decision] > 0.5).to(extra)
                if 0 <= int(extra[1]) < len(SKIP_MODES):
                    state_dict = {**state_dict, key: torch.cat((mine, extra[2:]))}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if (
            decision in missing_keys
        ):  # of a version that had the decision in the extra state alone, or of no ELA layer
            missing_keys.remove(decision)
        if key in missing_keys:
            missing_keys.remove(key)
            # A checkpoint that has nothing of this layer (of a head alone, say) says nothing about it either.
            if decision not in state_dict and any(k.startswith(prefix) for k in state_dict):
                self.skipped = self.pruned

    def _has_query(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a state has the query's filter: somebody else retrieves with the same module."""
        return any(k.startswith(prefix + "attn.") and ".Wq." in k for k in state_dict)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if "decision" in self._buffers:
            self.totals.to(self.decision.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without the observations of the step under way, and with no EBQM attached.
        state = super().__getstate__()
        state["_had_readers"] = self._has_readers()
        for name in ("observations", "totals", "watchers", "readers", "number"):
            del state[name]
        state["watched"] = state["probe_next"] = state["weights_next"] = False
        state["kept_weights"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.observations, self.watchers = [], weakref.WeakSet()
        self.totals, self.readers, self.number, self.stage = (
            Totals(),
            Readers(),
            next(_numbers),
            None,
        )
        self.watched = False
        for name, value in (("_had_readers", None), ("is_first", self.place == 0)):
            self.__dict__.setdefault(name, value)
        if "decision" in self._buffers:
            self.totals.to(self.decision.device)

    def extra_repr(self) -> str:
        return f"skip={self.skip!r}, skipped={self.skipped}, pruned={self.pruned}"
