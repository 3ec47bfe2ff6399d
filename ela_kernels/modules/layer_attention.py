"""The base form of layer attention as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ela_kernels.backends.dispatch import Refusal, refusal_in_a_graph
from ela_kernels.backends.types import RESIDUAL
from ela_kernels.explaining import refused, served, served_without_kernels
from ela_kernels.modules.query_key_value import (
    ChannelFilter as ChannelFilter,  # pickles find it here
)
from ela_kernels.modules.query_key_value import QueryKeyValue, passed_on
from ela_kernels.modules.tokens import Grid, TakesTokens, joined, joined_with_zeros
from ela_kernels.ops.checks import check_tolerance
from ela_kernels.ops.layer_attention.history import LayerHistory
from ela_kernels.ops.layer_attention.in_graph.history import GraphPlan
from ela_kernels.ops.layer_attention.plan import LayerPlan
from ela_kernels.ops.traced import is_traced, traced_call


class History(Protocol):
    """What the modules need of a history; :class:`ela_kernels.LayerHistory` is the one to use."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, caller: Any = None, **options: Any
    ) -> Tensor: ...


class Turn(NamedTuple):
    """How a layer that can be skipped takes part in its stage, where it does not simply retrieve.

    Attributes:
        active: whether it retrieves, where that is data: a boolean of no dimension. None: it does not.
        given: whether its pair is there for the layers after it, where that is data; None: it is.
        provides: whether it gives a pair at all.
        probe: called with the divergence `[B, G]` that it would have; None: it is not looked at.
        copy: pass a copy of the input on, not a view.
    """

    active: Tensor | None = None
    given: Tensor | None = None
    provides: bool = True
    probe: Callable[[Tensor | None], None] | None = None
    copy: bool = True


class LayerAttention(TakesTokens, QueryKeyValue):
    """Retrieve from the feature maps of all layers of the stage so far.

    On the CPU and with Triton query, key, value and retrieval come from one call of the kernels, and so do all
    gradients.

    Equivalent PyTorch, with `keys` and `values` two growing lists of the stage::

        y = x.mean((2, 3)).unsqueeze(1)                                  # [B, 1, C]
        q = F.conv1d(y, Wq.weight, padding=Wq.padding).squeeze(1)
        k = F.conv1d(y, Wk.weight, padding=Wk.padding).squeeze(1)
        v = Wv(x)
        keys.append(k), values.append(v)
        out = ek.layer_attention(q, keys, values, heads=dim // head_dim).out

    Parameters have the names and shapes of the published modules, so that their checkpoints load: `Wq.weight` and
    `Wk.weight` `[1, 1, kernel_size]`, `Wv.weight` `[C, 1, 3, 3]`.

    Args:
        dim: number of channels C.
        head_dim: channels of a head; a divisor of `dim`. 1 is the channel-wise form.
        kernel_size: odd size of the filters over the channel axis; `int(|log2(C) + 1| / 2)`, made odd, if None.
        tolerance: retrievals of a smaller weight are left out, and their values not read; see
            :func:`ela_kernels.layer_attention`. That of the history if None.
        prefix_tokens: of inputs that are tokens `[B, N, C]`, how many come before the patches (class and register
            tokens). They take no part, and the retrieval has zeros in their places, so that `x + out` passes them by.
        grid: height and width in patches of inputs that are tokens; None for a square.
        qk_norm: queries and keys are normalised, head by head, by `nn.RMSNorm(head_dim)` of their own (`q_norm`,
            `k_norm`) before the attention. Filters and norms are then PyTorch's, and the attention alone is fused.

    Tokens after the prefix are viewed as a map `[B, C, H, W]`, `x.view(B, H, W, C).permute(0, 3, 1, 2)`, which kernels
    read as it lies in memory, and the result is viewed as tokens again. Without a prefix nothing is copied. With one
    the input is not copied either; the result is, once, to stand behind its zeros, and so are gradients.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        MRLA (arXiv 2302.03985), equations 4 to 6, base form. The tolerance is our definition, and so is `qk_norm` here,
        which transformers have between tokens (arXiv 2010.04245).

    Example:
        >>> import torch, ela_kernels as ek
        >>> layers = [ek.LayerAttention(32) for _ in range(3)]
        >>> x, history = torch.randn(2, 32, 8, 8), ek.LayerHistory()
        >>> for layer in layers:
        ...     x = x + layer(x, history)
    """

    # Of the class, for layers that were pickled without one.
    tolerance: float | None = None

    def __init__(
        self,
        dim: int,
        head_dim: int = 16,
        kernel_size: int | None = None,
        tolerance: float | None = None,
        prefix_tokens: int = 0,
        grid: Grid | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(dim, head_dim, kernel_size, qk_norm)
        self.tolerance = None if tolerance is None else check_tolerance(tolerance)
        self._take_tokens(prefix_tokens, grid)

    def forward(
        self, x: Tensor, history: History, residual: bool = False, turn: Turn | None = None
    ) -> Tensor:
        """The aggregation, of the shape of `x`; weights and divergence are then in `history`.

        Args:
            x: feature map `[B, C, H, W]`, in any memory format, or tokens `[B, N, C]`.
            history: the :class:`ela_kernels.LayerHistory` of this stage and forward pass.
            residual: give `x` plus the aggregation, which the kernel of a whole layer adds in the same pass.
            turn: what a layer that can be skipped does instead; where it does not retrieve, `x` is passed on.
        """
        if not isinstance(x, Tensor) or x.dim() != 3:
            return self._retrieve(x, history, residual, turn)
        first, patches = self._split(x, self.dim)
        out = self._retrieve(patches, history, residual, turn)
        if (residual and turn is None) or (turn is not None and turn.active is None):
            return joined(first, out)
        return joined_with_zeros(self.prefix_tokens, out)

    def _retrieve(self, x: Tensor, history: History, residual: bool, turn: Turn | None) -> Tensor:
        """:meth:`forward` of a map."""
        if type(x) is not Tensor and is_traced(x) and turn is None:
            return traced_call(self, x, history, residual=residual)
        if turn is not None and turn.active is None:
            return self._pass_on(x, history, turn)
        self.check_input(x)
        if not hasattr(type(history), "attend"):
            raise TypeError(
                f"history: got {type(history).__name__}; allowed is the LayerHistory of this stage and forward pass"
            )
        if isinstance(history, LayerHistory) and not torch.compiler.is_compiling():
            plan = self.plan(x, history)
            if isinstance(plan, LayerPlan):
                served(self, "layer", plan.backend.name)
                epilogue = RESIDUAL if residual else None
                return history.attend_layer(
                    x, plan, heads=self.heads, epilogue=epilogue, caller=self
                )
            refused(self, "layer", plan)
        elif isinstance(history, LayerHistory) and turn is None:
            found = self.plan_in_graph(x, history)
            if isinstance(found, GraphPlan):
                return history.attend_in_graph(
                    x,
                    found,
                    heads=self.heads,
                    epilogue=RESIDUAL if residual else None,
                    caller=self,
                )
        q, k, v = self.query_key_value(x)
        options: dict[str, Any] = {}
        if self.tolerance is not None:
            options["tolerance"] = self.tolerance
        if turn is not None:
            options.update(active=turn.active, given=turn.given)
        out = history.attend(q, k, v, heads=self.heads, caller=self, **options)
        return x + out if residual and turn is None else out

    def _pass_on(self, x: Tensor, history: Any, turn: Turn) -> Tensor:
        if turn.probe is not None:
            self.look(x, history, turn.probe)
        if turn.provides:
            self.provide(x, history)
        # After the pair was made: autograd then comes to this node first, and hooks on it (those of FSDP, which bring
        # the parameters back) run before the backward that needs them.
        return passed_on(x, turn.copy)

    def look(self, x: Tensor, history: Any, probe: Callable[[Tensor | None], None]) -> None:
        """Tell `probe` the divergence that the layer would have; nothing else comes of it."""
        if history.recomputing:
            return
        with torch.no_grad():
            q, k = self.query_key(x)
        probe(history.probe(q, k, heads=self.heads).kl)

    def provide(self, x: Tensor, history: LayerHistory) -> None:
        """Give key and value of `x` to the later layers, and retrieve nothing."""
        self.check_input(x)
        is_traced = torch.compiler.is_compiling()
        plan = refusal_in_a_graph() if is_traced else self.plan(x, history)
        if isinstance(plan, LayerPlan):
            served(self, "pair", plan.backend.name)
            history.provide_layer(x, plan, heads=self.heads, caller=self)
            return
        refused(self, "pair", plan)
        served_without_kernels(self, "pieces")
        k, v = self.key_value(x)
        history.provide(k, v, heads=self.heads, caller=self)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._tokens_repr()

    def plan_in_graph(
        self, x: Tensor, history: LayerHistory, op: str = "layer"
    ) -> GraphPlan | Refusal:
        """As :meth:`plan`, in a graph that is being compiled."""
        filters = None if self.obstacles() else self.own_filters()
        if filters is not None and self.shape_obstacles(filters):
            filters = None
        return history.plan_in_graph(x, filters, op, self.tolerance)

    def plan(
        self, x: Tensor, history: LayerHistory, op: str = "layer", obstacles: tuple[str, ...] = ()
    ) -> LayerPlan | Refusal:
        """The kernels that serve this layer here, or every reason why none does; see `LayerHistory.plan_layer`."""
        obstacles = (*obstacles, *self.obstacles())
        filters = self.own_filters()
        if obstacles or filters is None:
            # Whether the kernels serve the rest, before a weight is worked out.
            found = history.plan_layer(x, (), op, obstacles, self, self.tolerance)
            if isinstance(found, Refusal):
                return found
            filters = self.filters()
        obstacles = self.shape_obstacles(filters)
        return history.plan_layer(x, filters, op, obstacles, self, self.tolerance)
