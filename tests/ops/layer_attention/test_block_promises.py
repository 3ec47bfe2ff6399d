"""A block's norm, activation and drop path, kept as PyTorch's modules keep them, however they were changed."""

from __future__ import annotations

import copy

import pytest
import torch
from support.layer_stages import FORMS, gradients, light_step, make_blocks, make_light_blocks, step
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import ela_kernels as ek
from ela_kernels.backends.cpp.layer import layer
from ela_kernels.backends.extension import extension
from ela_kernels.backends.types import Filters, NormAct
from ela_kernels.ops.light_layer_attention.history import PreviousOutput

pytestmark = pytest.mark.skipif(extension() is None, reason="needs the compiled kernels")


def with_attributes(**attributes):
    def change(block):
        for name, value in attributes.items():
            setattr(block.norm, name, value)

    return change


def other(name, module):
    return lambda block: setattr(block, name, module)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


SERVED = {
    "momentum 0": with_attributes(momentum=0.0),
    "momentum 1": with_attributes(momentum=1.0),
    "no longer tracked": with_attributes(track_running_stats=False),
    "no count": with_attributes(num_batches_tracked=None),
    "no count, cumulative": with_attributes(num_batches_tracked=None, momentum=None),
    "a count, no statistics": with_attributes(running_mean=None, running_var=None),
    "frozen": lambda block: block.norm.eval(),
    "gamma frozen": lambda block: block.norm.weight.requires_grad_(False),
    "all but gamma frozen": lambda block: block.requires_grad_(False).norm.weight.requires_grad_(),
    "all but beta frozen": lambda block: block.requires_grad_(False).norm.bias.requires_grad_(),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [make_blocks, make_light_blocks])
@pytest.mark.parametrize("change", SERVED)
def test_norms_that_are_served(both_ways, change, make, training):
    blocks, x = make((2, 6, 4, 5), 2, 3)
    blocks.train(training)
    SERVED[change](blocks[0])
    run = step if make is make_blocks else light_step

    def twice():
        twice = copy.deepcopy(blocks)
        first = run(twice, x)
        twice.train()
        return [*first, *run(twice, x.detach())]

    both_ways(twice, **{"block" if make is make_blocks else "light_block": 4})


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def with_forward(name):
    def change(block):
        getattr(block, name).forward = lambda x, *_: 2 * x

    return change


CALLED = {
    "eps 0": with_attributes(eps=0.0),
    "a mean and no variance": with_attributes(running_var=None),
    "gamma of another shape": with_attributes(weight=parameter(3)),
    "a mean of another shape": with_attributes(running_mean=torch.zeros(3, dtype=torch.float64)),
    "a norm of another dtype": lambda block: block.norm.float(),
    "a norm in half precision": lambda block: block.norm.bfloat16(),
    "a norm's subclass": other("norm", DoubledNorm(6).double()),
    "no norm": other("norm", nn.Identity()),
    "instance norm": other("norm", nn.InstanceNorm2d(6, affine=True).double()),
    "another activation": other("act", nn.ReLU6()),
    "no drop path": other("drop_path", nn.Identity()),
    "another drop path": other("drop_path", nn.Dropout(0.5)),
    "a norm's own forward": with_forward("norm"),
    "an activation's own forward": with_forward("act"),
    "a drop path's own forward": with_forward("drop_path"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CALLED)
def test_what_is_called(both_ways, change, training):
    """Modules that do something else, and norms that PyTorch has something to say about."""
    blocks, x = make_blocks((2, 6, 4, 5), 1, 3)
    CALLED[change](blocks[0])
    blocks.train(training)
    both_ways(lambda: step(blocks, x), layer=1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_statistics_with_a_value_far_from_the_others(form):
    """Distances from such a value, summed over a plane, cancel to nothing: the variance would be off by a tenth."""
    x = torch.randn(2, 4, 96, 96)
    x[:, 0, 0, 0] = 1e4
    x[:, 1, :2] = 1e3
    x[:, 2, -1, -1] = 1e4
    x = x.contiguous(memory_format=form)
    center, one = torch.zeros(4, 1, 3, 3), torch.ones(1, 1, 1)
    center[:, :, 1, 1] = 1.0
    norm = NormAct(None, None, None, None, 1e-5, True)
    filters = Filters(one, one, center)
    r = layer(x, filters, (), (), 2, 1.0, None, norm, True)
    mean, variance = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    # Sums of a thousand numbers in float32, joined; the mean beside the spread.
    assert ((r.statistics[0] - mean).abs() <= 1e-5 * variance.sqrt()).all()
    torch.testing.assert_close(r.statistics[1], variance.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stopping", [True, False])
@pytest.mark.parametrize("make", [make_blocks, make_light_blocks])
def test_a_checkpoint_tracks_twice(both_ways, make, stopping):
    """As PyTorch's own norm does when it is recomputed, also where the recomputation stops at the block."""
    blocks, x = make((4, 6, 4, 5), 3, 3, drop_path=0.3)

    def run():
        copies = copy.deepcopy(blocks)
        torch.manual_seed(5)
        shared, y = ek.LayerHistory() if make is make_blocks else PreviousOutput(), x
        with set_checkpoint_early_stop(stopping):
            for block in copies:
                y = checkpoint(block, y, shared, use_reentrant=False)
            found = gradients(y.square().sum(), [x, *copies.parameters()])
        return [y, *found, *(b.double() for b in copies.buffers()), torch.rand(2)]

    both_ways(run, **{"block" if make is make_blocks else "light_block": 6})


def test_reentrant_checkpointing_of_light_blocks_is_refused():
    """It would lose the gradients between layers; silently, where the previous output came without one."""
    blocks, x = make_light_blocks((2, 6, 4, 5), 2, 3)
    previous, y = PreviousOutput(), x
    for block in blocks:
        y = checkpoint(block, y, previous, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()
