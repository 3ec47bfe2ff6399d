"""Gradients as they arrive at a node of the kernels, and first derivatives that have derivatives themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ela_kernels.backends.layout import in_form, is_interleaved, resolved
from ela_kernels.torch_internals import is_batched_gradient, version_of


def check_unchanged(dout: Tensor | None, version: int) -> None:
    """Refuse an output gradient that is no longer what a layer left."""
    if dout is not None and version_of(dout) != version:
        raise RuntimeError(
            "the gradient of a layer attention output was changed in place during the backward pass (by a hook?), "
            "but earlier layers still need it; return a new tensor from the hook instead"
        )


def with_own_memory(dout: Tensor, op: str = "layer attention") -> Tensor:
    """An output gradient that has memory of its own to read."""
    if is_batched_gradient(dout):
        raise RuntimeError(
            f"{op}: got batched gradients (is_grads_batched=True, or vectorize=True of a Jacobian), which "
            "have no memory for a kernel to read; use ela_kernels.use_backend('eager')"
        )
    return resolved(dout)


def in_form_of(value: Tensor, dout: Tensor, channels_last: bool) -> Tensor:
    """An output gradient as the kernels read it beside a map that they made; once, not for every earlier layer.

    The gradient of a sum is expanded, for instance.
    """
    dout = with_own_memory(dout)
    if dout.stride() == value.stride():
        return dout
    return in_form(dout, channels_last, is_interleaved(value, channels_last))


def refuse_second_derivative(
    history: str = "LayerHistory", functional: str = "layer_attention"
) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{history}: a second derivative was asked for (create_graph=True), and the kernels' pull backward "
            f"has none; use ela_kernels.use_backend('eager'), or the functional {functional}"
        )


def differentiable_gradients(
    outputs_of: Callable[[], Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradient of each input that requires one, None for the others, through what `outputs_of` computes of them.

    By eager PyTorch, where a kernel's backward has no derivative of its own.
    """
    with torch.enable_grad():
        outputs = outputs_of()
    pairs = [
        (o, g)
        for o, g in zip(outputs, grad_outputs, strict=True)
        if o is not None and g is not None
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    grads = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(grads) if x is not None and x.requires_grad else None for x in inputs)
