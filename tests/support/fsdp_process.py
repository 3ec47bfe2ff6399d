"""One of several processes that train the same network, sharded by FSDP2 in every way, and not at all."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from support.ela_models import Network
from support.leaving import leave_together
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import ela_kernels as ek


class WithConvolution(Network):
    """A convolution before each layer, as a residual network has them."""

    def __init__(self, mode: str) -> None:
        super().__init__((4,), skip=mode)
        self.convolutions = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        history = ek.LayerHistory()
        for convolution, layer in zip(self.convolutions, self.layers, strict=True):
            x = layer(convolution(x), history)
        return x


def each_layer(network: WithConvolution) -> list[nn.Module]:
    return [*network.layers]


def each_attention(network: WithConvolution) -> list[nn.Module]:
    return [layer.attn for layer in network.layers]


def each_part(network: WithConvolution) -> list[nn.Module]:
    return [part for layer in network.layers for part in (layer.attn.Wk, layer.attn.Wv, layer.norm)]


def the_whole(network: WithConvolution) -> list[nn.Module]:
    return []


WAYS: list[Callable[[WithConvolution], list[nn.Module]]] = [
    each_layer,
    each_attention,
    each_part,
    the_whole,
]


def gradients(network: nn.Module, x: Tensor) -> list[Tensor | None]:
    network(x).square().mean().backward()
    found = []
    for parameter in network.parameters():
        gradient = parameter.grad
        found.append(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
    return found


def mixed(mesh: DeviceMesh, x: Tensor) -> list[object]:
    """What a skipped layer makes of its input where only its attention works in half precision."""
    wrong: list[object] = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for mode, new in itertools.product(("retrieval", "layer", "reuse"), (False, True)):
        layers = WithConvolution(mode).layers
        layers[1].skipped = True
        for layer in layers[:2]:
            fully_shard(layer.attn, mesh=mesh, mp_policy=policy)
        history = ek.LayerHistory()
        before = layers[0](x, history)
        after = layers[1](before, history, copy=new)
        after.sum().backward()
        if mode == "reuse":  # what was added: a norm of something in half precision
            want = layers[1].norm(history.last_retrieved().o).relu().to(before.dtype)
            same = torch.allclose(after, before + want, 1e-3, 1e-3)
        else:
            same = torch.equal(after, before)
        if after.dtype != before.dtype or not same:
            wrong.append((mode, new, after.dtype))
    return wrong


def run(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    mesh = init_device_mesh("cpu", (processes,))
    torch.manual_seed(0)
    wrong, x = [], torch.rand(2 * processes, 16, 5, 5) + 0.5
    mine = x[2 * rank : 2 * rank + 2]
    cases = itertools.product(
        WAYS,
        ("retrieval", "layer", "reuse"),
        (set(), {1}, {2, 3}),
        ("eager", "auto"),
        (False, True),
    )
    for way, mode, skip, backend, probes in cases:
        if probes and not skip:
            continue
        plain = WithConvolution(mode)
        for i in skip:
            plain.layers[i].skipped = True
            plain.layers[i].probe_next = probes
        ek.use_backend(backend)
        sharded = copy.deepcopy(plain)
        for layer, other in zip(plain.layers, sharded.layers, strict=True):
            layer.watched = other.watched = True
            other.probe_next = layer.probe_next
        for part in way(sharded):
            fully_shard(part, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        # The mean over the processes of what each has of its own part.
        want = gradients(plain, mine)
        for gradient in want:
            if gradient is not None:
                distributed.all_reduce(gradient)
                gradient /= processes
        got = gradients(sharded, mine)
        same = all(
            (g is None) == (w is None) and (g is None or torch.allclose(g, w, 1e-4, 1e-6))
            for g, w in zip(got, want, strict=True)
        )
        seen = [len(layer.observations) for layer in sharded.layers]
        if not same or seen != [len(layer.observations) for layer in plain.layers]:
            wrong.append((way.__name__, mode, sorted(skip), backend, probes, same, seen))
    ek.use_backend("auto")
    wrong += mixed(mesh, mine)
    torch.save(wrong, Path(folder) / f"{rank}.pt")
    leave_together()
