"""Whether the nodes of a history gather every gradient of the tensors that it holds; else the functional op serves."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def signs_are_in_memory(*tensors: Tensor) -> bool:
    """Whether kernels can read the tensors that autograd knows.

    PyTorch may hold a negation back as a flag: what is in memory is then another tensor than the one that a history
    holds, and that may ask for a gradient later.
    """
    return not any(map(Tensor.is_neg, tensors))


class Gathering(NamedTuple):
    """What is known of the tensors that a history holds, as an immutable value.

    Kernels of the pull form give no gradient to what they read: a node that was made when the tensor was added gathers
    it. Where one was not made, or was made of another tensor than the one that kernels would read, no layer may go that
    way, whatever it is that it retrieves.

    Attributes:
        is_whole: every tensor that had a gradient when it was added has a node, and the signs of all are in memory.
        without_gradient: those that had none. A leaf among them may ask for one at any time, and has no node then.
    """

    is_whole: bool = True
    without_gradient: tuple[Tensor, ...] = ()

    @property
    def serves(self) -> bool:
        """Whether the gradients that are asked for now are gathered."""
        if not self.is_whole:
            return False
        return not torch.is_grad_enabled() or not any(
            tensor.requires_grad for tensor in self.without_gradient
        )

    def with_tensors(self, tensors: tuple[Tensor, ...], have_node: bool) -> Gathering:
        """With `tensors` added; `have_node`: a node gathers the gradients of those that have one."""
        is_whole, without_gradient = self
        for tensor in tensors:
            if not tensor.requires_grad:
                without_gradient = (*without_gradient, tensor)
            elif not have_node:
                is_whole = False
        return Gathering(is_whole and signs_are_in_memory(*tensors), without_gradient)
