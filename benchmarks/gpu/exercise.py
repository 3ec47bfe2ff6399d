"""Every kernel a few times on small odd shapes, for a sanitizer to watch: `compute-sanitizer python -m ...exercise`.

Under a sanitizer every allocation is one of its own, and kernels run many times slower: few and small calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import ela_kernels as ek
from benchmarks.gpu.setting import make_setting
from ela_kernels.backends.dispatch import KERNELS

# Heads that straddle blocks, lengths that no vector divides, a map of one position, a deeper history.
_SHAPES = ((3, 2, 12, 7, 5, 3), (2, 1, 37, 9, 1, 37), (2, 3, 16, 1, 1, 2), (9, 1, 8, 16, 16, 1))
# Triton compiles anew for every depth, dtype and format, which takes longer than all the rest.
_COUNTS = {"triton": 1, "cuda": 3}


def _retrieve_at_positions(values: Sequence[torch.Tensor]) -> None:
    """Attention at every position by one query and by a map of them, with the backward in both forms."""
    of_channels = torch.randn(values[0].shape[1], device=values[0].device)
    total = torch.zeros((), device=values[0].device)
    history = ek.PositionHistory()
    for i, value in enumerate(values):
        history.append(value)
        query = value.detach() if i else of_channels
        total = total + history.attend(query).float().square().sum()
    assert history.weights is not None
    for query, keys in ((of_channels, None), (values[0], values)):
        found = ek.position_attention(
            query, values, keys, of_channels, prev_weights=history.weights.detach()
        )
        assert found.kl is not None
        total = total + found.out.float().square().sum() + found.kl.sum()
    total.backward()


def _mix(values: Sequence[torch.Tensor], heads: int) -> None:
    """A sum by given weights, with gradients of these and of values, of the former alone, and of the latter alone."""
    size = values[0].shape[0], heads, len(values)
    weights = torch.randn(size, device=values[0].device).requires_grad_()
    plain = [value.detach() for value in values]
    for given, summed in ((weights, values), (weights, plain), (weights.detach(), values)):
        ek.depth_mix(given, summed).float().square().sum().backward()


def _leave_out(leaves: Sequence[torch.Tensor], heads: int) -> None:
    """Retrievals of small weights left out: through a history, which gathers, and in the form that does not."""
    queries, keys, values = leaves[::3], leaves[1::3], leaves[2::3]
    tolerance = 1 / (len(values) + 1)
    history = ek.LayerHistory(tolerance=tolerance)
    total = torch.zeros((), device=values[0].device)
    for q, k, v in zip(queries, keys, values, strict=True):
        total = total + history.attend(q, k, v, heads=heads).float().square().sum()
    found = ek.layer_attention(queries[-1], keys, values, heads, tolerance=tolerance)
    (total + found.out.float().square().sum()).backward()


def exercise(backend: str, device: torch.device, few: bool = False) -> int:
    """Forward, backward in both forms, gather and weights-only; returns the number of layers that ran.

    `few`: one shape, in each dtype and each layout once.
    """
    count = 0
    shapes = _SHAPES[:1] if few else _SHAPES[: _COUNTS.get(backend)]
    layouts = (torch.contiguous_format, torch.channels_last)
    with ek.use_backend(backend):
        for i, dtype in enumerate((torch.float32, torch.bfloat16)):
            for depth, batch, channels, rows, columns, heads in shapes:
                for layout in layouts[i : i + 1] if few else layouts:
                    leaves = [
                        torch.randn(size, device=device)
                        .to(dtype)
                        .contiguous(memory_format=form)
                        .requires_grad_()
                        for _ in range(depth)
                        for size, form in (
                            ((batch, channels), torch.contiguous_format),
                            ((batch, channels), torch.contiguous_format),
                            ((batch, channels, rows, columns), layout),
                        )
                    ]
                    queries, keys, values = leaves[::3], leaves[1::3], leaves[2::3]
                    _retrieve_at_positions(values)
                    _mix(values, heads)
                    _leave_out(leaves, heads)
                    history = ek.LayerHistory()
                    total = torch.zeros((), device=device)
                    for q, k, v in zip(queries, keys, values, strict=True):
                        out = history.attend(q, k, v, heads=heads)
                        total = total + out.float().square().sum()
                        if history.kl is not None:
                            total = total + history.kl.sum()
                        count += 1
                    total.backward()
                    weights = history.weights
                    assert weights is not None
                    found = ek.layer_attention(
                        queries[-1], keys, values, heads, prev_weights=weights.detach()
                    )
                    found.out.float().sum().backward()
                    with torch.no_grad():
                        ek.layer_attention_weights(queries[-1], keys, heads)
                    count += _exercise_modules(values[0], channels // heads, backend)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count


def _exercise_modules(x: torch.Tensor, head_dim: int, backend: str) -> int:
    """A layer with the residual, a block with norm and dropped samples, a layer that only provides, a light layer.

    The light one where the backend has kernels of it. The last block leaves out retrievals of small weights, and then
    takes over a retrieval.
    """
    x = x.detach().requires_grad_()
    channels, count = x.shape[1], 0
    first, last = (ek.LayerAttention(channels, head_dim).to(x.device, x.dtype) for _ in range(2))
    block = ek.ELA(channels, head_dim, drop_path=0.5).to(x.device, x.dtype)
    other = ek.ELA(channels, head_dim, skip="reuse", tolerance=0.4).to(x.device, x.dtype)
    light = ek.LightLayerAttention(channels, head_dim).to(x.device, x.dtype)
    for is_training in (True, False):
        history = ek.LayerHistory()
        y = first(x, history, residual=True)
        if is_training and x.shape[0] * x.shape[2] * x.shape[3] > 1:
            y = block(y, history)
        last.provide(y, history)
        y = block.eval()(y, history)
        for skipped in (False, True):
            other.skipped = skipped
            y = other.eval()(y, history)
        count += 5
        if "light_layer" in (KERNELS[backend].ops or ()):
            y = light(y, x)
            count += 1
        y.float().square().sum().backward()
        block.train()
    return count


def main(argv: list[str] | None = None) -> None:
    """Exercise all backends that run on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.exercise", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="changes nothing: all is small")
    parser.add_argument("--few", action="store_true", help="one shape alone")
    args = parser.parse_args(argv)
    setting = make_setting(args.device, None, smoke=True)
    for backend in setting.backends:
        print(f"{backend}: {exercise(backend, setting.device, args.few)} layers", flush=True)


if __name__ == "__main__":
    main()
