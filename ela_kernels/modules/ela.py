"""The high-level block: layer attention, norm, activation, residual, and the means to be skipped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ela_kernels.explaining import is_explaining, served_without_kernels
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.ela_state import ELAState
from ela_kernels.modules.layer_attention import LayerAttention, Turn
from ela_kernels.modules.parts import made_part
from ela_kernels.modules.query_key_value import as_before_wrappers, passed_on
from ela_kernels.modules.residual import block_in_graph, residual_block
from ela_kernels.modules.reuse import end_of_block, reused_block
from ela_kernels.modules.skipping import MODES, SkipMode
from ela_kernels.modules.tied import expects_all_parameters, tied
from ela_kernels.modules.tokens import Grid, TakesTokens, is_same_memory, joined
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.deferral import can_defer
from ela_kernels.ops.traced import is_traced, traced_call
from ela_kernels.torch_internals import has_hooks, is_exporting


def _take_no_note(_: Tensor | None) -> None:
    """Of a probe that is for somebody who looks on, who is told by the history."""


class ELA(TakesTokens, ELAState):
    """Efficient layer attention: a residual retrieval from the stage's history, skipped when it is redundant.

    Equivalent PyTorch: `x + drop_path(act(norm(o)))` with `o = LayerAttention(dim)(x, history)`, or when skipped `x`,
    or with `skip="reuse"` the same with the `o` of the last layer before it in the stage that retrieved.

    :class:`ela_kernels.EBQM` decides which layers are skipped; `skipped` can be set by hand too. It is part of the
    state dict, with the skip mode and the layer's place in its stage; a checkpoint without it loads as a layer that
    retrieves.

    Args:
        dim: number of channels C.
        head_dim: channels of a head; a divisor of `dim`.
        kernel_size: odd size of the filters over the channel axis; `int(|log2(C) + 1| / 2)`, made odd, if None.
        norm_layer: called with `dim`; makes the norm of the retrieval. The kernels of a whole block know
            `nn.BatchNorm2d`, and the `FrozenBatchNorm2d` of torchvision and detectron2; with any other, `nn.GroupNorm`
            say, those of the whole layer serve and PyTorch runs the norm. A `nn.LayerNorm` or `nn.RMSNorm` is one over
            the channels, `norm(o.movedim(1, -1)).movedim(-1, 1)`.
        act_layer: called without arguments; makes the activation. `nn.ReLU` is made to work in place.
        drop_path: probability of dropping the retrieval for a sample in training, in [0, 1].
        skip: what a skipped layer leaves out. `"reuse"`: it takes the last retrieval before it in the stage in place of
            its own, which its own norm works on, and its key and value still go to the later layers; with no retrieval
            before it, `x` passes on. `"retrieval"`: it retrieves nothing, `x` passes on unchanged, and its key and
            value still go to the later layers. `"layer"`: it gives none either.
        provides: whether a layer skipped with `"reuse"` still gives its key and value; True if None.
        tolerance: as of :class:`LayerAttention`.
        prefix_tokens: of inputs that are tokens `[B, N, C]`, how many come before the patches (class and register
            tokens). They pass by: the output holds them as they came in.
        grid: height and width in patches of inputs that are tokens; None for a square.
        qk_norm: as of :class:`LayerAttention`.

    Tokens after the prefix are viewed as a map, `x.view(B, H, W, C).permute(0, 3, 1, 2)`, which kernels read as it lies
    in memory, and the output is viewed as tokens again. Without a prefix nothing is copied. With one the output is,
    once, to stand behind it, and so are gradients.

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

    def __init__(
        self,
        dim: int,
        head_dim: int = 16,
        kernel_size: int | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        drop_path: float = 0.0,
        skip: SkipMode = "reuse",
        provides: bool | None = None,
        tolerance: float | None = None,
        prefix_tokens: int = 0,
        grid: Grid | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(skip, provides)
        self._take_tokens(prefix_tokens, grid)
        self.attn: LayerAttention | None = LayerAttention(
            dim, head_dim, kernel_size, tolerance, qk_norm=qk_norm
        )
        self.norm: nn.Module | None = made_part("norm_layer", norm_layer, dim)
        is_relu = act_layer is nn.ReLU
        self.act = nn.ReLU(inplace=True) if is_relu else made_part("act_layer", act_layer)
        self.drop_path = DropPath(drop_path)
        self._begin()

    def forward(self, x: Tensor, history: LayerHistory, copy: bool = True) -> Tensor:
        """The block's output, shape and dtype of `x`.

        Args:
            x: feature map `[B, C, H, W]`, in any memory format, or tokens `[B, N, C]`.
            history: the :class:`ela_kernels.LayerHistory` of this stage and forward pass.
            copy: the output is new memory, skipped or not. With False it is a view of `x` where the layer is skipped,
                which saves the copy, for a caller that changes neither of them in place.
        """
        if not isinstance(x, Tensor) or x.dim() != 3:
            return self._run(x, history, copy)
        first, patches = self._split(x, getattr(self.attn, "dim", None))
        if first is None:
            return joined(None, self._run(patches, history, copy))
        # What is joined with the prefix is new memory in any case.
        out = self._run(patches, history, copy=False)
        if not copy and is_same_memory(out, patches):
            return x.view_as(x)
        return joined(first, out)

    def _run(self, x: Tensor, history: LayerHistory, copy: bool) -> Tensor:
        """:meth:`forward` of a map."""
        if type(x) is not Tensor and is_traced(x):
            return traced_call(self, x, history, copy=copy)
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
                    gives = self.attn is not None and self.provides
                    out = self._pass(x, history, watched and self.probe_next, copy)
                    return tied(out, self.attn, self.norm) if expects_all_parameters() else out
                attn, norm = self.attn, self.norm
                if attn is None or norm is None:
                    raise RuntimeError(
                        "ELA: this layer was pruned, and cannot retrieve; skipped must stay True"
                    )
                gives = True
                keeps = self.hands_on()
                out = residual_block(
                    attn, norm, self.act, self.drop_path, x, history, self.lent, keeps
                )
                if watched:
                    self._observe(history.kl, history.has_divergence)
                    if self.weights_next:
                        self._keep_weights(history.weights, history.tolerance_of(attn.tolerance))
                return out
            gives = True
            return self._decided(x, history, watched)
        finally:
            turns.end(self.readers if gives and not recomputing else None)

    def _pass(self, x: Tensor, history: LayerHistory, probe: bool, copy: bool) -> Tensor:
        """Leave out the retrieval; give key and value where the skip mode says so."""
        attn = self.attn
        skip, provides = MODES[self._mode()]
        provides = provides and attn is not None
        # A pruned layer has nothing left to make a query with.
        is_looked_at = attn is not None and (probe or (history.is_observed and not self.pruned))
        look = None
        if is_looked_at:
            look = self._observe if probe else _take_no_note
        if provides and not is_looked_at and self._can_wait(attn, x, history):
            assert isinstance(attn, LayerAttention)
            history.defer(attn, x, attn.heads)
            provides = False
        # One name for a layer, skipped or not, by which a second pass is known.
        counted = attn if type(attn) is LayerAttention else self
        if skip == "reuse":
            is_compiling = torch.compiler.is_compiling()
            kept = history.last_retrieved(attn if provides else counted)
            if kept is not None and kept.exists is not None and not is_compiling:
                # Layers before it are compiled, and may all have been skipped.
                kept = kept._replace(exists=None) if bool(kept.exists) else None
            if kept is not None:
                assert self.norm is not None
                turn = Turn(provides=provides, probe=look, copy=False)
                of_block = (attn, self.norm, self.act, self.drop_path, x, history)
                out: Tensor = reused_block(*of_block, kept, turn, self, counted, self.lent)
                self.probe_next = self.probe_next and not probe
                return out
        if attn is None or not (provides or is_looked_at):
            served_without_kernels(self, "skipped")
            history.pass_by(caller=counted)
            return passed_on(x, copy or (not torch.compiler.is_compiling() and has_hooks(self)))
        # By its call, not by a method of it: wrappers and hooks work there.
        # Hooks may change what they get in place; a compiled graph copies where that needs it.
        copy = copy or (not torch.compiler.is_compiling() and has_hooks(self, attn))
        turn = Turn(provides=provides, probe=look, copy=copy)
        out = attn(x, history, turn=turn)
        out = as_before_wrappers(out, x)
        if probe:
            self.probe_next = False
        if not provides:
            history.pass_by(caller=counted)
        return out

    def _decided(self, x: Tensor, history: LayerHistory, watched: bool) -> Tensor:
        """The block where the decision is data: worked out either way, and `x` where the layer is skipped."""
        assert self.attn is not None
        assert self.norm is not None
        active = ~(self.decision[0] > 0.5)  # as in eager PyTorch, at the half and at NaN too
        skip, provides = MODES[self._mode()]
        if provides and torch.compiler.is_compiling():
            of_block = (self.attn, self.norm, self.act, self.drop_path, x, history)
            out = block_in_graph(*of_block, self.lent, skip == "reuse", active)
            if out is not None:
                self._add_to_totals(history, watched)
                return out
        kept = history.last_retrieved() if skip == "reuse" else None
        turn = Turn(active, None if provides else active)
        o = self.attn(x, history, turn=turn)
        applies: Tensor | None = active
        if skip == "reuse":
            if kept is not None:
                o = torch.where(active, o, kept.o)
                applies = None if kept.exists is None else active | kept.exists
            history.keep(o, applies)
        self._add_to_totals(history, watched)
        return end_of_block(self.norm, self.act, self.drop_path, x, o, applies)

    def _add_to_totals(self, history: LayerHistory, watched: bool) -> None:
        # Inside a transform of torch.func the layer is one of several models.
        if watched and history.kl is not None and torch.compiler.is_compiling():
            self.totals.add(history.kl, history.has_divergence)

    def _can_wait(self, attn: nn.Module | None, x: Tensor, history: LayerHistory) -> bool:
        """Whether the pair need not be made before somebody reads it, since nobody who did before retrieves now."""
        if torch.compiler.is_compiling() or self.lent or history.recomputing:
            return False
        readers = self.readers
        if not readers.learnt or readers.retrieve() or not readers.are_all_here():
            return False
        if type(attn) is not LayerAttention or type(history) is not LayerHistory:
            return False
        if is_explaining() or is_exporting() or history.is_observed:
            return False
        attn.check_input(x)
        # Hooks on this layer may take its parameters away when it is done, as FSDP's do.
        if not can_defer(x) or has_hooks(self, attn):
            return False
        if attn.obstacles() or attn.own_filters() is None:
            return False
        attn.check_beside_parameters(x)
        return True

    def extra_repr(self) -> str:
        return super().extra_repr() + self._tokens_repr()
