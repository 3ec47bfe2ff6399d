"""convert() on every published shape of network: what it converts, and that nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.published.networks import NETWORKS

# What is converted of each, and as how many whole blocks; of the others nothing is.
CONVERTED = {
    "base cifar": 5,
    "base cifar, basic blocks": 5,
    "base imagenet": 5,
    "base imagenet, no activation": 5,
    "base imagenet, channel-wise, gates": 5,
    "light cifar": 5,
    "light cifar, basic blocks": 5,
    "light imagenet": 5,
    "light imagenet, gates": 5,
    "light backbone": 5,
    "base tokens": 0,
    "light tokens": 0,
    "dynamic base": 5,
    "dynamic light": 5,
    "dynamic light, imagenet": 5,
}
REASONS = {
    "equation (4)": "view() mixes layers and heads",
    "raw features": "raw feature maps",
    "raw features, linear": "raw feature maps",
    "linear": "running sums",
    "norms of keys": "running sums",
}


def results(network: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, gradients by kind of parameter, and buffers of a step.

    Gradients of one kind are compared together: some are nothing but rounding, as a bias's in front of a norm.
    """
    network.train(training)
    network.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = network(x)
    (out[-1] if isinstance(out, (tuple, list)) else out).square().sum().backward()
    found: dict[str, list[Tensor]] = {"x": [x.grad]}
    for name, parameter in network.named_parameters():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        if parameter.grad is not None:
            found.setdefault(kind, []).append(parameter.grad.flatten())
    outs = out if isinstance(out, (tuple, list)) else [out]
    return {
        **{f"output {i}": o.detach() for i, o in enumerate(outs)},
        **{kind: torch.cat([g.flatten() for g in grads]) for kind, grads in found.items()},
        **{name: b.double() for name, b in network.named_buffers()},
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks(name: str) -> None:
    make, shape, count, _ = NETWORKS[name]
    torch.manual_seed(0)
    original = make().double()
    ours = copy.deepcopy(original)
    x = torch.randn(shape, dtype=torch.float64)
    if name in CONVERTED:
        report = ek.convert(ours, strict=True)
        blocks = sum("with the residual block" in what for what in report.converted.values())
        assert (len(report.converted), blocks) == (count, CONVERTED[name])
    else:
        with pytest.warns(UserWarning, match="changed nothing"):
            report = ek.convert(ours)
        assert len(report.left) == count
        assert all(REASONS[name] in why for why in report.left.values())
    assert list(ours.state_dict()) == list(original.state_dict())
    for training in (True, False):
        want, got = results(original, x, training), results(ours, x, training)
        assert got.keys() == want.keys()
        for what, value in want.items():
            scale = value.abs().max()
            assert (got[what] - value).abs().max() <= 1e-10 * scale, (what, training)


def test_every_shape_is_spoken_of() -> None:
    assert set(CONVERTED) | set(REASONS) == set(NETWORKS)
