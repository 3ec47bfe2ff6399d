"""Cases of modules and networks: whole layers, residual blocks, the light form, skips, checkpoints, autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from build_tools.same_numbers.draw import BF16, DTYPES, F16, F32, F64, MAPS, Draw, laid_out
from ela_kernels import models

CHANNELS = (1, 4, 6, 8, 16, 24, 33, 64)


def _shape(d: Draw, *batches: int) -> tuple[int, int, int, int]:
    height, width = d.spatial(2)
    return d.of("batch", *batches), d.of("channels", *CHANNELS), height, width


def _head_dim(d: Draw, channels: int) -> int:
    return channels // d.heads(channels)


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return {f"buffer {n}": b.detach().clone() for n, b in module.named_buffers()}


def layers(d: Draw, depth: int | None = None) -> dict[str, Tensor]:
    """A stage of LayerAttention, alone or added to its input, of which some only provide."""
    shape, depth = _shape(d, 0, 1, 2, 2, 3), depth or d.of("depth", *range(1, 9))
    head_dim, size = _head_dim(d, shape[1]), d.of("kernel_size", None, None, 1, 5, 9)
    stage = nn.ModuleList(ek.LayerAttention(shape[1], head_dim, size) for _ in range(depth))
    dtype = d.of("dtype", *DTYPES)
    stage.to(dtype)
    mixed = d.chance("mixed dtypes", 0.1) and dtype != F64
    for layer in stage[depth // 2 :] if mixed else ():
        layer.to(F64 if dtype == F32 else F32)
    x = first = d.leaf("x", laid_out(shape, dtype, d.of("layout", *MAPS)))
    d.parameters(stage)
    residual = d.of("residual", "inside", "outside", "none")
    recomputed = d.chance("checkpointing", 0.12)
    history, outputs = ek.LayerHistory(), {}
    with d.grad_mode(), d.autocast(dtype, 0.0 if mixed else 0.2):
        for j, layer in enumerate(stage):
            x = x.to(next(layer.parameters()).dtype) if mixed else x
            if d.random.random() < 0.12:
                layer.provide(x, history)
                continue
            call: Any = layer
            if recomputed and torch.is_grad_enabled():
                call = lambda *a, layer=layer: checkpoint(layer, *a, use_reentrant=False)  # noqa: E731
            if residual == "inside":
                x = call(x, history, True)
            else:
                found = call(x, history)
                x = x + found if residual == "outside" else found
            outputs |= {f"out[{j}]": x, f"weights[{j}]": history.weights, f"kl[{j}]": history.kl}
    assert first.shape == x.shape
    return d.finish(outputs)


def layers_deep(d: Draw) -> dict[str, Tensor]:
    return layers(d, 40)


def _norm(d: Draw) -> Any:
    kind = d.of("norm", *["batch"] * 6, "plain", "untracked", "cumulative", "group", "none")
    return {
        "batch": nn.BatchNorm2d,
        "plain": lambda c: nn.BatchNorm2d(c, affine=False),
        "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None, eps=1e-3),
        "group": lambda c: nn.GroupNorm(1, c),
        "none": lambda c: nn.Identity(),
    }[kind]


def blocks(d: Draw, depth: int | None = None) -> dict[str, Tensor]:
    """A stage of ELA in training or not, some of its layers skipped."""
    shape, depth = _shape(d, 2, 2, 3, 4), depth or d.of("depth", *range(1, 9))
    if shape[2] * shape[3] == 1:
        shape = (*shape[:2], 3, 5)
    skip = d.of("skip", "retrieval", "layer")
    options = {
        "norm_layer": _norm(d),
        "act_layer": d.of("act", nn.ReLU, nn.ReLU, nn.Identity, nn.GELU),
        "drop_path": d.of("drop_path", 0.0, 0.0, 0.4, 1.0),
        "skip": skip,
    }
    head_dim = _head_dim(d, shape[1])
    stage = nn.ModuleList(ek.ELA(shape[1], head_dim, **options) for _ in range(depth))
    dtype = d.of("dtype", *DTYPES)
    stage.to(dtype)
    for layer in stage:
        if getattr(layer.norm, "weight", None) is not None:
            nn.init.normal_(layer.norm.weight, 1.0, 0.5)
            nn.init.normal_(layer.norm.bias)
        if isinstance(layer.norm, nn.BatchNorm2d):
            if layer.norm.running_mean is not None:
                nn.init.normal_(layer.norm.running_mean)
            if dtype in (BF16, F16) and d.random.random() < 0.3:
                layer.norm.float()
    some_skipped = d.chance("some skipped", 0.3)
    for layer in stage[1:] if some_skipped else ():
        layer.skipped = d.random.random() < 0.5
    stage.train(d.chance("train", 0.7))
    x = d.leaf("x", laid_out(shape, dtype, d.of("layout", *MAPS)))
    d.parameters(stage)
    copy, recomputed = d.chance("copy", 0.8), d.chance("checkpointing", 0.12)
    history, outputs = ek.LayerHistory(), {}
    with d.grad_mode(), d.autocast(dtype):
        for j, layer in enumerate(stage):
            # A norm may give float32 under autocast, or beside half precision; the next layer takes its own.
            x = x.to(dtype) if not torch.is_autocast_enabled("cpu") else x
            if recomputed and torch.is_grad_enabled():
                x = checkpoint(layer, x, history, copy, use_reentrant=False)
            else:
                x = layer(x, history, copy)
            outputs |= {f"out[{j}]": x, f"weights[{j}]": history.weights, f"kl[{j}]": history.kl}
    found = d.finish(outputs)
    return found | {n: b for n, b in _buffers(stage).items() if b is not None}


def blocks_deep(d: Draw) -> dict[str, Tensor]:
    return blocks(d, 40)


def watched(d: Draw) -> dict[str, Tensor]:
    """Some steps of training with EBQM, and what is left of the model when it is pruned."""
    channels, depth = d.of("channels", 8, 12), d.of("depth", 4, 7)
    skip = d.of("skip", "retrieval", "layer")
    stage = nn.ModuleList(ek.ELA(channels, 4, skip=skip) for _ in range(depth))
    ebqm = ek.EBQM(stage, warmup=2, interval=2, max_share=0.6)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for step in range(8):
        if step == 4:  # so that some are skipped whatever the decision was
            stage[depth - 1].skipped = stage[2].skipped = True
        x, history = torch.randn(2, channels, 5, 6), ek.LayerHistory()
        for layer in stage:
            x = layer(x, history)
        loss = x.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ebqm.step()
        found[f"loss {step}"] = loss.detach()
        found[f"skipped {step}"] = torch.tensor([layer.skipped for layer in stage])
    found |= {n: p.detach().clone() for n, p in stage.named_parameters()}
    found |= {n: b for n, b in _buffers(stage).items() if b is not None}
    ek.prune(stage)
    stage.eval()
    x, history = torch.randn(2, channels, 5, 6), ek.LayerHistory()
    for layer in stage:
        x = layer(x, history)
    return found | {"pruned": x.detach()}


def light_layers(d: Draw) -> dict[str, Tensor]:
    shape, depth = _shape(d, 0, 1, 2, 3), d.of("depth", *range(1, 7))
    head_dim, size = _head_dim(d, shape[1]), d.of("kernel_size", None, 3)
    stage = nn.ModuleList(ek.LightLayerAttention(shape[1], head_dim, size) for _ in range(depth))
    dtype = d.of("dtype", *DTYPES)
    stage.to(dtype)
    x = previous = d.leaf("x", laid_out(shape, dtype, d.of("layout", *MAPS)))
    d.parameters(stage)
    residual, outputs = d.of("residual", False, True), {}
    with d.grad_mode(), d.autocast(dtype):
        for j, layer in enumerate(stage):
            previous = layer(x, previous)
            x = x + previous if residual else previous
            outputs[f"out[{j}]"] = x
    return d.finish(outputs)


# The convolutions of a network are PyTorch's own. With oneDNN those of some narrow maps write past their memory on two
# threads (a 1x1 convolution of four channels in channels_last, with AVX-512).
@torch.backends.mkldnn.flags(enabled=False)
def networks(d: Draw) -> dict[str, Tensor]:
    """A small residual network: a step of training, then inference."""
    attention = d.of("attention", "none", "mrla", "mrla", "mrla_light", "mrla_light", "ela", "ela")
    block = d.of("block", "basic", "bottleneck")
    options: dict[str, Any] = {
        "head_dim": d.of("head_dim", None, 1, 4),
        "drop_path": d.of("drop_path", 0.0, 0.3),
        "features_only": d.chance("features only", 0.2),
        "checkpointing": d.chance("checkpointing", 0.2),
    }
    converted = attention == "mrla" and d.chance("converted", 0.4)
    if converted:
        options |= {"fused": False, "checkpointing": False}
    if attention == "ela":
        options["skip"] = d.of("skip", "retrieval", "layer")
    make = models.CifarResNet(
        (d.of("blocks", 1, 3), 2), (4, 8), block, attention=attention, **options
    )
    model = make.to(d.of("dtype", F32, F32, F64, BF16))
    if converted and d.chance("fused now", 0.7):
        ek.convert(model)
        if d.chance("and back", 0.2):
            ek.unconvert(model)
    elas = [m for m in model.modules() if isinstance(m, ek.ELA)]
    for layer in elas[1:] if d.chance("some skipped", 0.3) else ():
        layer.skipped = d.random.random() < 0.5
    dtype = next(model.parameters()).dtype
    images = d.leaf("images", torch.randn(3, 3, 12, 10, dtype=F32).to(dtype), 0.3)
    if d.chance("channels_last", 0.4):
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    d.parameters(model)
    wide = dtype != F32
    with contextlib.nullcontext() if wide else d.autocast(dtype, 0.3):
        found = model(images)
        outs = (
            {f"map[{i}]": m for i, m in enumerate(found)}
            if isinstance(found, list)
            else {"scores": found}
        )
        results = d.finish(outs)
        results |= {n: b for n, b in _buffers(model).items() if b is not None}
        model.eval()
        with torch.no_grad():
            found = model(images)
    last = found[-1] if isinstance(found, list) else found
    return results | {"in inference": last}


FORMS = {
    "layers": (layers, 120),
    "layers deep": (layers_deep, 4),
    "blocks": (blocks, 130),
    "blocks deep": (blocks_deep, 3),
    "watched": (watched, 6),
    "light layers": (light_layers, 50),
    "networks": (networks, 60),
}
"""By name: what makes a case of it, and how many there are."""
