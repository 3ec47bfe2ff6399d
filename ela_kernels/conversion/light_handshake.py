"""Whether a module around a gate computes the light form, on maps or on tokens: both are run, and compared."""

from __future__ import annotations

import contextlib
from itertools import product
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ela_kernels.backends.types import ValueAct
from ela_kernels.conversion.fused import ActModule, Form, Fused, FusedDecay, FusedGate, fuse
from ela_kernels.conversion.handshake import MAP, Layer, agree, check_class, check_names
from ela_kernels.conversion.tokens import FusedTokens
from ela_kernels.conversion.trial import (
    DisagreementError,
    close,
    failure,
    kept_by,
    parameter_names,
)
from ela_kernels.modules.tokens import as_map, as_tokens
from ela_kernels.ops.light_layer_attention import light_layer_attention
from ela_kernels.ops.light_layer_attention.interface import activated

# Of the squares of tokens that a module is tried on.
SIDES = (3, 2)

_ACTS: dict[ValueAct | None, str] = {
    None: "",
    "gelu": ", GELU on the value",
    "gelu_tanh": ", GELU with a tanh on the value",
}


class LightForm(NamedTuple):
    """What was found out about a light layer and the module around it.

    Attributes:
        form: of the layer.
        around: the class of ours for the module, and `kept` what that keeps in the instance.
    """

    form: Form
    around: type[Fused]
    kept: dict[str, Any]

    @property
    def what(self) -> str:
        """For the report."""
        dim, head_dim, act = self.form.dim, self.form.head_dim, _ACTS[self.form.value_act]
        where = " on tokens" if self.around is FusedTokens else ""
        return f"light form{where}, {dim // head_dim} heads of {head_dim}{act}"

    def carry_out(self, module: nn.Module) -> None:
        """Convert the module, and the layer in it."""
        layer = module.get_submodule(self.kept["fused_layer_name"])
        fuse(layer, FusedGate, fused_form=self.form)
        fuse(module, self.around, **self.kept)


class _Reading(NamedTuple):
    """What a module may compute: with which parameter as decay, and with which norms of x and of the output before.

    `norms` is None where it is called with maps.
    """

    decay: str
    norms: tuple[str | None, str | None] | None

    def computed(
        self, layer: Layer, given: tuple[Tensor, Tensor], act: ValueAct | None, heads: int
    ) -> Tensor:
        """What the copy would give then."""
        module = layer.copy.module
        decay = module.get_parameter(self.decay).flatten()
        if self.norms is None:
            return _light(layer, *given, decay, act, heads)
        x, prev_out = (
            t if name is None else module.get_submodule(name)(t)
            for t, name in zip(given, self.norms, strict=True)
        )
        out = _light(layer, as_map(x[:, 1:]), as_map(prev_out[:, 1:]), decay, act, heads)
        return torch.cat((x[:, :1], as_tokens(out)), 1)


def light_form(module: nn.Module, name: str) -> LightForm:
    """What `module`, with the layer `name` in it, is as the light form, `forward(x, prev_out) -> out`.

    On maps it has a factor `[C, 1, 1]` of the output before. On tokens `[B, 1 + N, C]`, N a square, that is `[C]` or
    `[1, 1, C]`, x and the output before may each pass a LayerNorm first, and the first token of x goes by.

    Raises:
        DisagreementError: it is something else.
    """
    layer = Layer(module.get_submodule(name), module, name)
    if len(parameter_names(module)) != 2:
        raise DisagreementError(
            "it gives the gated value alone, and the module around it is not called with the output before"
        )
    act, act_module = _check_gate(layer)
    readings = _readings(layer)
    random, dim = layer.copy.random, layer.dim
    if readings[0].norms is None:
        shapes: list[tuple[int, ...]] = [(2, dim, *MAP)]
    else:
        shapes = [(2, 1 + side * side, dim) for side in SIDES]
    given = [(random(*s).requires_grad_(), random(*s).requires_grad_()) for s in shapes]
    outs = [layer.copy.run(*pair) for pair in given]
    for head_dim, reading in product(layer.sizes, readings):
        heads = dim // head_dim
        if all(
            close(out, reading.computed(layer, pair, act, heads))
            for out, pair in zip(outs, given, strict=True)
        ):
            kept: dict[str, Any] = {"fused_layer_name": name, "fused_factor": reading.decay}
            if reading.norms is not None:
                _check_parts(layer.copy.module, {name, *reading.norms})
                kept["fused_norms"] = reading.norms
            form = layer.form(head_dim, value_act=act, act_module=act_module)
            found = LightForm(form, FusedDecay if reading.norms is None else FusedTokens, kept)
            _confirm(layer, found, given, outs)
            return found
    raise DisagreementError("its output is not the gated value plus the decayed output before")


def _light(
    layer: Layer, x: Tensor, prev_out: Tensor, decay: Tensor, act: ValueAct | None, heads: int
) -> Tensor:
    q, k, v = layer.parts(x)
    return light_layer_attention(q, k, activated(v, act), prev_out, decay, heads)


def _readings(layer: Layer) -> list[_Reading]:
    """What the module around the layer may compute, by its parameters and norms."""
    around, dim = layer.copy.module, layer.dim
    shapes = {n: p.shape for n, p in around.named_parameters(recurse=False)}
    of_maps = [n for n, shape in shapes.items() if shape == (dim, 1, 1)]
    if of_maps:
        return [_Reading(n, None) for n in of_maps]
    of_tokens = [n for n, shape in shapes.items() if shape in ((dim,), (1, 1, dim))]
    if not of_tokens:
        raise DisagreementError(
            f"the module around it has no factor of the output before, [{dim}, 1, 1], or [{dim}] on tokens"
        )
    norms = [None, *(n for n, m in around.named_children() if isinstance(m, nn.LayerNorm))]
    return [_Reading(n, (of_x, of_prev)) for n in of_tokens for of_x in norms for of_prev in norms]


def _check_parts(around: nn.Module, called: set[str | None]) -> None:
    """That ours calls all that is in a module on tokens: what does nothing now, a dropout, say, may do more later."""
    others = [n for n, _ in around.named_children() if n not in called]
    if others:
        raise DisagreementError(
            f"the module around it has {', '.join(others)}, which ours does not call"
        )


def _confirm(
    layer: Layer, found: LightForm, given: list[tuple[Tensor, Tensor]], outs: list[Tensor]
) -> None:
    """That the copy gives the same once it is converted."""
    around = layer.copy.module
    check_names(layer.own, FusedGate, found.form)
    check_names(around, found.around)
    check_class(layer.own, FusedGate)
    check_class(around, found.around)
    wanted = [layer.copy.gradients((o,), pair) for o, pair in zip(outs, given, strict=True)]
    found.carry_out(around)
    for pair, out, gradients in zip(given, outs, wanted, strict=True):
        agree(layer.copy, (around(*pair),), (out,), pair, gradients)


def _check_gate(layer: Layer) -> tuple[ValueAct | None, ActModule | None]:
    """That a light layer gives its gated value, and what that passes before: an activation of ours, and its module.

    Raises:
        DisagreementError: it gives something else; what, if that can be told.
    """
    x = layer.copy.random(2, layer.dim, *MAP)
    before = kept_by(layer.own)
    with failure("its forward(x)"):
        out = layer.own.eval()(x)
    if kept_by(layer.own) != before:
        raise DisagreementError("its forward keeps something in the module, which ours would not")
    q, k, v = layer.parts(x)
    nothing, no_decay = torch.zeros_like(v), v.new_zeros(layer.dim)

    def is_gated(value: object) -> bool:
        if not isinstance(value, Tensor) or value.shape != v.shape:
            return False
        return any(
            close(out, light_layer_attention(q, k, value, nothing, no_decay, layer.dim // size))
            for size in layer.sizes
        )

    if is_gated(v):
        return None, None
    # What each part of the layer makes of the value, where it is one that can take it.
    passed: dict[str, Tensor] = {}
    for name, part in layer.own.named_children():
        with contextlib.suppress(Exception):  # a pooling, say
            passed[name] = part(v)
    for act in get_args(ValueAct):
        value = activated(v, act)
        if is_gated(value):
            names = (name for name, out in passed.items() if close(out, value))
            found = next((ActModule.of(n, layer.own.get_submodule(n)) for n in names), None)
            return act, found
    for name, value in passed.items():
        if is_gated(value):
            kind = type(layer.own.get_submodule(name)).__name__
            raise DisagreementError(
                f"its value passes {kind} ({name}), which no kernel here knows: converting it would gain nothing"
            )
    raise DisagreementError("its output is not a value that is gated by query and key")
