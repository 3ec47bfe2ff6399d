"""Attention residuals as a module: a learned query retrieves from all layers so far at every position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.explaining import is_explaining, served_without_kernels
from ela_kernels.modules.skipping import mode_number
from ela_kernels.modules.tied import expects_all_parameters, tied_to
from ela_kernels.modules.watched import Watched
from ela_kernels.ops.position_attention import PositionHistory
from ela_kernels.ops.position_attention.checks import DEFAULT_EPS, check_eps, check_scale
from ela_kernels.ops.position_attention.interface import retrieve
from ela_kernels.torch_internals import is_exporting


class AttentionResidual(Watched):
    """Give a layer its input: at every position a weighted mean of what all layers before it gave.

    Takes the place of the sum of a residual network. Equivalent PyTorch, for tokens `[B, N, C]`::

        v = torch.stack(values, 1)                                # [B, T, N, C]
        s = F.rms_norm(v, (dim,), norm_weight, eps) @ query       # [B, T, N]
        out = (s.softmax(1).unsqueeze(-1) * v).sum(1)

    The query starts at zero, so that the weights of all values are equal at first, as in the paper.

    :class:`ela_kernels.EBQM` decides which are skipped; `skipped` can be set by hand too, and is part of the state
    dict; a checkpoint without it loads as a module that retrieves. A skipped one gives what was retrieved last before
    it in the history, the same tensor, so that nobody may change it in place; it reads no value and makes no weights,
    and those of the history stay. The first of a history has nothing to take over, and retrieves in any case.

    Args:
        dim: number of channels C.
        eps: added to the mean square of a key.
        scale: factor of the scores; 1 if None.
        device, dtype: of the parameters `query` and `norm_weight`, `[C]` each.

    Raises:
        TypeError, ValueError: arguments that do not fit, each named.

    Source:
        Attention Residuals (Kimi Team, arXiv 2603.15031), the full form. The block form is the same module over fewer
        values: the sums of finished blocks, and the sum of the block that is under way. Skipping is our definition.

    Example:
        >>> import torch, ela_kernels as ek
        >>> layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        >>> mixes = torch.nn.ModuleList(ek.AttentionResidual(8) for _ in range(4))
        >>> history = ek.PositionHistory()
        >>> history.append(torch.randn(2, 5, 8))
        >>> for layer, mix in zip(layers, mixes):
        ...     history.append(layer(mix(history)))
        >>> mixes[-1](history).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        eps: float = DEFAULT_EPS,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("reuse")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: got {type(dim).__name__}; allowed is an int")
        if dim < 1:
            raise ValueError(f"dim: got {dim}; allowed is the number of channels, 1 or more")
        self.dim, self.eps = dim, check_eps(eps)
        self.scale = None if scale is None else check_scale(scale)
        query = torch.zeros(dim, device=device, dtype=dtype)
        self.query: nn.Parameter | None = nn.Parameter(query)
        self.norm_weight: nn.Parameter | None = nn.Parameter(torch.ones_like(query))
        self.decision = self.decision.to(query.device)
        self._begin()

    def forward(
        self, values: PositionHistory | Sequence[Tensor], channels_last: bool | None = None
    ) -> Tensor:
        """What the next layer is given, like a value.

        Args:
            values: the :class:`ela_kernels.PositionHistory` of this forward pass, which then holds weights and
                divergence, and gathers gradients; or a list of tensors, as of :func:`ela_kernels.position_attention`.
            channels_last: of a list, whether the last dimension of a value is the channel. A history knows.

        Raises:
            TypeError, ValueError: as of :func:`ela_kernels.position_attention`; `channels_last` that is not that of the
                history; a list where the module is skipped.
            RuntimeError: the module is skipped, and what it takes over was changed in place; or it was pruned, and is
                the first of its history.
        """
        if not isinstance(values, PositionHistory):
            return self._retrieve_from(values, channels_last)
        values.check_form(channels_last)
        self._take_place(values)
        watched = self.watched and self.training and torch.is_grad_enabled()
        watched = watched and not (is_exporting() or is_explaining())
        before = values.last
        if self.pruned or not self.decides_as_data():
            if before is not None and self.skipped:
                return self._reuse(values, watched and self.probe_next)
            out = values.attend(*self._retrieval(), caller=self)
            if watched:
                self._observe(_with_heads(values.kl))
                weights = values.weights
                if self.weights_next and weights is not None:
                    depth = weights.shape[1]
                    self._keep_weights(weights.movedim(1, -1).reshape(-1, 1, depth), 0.0)
            return out
        out = values.attend(*self._retrieval(), caller=self)
        if before is None:
            return out
        kl = _with_heads(values.kl)
        # Inside a transform of torch.func the module is one of several.
        if watched and kl is not None and torch.compiler.is_compiling():
            self.totals.add(kl, None)
        # As in eager PyTorch, at the half and at NaN too.
        return values.choose(~(self.decision[0] > 0.5), before)

    def _take_place(self, history: PositionHistory) -> None:
        stage, place = history.stage_of(self.number), history.position
        # A compiled graph would be made for what they were; setting them takes longer than to look.
        if torch.compiler.is_compiling() or self.place != place or self.stage != stage:
            self.place, self.stage = place, stage
            if place == 0:
                self.is_first = True

    def _retrieval(self) -> tuple[Tensor, Tensor | None, float, float | None]:
        query = self.query
        if query is None:
            raise RuntimeError(
                "AttentionResidual: this module was pruned, and cannot retrieve; allowed is a place behind others in a "
                "history, with skipped as it is"
            )
        return query, self.norm_weight, self.eps, self.scale

    def _retrieve_from(self, values: Sequence[Tensor], channels_last: bool | None) -> Tensor:
        if self._last[0] if torch.compiler.is_compiling() else self.skipped:
            raise ValueError(
                f"values: got {type(values).__name__} with an AttentionResidual that is skipped, and takes over what "
                "was retrieved before it; allowed is the PositionHistory of this forward pass, which knows that. "
                "Append the values to one, or set skipped = False"
            )
        query, norm_weight, eps, scale = self._retrieval()
        options = (norm_weight, eps, scale, None, channels_last, self)
        return retrieve(query, values, None, *options).out

    def _reuse(self, history: PositionHistory, probe: bool) -> Tensor:
        """Take over the last retrieval; `probe`: and see how far this module's own would be from it."""
        if (probe or history.is_observed) and not self.pruned:
            kl = history.probe(*self._retrieval())
            if probe:
                self._observe(_with_heads(kl))
                self.probe_next = False
        served_without_kernels(self, "skipped")
        out = history.reuse(self)
        if not expects_all_parameters():
            return out
        # Where no later one retrieves, nobody reads what was added since the last that did.
        return tied_to(out, *self.parameters(), *history.unread)

    def parts(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """The parameters, and whether they take no part in a training pass: the first of a history retrieves."""
        is_idle = self.skipped and not self.is_first
        for parameter in self.parameters(recurse=False):
            yield parameter, is_idle

    def remove_unused(self) -> None:
        """Remove the parameters of a module that is skipped, for good."""
        self.query = self.norm_weight = None
        self.make_permanent()
        self.probe_next = self.weights_next = False

    def _prune_as(self, pruned: int, state_dict: dict[str, Any], prefix: str) -> None:
        self.remove_unused()

    def number_of(self, skip: object, provides: bool | None = None) -> int:
        """As of any module that can be skipped, where there is one way alone.

        Raises:
            TypeError, ValueError: by the names of the arguments.
        """
        number = mode_number(skip, provides)
        if skip != "reuse":
            raise ValueError(
                f"skip: got {skip!r} for an AttentionResidual; allowed is 'reuse': it has no input that could pass on "
                "in place of what it retrieves"
            )
        if provides is False:
            raise ValueError(
                "provides: got False for an AttentionResidual; allowed are True and None: whoever runs it appends the "
                "values, and it gives none"
            )
        return number

    def reset_parameters(self) -> None:
        """What a new module has: a query of zeros, a norm weight of ones, and no decision, unless it was pruned."""
        super().reset_parameters()
        if self.query is not None and self.norm_weight is not None:
            nn.init.zeros_(self.query)
            nn.init.ones_(self.norm_weight)

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale}"
        state = f", skipped=True, pruned={self.pruned}" if self.skipped else ""
        return f"{self.dim}, eps={self.eps}{scale}{state}"


def _with_heads(kl: Tensor | None) -> Tensor | None:
    """The divergence `[B, *positions]` as EBQM takes it, `[B, G]`: each position of a sample counts as one of one head.

    So micro-batches of one step may have sequences of different lengths.
    """
    return None if kl is None else kl.reshape(-1, 1)
