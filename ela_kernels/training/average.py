"""A moving average of the weights: PyTorch's, with the decay of torchvision's reference script."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ela_kernels.modules import ELA
from ela_kernels.training.options import Options
from ela_kernels.training.recipe import Recipe


def decay_of(recipe: Recipe, images: int, epochs: int) -> float:
    """The decay of one update, for steps of so many images in all processes together and so many epochs.

    `1 - decay` grows with the images between two updates, and shrinks with the epochs, so that the average looks back
    over the same part of a run whatever these are.

    Source:
        torchvision's references/classification/train.py, which has it from pycls.
    """
    share = (1 - recipe.model_ema_decay) * images * recipe.model_ema_steps / epochs
    return 1 - min(1.0, share)


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model` that averages its parameters and its floating-point buffers, and copies all others.

    In the first updates the decay is less, `(1 + n) / (10 + n)` after `n` of them: what the average began with is
    forgotten in a short run too.
    """

    def update(average: Any, current: Any, updates: Tensor | int) -> None:
        if not average[0].is_floating_point():
            # Counters, which PyTorch's own would average and cut off.
            for old, new in zip(average, current, strict=True):
                old.copy_(new)
            return
        n = int(averaged.n_averaged)  # which stays on the host, unlike `updates`
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(average, current, updates)

    averaged = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    averaged.eval()
    return averaged


class Average:
    """The moving average of a model in training.

    Args:
        model: whose. The average begins with its weights.
        options: of the run, whose recipe says the decay, and in which steps the average takes in the weights.
        processes: of the run.
    """

    def __init__(self, model: nn.Module, options: Options, processes: int = 1) -> None:
        self._source, self._recipe = model, options.recipe
        images = options.batch_size * processes
        self.model = make_average(model, decay_of(options.recipe, images, options.epochs))

    @torch.no_grad()
    def step(self, steps: int, epoch: int) -> None:
        """Take in the weights after a step, before which there were `steps`; EBQM's decisions as they are now."""
        if steps % self._recipe.model_ema_steps:
            return
        self.model.update_parameters(self._source)
        for averaged, layer in zip(
            self.model.module.modules(), self._source.modules(), strict=True
        ):
            if isinstance(layer, ELA) and isinstance(averaged, ELA):
                # On the device, where looking at one would wait for it.
                averaged.decision.copy_(layer.decision)
        if epoch < self._recipe.lr_warmup_epochs:
            # The next one begins anew: what the weights were while the rate rose is of no use.
            self.model.n_averaged.zero_()
