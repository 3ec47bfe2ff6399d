"""What an ELA layer keeps beside its parameters, and how that is saved, copied and loaded."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.observations import Totals
from ela_kernels.modules.skipping import MODES, Skipping, rounded
from ela_kernels.ops.layer_attention.readers import Readers
from ela_kernels.torch_internals import own_child

_numbers = itertools.count(1)
# Of layers that were skipped one after another: in a stage that shares layers they may follow each other in a circle.
_MOST_ASKED = 64


class ELAState(Skipping):
    """The decision, what the passes have shown of the stage, and what was observed for EBQM."""

    attn: LayerAttention | None
    norm: nn.Module | None
    # Whether the weights of its next training pass are kept, for EBQM's report; and those, `[B, G, t]`.
    weights_next = False
    kept_weights: Tensor | None = None
    kept_tolerance = 0.0  # of them

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

    def hands_on(self) -> bool:
        """Whether a later layer takes over what this one retrieves: those that came by the last time are asked.

        True where none is known, which costs memory; where it turns out to be wrong, the retrieval is made again. So
        what they last knew of their decisions will do, which costs nothing to look at.
        """
        readers, asked = self.readers, 0
        if not readers.learnt:
            return True
        while readers.follower is not None and asked < _MOST_ASKED:
            if readers.varies:
                return True
            layer = readers.follower()
            if (
                layer is None
            ):  # it is gone, as those of a replica are, and another may be in its place
                return True
            if not isinstance(layer, ELAState):
                return False
            skipped, mode = layer._last
            if not skipped:
                return False
            if MODES[mode][0] == "reuse":
                return True
            readers, asked = layer.readers, asked + 1
        return False

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
        if self.skip != "reuse":
            self.norm = None
        if not provides:
            self.attn = None
        elif self.attn is not None and not keeps_query:
            for module in self.attn.modules():  # a wrapper may be around it
                if isinstance(module, LayerAttention):
                    module.register_module("Wq", None)
                    if own_child(module, "q_norm") is not None:
                        module.register_module("q_norm", None)
        self.make_permanent()
        self.probe_next = self.weights_next = False

    def reset_parameters(self) -> None:
        """Forget the decision, for memory that was never written. The parts reset themselves."""
        self.skipped = self.pruned

    def get_extra_state(self) -> Tensor:
        """One tensor: skipped, the number of how, place in the stage, pruned (2: emptied), whether it is read.

        Place and the last are -1 where they are not known.
        """
        place = -1 if self.place is None else self.place
        pruned = 0 if not self.pruned else 2 if self.attn is None else 1
        has_readers = self._has_readers()
        numbers = [
            int(self.skipped),
            self._mode(),
            place,
            pruned,
            -1 if has_readers is None else int(has_readers),
        ]
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave, now or in an earlier version, without the last."""
        skipped, mode, place, _, *later = (int(s) for s in state.tolist())
        if not 0 <= mode < len(MODES):
            raise ValueError(
                f"state_dict: got the skip mode number {mode} for an ELA layer; allowed are 0 to {len(MODES) - 1}, for "
                f"{', '.join(f'{m!r}' for m in MODES)}. The state is damaged, or of a later version"
            )
        if self.pruned and not skipped:
            raise ValueError(
                "state_dict: got a layer that retrieves for an ELA layer that was pruned; allowed is the state of a "
                "model with the same layers skipped. Load into a model that was not pruned"
            )
        # Only what differs: the buffer may be that of a moving average, between two decisions.
        if bool(skipped) != self.skipped:
            self.skipped = bool(skipped)
        if mode != self._mode():
            self._decide((self._decision()[0], mode))
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
                if 0 <= int(extra[1]) < len(MODES):
                    self._decide((True, int(extra[1])))
                self.remove_unused(pruned == 1, keeps_query=self._has_query(state_dict, prefix))
            elif decision in state_dict:
                # In an average of checkpoints the buffer was averaged, and the rest is that of one of them.
                mine = rounded(state_dict[decision].tolist())
                if 0 <= int(extra[1]) < len(MODES):
                    state_dict = {
                        **state_dict,
                        key: torch.cat((extra.new_tensor(mine), extra[2:])),
                    }
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
