"""First derivatives that have derivatives themselves: by eager PyTorch, where a kernel's backward has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_gradients(
    outputs_of: Callable[[], Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradient of each input that requires one, None for the others, through what `outputs_of` computes of them."""
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
