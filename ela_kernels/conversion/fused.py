"""Classes that stand in front of those of published layers, so that the very instances run on the kernels.

A converted layer is still an instance of its own class, with its parameters, hooks and names; its class is one made
here, of a mixin below and of the class that it had. Wherever PyTorch has to see every operation (compiled graphs,
tracing, `torch.func`), and for whatever the mixin does not know, the original forward runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import refusal_by
from ela_kernels.backends.tracing import is_transformed, needs_dispatcher
from ela_kernels.backends.types import ValueAct
from ela_kernels.conversion.cut import end_here
from ela_kernels.conversion.factors import HAVE_FACTORS, Gated, gated
from ela_kernels.conversion.stacked import Lazy, Stacked, continued
from ela_kernels.explaining import refused
from ela_kernels.modules.layer_attention import LayerAttention
from ela_kernels.modules.light import LightLayerAttention
from ela_kernels.modules.query_key_value import QueryKeyValue, pooled, runs_as
from ela_kernels.ops.autocast import is_autocast_on, layer_dtype
from ela_kernels.ops.depth_mix.interface import mixed
from ela_kernels.ops.layer_attention import LayerHistory
from ela_kernels.ops.layer_attention.observer import present_observer
from ela_kernels.ops.layer_attention.plan import LayerPlan
from ela_kernels.ops.layer_attention.reference import log_weights_reference
from ela_kernels.torch_internals import has_hooks, has_own_hooks, is_plain_convolution, own_child


class ActModule(NamedTuple):
    """The module that a value passes, as it was found: its name, its class, and which form it says that it has."""

    name: str
    kind: type[nn.Module]
    approximate: object

    @classmethod
    def of(cls, name: str, module: nn.Module) -> ActModule:
        return cls(name, type(module), getattr(module, "approximate", None))

    def is_still(self, module: nn.Module | None) -> bool:
        return (
            type(module) is self.kind
            and "forward" not in vars(module)
            and getattr(module, "approximate", None) == self.approximate
        )


class Form(NamedTuple):
    """What the handshake found out about a published layer.

    Attributes:
        dim, head_dim, kernel_size: as of :class:`ela_kernels.LayerAttention`.
        parameters: names of the arguments of its forward.
        value_act: what the value of a light layer passes.
        act_module: the module of that; None where it is a function's.
        starts: whether it begins anew whatever it is given.
        starts_on_none: whether it begins anew where keys and values are None.
        carries: whether keys and values are no tensors in compiled graphs either, since some layers can be skipped.
    """

    dim: int
    head_dim: int
    kernel_size: int
    parameters: tuple[str, ...]
    value_act: ValueAct | None = None
    act_module: ActModule | None = None
    starts: bool = False
    starts_on_none: bool = False
    carries: bool = False


class InFront(nn.Module):
    """In front of the class that an instance had; `unfuse` takes it away again."""

    fused_original: type[nn.Module]
    fused_mixin: type[InFront]
    fused_prefix = "Fused"  # of the class's name

    def fused_original_forward(self, *args: Any, **options: Any) -> Any:
        """As the module was written."""
        return self.fused_original.forward(self, *args, **options)

    def __init_subclass__(cls, **options: Any) -> None:
        """Not that of the original, which may keep a register of its subclasses or ask for options."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, and cannot be found by its name.
        reduced = super().__reduce_ex__(max(protocol, 2))
        if not isinstance(reduced, tuple) or reduced[1] != (type(self),):
            return reduced  # the class has a way of its own
        return _blank, (self.fused_mixin, self.fused_original), *reduced[2:]

    def fused_release(self) -> None:
        """Take away what the mixin keeps in the instance."""


class Fused(InFront):
    """In front of the class of a converted module."""

    fused_what: str  # for the report

    def fused_release(self) -> None:
        super().fused_release()
        del self.fused_what


class FusedFilters(Fused, QueryKeyValue):
    """Query, key and value by the convolutions of a published layer, whose sizes the handshake found."""

    fused_form: Form

    dim = property(lambda self: self.fused_form.dim)
    head_dim = property(lambda self: self.fused_form.head_dim)
    kernel_size = property(lambda self: self.fused_form.kernel_size)

    @staticmethod
    def is_filter(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Conv1d)
            and runs_as(module, nn.Conv1d)
            and is_plain_convolution(module)
            and module.in_channels == module.out_channels == 1
            and module.stride == module.dilation == (1,)
            and module.padding == (module.kernel_size[0] // 2,)
            and module.padding_mode == "zeros"
        )

    def filtered(self, y: Tensor, *filters: nn.Module) -> list[Tensor]:
        y = y.unsqueeze(1)
        return [w(y).squeeze(1) for w in filters]

    def fused_is_watched(self) -> bool:
        """Whether a part that ours does not call has hooks."""
        others = [m for name, m in self.named_children() if name not in ("Wq", "Wk", "Wv")]
        return any(has_own_hooks(*other.modules()) for other in others)

    def fused_release(self) -> None:
        super().fused_release()
        del self.fused_form


class Carried:
    """What layers that can be skipped hand on in a compiled graph as keys and values: the history, and no tensor."""

    def __init__(self, history: LayerHistory) -> None:
        self.history = history


class FusedLayer(FusedFilters, LayerAttention):
    """The base form: `forward(x, keys, values) -> (out, keys, values)`, with the history where those were."""

    stands_for = LayerAttention

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original: `out` `[B, C, H, W]`, keys `[B, t, C]` and values `[B, t, C, H, W]` up to this layer.

        Keys and values are stand-ins that carry the history, and become tensors when they are looked into. Given a
        :class:`ela_kernels.LayerHistory` in their place it is a `LayerAttention`.
        """
        if len(args) > 1 and isinstance(args[1], LayerHistory):
            return super().forward(*args, **options)
        names = self.fused_form.parameters
        given = (*args, *(options[n] for n in names[len(args) :] if n in options))
        if len(given) != 3 or len(given) != len(args) + len(options):
            return self.fused_original_forward(*args, **options)
        x, *state = given
        history = self.fused_history(x, *state)
        if history is None:
            return self.fused_original_forward(*given)
        end_here(self, self, x, history)
        if isinstance(history, Gated):
            o, left = self.fused_mixed(x, history)
            return o, *left
        return self.fused_with_state(super().forward(x, history), history)

    def fused_mixed(self, x: Tensor, before: Gated) -> tuple[Tensor, Gated]:
        """What the layer retrieves from values that have factors, and what it hands on: no value is written anew."""
        self.check_input(x)
        refused(self, "layer", refusal_by((HAVE_FACTORS,)), tells=False)
        history = LayerHistory()
        plan = self.plan(x, history)
        if isinstance(plan, LayerPlan):
            history.provide_layer(x, plan, heads=self.heads, caller=self)
            pairs = history.left_by_last().pairs
            k, v = pairs.keys[-1], pairs.values[-1]
            (q,) = self.filtered(pooled(x), self.Wq)
        else:
            q, k, v = self.query_key_value(x)
        left = before.with_own(k, v)
        heads, keys = self.heads, left.keys.unbind(1)
        # Of so few numbers that no kernel is worth its call.
        weights = log_weights_reference(q, keys, heads, self.head_dim**-0.5).exp()
        by_channel = weights.repeat_interleave(self.head_dim, 1) * left.factors()
        return mixed(by_channel, left.values.pairs, False, self), left

    @staticmethod
    def fused_with_state(
        out: Tensor, history: LayerHistory, x: Tensor | None = None
    ) -> tuple[Any, ...]:
        """What the original gives, after the layer's turn in `history`; `x`: of a layer that may have given no pair."""
        if torch.compiler.is_compiling():
            return out, Carried(history), Carried(history)
        left = history.left_by_last()
        keys, values = left.pairs.keys, left.pairs.values
        if not keys:
            assert x is not None
            return (
                out,
                x.new_empty(x.shape[0], 0, x.shape[1]),
                x.new_empty(x.shape[0], 0, *x.shape[1:]),
            )
        held_keys, held_values = history.held or (None, None)
        state = (
            Stacked.of(keys, history, left, held_keys),
            Stacked.of(values, history, left, held_values),
        )
        if not torch.is_grad_enabled() and any(v.requires_grad for v in values):
            # Concatenated here, they would be cut off from the layers before.
            return out, *(t.make() for t in state)
        return out, *state

    def fused_history(self, x: Any, keys: Any, values: Any) -> Any:
        """The one that the layer goes on with; None where the original has to serve."""
        form = self.fused_form
        if not isinstance(x, Tensor) or self.fused_is_watched():
            return None
        if (needs_dispatcher(x) or is_transformed()) and not form.carries:
            return None
        if form.starts or (form.starts_on_none and keys is None and values is None):
            return LayerHistory(repeats=True)  # what it is given says all about the pass
        if isinstance(keys, Carried):
            return keys.history
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
            return None
        # Anything else, resized or empty, say, is the original's own to serve or to refuse.
        batch, *rest = x.shape
        if keys.dim() != 3 or keys.shape[::2] != (batch, form.dim) or keys.device != x.device:
            return None
        if values.shape != (batch, keys.shape[1], *rest) or values.device != x.device:
            return None
        history = continued(keys, values)
        if history is None:
            if not keys.dtype == values.dtype == x.dtype or is_autocast_on(x):
                return None
            # Whoever looks on, or may have layers skipped, is told by a history.
            if not form.carries and present_observer() is None:
                found = gated(keys, values)
                if found is not None:
                    return found
            keys, values = (t.make() if isinstance(t, Lazy) else t for t in (keys, values))
            history = LayerHistory.holding(keys, values, heads=self.heads, repeats=True)
        return history


class FusedGate(FusedFilters, LightLayerAttention):
    """The light form's layer: `forward(x)`, the gated value alone.

    Given the output before and a decay as well, it is the light form.
    """

    stands_for = LightLayerAttention
    value_act = property(lambda self: self.fused_form.value_act)

    def fused_is_watched(self) -> bool:
        """Whether a part that ours does not call has hooks, or the activation is not what it was."""
        act = self.fused_form.act_module
        if act is not None and not act.is_still(own_child(self, act.name)):
            return True
        return super().fused_is_watched()

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original, or `[B, C, H, W]` of `x`, the output before and the decay."""
        if options or len(args) != 3:
            return self.fused_original_forward(*args, **options)
        return super().forward(*args)


def is_wrapped(*modules: nn.Module) -> bool:
    """Whether calling any of `modules` runs more than the forward of its class."""
    return has_hooks(*modules) or any("forward" in vars(module) for module in modules)


def gate_of(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> FusedGate | None:
    """The light layer in a module that is called with a map and the output before; None where it may not be called."""
    layer = own_child(module, module.fused_layer_name)
    if options or len(args) != 2 or not isinstance(layer, FusedGate):
        return None
    return None if is_wrapped(layer) or layer.fused_is_watched() else layer


def summed_dtype(x: Tensor, prev_out: Any, decay: Tensor) -> torch.dtype:
    """Of the original's `gated + decay * prev_out`: autocast casts what convolutions give, and neither product nor sum.

    A factor in float32 beside it makes the result float32, from there on through the residual connections too.
    """
    dtype = torch.promote_types(layer_dtype(x), decay.dtype)
    return torch.promote_types(dtype, prev_out.dtype) if isinstance(prev_out, Tensor) else dtype


class FusedDecay(Fused):
    """The module around a light layer: `forward(x, prev_out)`, the gated value plus the decayed previous output."""

    fused_layer_name: str
    fused_factor: str

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the original: `[B, C, H, W]` of `x` and the output before, `[B, C, H, W]` each."""
        layer = gate_of(self, args, options)
        if layer is None:
            return self.fused_original_forward(*args, **options)
        x, prev_out = args
        if not isinstance(x, Tensor) or needs_dispatcher(x) or is_transformed():
            return self.fused_original_forward(x, prev_out)
        end_here(self, layer, x, prev_out)
        decay = self.fused_decay()
        return layer(x, prev_out, decay).to(summed_dtype(x, prev_out, decay))

    def fused_decay(self) -> Any:
        """The decay, `[C, 1, 1]`."""
        return getattr(self, self.fused_factor)

    def fused_release(self) -> None:
        super().fused_release()
        del self.fused_layer_name, self.fused_factor


_classes: dict[tuple[type[InFront], type[nn.Module]], type[InFront]] = {}


def fused_class(mixin: type[InFront], original: type[nn.Module]) -> type[InFront]:
    """The class of `mixin` in front of `original`; the same one at every call."""
    found = _classes.get((mixin, original))
    if found is None:
        body = {"fused_mixin": mixin, "fused_original": original, "__module__": original.__module__}
        found = type(f"{mixin.fused_prefix}{original.__name__}", (mixin, original), body)
        found = _classes.setdefault((mixin, original), found)
    return found


def put_in_front(module: nn.Module, mixin: type[InFront], **kept: Any) -> None:
    """Put `mixin` in front of the class of `module`, with what it keeps in the instance."""
    module.__class__ = fused_class(mixin, type(module))
    for name, value in kept.items():
        object.__setattr__(module, name, value)


def fuse(module: nn.Module, mixin: type[Fused], what: str = "", **kept: Any) -> None:
    """The same for a converted module."""
    put_in_front(module, mixin, fused_what=what, **kept)


def names_taken(module: nn.Module, mixin: type[InFront]) -> list[str]:
    """Names of the module or its class that the mixin would hide: the module's own code may need them.

    The sizes that both have are no matter where they are the same.
    """
    own = set(vars(module)) | {name for name, _ in module.named_children()}
    own |= {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers())}
    for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        own |= set(vars(kind))
    hidden = own & (set(dir(mixin)) - set(dir(nn.Module)))
    return sorted(name for name in hidden if name not in SIZES)


SIZES = ("dim", "head_dim", "heads", "kernel_size")


def unfuse(module: InFront) -> None:
    """Undo :func:`put_in_front`."""
    module.fused_release()
    module.__class__ = module.fused_original  # type: ignore[assignment]


def _blank(mixin: type[InFront], original: type[nn.Module]) -> nn.Module:
    """An instance without anything, for a copy or a pickle to fill."""
    kind = fused_class(mixin, original)
    return kind.__new__(kind)
