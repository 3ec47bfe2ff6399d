"""The stage of a network that is not ours: what its blocks hand on to each other, and how they find it.

Whoever calls the blocks knows nothing of a history: a Sequential, a loop, a checkpoint. So it travels with the maps:
the tensor that a block gives carries, as an attribute, the history as the block left it. What a checkpoint recomputes
starts from the tensors of its forward pass, and finds on them the history of that very pass; two passes before one
backward, replicas and threads do not see each other.

The reference is strong, and makes no circle through autograd's graph, in which nobody would collect it: a block does
not go on with the history that it finds but with a copy, so that what a tensor carries knows the layers before it
alone, and their values were made before the tensor was.
"""

from __future__ import annotations

import threading
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ela_kernels.integrations.views import Maps
from ela_kernels.modules.ela import ELA
from ela_kernels.ops.autograd.record import graph_task
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.light_layer_attention.history import PreviousOutput
from ela_kernels.torch_internals import top_saved_tensors_hooks

if TYPE_CHECKING:
    from typing_extensions import Self

_ATTRIBUTE = "_ela_kernels_passed"

_REENTRANT = (
    "allowed is torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which recomputes a block with the very "
    "tensors of its forward pass. With use_reentrant=True the gradients between layers would be lost"
)


class LightHistory(PreviousOutput):
    """What a light layer needs of the one before, with the methods of a `LayerHistory` that a stage calls."""

    position = 0
    _has_grad: bool | None = None

    def find(self, layer: nn.Module, x: Tensor) -> Tensor:
        self._has_grad = torch.is_grad_enabled()
        return x if self._out is None else self._out

    def leave(self, out: Tensor) -> None:
        self._out = out
        self.position += 1

    @property
    def recomputing(self) -> bool:
        return self._recomputing()

    @property
    def place_found(self) -> tuple[None, bool] | None:
        return None if self._has_grad is None else (None, self._has_grad)

    def continued(self) -> Self:
        other = copy(self)
        other._has_grad = None
        return other

    @property
    def place_left(self) -> tuple[None, bool]:
        return None, True

    def recomputed_from(self, place: tuple[None, bool]) -> Self:
        if not place[1] and torch.is_grad_enabled():
            raise RuntimeError(f"LightHistory: got reentrant checkpointing; {_REENTRANT}")
        other = self.continued()
        if not self.recomputing:
            other._made_in = -1
        return other


class Passed:
    """What a tensor carries from one block to the next: the history up to there.

    Attributes:
        stage: whose history it is.
        history: a `LayerHistory` or a :class:`LightHistory`, which nobody changes any more.
        position: number of layers that came by.
        shape: of the maps in it.
        found: what the next layer found in it, for a recomputation; None before that layer ran.
    """

    __slots__ = ("found", "history", "position", "shape", "stage")

    def __init__(self, stage: Stage, history: Any, position: int, shape: torch.Size) -> None:
        self.stage, self.history, self.position, self.shape = stage, history, position, shape
        self.found: Any = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or saved tensor carries nothing: as a set, which `torch.load` admits."""
        return set, ()


class _InThread(threading.local):
    """What a stage knows in one thread.

    Attributes:
        given: a block that is called, and what its input carries.
        made: what the block that is called hands on.
        last: where operations stand between the blocks, what the last block handed on; None after the last of the
            stage.
        in_graph: while a graph is compiled, where tensors carry no attributes: the history, how many layers came by,
            and the shape of the maps.
    """

    given: tuple[nn.Module, Passed | None] | None = None
    made: Passed | None = None
    last: Passed | None = None
    in_graph: tuple[Any, int, torch.Size] | None = None


class Stage:
    """The blocks whose layers share a history.

    Args:
        names: of the blocks that a layer follows, in the order in which they run.
        view: how a map is found in a block's output.
        is_light: whether the layers are of the light form.
        history_dtype, tolerance: of the :class:`ela_kernels.LayerHistory`.
        operations_between: whether operations stand between the blocks.
    """

    # Of stages that were pickled before there was a choice.
    operations_between = False

    def __init__(
        self,
        names: tuple[str, ...],
        view: Maps,
        is_light: bool,
        history_dtype: torch.dtype | None = None,
        tolerance: float = 0.0,
        operations_between: bool = False,
    ) -> None:
        self.names, self.view, self.is_light = names, view, is_light
        self.history_dtype, self.tolerance = history_dtype, tolerance
        self.operations_between = operations_between
        self._local = _InThread()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_local"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = _InThread()

    def new_history(self) -> LayerHistory | LightHistory:
        """What the layers share in one forward pass."""
        if self.is_light:
            return LightHistory()
        return LayerHistory(dtype=self.history_dtype, tolerance=self.tolerance)

    def carried_by(self, tensor: object) -> Passed | None:
        """The history of this stage that a tensor carries."""
        found = getattr(tensor, _ATTRIBUTE, None)
        return found if isinstance(found, Passed) and found.stage is self else None

    def receive(self, block: nn.Module, x: object) -> None:
        """`block` is called with `x`, which its hooks may exchange before its forward runs."""
        self._local.given = block, self.carried_by(x)
        self._local.made = None

    def hand_on(self, out: object) -> None:
        """A block gives `out`, which its hooks may have exchanged."""
        made = self._local.made
        if made is not None and isinstance(out, Tensor) and self.carried_by(out) is None:
            setattr(out, _ATTRIBUTE, made)

    def end_call(self) -> None:
        """The block's call is over, also where it raised: what it was given is not held on to."""
        self._local.given = self._local.made = None

    def give_up(self) -> None:
        """The pass is over before its end: what it holds is let go of, not kept until the next."""
        self._local.last = None

    def pass_on(self, block: nn.Module, x: object, out: object) -> None:
        """After a block without a layer of its own, between others that have one."""
        if torch.compiler.is_compiling() or not isinstance(out, Tensor):
            return
        passed = self._received(block, x)
        if passed is not None:
            setattr(out, _ATTRIBUTE, passed)
            self._local.made = passed

    def follow(self, block: nn.Module, layer: nn.Module, index: int, x: object, out: Any) -> Tensor:
        """The block's output after its layer.

        Args:
            block: the block, which was called with `x` and gave `out`.
            layer: its layer.
            index: the layer's place in the stage.
        """
        x_map = self.view.map_of(out, self.names[index])
        if torch.compiler.is_compiling():
            return self.view.back(self._followed_in_graph(layer, index, x_map), out)
        passed = None
        if index:
            passed = self._passed(block, index, x)
            self._check_shape(index, x_map, passed.shape)
            history: Any = passed.history.continued()
            if history.recomputing:
                if passed.found is None:
                    raise RuntimeError(self._lost(index))
                history = history.recomputed_from(passed.found)
        else:
            history = self.new_history()
            if _recomputes():
                history = history.recomputed_from(history.place_left)
        recomputing = history.recomputing
        if not recomputing:
            self._local.last = None
        given = self.view.back(_called(layer, x_map, history), out)
        if passed is not None and not recomputing:
            passed.found = history.place_found
        if index + 1 < len(self.names):
            if recomputing:
                history = history.continued()
            left = Passed(self, history, index + 1, x_map.shape)
            self._check_position(index, history.position - 1)
            if recomputing:
                left.found = history.place_left
            elif self.operations_between:
                self._local.last = left
            setattr(given, _ATTRIBUTE, left)
            self._local.made = left
        return given

    def _followed_in_graph(self, layer: nn.Module, index: int, x_map: Tensor) -> Tensor:
        """The same while a graph is made of it, in which one history grows."""
        if index == 0:
            history: Any = self.new_history()
        else:
            if self._local.in_graph is None or self._local.in_graph[1] != index:
                raise RuntimeError(
                    f"{self.names[index]}: got a graph that is compiled without the blocks before it in its stage; "
                    "allowed is one that has the stage's blocks from the first on. Compile the whole model, or the "
                    "stage"
                )
            history, _, shape = self._local.in_graph
            self._check_shape(index, x_map, shape)
        result: Tensor = _called(layer, x_map, history)
        is_last = index + 1 == len(self.names)
        self._local.in_graph = None if is_last else (history, index + 1, x_map.shape)
        return result

    def _received(self, block: nn.Module, x: object) -> Passed | None:
        """What `x` carries, or carried before the hooks of `block` exchanged it."""
        found = self.carried_by(x)
        given = self._local.given
        if found is None and given is not None and given[0] is block:
            found = given[1]
        return found

    def _passed(self, block: nn.Module, index: int, x: object) -> Passed:
        """The history that a block goes on with.

        Where its input carries none, and operations may stand between the blocks, it is that of the last block that ran
        in this thread: another's where a pass ended before its stage did, or two take turns block by block.
        """
        found = self._received(block, x)
        if found is None and self.operations_between:
            # In a recomputation it is of another pass, and refused there: its next layer has not run.
            found = self._local.last
        if found is None:
            raise RuntimeError(self._lost(index))
        self._check_position(index, found.position)
        return found

    def _lost(self, index: int) -> str:
        name, before = self.names[index], self.names[index - 1]
        if graph_task() != -1:
            return (
                f"{name}: got a map in a backward pass that does not carry the history of its stage, as with reentrant "
                f"checkpointing, and where hooks give a checkpoint other tensors than it saved; {_REENTRANT}"
            )
        if self.operations_between:
            return (
                f"{name}: got a map that does not carry the history of its stage, and {before} did not run just before "
                "it; allowed is a pass through all blocks of a stage in their order. Attach layers to the blocks that "
                "run"
            )
        return (
            f"{name}: got a map that does not carry the history of its stage; allowed is the very tensor that {before} "
            "gave, in a pass through all blocks of a stage in their order. Where an operation stands between the "
            "blocks, attach with operations_between=True; compile the whole model or stage, not single blocks"
        )

    def _check_position(self, index: int, position: int) -> None:
        if position != index:
            raise RuntimeError(
                f"{self.names[index]}: got {position} layers before it in the history of its stage; allowed is "
                f"{index}: the blocks of a stage run once each in a pass, in the order {', '.join(self.names)}"
            )

    def _check_shape(self, index: int, x_map: Tensor, shape: torch.Size) -> None:
        if x_map.shape != shape:
            raise ValueError(
                f"{self.names[index]}: got a map {list(x_map.shape)}, after {self.names[index - 1]} gave "
                f"{list(shape)}; allowed are maps of one shape, since a backbone that returns maps of several sizes in "
                "one stage has nothing to share there. Attach the blocks of each size as a stage of their own"
            )


def _called(layer: nn.Module, x_map: Tensor, history: Any) -> Any:
    # What a skipped layer passes on nobody changes in place: the next block would change the output of this one.
    return layer(x_map, history, copy=False) if isinstance(layer, ELA) else layer(x_map, history)


def _recomputes() -> bool:
    """Whether a checkpoint recomputes: a backward pass is under way, and hooks wait for what is saved."""
    if graph_task() == -1:
        return False
    return top_saved_tensors_hooks is None or top_saved_tensors_hooks(True) is not None
