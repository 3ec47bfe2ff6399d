"""Run every kernel that a stage will need once, so that no training step pays for compiling or loading it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ela_kernels.backends.contract import Request
from ela_kernels.backends.dispatch import Refusal, plan
from ela_kernels.backends.layout import accumulate_dtype
from ela_kernels.backends.types import RESIDUAL, Filters, NormAct
from ela_kernels.ops.depth_mix.interface import depth_mix
from ela_kernels.ops.layer_attention.history import LayerHistory
from ela_kernels.ops.layer_attention.interface import layer_attention, layer_attention_weights
from ela_kernels.ops.layer_attention.plan import LayerPlan
from ela_kernels.ops.position_attention.history import PositionHistory
from ela_kernels.ops.position_attention.interface import position_attention


def warmup(
    shapes: Sequence[Sequence[int]],
    depth: int,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    channels_last: bool = False,
    device: torch.device | str = "cuda",
    training: bool = True,
    tolerance: float = 0.0,
) -> float:
    """Compile and load ahead the kernels that stages of these shapes need, with the backend in force.

    Triton compiles a kernel at the first call of its kind and CUDA loads one at its first launch; both keep a
    first training step waiting, and neither may happen inside a CUDA graph. This makes the calls once: each
    depth up to `depth`, with and without previous weights, the functional form and :class:`LayerHistory`, the
    weights-only pass, for feature maps `[B, C, H, W]` whole layers and residual blocks too, :func:`depth_mix` by
    weights for each map, head and channel, :func:`position_attention` of values that are their own keys by one query
    and the same through :class:`PositionHistory`, and with `training` the backward of each. Where eager PyTorch
    serves, nothing is lost, nor where a forced backend knows no mix or no attention at every position.

    Args:
        shapes: shape of a value in each stage, `[B, C, *spatial]`, or `[B, *spatial, C]` with `channels_last`.
            The batch counts: use the one that you train with.
        depth: layers in the deepest of these stages.
        head_dim: D, channels to a head.
        dtype: of the values; under autocast the dtype that it casts to.
        memory_format: of the values; `torch.channels_last` for a network that runs in it.
        channels_last: the last dimension of the values is the channel.
        device: where the network runs.
        training: the backward kernels too.
        tolerance: of the layers. Above zero, whatever it is, Triton compiles other kernels, and those are compiled
            here in place of the ones that leave nothing out.

    Returns:
        The time taken, in seconds.

    Raises:
        ValueError: a shape, `head_dim`, `depth` or `tolerance` that does not fit, or a forced backend that cannot
            serve.

    Example:
        >>> import ela_kernels as ek
        >>> seconds = ek.warmup([(2, 16, 8, 8), (2, 32, 4, 4)], depth=3, device="cpu")
    """
    if depth < 1:
        raise ValueError(f"depth: got {depth}; allowed is the number of layers, at least 1")
    start = time.perf_counter()
    for shape in shapes:
        if len(shape) < 2:
            raise ValueError(f"shapes: got {tuple(shape)}; allowed is [B, C, *spatial]")
        channels = shape[-1 if channels_last else 1]
        if head_dim < 1 or channels % head_dim:
            raise ValueError(
                f"head_dim: got {head_dim}; allowed is a divisor of the {channels} channels of {tuple(shape)}"
            )
        value = torch.zeros(tuple(shape), dtype=dtype, device=device).contiguous(
            memory_format=memory_format
        )
        heads = channels // head_dim
        with torch.set_grad_enabled(training):
            _run_stage(value, depth, heads, channels_last, training, tolerance)
            _run_mixes(value.detach(), depth, heads, channels_last, training)
            _run_positions(value.detach(), depth, channels_last, training)
            if value.dim() == 4 and not channels_last:
                _run_layers(value.detach(), depth, heads, training, tolerance)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _run_stage(
    value: torch.Tensor,
    depth: int,
    heads: int,
    channels_last: bool,
    training: bool,
    tolerance: float,
) -> None:
    # One map stands for all values and one for all gradients: about `depth` maps in all, those of the outputs.
    value.requires_grad_(training)
    channels = value.shape[-1 if channels_last else 1]
    q = torch.zeros(
        value.shape[0], channels, dtype=value.dtype, device=value.device, requires_grad=training
    )
    history = LayerHistory(tolerance=tolerance)
    outs = []
    for t in range(1, depth + 1):
        outs.append(history.attend(q, q, value, heads=heads, channels_last=channels_last))
        prev = history.weights
        assert prev is not None
        prev = prev.detach()
        with torch.no_grad():
            layer_attention_weights(q, [q] * t, heads)
            layer_attention_weights(q, [q] * t, heads, prev_weights=prev)
        for weights in (None, prev):
            r = layer_attention(
                q,
                [q] * t,
                [value] * t,
                heads,
                prev_weights=weights,
                channels_last=channels_last,
                tolerance=tolerance,
            )
            if training:
                r.out.backward(torch.zeros_like(r.out))
    if training:
        torch.autograd.backward(outs, [torch.zeros_like(value)] * depth)


def _is_served(op: str, value: torch.Tensor, depth: int, training: bool) -> bool:
    request = Request(op, value.device, value.dtype, depth, training)
    return not isinstance(plan(request), Refusal)


def _run_mixes(
    value: torch.Tensor, depth: int, heads: int, channels_last: bool, training: bool
) -> None:
    """Sums by weights that are given: one for each map, for each of its heads, and for each channel."""
    value.requires_grad_(training)
    dtype = accumulate_dtype(value.dtype)
    channels = value.shape[-1 if channels_last else 1]
    for t in range(1, depth + 1):
        if not _is_served("depth_mix", value, t, training):
            return
        for shape in ((t,), (heads, t), (channels, t)):
            weights = torch.zeros(shape, dtype=dtype, device=value.device, requires_grad=training)
            out = depth_mix(weights, [value] * t, channels_last=channels_last)
            if training:
                out.backward(torch.zeros_like(out))


def _run_positions(value: torch.Tensor, depth: int, channels_last: bool, training: bool) -> None:
    """Attention at every position in both forms, with and without previous weights."""
    value.requires_grad_(training)
    channels = value.shape[-1 if channels_last else 1]
    query, norm_weight = (value.new_zeros(channels, requires_grad=training) for _ in range(2))
    history = PositionHistory()
    outs = []
    for t in range(1, depth + 1):
        if not _is_served("position_attention", value, t, training):
            break
        history.append(value, channels_last)
        outs.append(history.attend(query, norm_weight))
        found = history.weights
        assert found is not None
        for prev in (None, found.detach()):
            r = position_attention(
                query,
                [value] * t,
                norm_weight=norm_weight,
                prev_weights=prev,
                channels_last=channels_last,
            )
            if training:
                r.out.backward(torch.zeros_like(r.out))
    if training and outs:
        torch.autograd.backward(outs, [torch.zeros_like(value)] * len(outs))


def _run_layers(x: torch.Tensor, depth: int, heads: int, training: bool, tolerance: float) -> None:
    """Stages of whole layers, with and without the residual and one that only provides, and of blocks."""
    channels = x.shape[1]
    x.requires_grad_(training)
    wq, wk = (x.new_zeros((1, 1, 3), requires_grad=training) for _ in range(2))
    filters = Filters(wq, wk, x.new_zeros((channels, 1, 3, 3), requires_grad=training))
    if isinstance(LayerHistory(tolerance=tolerance).plan_layer(x, filters), Refusal):
        return
    statistics = torch.ones((2, channels), dtype=accumulate_dtype(x.dtype), device=x.device)
    gamma, beta = (x.new_ones(channels, requires_grad=training) for _ in range(2))
    # A block's norm takes the statistics of the batch, or running ones.
    for given in (None, statistics):
        norm = NormAct(gamma, beta, given, None, 1e-5, True)
        of_layers, of_blocks = (LayerHistory(tolerance=tolerance) for _ in range(2))
        of_layers.provide_layer(x, _plan(of_layers, x, filters), heads=heads)
        outs = []
        for _ in range(depth):
            for history, epilogue in (
                (of_layers, None if given is None else RESIDUAL),
                (of_blocks, norm),
            ):
                plan = _plan(history, x, filters)
                outs.append(history.attend_layer(x, plan, heads=heads, epilogue=epilogue))
        if training:
            torch.autograd.backward(outs, [torch.zeros_like(x)] * len(outs))


def _plan(history: LayerHistory, x: torch.Tensor, filters: Filters) -> LayerPlan:
    plan = history.plan_layer(x, filters)
    assert isinstance(plan, LayerPlan)  # asked before
    return plan
