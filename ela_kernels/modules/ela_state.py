"""What an ELA layer keeps beside its parameters and beside what EBQM needs of any layer: who reads its pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.skipping import MODES
from ela_kernels.modules.watched import Watched
from ela_kernels.ops.layer_attention.readers import Readers
from ela_kernels.torch_internals import own_child

# Of layers that were skipped one after another: in a stage that shares layers they may follow each other in a circle.
_MOST_ASKED = 64


class ELAState(Watched):
    """Who reads the layer's pair, by the passes, and which of its parameters serve nobody."""

    attn: LayerAttention | None
    norm: nn.Module | None

    def _begin(self) -> None:
        super()._begin()
        self.readers = Readers()  # learnt from the passes
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

    def parts(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """The parameters of attention and norm, and whether each takes no part in a training pass."""
        is_skipped, attn, readers = self.skipped, self.attn, self.readers
        gives = self.provides and not (readers.learnt and not readers.retrieve())
        if attn is not None:
            children = (own_child(attn, name) for name in ("Wq", "q_norm"))
            of_query = {p for child in children if child is not None for p in child.parameters()}
            for parameter in attn.parameters():
                yield parameter, is_skipped and (not gives or parameter in of_query)
        if self.norm is not None:
            for parameter in self.norm.parameters():
                yield parameter, is_skipped and self.skip != "reuse"

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

    def _pruned_as(self) -> int:
        return 0 if not self.pruned else 2 if self.attn is None else 1

    def get_extra_state(self) -> Tensor:
        """One tensor: skipped, the number of how, place in the stage, pruned (2: emptied), whether it is read.

        Place and the last are -1 where they are not known.
        """
        has_readers = self._has_readers()
        last = [-1 if has_readers is None else int(has_readers)]
        return torch.cat((super().get_extra_state(), torch.tensor(last, device="cpu")))

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave, now or in an earlier version, without the last."""
        super().set_extra_state(state)
        later = state[4:].tolist()
        self._had_readers = bool(later[0]) if later and later[0] >= 0 else None

    def _prune_as(self, pruned: int, state_dict: dict[str, Any], prefix: str) -> None:
        self.remove_unused(pruned == 1, keeps_query=self._has_query(state_dict, prefix))

    def _has_query(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a state has the query's filter: somebody else retrieves with the same module."""
        return any(k.startswith(prefix + "attn.") and ".Wq." in k for k in state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_had_readers"] = self._has_readers()
        del state["readers"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.readers = Readers()
        self.__dict__.setdefault("_had_readers", None)

    def extra_repr(self) -> str:
        return f"skip={self.skip!r}, skipped={self.skipped}, pruned={self.pruned}"
