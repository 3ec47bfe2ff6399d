"""Threads that meet new shapes at once, in every form, forward and backward; a program of its own, since it may crash.

    python tests/support/thread_stress.py SHAPES [--backend NAME] [--forms NAME ...] [--provoke]

All threads of a round get the same inputs and modules, and have to find the same bits as one thread does afterwards.
Half of the rounds each thread runs the backward of another one's forward. Memory that two threads wrote shows as a
difference, as the exit code of a crash, or in the report of a sanitizer that the interpreter was started with.
"""

from __future__ import annotations

import argparse
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ela_kernels as ek
from ela_kernels.backends.cpp.attention import DTYPE_CODES
from ela_kernels.backends.cpp.attention import kernels as compiled
from ela_kernels.modules.drop_path import DropPath
from ela_kernels.modules.residual import light_residual_block

THREADS = 4
CHANNELS, HEAD_DIM = 16, 4
HEADS = CHANNELS // HEAD_DIM
DEPTH = 9

Outputs = list[Tensor]


class Round(NamedTuple):
    """What the threads of one round share."""

    x: Tensor
    q: Tensor
    layers: nn.ModuleList
    blocks: nn.ModuleList
    light: nn.ModuleList
    norm: nn.Module


def op(r: Round) -> Outputs:
    weights, outs = None, []
    for depth in range(1, DEPTH + 1):
        keys, values = (
            [r.q * i for i in range(1, depth + 1)],
            [r.x / i for i in range(1, depth + 1)],
        )
        found = ek.layer_attention(r.q, keys, values, HEADS, prev_weights=weights)
        weights = found.weights
        outs += [found.out, weights]
    return outs


def weights_only(r: Round) -> Outputs:
    with torch.no_grad():
        keys = [r.q * i for i in range(1, DEPTH + 1)]
        return [ek.layer_attention_weights(r.q, keys[:t], HEADS).weights for t in range(1, DEPTH)]


def weights_of(h: ek.LayerHistory) -> Tensor:
    """Of the last layer. What is kept for a shape may be wrong for good: then all threads agree, and one alone too."""
    weights = h.weights
    assert weights is not None
    assert weights.shape[2] == h.depth, f"{list(weights.shape)} weights at depth {h.depth}"
    return weights


def history(r: Round) -> Outputs:
    h, x, outs = ek.LayerHistory(), r.x, []
    for _ in range(DEPTH):
        x = h.attend(r.q, x.flatten(2).mean(2), x.tanh(), heads=HEADS)
        outs += [x, weights_of(h)]
    return outs


def layer(r: Round) -> Outputs:
    h, x, outs = ek.LayerHistory(), r.x, []
    for i, module in enumerate(r.layers):
        if i == 2:
            module.provide(x, h)
        else:
            x = module(x, h, residual=True)
            outs += [x, weights_of(h)]
    return outs


def block(r: Round) -> Outputs:
    h, x, outs = ek.LayerHistory(), r.x, []
    for module in r.blocks:
        x = module(x, h)
        outs += [x] if module.skipped else [x, weights_of(h)]
    return outs


def inference(r: Round) -> Outputs:
    with torch.inference_mode():
        return [out.clone() for out in block(r)]


def light_layer(r: Round) -> Outputs:
    out, outs = r.x, []
    for module in r.light:
        out = module(r.x, out)
        outs.append(out)
    return outs


def light_block(r: Round) -> Outputs:
    x = out = r.x
    outs = []
    for module in r.light:
        x, out = light_residual_block(module, r.norm, nn.ReLU(), DropPath(), x, out)
        outs += [x, out]
    return outs


def replica(module: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes one for each of its threads: parameters are attributes, all else is shared."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.view_as(parameter))
    return made


def replicas(r: Round) -> Outputs:
    return block(r._replace(blocks=replica(r.blocks)))


def training(r: Round) -> Outputs:
    """Steps of a model of the thread's own."""
    blocks = copy.deepcopy(r.blocks)
    optimizer = torch.optim.SGD(blocks.parameters(), lr=1e-3)
    for _ in range(2):
        h, x = ek.LayerHistory(), r.x.detach()
        for module in blocks:
            x = module(x, h)
        optimizer.zero_grad()
        x.float().square().mean().backward()
        optimizer.step()
    return [p.detach() for p in blocks.parameters()]


FORMS: dict[str, Callable[[Round], Outputs]] = {
    f.__name__: f
    for f in (
        op,
        weights_only,
        history,
        layer,
        block,
        replicas,
        inference,
        light_layer,
        light_block,
        training,
    )
}


def gradients(outs: Outputs, r: Round) -> Outputs:
    """Of everything that the threads share; by `grad`, since `backward` would add them up in one place."""
    wanted = [t for t in outs if t.requires_grad]
    if not wanted:
        return []
    inputs = [r.x, r.q]
    for modules in (r.layers, r.blocks, r.light, r.norm):
        inputs += modules.parameters()
    loss = torch.stack([t.float().square().mean() for t in wanted]).sum()
    return [g for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None]


def norm(channels: int) -> nn.Module:
    # Running statistics are written by every forward pass in training, PyTorch's own as well.
    return nn.BatchNorm2d(channels, track_running_stats=False)


def rounds(count: int, side: int) -> Iterator[Round]:
    torch.manual_seed(0)
    for i in range(count):
        turn = i // len(FORMS)  # so that each form meets all of these
        dtype = torch.bfloat16 if turn % 4 == 1 else torch.float32
        form = torch.channels_last if turn % 2 else torch.contiguous_format
        shape = (1 + turn % 3, CHANNELS, side + i % 23, side + 1 + i // 23)
        x = torch.randn(shape).to(dtype=dtype, memory_format=form).requires_grad_()
        q = torch.randn(shape[:2]).to(dtype).requires_grad_()
        blocks = [
            ek.ELA(CHANNELS, HEAD_DIM, norm_layer=norm if t % 2 else nn.BatchNorm2d)
            for t in range(DEPTH)
        ]
        for t, b in enumerate(blocks):
            b.skipped = t == 2
            if not t % 2:
                b.eval()
        layers = [ek.LayerAttention(CHANNELS, HEAD_DIM) for _ in range(DEPTH)]
        light = [ek.LightLayerAttention(CHANNELS, HEAD_DIM) for _ in range(3)]
        modules = (nn.ModuleList(m).to(dtype) for m in (layers, blocks, light))
        yield Round(x, q, *modules, norm(CHANNELS).to(dtype))


def at_once(form: Callable[[Round], Outputs], r: Round, handed_over: bool) -> list[Outputs]:
    """What each thread finds: outputs and gradients, in the second case of the next thread's outputs."""
    start, forward_done = (threading.Barrier(THREADS) for _ in range(2))
    outs: list[Outputs] = [[] for _ in range(THREADS)]
    found: list[Outputs] = [[] for _ in range(THREADS)]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            start.wait()
            outs[i] = form(r)
            other = i
            if handed_over:
                forward_done.wait()
                other = (i + 1) % THREADS
            found[i] = [*outs[i], *gradients(outs[other], r)]
        except BaseException as error:
            errors.append(error)
            start.abort(), forward_done.abort()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def provoke() -> None:
    """A race that a thread sanitizer has to see: two threads have a kernel write the same memory."""
    q, weights = torch.ones(20_000, CHANNELS), torch.empty(20_000, HEADS, 1)

    def work() -> None:
        for _ in range(20):
            compiled().weights(
                DTYPE_CODES[q.dtype],
                sizes=(*q.shape, HEADS, 1, 0),
                attention=compiled().attention(
                    scale=1.0,
                    query=q.data_ptr(),
                    query_stride=CHANNELS,
                    keys=[q.data_ptr()],
                    key_strides=[CHANNELS],
                    values=[],
                    value_strides=[],
                    prev=0,
                    prev_depth=0,
                    weights=weights.data_ptr(),
                    tolerance=0.0,
                ),
                kl=0,
                threads=1,
            )

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--side", type=int, default=3, help="of the smallest map")
    parser.add_argument("--openmp", type=int, default=1, help="threads of each kernel")
    parser.add_argument("--provoke", action="store_true", help=provoke.__doc__)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    ek.use_backend(options.backend)
    torch.set_num_threads(options.openmp)
    sys.setswitchinterval(1e-5)  # a thousandth of the usual: threads change in more places
    if options.provoke:
        provoke()
    for i, r in enumerate(rounds(options.shapes, options.side)):
        name = options.forms[i % len(options.forms)]
        found = at_once(FORMS[name], r, handed_over=(i + i // len(FORMS)) % 2 == 1)
        outs = FORMS[name](r)
        expected = [*outs, *gradients(outs, r)]
        for of_thread in found:
            assert len(of_thread) == len(expected) > 0
            for j, (a, b) in enumerate(zip(of_thread, expected, strict=True)):
                assert torch.equal(a, b), (
                    f"{name}, shape {list(r.x.shape)}, {r.x.dtype}: tensor {j}"
                )
    print("equal")


if __name__ == "__main__":
    main()
