"""Converted networks under autocast: what is wide in the original is as wide in ours."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import ela_kernels as ek
from benchmarks.published.networks import NETWORKS

KNOWN = sorted(name for name, network in NETWORKS.items() if network.softmax)


def both(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, a converted copy, and images, in evaluation mode, where no norm magnifies a rounding."""
    torch.manual_seed(0)
    model = NETWORKS[name].make().eval()
    ours = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ek.convert(ours)
    return model, ours, torch.randn(NETWORKS[name].shape)


def maps_of(model: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What each block of a stage gives, and the network."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(_: nn.Module, __: object, out: object) -> None:
            first = out[0] if isinstance(out, (tuple, list)) else out
            assert isinstance(first, Tensor)
            found[name] = first.detach()

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            for child, _ in module.named_children():
                keep(f"{name}.{child}")
    keep("")
    with torch.autocast("cpu", dtype):
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_every_block_gives_the_dtype_of_the_original(name: str, dtype: torch.dtype) -> None:
    """The light form's factor is float32 and no autocast casts it: what it multiplies, and all behind, is too."""
    model, ours, images = both(name)
    want, got = maps_of(model, images, dtype), maps_of(ours, images, dtype)
    assert {n: m.dtype for n, m in got.items()} == {n: m.dtype for n, m in want.items()}
    exact = maps_of(model.double(), images.double(), dtype)
    for block, of in want.items():
        # Each rounds at other places: as close to float64 as the original is, and a rounding at each of five layers.
        rounding = 5 * torch.finfo(dtype).eps * exact[block].abs().max()
        off = (of - exact[block]).abs().max()
        assert (got[block] - exact[block]).abs().max() <= 2 * off + rounding, block


def test_gradients_come_back_in_float32() -> None:
    model, ours, images = both("light cifar")
    found = []
    for network in (model.train(), ours.train()):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            out = network(images)
        out.float().square().sum().backward()
        found.append({n: p.grad for n, p in network.named_parameters()})
    want, got = found
    for name, gradient in want.items():
        assert gradient is not None
        assert got[name] is not None
        assert got[name].dtype == gradient.dtype


def test_explain_says_why_the_block_is_not_one_call() -> None:
    _, ours, images = both("light cifar")
    with torch.autocast("cpu", torch.bfloat16):
        found = ek.explain(ours, images)
    assert {e.form for e in found} == {"layer"}
    assert "under autocast the sum with the output before is torch.float32" in str(found)
