"""Cases of the operations: functional forms, weights only, and the history of a stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ela_kernels as ek
from build_tools.same_numbers.draw import (
    BF16,
    CHANNELS,
    DTYPES,
    F16,
    F32,
    F64,
    MAPS,
    TOKENS,
    Draw,
    laid_out,
)

ROWS = (
    "contiguous",
    "contiguous",
    "batch_slice",
    "channel_slice",
    "channel_step",
    "one_batch",
    "one_channel",
)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def _inputs(d: Draw, depth: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `layer_attention`."""
    channels = d.of("channels", *CHANNELS)
    batch = d.of("batch", 0, 1, 1, 2, 2, 3, 4)
    heads, tokens = d.heads(channels), d.chance("tokens", 0.3)
    spatial = d.spatial(
        d.of("dimensions", 1, 2, 2) if tokens else d.of("dimensions", 0, 1, 2, 2, 2, 3)
    )
    shape = (batch, *spatial, channels) if tokens else (batch, channels, *spatial)
    layout = d.of("layout", *(TOKENS if tokens else MAPS))
    one_layout = d.chance("one layout", 0.7)

    def row(name: str) -> Tensor:
        return d.leaf(name, laid_out((batch, channels), dtype, d.random.choice(ROWS)))

    def a_map(j: int) -> Tensor:
        mine = layout if one_layout else d.random.choice(TOKENS if tokens else MAPS)
        return d.leaf(f"values[{j}]", laid_out(shape, dtype, mine))

    q, keys = row("q"), [row(f"keys[{j}]") for j in range(depth)]
    values: Any = [a_map(j) for j in range(depth)]
    found: dict[str, Any] = {"q": q, "heads": heads, "channels_last": tokens}
    found["scale"] = d.of("scale", None, None, 0.25, -1.7, 40.0)
    if len(shape) > 2 and d.chance("stacked", 0.15):
        keys, values = torch.stack(keys, 1), torch.stack(values, 1)
    found |= {"keys": keys, "values": values}
    if d.chance("previous", 0.7):
        before = d.random.randint(1, depth)
        prev = (3 * torch.randn(batch, heads, before)).softmax(-1).to(_accumulated(dtype))
        if d.chance("zeros in it", 0.2):
            prev = torch.where(prev < 0.1, 0.0, prev)
        found["prev_weights"] = d.leaf("prev_weights", prev, 0.5)
    return found


def op(d: Draw, depth: int | None = None) -> dict[str, Tensor]:
    inputs = _inputs(d, depth or d.of("depth", *range(1, 9)), d.of("dtype", *DTYPES))
    with d.grad_mode(), d.autocast(inputs["q"].dtype, 0.1):
        r = ek.layer_attention(**inputs)
    return d.finish(r._asdict())


def op_deep(d: Draw) -> dict[str, Tensor]:
    return op(d, 40)


def op_second(d: Draw) -> dict[str, Tensor]:
    """Second derivatives."""
    inputs = _inputs(d, d.of("depth", 1, 3), d.of("dtype", F64, F32))
    outputs = [t for t in ek.layer_attention(**inputs) if t is not None and t.requires_grad]
    wanted = {n: t for n, t in d.leaves.items() if t.requires_grad}
    if not outputs or not wanted:
        return {}
    loss = sum(t.square().sum() for t in outputs)
    first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True, allow_unused=True)
    return d.finish(
        {f"first of {n}": g for n, g in zip(wanted, first, strict=True) if g is not None}
    )


def weights(d: Draw) -> dict[str, Tensor]:
    inputs = _inputs(d, d.of("depth", 1, 2, 5, 8, 40), d.of("dtype", *DTYPES))
    del inputs["values"], inputs["channels_last"]
    # The kernels of this pass have no backward.
    with torch.no_grad() if d.backend == "cpp" else d.grad_mode(), d.autocast(F32, 0.1):
        r = ek.layer_attention_weights(**inputs)
    return d.finish(r._asdict())


def light_op(d: Draw) -> dict[str, Tensor]:
    dtype, channels = d.of("dtype", *DTYPES), d.of("channels", *CHANNELS)
    batch, spatial = d.of("batch", 0, 1, 2, 3), d.spatial(d.of("dimensions", 0, 1, 2, 2, 3))
    shape, layout = (batch, channels, *spatial), d.of("layout", *MAPS)
    q, k = (d.leaf(n, laid_out((batch, channels), dtype, d.random.choice(ROWS))) for n in "qk")
    v, prev = (d.leaf(n, laid_out(shape, dtype, layout)) for n in ("v", "prev_out"))
    decay = d.leaf("decay", torch.randn(channels, *([1] * len(spatial))).to(dtype))
    scale = d.of("scale", None, 0.3, -2.0)
    # No kernel serves it alone, so a forced one may refuse it.
    with ek.use_backend("auto" if d.backend == "cpp" else d.backend), d.grad_mode():
        out = ek.light_layer_attention(q, k, v, prev, decay, d.heads(channels), scale)
    return d.finish({"out": out})


class _Layer(nn.Module):
    """A layer of a stage, so that a checkpoint knows it again."""

    def __init__(self, provides: bool, **options: Any) -> None:
        super().__init__()
        self.provides, self.options = provides, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, history: ek.LayerHistory) -> Tensor | None:
        options = dict(self.options)
        if self.provides:
            for name in ("scale", "active", "given"):
                options.pop(name, None)
            history.provide(k, v, caller=self, **options)
            return None
        return history.attend(q, k, v, caller=self, **options)


def _dtypes(d: Draw, depth: int) -> list[torch.dtype]:
    """One for each layer: nearly always the same, or growing, as a history allows it."""
    if not d.chance("mixed dtypes", 0.12):
        return [d.of("dtype", *DTYPES)] * depth
    steps = (d.of("from", BF16, F16, F32), F32, F64)
    return [steps[j] for j in sorted(d.random.randrange(3) for _ in range(depth))]


def history(d: Draw, depth: int | None = None) -> dict[str, Tensor]:
    """A stage on a LayerHistory: attend, provide and probe, each layer's input its own or the output before."""
    depth = depth or d.of("depth", *range(1, 9))
    channels, batch, tokens = (
        d.of("channels", *CHANNELS),
        d.of("batch", 0, 1, 2, 3),
        d.chance("tokens", 0.3),
    )
    heads, spatial = (
        d.heads(channels),
        d.spatial(d.of("dimensions", 1, 2, 2) if tokens else d.of("dimensions", 1, 2, 2, 2, 3)),
    )
    shape = (batch, *spatial, channels) if tokens else (batch, channels, *spatial)
    dtypes, layout = _dtypes(d, depth), d.of("layout", *(TOKENS if tokens else MAPS))
    chained, recomputed = d.chance("chained", 0.5), d.chance("checkpointing", 0.15)
    decided = not recomputed and d.chance("decided as data", 0.08)
    stage, outputs, before = ek.LayerHistory(), {}, None
    # All of it under one: a layer outside of it is refused what a product of its dtypes would be.
    with d.grad_mode(), d.autocast(dtypes[0], 0.15):
        for j, dtype in enumerate(dtypes):
            q, k = (
                d.leaf(f"{n}[{j}]", laid_out((batch, channels), dtype, d.random.choice(ROWS)))
                for n in "qk"
            )
            v = d.leaf(f"v[{j}]", laid_out(shape, dtype, layout))
            if chained and before is not None and before.dtype == v.dtype:
                v = v + before
            options: dict[str, Any] = {"heads": heads, "channels_last": tokens}
            if d.random.random() < 0.2:
                options["scale"] = d.random.choice((0.3, -1.5))
            if decided and j and d.random.random() < 0.5:
                options["active"] = torch.tensor(d.random.random() < 0.5)
                options["given"] = d.random.choice((None, options["active"]))
            if len(set(dtypes)) == 1 and not decided and d.random.random() < 0.1:
                outputs |= {
                    f"probe {n}[{j}]": t
                    for n, t in stage.probe(q, k, heads=heads)._asdict().items()
                }
            layer = _Layer(d.random.random() < 0.15, **options)
            if recomputed and torch.is_grad_enabled():
                out = checkpoint(layer, q, k, v, stage, use_reentrant=False)
            else:
                out = layer(q, k, v, stage)
            if out is not None:
                before = out
                outputs |= {f"out[{j}]": out, f"weights[{j}]": stage.weights, f"kl[{j}]": stage.kl}
    return d.finish(outputs)


def history_deep(d: Draw) -> dict[str, Tensor]:
    return history(d, 40)


def transforms(d: Draw) -> dict[str, Tensor]:
    """Forward-mode derivatives, gradients and vmap of torch.func; a forced backend refuses them."""
    inputs = _inputs(d, d.of("depth", 1, 3), d.of("dtype", F64, F32))
    q = inputs.pop("q").detach()
    with ek.use_backend("auto"):

        def f(q: Tensor) -> Tensor:
            r = ek.layer_attention(q, **inputs)
            return r.out.sum() + (r.weights**2).sum()

        found = {"gradient": torch.func.grad(f)(q)}
        found["along"] = torch.func.jvp(f, (q,), (torch.ones_like(q),))[1]
        many = torch.stack([q, 2 * q])
        found["many"] = torch.func.vmap(f)(many)
    return {n: t.detach() for n, t in found.items()}


def warmed(d: Draw) -> dict[str, Tensor]:
    """`warmup` runs to its end, and leaves what comes after it as it is."""
    channels, dtype = d.of("channels", 8, 12), d.of("dtype", *DTYPES)
    training = d.chance("training", 0.5)
    ek.warmup([(2, channels, 5, 7)], 3, 4, dtype, device="cpu", training=training)
    return op(d)


FORMS = {
    "op": (op, 130),
    "op deep": (op_deep, 6),
    "op second": (op_second, 16),
    "weights": (weights, 40),
    "light op": (light_op, 30),
    "history": (history, 150),
    "history deep": (history_deep, 6),
    "transforms": (transforms, 8),
    "warmup": (warmed, 4),
}
"""By name: what makes a case of it, and how many there are."""
