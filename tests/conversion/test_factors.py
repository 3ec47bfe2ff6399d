"""Values that code between converted layers multiplies with numbers: the same results, and no map written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.converted_stages import DIM, State, run, stages
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ela_kernels.conversion.handshake import MAP

assert MAP != (4, 3)  # that of the maps here


def gate(means: Tensor) -> Tensor:
    """`[B, C]` of `[B, C]`, of either sign."""
    return (3 * means).tanh() + 0.25


def pooled(v: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(v, (1, 1)).flatten(1)


def as_published(k: Any, v: Any) -> State:
    """Keys and values one at a time, as dynamic layer attention has it."""
    keys, values = [], []
    for i in range(k.shape[1]):
        key, value = k[:, i], v[:, i]
        keys.append((key * gate(key)).unsqueeze(1))
        values.append((value * gate(pooled(value))[:, :, None, None]).unsqueeze(1))
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def of_values(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Any], State]:
    def between(k: Any, v: Any) -> State:
        return k, torch.cat([change(v[:, i]).unsqueeze(1) for i in range(v.shape[1])], 1)

    return between


def with_gates(v: Tensor) -> Tensor:
    return gate(v.mean((2, 3)))[:, :, None, None]


def two_means_of_which_one_is_changed(v: Tensor) -> Tensor:
    first, second = v.mean((2, 3)), v.mean((2, 3))
    first.add_(1)
    return v * (first * second).tanh()[:, :, None, None]


def hooks_on_means(k: Any, v: Any) -> State:
    parts = []
    for i in range(v.shape[1]):
        mean = v[:, i].mean((2, 3))
        if mean.requires_grad:
            mean.register_hook(lambda gradient: 2 * gradient)
        parts.append(v[:, i] * mean.tanh()[:, :, None, None])
    return k, torch.stack(parts, 1)


KNOWN: dict[str, Callable[[Any, Any], Any]] = {
    "as published": as_published,
    "taken apart and stacked": lambda k, v: (
        k,
        torch.stack([part * with_gates(part) for part in v.unbind(1)], 1),
    ),
    "torch.unbind, negative dimensions": lambda k, v: (
        k,
        torch.stack([part * with_gates(part) for part in torch.unbind(v, dim=-4)], dim=-4),
    ),
    "selected": lambda k, v: (
        k,
        torch.concat(
            [
                torch.mul(v.select(1, i), with_gates(v.select(1, i)))[:, None]
                for i in range(v.size(1))
            ],
            dim=1,
        ),
    ),
    "whole slices": lambda k, v: (
        k,
        torch.cat(
            [
                (v[:, i, :, :, :] * with_gates(v[:, i, ...]))[:, None, :, :, :]
                for i in range(v.size(1))
            ],
            1,
        ),
    ),
    "from the left": of_values(lambda v: with_gates(v) * v),
    "expanded": of_values(lambda v: v * with_gates(v).expand_as(v)),
    "means that keep dimensions": of_values(lambda v: v * gate(v.mean([-1, -2], keepdim=True))),
    "the mean by a function": of_values(
        lambda v: v * gate(torch.mean(v, dim=(2, 3), keepdim=True))
    ),
    "a module": of_values(lambda v: v * gate(nn.AdaptiveAvgPool2d(1)(v))),
    "twice": of_values(lambda v: v * with_gates(v) * with_gates(v * with_gates(v))),
    "constants": of_values(lambda v: v * torch.full((2, DIM, 1, 1), -0.5).double()),
    "as they were": of_values(lambda v: v),
    "one of them": lambda k, v: (
        k,
        torch.cat(
            [
                (v[:, i] * with_gates(v[:, i]) if i == 0 else v[:, i]).unsqueeze(1)
                for i in range(v.size(1))
            ],
            1,
        ),
    ),
    "means in the loss": lambda k, v: (*as_published(k, v), pooled(v[:, 0])),
    "means changed in place": of_values(
        lambda v: v * v.mean((2, 3)).mul_(3).sigmoid_()[:, :, None, None]
    ),
    "pooled maps changed in place": of_values(
        lambda v: v * F.adaptive_avg_pool2d(v, 1).sub_(0.1).tanh_()
    ),
    "two means, of which one is changed": of_values(two_means_of_which_one_is_changed),
    "hooks on means": hooks_on_means,
    "metadata of a part": lambda k, v: (
        as_published(k, v) if v[:, 0].shape == v.shape[:1] + v.shape[2:] else ()
    ),
}


@pytest.mark.parametrize("use", KNOWN)
def test_no_map_is_written(use: str, made: list[tuple[int, ...]]) -> None:
    theirs, ours = stages()
    found = run(ours, KNOWN[use])
    assert made == []
    for a, b in zip(found, run(theirs, KNOWN[use]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def changed_in_place(k: Any, v: Any) -> State:
    parts = [v[:, i] for i in range(v.shape[1])]
    v.mul_(0.5)
    return k, torch.stack(parts, 1)


def part_changed_in_place(k: Any, v: Any) -> State:
    v[:, 0].mul_(0.5)
    return k, v


def scaled_and_then_changed(k: Any, v: Any) -> State:
    scaled = [v[:, i] * with_gates(v[:, i]) for i in range(v.shape[1])]
    v.mul_(0.5)
    return k, torch.stack(scaled, 1)


def gates_changed(k: Any, v: Any) -> State:
    parts = []
    for i in range(v.shape[1]):
        by = torch.full((2, DIM, 1, 1), 0.5).double()
        parts.append(v[:, i] * by)
        by.mul_(100)
    return k, torch.stack(parts, 1)


def seen_twice_and_changed(k: Any, v: Any) -> State:
    again = v.view_as(v)
    v.mul_(0.5)
    return k, again


def parts_seen_twice_and_changed(k: Any, v: Any) -> State:
    parts = [v[:, i] * with_gates(v[:, i]) for i in range(v.shape[1])]
    again = [part.view_as(part) for part in parts]
    again[0].mul_(0.5)
    return k, torch.stack(parts, 1)


def without_gradients(k: Any, v: Any) -> State:
    with torch.no_grad():
        scaled = [v[:, i] * with_gates(v[:, i]) for i in range(v.shape[1])]
    return k, torch.stack(scaled, 1)


# The original's own backward refuses what was changed under it.
IN_PLACE = (
    "changed in place",
    "a part changed in place",
    "scaled, and then changed",
    "gates changed afterwards",
    "seen twice, and changed",
    "parts seen twice, and changed",
)
OTHERWISE: dict[str, Callable[[Any, Any], Any]] = {
    "another order": lambda k, v: (
        k,
        torch.stack([v[:, i] * with_gates(v[:, i]) for i in reversed(range(v.size(1)))], 1),
    ),
    "the last two": lambda k, v: (
        k[:, -2:],
        torch.stack([v[:, i] * with_gates(v[:, i]) for i in range(v.size(1))][-2:], 1),
    ),
    "one twice": lambda k, v: (
        torch.cat((k, k[:, :1]), 1),
        torch.stack([*(v[:, i] * with_gates(v[:, i]) for i in range(v.size(1))), v[:, 0]], 1),
    ),
    "numbers for positions": of_values(lambda v: v * v.mean(1, keepdim=True)),
    "numbers for channels alone": of_values(
        lambda v: v * torch.linspace(0, 1, DIM).double().view(1, DIM, 1, 1)
    ),
    "a number": of_values(lambda v: v * 0.5),
    "a gate for every element": of_values(lambda v: v * v.tanh()),
    "a sum": of_values(lambda v: v * with_gates(v) + 1),
    "another function of a scaled part": of_values(lambda v: (v * with_gates(v)).relu()),
    "the square": of_values(lambda v: (v * with_gates(v)) * (v * with_gates(v))),
    "a part in the loss": lambda k, v: (*as_published(k, v), v[:, 0]),
    "a scaled part in the loss": lambda k, v: (*as_published(k, v), v[:, 0] * with_gates(v[:, 0])),
    "the stack in the loss": lambda k, v: (k, v, as_published(k, v)[1]),
    "detached": of_values(lambda v: (v * with_gates(v)).detach()),
    "stacked elsewhere": lambda k, v: (
        k,
        torch.stack([v[:, i] * with_gates(v[:, i]) for i in range(v.size(1))], 2).transpose(1, 2),
    ),
    "changed in place": changed_in_place,
    "a part changed in place": part_changed_in_place,
    "scaled, and then changed": scaled_and_then_changed,
    "gates changed afterwards": gates_changed,
    "seen twice, and changed": seen_twice_and_changed,
    "parts seen twice, and changed": parts_seen_twice_and_changed,
    "without gradients": without_gradients,
    "means over batch too": of_values(lambda v: v * gate(v.mean((0, 2, 3)))[None, :, None, None]),
    "pooled to more": of_values(lambda v: v * F.adaptive_avg_pool2d(v, (4, 1)).tanh()),
    "of a checkpoint": lambda k, v: checkpoint(as_published, k, v, use_reentrant=False),
}


@pytest.mark.parametrize("use", OTHERWISE)
def test_whatever_is_done_to_them_the_results_stay(use: str) -> None:
    theirs, ours = stages()
    with torch.set_grad_enabled(use not in IN_PLACE):
        for a, b in zip(run(ours, OTHERWISE[use]), run(theirs, OTHERWISE[use]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, DIM, 1, 1), (3, DIM, 1, 7)])
def test_other_sizes_of_maps(shape: tuple[int, ...]) -> None:
    theirs, ours = stages(3)
    between = KNOWN["expanded"]
    results = []
    for stage in (theirs, ours):
        x, k, v = (
            torch.linspace(-1, 1, 512).double()[: torch.Size(shape).numel()].view(shape),
            None,
            None,
        )
        for layer in stage:
            out, k, v = layer(x, k, v)
            x = x + out
            k, v = between(k, v)
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_parts_of_two_stacks_are_not_taken_for_one() -> None:
    theirs, ours = stages(3)
    results = []
    for stage in (theirs, ours):
        x = torch.linspace(-1, 1, 2 * DIM * 12).double().view(2, DIM, 4, 3)
        _, k, v = stage[0](x, None, None)
        _, left_k, left_v = stage[1](x.cos(), k, v)
        _, _, right_v = stage[2](x.sin(), k, v)
        mixed = torch.stack((left_v[:, 0] * with_gates(left_v[:, 0]), right_v[:, 1]), 1)
        results.append(stage[1](x, left_k, mixed)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_two_layers_go_on_from_one_stack() -> None:
    theirs, ours = stages(3)
    results = []
    for stage in (theirs, ours):
        stage.zero_grad()
        x = torch.linspace(-1, 1, 2 * DIM * 12).double().view(2, DIM, 4, 3)
        first, k, v = stage[0](x, None, None)
        k, v = as_published(k, v)
        left, left_k, left_v = stage[1](x.cos(), k, v)
        right, right_k, right_v = stage[2](x.sin(), k, v)
        again = stage[2](left, *as_published(left_k, left_v))[0]
        other = stage[1](right, *as_published(right_k, right_v))[0]
        (left * right + again * other + first).square().sum().backward()
        results.append([left, right, again, other, *(p.grad for p in stage.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_without_gradients_no_map_is_written_either(made: list[tuple[int, ...]]) -> None:
    theirs, ours = stages()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            (found,), (expected,) = run(ours, as_published), run(theirs, as_published)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert made == []


def test_layers_and_what_is_between_in_a_checkpoint(made: list[tuple[int, ...]]) -> None:
    theirs, ours = stages()

    def between(k: Any, v: Any) -> State:
        return as_published(k, v)

    class Stage(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers

        def step(self, i: int, x: Tensor, k: Any, v: Any) -> Any:
            out, k, v = self.layers[i](x, k, v)
            return (x + out, *between(k, v))

        def forward(self, x: Tensor, each: bool) -> Tensor:
            k = v = None
            for i in range(len(self.layers)):
                if each:
                    x, k, v = checkpoint(self.step, i, x, k, v, use_reentrant=False)
                else:
                    x, k, v = self.step(i, x, k, v)
            return x

    results = []
    for layers, each, whole in ((theirs, False, False), (ours, True, False), (ours, False, True)):
        stage = Stage(layers)
        stage.zero_grad()
        x = torch.linspace(-1, 1, 2 * DIM * 12).double().view(2, DIM, 4, 3).requires_grad_()
        out = checkpoint(stage, x, each, use_reentrant=False) if whole else stage(x, each)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in stage.parameters())])
    assert made == []
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_reentrant_checkpoint_is_refused() -> None:
    _, ours = stages(3)
    x = torch.linspace(-1, 1, 2 * DIM * 12).double().view(2, DIM, 4, 3).requires_grad_()
    _, k, v = ours[0](x, None, None)
    k, v = as_published(k, v)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        ours[1](x, *checkpoint(lambda k, v: (k, v), k, v, use_reentrant=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, made: list[tuple[int, ...]]) -> None:
    theirs, ours = (stage.to(dtype) for stage in stages(3))
    exact, _ = stages(3)
    exact.load_state_dict(theirs.state_dict())
    found = run(ours, as_published, dtype)
    assert made == []
    expected, published = run(exact, as_published), run(theirs, as_published, dtype)
    # As near to float64 as the published form in this dtype, by a few times: fewer numbers are rounded.
    for a, b, c in zip(found, published, expected, strict=True):
        scale = c.abs().max().clamp(min=1e-3)  # one layer alone has no gradient of its query
        ours_off, theirs_off = ((t.double() - c).abs().max() / scale for t in (a, b))
        assert ours_off <= 3 * theirs_off + 8 * torch.finfo(dtype).eps


def test_autocast_is_the_originals_own_affair() -> None:
    theirs, ours = (stage.float() for stage in stages(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (run(s, as_published, torch.float32) for s in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 0.05 * b.abs().max() + 1e-3
