"""The light form of layer attention as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import Refusal, refusal_in_a_graph
from ela_kernels.backends.types import LightFilters, ValueAct
from ela_kernels.explaining import refused, served, served_without_kernels
from ela_kernels.modules.query_key_value import QueryKeyValue
from ela_kernels.modules.tokens import Grid, TakesTokens, joined
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import is_autocast_on, may_be_cast
from ela_kernels.ops.light_layer_attention.interface import activated, gated
from ela_kernels.ops.light_layer_attention.layer import light_layer
from ela_kernels.ops.light_layer_attention.plan import LightPlan, plan_light_layer
from ela_kernels.ops.traced import is_traced, traced_call


class LightLayerAttention(TakesTokens, QueryKeyValue):
    """Gate this layer's value and let the previous layer's output decay; needs no history.

    Where the kernels serve it, one call of theirs makes all of it, and another all gradients.

    Equivalent PyTorch::

        y = x.mean((2, 3)).unsqueeze(1)                                  # [B, 1, C]
        q = F.conv1d(y, Wq.weight, padding=Wq.padding).squeeze(1)
        k = F.conv1d(y, Wk.weight, padding=Wk.padding).squeeze(1)
        v = Wv(x)                                                        # F.gelu(Wv(x)) with `value_act`
        out = ek.light_layer_attention(q, k, v, prev_out, lambda_t, heads=dim // head_dim)

    Args:
        dim: number of channels C.
        head_dim: channels of a head; a divisor of `dim`.
        kernel_size: odd size of the filters over the channel axis; `int(|log2(C) + 1| / 2)`, made odd, if None.
        value_act: what the value passes before it is gated: `"gelu"`, `"gelu_tanh"` (`F.gelu(v, approximate="tanh")`),
            or nothing.
        prefix_tokens: of inputs that are tokens `[B, N, C]`, how many come before the patches (class and register
            tokens). They take no part, and the output holds those of `x`, as the published vision transformers have it.
        grid: height and width in patches of inputs that are tokens; None for a square.
        qk_norm: as of :class:`LayerAttention`; the layer is then made of PyTorch's own pieces.

    Tokens are viewed as maps and back, as in :class:`LayerAttention`: without a prefix nothing is copied, with one the
    output is, once.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        MRLA (arXiv 2302.03985), light form. Parameters have the published names, `lambda_t` `[C, 1, 1]` included.
    """

    value_act: ValueAct | None = None

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        kernel_size: int | None = None,
        value_act: ValueAct | None = None,
        prefix_tokens: int = 0,
        grid: Grid | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(dim, head_dim, kernel_size, qk_norm)
        self._take_tokens(prefix_tokens, grid)
        self.value_act = checks.check_value_act(value_act)
        self.lambda_t = nn.Parameter(torch.randn(dim, 1, 1))

    def plan(
        self,
        x: Tensor,
        prev_out: Tensor,
        op: str = "light_layer",
        obstacles: tuple[str, ...] = (),
        decay: Tensor | None = None,
    ) -> LightPlan | Refusal:
        """The kernels that serve this layer, with its parameters, or every reason why none does."""
        if torch.compiler.is_compiling():
            return refusal_in_a_graph()
        obstacles = (*obstacles, *self.obstacles())
        filters = self.own_filters()
        if obstacles or filters is None:
            # Whether the kernels serve the rest, before a weight is worked out.
            found = plan_light_layer(x, (), prev_out, op, obstacles)
            if isinstance(found, Refusal):
                return found
            filters = self.filters()
        wq, wk, wv = filters
        obstacles = self.shape_obstacles(filters)
        if wq is None:
            obstacles = (*obstacles, "Wq is missing")
            wq = wk
        decay = self.lambda_t if decay is None else decay
        if decay.shape != (self.dim, 1, 1):
            obstacles = (*obstacles, "lambda_t has another shape than the layer was made with")
        of_light = LightFilters(wq, wk, wv, decay)
        found = plan_light_layer(x, of_light, prev_out, op, obstacles)
        return found if isinstance(found, Refusal) else LightPlan(found, of_light)

    def forward(self, x: Tensor, prev_out: Tensor, decay: Tensor | None = None) -> Tensor:
        """The output, of the shape of `x`.

        Args:
            x: feature map `[B, C, H, W]`, or tokens `[B, N, C]`.
            prev_out: output of the layer before; the stage's input for its first layer. Shape of `x`. Of another dtype
                than `x` outside of autocast, the wider of the two is that of the output.
            decay: the factor `[C, 1, 1]` in the place of `lambda_t`, of a layer that has none of its own.

        Raises:
            ValueError: a backend with kernels is forced and cannot serve the layer; the message holds every reason.
        """
        if not isinstance(x, Tensor) or x.dim() != 3:
            return self._gate(x, prev_out, decay)
        first, patches = self._split(x, self.dim)
        if isinstance(prev_out, Tensor) and prev_out.dim() == 3:
            if prev_out.shape != x.shape:
                raise ValueError(
                    f"prev_out: got shape {list(prev_out.shape)}; allowed is that of x, {list(x.shape)}"
                )
            prev_out = self._split(prev_out, self.dim)[1]
        return joined(first, self._gate(patches, prev_out, decay))

    def _gate(self, x: Tensor, prev_out: Tensor, decay: Tensor | None) -> Tensor:
        """:meth:`forward` of maps."""
        if type(x) is not Tensor and is_traced(x):
            return traced_call(self, x, prev_out, decay)
        self.check_input(x)
        why = None
        if isinstance(prev_out, Tensor):
            plan = self.plan(x, prev_out, decay=decay)
            if isinstance(plan, LightPlan):
                served(self, "layer", plan.backend.name)
                scale = self.head_dim**-0.5
                out, _ = light_layer(
                    plan.backend,
                    x,
                    plan.filters,
                    prev_out,
                    self.heads,
                    scale,
                    None,
                    self.value_act,
                )
                return out
            refused(self, "layer", plan, tells=plan.forced is None)
            why = plan
        served_without_kernels(self, "eager")
        q, k, v = self.query_key_value(x)
        v = activated(v, self.value_act)
        if isinstance(prev_out, Tensor) and prev_out.dtype in checks.ALLOWED_DTYPES:
            if is_autocast_on(x) and may_be_cast(prev_out):
                # The stage's input need not have passed through an autocast operation.
                prev_out = prev_out.to(v.dtype)
            elif prev_out.dtype != v.dtype:
                # As PyTorch's own product and sum: the wider of the two.
                wider = torch.promote_types(v.dtype, prev_out.dtype)
                q, k, v, prev_out = (t.to(wider) for t in (q, k, v, prev_out))
        decay = self.lambda_t if decay is None else decay
        return gated(q, k, v, prev_out, decay, self.heads, why=why)

    def extra_repr(self) -> str:
        sizes = super().extra_repr() + self._tokens_repr()
        return sizes if self.value_act is None else f"{sizes}, value_act={self.value_act!r}"
