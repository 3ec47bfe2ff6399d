"""What EBQM needs of a module that it watches and skips, and how that is saved, copied and loaded."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.modules.observations import Totals, outside_of_transforms, refuse_static_graph
from ela_kernels.modules.skipping import MODES, Skipping, rounded

_numbers = itertools.count(1)
# Micro-batches of one step whose divergence is kept: a bound for a model that trains on without EBQM.step().
MOST_OBSERVATIONS = 64


class Watched(Skipping):
    """The decision, what the passes have shown of the stage, and what was observed for EBQM."""

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
        # Learnt from the passes: the number of the stage's first layer, and the place in it.
        self.number = next(_numbers)
        self.stage: int | None = None
        self.place: int | None = None
        self.is_first = False  # in any of its stages

    def parts(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """The parameters that retrieve, and whether each takes no part in a training pass, by the decision."""
        raise NotImplementedError

    def _prune_as(self, pruned: int, state_dict: dict[str, Any], prefix: str) -> None:
        """Remove what a pruned layer lacks, whose state this is; `pruned` as in the extra state."""
        raise NotImplementedError

    def _observe(self, kl: Tensor | None, is_seen: Tensor | None = None) -> None:
        """Keep a divergence `[B, G]`.

        `is_seen`: whether it is one, where that is data, after layers that are compiled.
        """
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

    def _keep_weights(self, weights: Tensor | None, tolerance: float) -> None:
        """Keep the weights of one pass, as they are: what is worked out of them is not the forward's to wait for."""
        self.weights_next, self.kept_tolerance = False, tolerance
        self.kept_weights = None if weights is None else outside_of_transforms(weights.detach())

    def reset_parameters(self) -> None:
        """Forget the decision, for memory that was never written. The parts reset themselves."""
        self.skipped = self.pruned

    def _pruned_as(self) -> int:
        return int(self.pruned)

    def get_extra_state(self) -> Tensor:
        """One tensor: skipped, the number of how, place in the stage or -1, and whether it is pruned."""
        place = -1 if self.place is None else self.place
        numbers = [int(self.skipped), self._mode(), place, self._pruned_as()]
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        skipped, mode, place = (int(s) for s in state[:3].tolist())
        kind = type(self).__name__
        if not 0 <= mode < len(MODES):
            raise ValueError(
                f"state_dict: got the skip mode number {mode} for a layer {kind}; allowed are 0 to {len(MODES) - 1}, "
                f"for {', '.join(f'{m!r}' for m in MODES)}. The state is damaged, or of a later version"
            )
        if self.pruned and not skipped:
            raise ValueError(
                f"state_dict: got a layer that retrieves for a layer {kind} that was pruned; allowed is the state of a "
                "model with the same layers skipped. Load into a model that was not pruned"
            )
        # Only what differs: the buffer may be that of a moving average, between two decisions.
        if bool(skipped) != self.skipped:
            self.skipped = bool(skipped)
        if mode != self._mode():
            self._decide((self._decision()[0], mode))
        if self.stage is None:  # what this model's own passes have shown counts for more
            self.place, self.is_first = None if place < 0 else place, place == 0

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
                self._prune_as(pruned, state_dict, prefix)
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
        if decision in missing_keys:
            # Of a version that had the decision in the extra state alone, or of a layer that could not be skipped.
            missing_keys.remove(decision)
        if key in missing_keys:
            missing_keys.remove(key)
            # A checkpoint that has nothing of this layer (of a head alone, say) says nothing about it either.
            if decision not in state_dict and any(k.startswith(prefix) for k in state_dict):
                self.skipped = self.pruned

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if "decision" in self._buffers:
            self.totals.to(self.decision.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle starts without the observations of the step under way, and with no EBQM attached.
        state = super().__getstate__()
        for name in ("observations", "totals", "watchers", "number"):
            del state[name]
        state["watched"] = state["probe_next"] = state["weights_next"] = False
        state["kept_weights"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.observations, self.watchers = [], weakref.WeakSet()
        self.totals, self.number, self.stage = Totals(), next(_numbers), None
        self.watched = False
        self.__dict__.setdefault("is_first", self.place == 0)
        if "decision" in self._buffers:
            self.totals.to(self.decision.device)
