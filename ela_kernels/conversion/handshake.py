"""Whether a module computes what one of ours does: both are run on small random maps, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.conversion.fused import (
    SIZES,
    Form,
    Fused,
    FusedLayer,
    fuse,
    fused_class,
    names_taken,
)
from ela_kernels.conversion.trial import (
    Copy,
    DisagreementError,
    RaisedError,
    close,
    failure,
    parameter_names,
    same_gradients,
)
from ela_kernels.ops.layer_attention.reference import layer_attention_reference

# Deeper than any stage that was published, so that a window over the last layers is seen for what it is.
MAP, DEPTH = (3, 2), 48
SUMS = "keys and values come from running sums: not softmax layer attention"


def head_sizes(module: nn.Module, dim: int) -> tuple[int, ...]:
    """The head size that the attributes of `module` tell, or else all that it may have."""
    for names, size_of in (
        (("heads", "num_heads", "n_heads", "nheads"), lambda n: dim // n),
        (("dim_perhead", "head_dim", "dim_head", "dim_per_head"), lambda n: n),
    ):
        for name in names:
            value = getattr(module, name, None)
            if type(value) is int and value > 0 and dim % value == 0:
                return (size_of(value),)
    return tuple(d for d in range(1, dim + 1) if dim % d == 0)


class Layer:
    """A module with Wq, Wk and Wv, run beside ours, alone or as the child `name` of the module `around` it.

    Raises:
        DisagreementError: its parameters are not those of layer attention.
    """

    def __init__(self, module: nn.Module, around: nn.Module | None = None, name: str = "") -> None:
        wq, wk, wv = (getattr(module, name, None) for name in ("Wq", "Wk", "Wv"))
        if not (isinstance(wq, nn.Conv1d) and isinstance(wk, nn.Conv1d)):
            raise DisagreementError("Wq and Wk are no convolutions over the channels")
        if not (isinstance(wv, nn.Conv2d) and wv.groups == wv.in_channels == wv.out_channels):
            raise DisagreementError("Wv is no depthwise convolution")
        if wq.kernel_size != wk.kernel_size:
            raise DisagreementError("Wq and Wk are of two sizes")
        self.dim, self.kernel_size = wv.in_channels, wq.kernel_size[0]
        self.names = parameter_names(module)
        self.sizes = head_sizes(module, self.dim)
        self.copy = Copy(module if around is None else around)
        self.own: Any = self.copy.module.get_submodule(name)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key `[B, C]` and value of a map, by the copy's parameters, as ours make them."""
        y = x.mean((2, 3)).unsqueeze(1)
        with failure("a convolution of it"):
            return self.own.Wq(y).squeeze(1), self.own.Wk(y).squeeze(1), self.own.Wv(x)

    def form(self, head_dim: int, **found: Any) -> Form:
        return Form(self.dim, head_dim, self.kernel_size, self.names, **found)


def base_form(module: nn.Module) -> Form:
    """What `module` is as the base form, `forward(x, keys, values) -> (out, keys, values)`.

    Raises:
        DisagreementError: it is something else.
    """
    layer = Layer(module)
    if len(layer.names) != 3:
        raise DisagreementError(_unknown_call(layer))
    random = layer.copy.random
    x = random(2, layer.dim, *MAP).requires_grad_()
    held_keys = random(2, DEPTH, layer.dim).requires_grad_()
    held_values = random(2, DEPTH, layer.dim, *MAP).requires_grad_()
    given = (x, held_keys, held_values)
    try:
        found = layer.copy.run(*given)
    except DisagreementError:
        if _adds_up(layer, x):
            raise DisagreementError(SUMS) from None
        raise
    out, keys, values = _three(found)
    q, k, v = layer.parts(x)
    k, v = k.unsqueeze(1), v.unsqueeze(1)
    starts = keys.dim() == 3 and keys.shape[1] == 1
    if not starts:
        k, v = torch.cat((held_keys, k), 1), torch.cat((held_values, v), 1)
    if not (close(keys, k) and close(values, v)):
        raise DisagreementError(_other_state(keys, values, k, v, x))
    starts_on_none = starts
    if not starts:
        try:
            first = _three(layer.copy.run(x, None, None))
        except RaisedError:
            pass  # it is never called so
        else:
            one = (v[:, -1], k[:, -1:], v[:, -1:])
            starts_on_none = all(map(close, first, one))
            if not starts_on_none:
                raise DisagreementError(
                    "given no keys and values it does something else than to begin anew"
                )
    if starts and len(layer.sizes) > 1:  # one layer alone is the same in all of them
        raise DisagreementError(
            "its head size cannot be told: it begins anew at every call, and has no attribute heads or head_dim"
        )
    for head_dim in layer.sizes:
        heads = layer.dim // head_dim
        want, _, _ = layer_attention_reference(
            q, _unbound(k), _unbound(v), heads, head_dim**-0.5, None, False
        )
        if close(out, want):
            form = layer.form(head_dim, starts=starts, starts_on_none=starts_on_none)
            check_names(layer.own, FusedLayer, form)
            check_class(layer.own, FusedLayer)
            calls = [given, (x, None, None)] if starts_on_none else [given]
            theirs = [_three(layer.copy.evaluated(*call)) for call in calls]
            gradients = [
                layer.copy.gradients(of, call) for of, call in zip(theirs, calls, strict=True)
            ]
            fuse(layer.own, FusedLayer, fused_form=form)
            for call, of, wanted in zip(calls, theirs, gradients, strict=True):
                agree(layer.copy, layer.own(*call), of, call, wanted)
            return form
    raise DisagreementError(
        "its output is not softmax attention over the keys with scores divided by the root of the head size"
    )


def check_names(module: nn.Module, mixin: type[Fused], form: Form | None = None) -> None:
    """That the class of ours hides nothing that the module's own code may need.

    Raises:
        DisagreementError: it does.
    """
    taken = names_taken(module, mixin)
    if form is not None:
        sizes = {**form._asdict(), "heads": form.dim // form.head_dim}
        taken += [n for n in SIZES if getattr(module, n, sizes[n]) != sizes[n]]
    if taken:
        raise DisagreementError(
            f"it has {', '.join(taken)} of its own, a name that ours needs; rename that to convert it"
        )


def check_class(module: nn.Module, mixin: type[Fused]) -> None:
    """That a class of ours can stand in front of that of `module`.

    Raises:
        DisagreementError: its class or its metaclass does not allow that.
    """
    with failure("a class in front of its own"):
        fused_class(mixin, type(module))


def agree(
    copy: Copy,
    ours: Sequence[Any],
    theirs: Sequence[Tensor],
    given: Sequence[Any],
    gradients: Sequence[Tensor | None],
) -> None:
    """That the converted copy itself gives what the original gave, and its gradients."""
    made = [out + 0 for out in ours]
    if not all(map(close, made, theirs)):
        raise DisagreementError("our layer gives another result")
    if not same_gradients(copy.gradients(made, given), gradients):
        raise DisagreementError("its gradients are others than those of what it computes")


def _adds_up(layer: Layer, x: Tensor) -> bool:
    """Whether it takes zeros of no dimension for keys and values, as only sums do."""
    try:
        found = layer.copy.evaluated(x, 0.0, 0.0)
    except DisagreementError:
        return False
    return isinstance(found, (tuple, list)) and len(found) == 3


def _three(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    if (
        isinstance(found, (tuple, list))
        and len(found) == 3
        and all(isinstance(t, Tensor) for t in found)
    ):
        return tuple(found)
    raise DisagreementError("it does not give an output with keys and values")


def _other_state(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, x: Tensor) -> str:
    """Why keys and values are not the concatenation of those that came in and the layer's own."""
    if keys.shape == k[:, :-1].shape and values.shape == v[:, :-1].shape:
        return SUMS
    if close(values[:, -1], x) if values.dim() == 5 else False:
        return (
            "it keeps raw feature maps, and applies Wk and Wv to all of them at every layer: another function than "
            "keys and values made once"
        )
    return "what it hands on is not the keys and values it was given with its own behind them"


def _unknown_call(layer: Layer) -> str:
    """Why a layer of another number of arguments is left."""
    names = ", ".join(layer.names)
    if len(layer.names) == 2:
        return _of_context(layer)
    return f"its forward({names}) is no call of layer attention that is known here"


def _of_context(layer: Layer) -> str:
    """A layer that is given all maps so far, `[B, T, C, H, W]`, and applies Wk and Wv to all of them anew."""
    names = ", ".join(layer.names)
    random = layer.copy.random
    context = random(2, DEPTH, layer.dim, *MAP)
    x = context[:, -1].clone()
    try:
        out = layer.copy.evaluated(x, context)
    except DisagreementError:
        out = None
    if isinstance(out, (tuple, list)):
        return SUMS
    if not isinstance(out, Tensor):
        try:
            state = layer.copy.evaluated(x, None)
        except DisagreementError:
            state = None
        if isinstance(state, (tuple, list)):
            return SUMS
        return f"its forward({names}) is no call of layer attention that is known here"
    q = layer.parts(x)[0]
    pairs = [layer.parts(m)[1:] for m in context.unbind(1)]
    keys, values = (torch.stack(t, 1) for t in zip(*pairs, strict=True))
    for head_dim in layer.sizes:
        heads = layer.dim // head_dim
        mixed = [
            t.view(2, heads, DEPTH, head_dim, *t.shape[3:]).transpose(1, 2).flatten(2, 3)
            for t in (keys, values)
        ]
        for what, (ks, vs) in (("view", mixed), ("plain", [keys, values])):
            want = layer_attention_reference(
                q, _unbound(ks), _unbound(vs), heads, head_dim**-0.5, None, False
            )[0]
            if close(out, want):
                if what == "view" and heads > 1:
                    return (
                        "view() mixes layers and heads: the published code of eq. 4; converting would change the "
                        "result"
                    )
                return "it applies Wk and Wv to all maps so far at every layer, and hands no keys and values on"
    return f"its forward({names}) gives something else than softmax layer attention"


def _unbound(stacked: Tensor) -> Sequence[Tensor]:
    return list(stacked.unbind(1))
