"""Retrievals of a weight below a tolerance are left out: of sums, of dot products and of gathers, and are not read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.backends import ALL, Backend, over, words
from support.cases import Case, evaluate, make_case
from support.layer_checks import FORMS, Results, check, filters_together, leaf, make, step
from support.layouts import TOKEN_LAYOUTS, channel_slice, channels_last, contiguous, last_slice
from support.left_out import between, spread
from support.on_gpu import same_bits
from support.oracle import assert_matches
from support.pairs import pairs
from torch import Tensor, nn

import ela_kernels as ek


def check_case(backend: Backend, case: Case) -> dict[str, Tensor]:
    found = backend.evaluate(case)
    weights = found["weights"]
    assert (weights < case.tolerance).any()
    assert (weights >= case.tolerance).any()
    assert_matches(found, case)
    return found


def layouts(backend: Backend) -> list[dict[str, Any]]:
    factors = {
        "layout": (contiguous, channels_last, channel_slice, last_slice),
        "dout": (contiguous, channels_last),
        "dtype": backend.dtypes,
        "size": [((3, 12, 5, 7), 3), ((2, 32, 4, 8), 2), ((2, 6, 4, 5), 6)],
        "depth": [2, 3, 7],
    }
    return pairs(factors)


@over("pair", layouts, ALL, ids=words)
def test_layouts_of_maps(backend, pair):
    shape, heads = pair["size"]
    makers, dout = pair["layout"], pair["dout"]
    check_case(
        backend, spread(make_case(shape, pair["depth"], heads, pair["dtype"], makers, dout=dout))
    )


@over("layout", lambda backend: TOKEN_LAYOUTS, ALL, words)
def test_layouts_of_tokens(backend, layout):
    case = make_case((2, 9, 12), 4, 2, backend.exact, layout, dout=layout, channels_last=True)
    check_case(backend, spread(case))


@over(
    "size",
    lambda backend: [s for s in backend.sizes if s[0][0] * s[1] > 1 and len(s[0]) == 4 and s[0][2]],
    ALL,
)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
def test_sizes(backend, size, layout):
    shape, heads = size
    check_case(backend, spread(make_case(shape, 6, heads, backend.exact, layout, dout=layout)))


@over("depth", lambda backend: [d for d in backend.depths if d > 3], ALL)
def test_depths(backend, depth):
    case = make_case((2, 4, 2, 3), depth, 2, backend.exact)
    check_case(backend, spread(case))


@over("beyond", lambda backend: backend.beyond, [b for b in ALL if b.beyond], words)
def test_beyond_what_is_worked_on_at_a_time(backend, beyond):
    shape, heads, layout = beyond
    if shape[0] * heads < 2:
        shape = (2, *shape[1:])
    case = make_case(shape, 3, heads, backend.exact, layout, dout=layout)
    found = backend.evaluate(spread(case))
    assert_matches(found, case)


@over("layout", lambda backend: [contiguous, channels_last], ALL, words)
@pytest.mark.parametrize("tolerance", [0.99, 0.5], ids=["all", "most"])
def test_hardly_anything_or_nothing_is_left(backend, layout, tolerance):
    """Of a sum over nothing all is zero, whatever the values are."""
    case = make_case((3, 6, 4, 5), 5, 2, backend.exact, layout, scale=0.1, dout=layout)
    case.tolerance = tolerance
    found = backend.evaluate(case)
    assert_matches(found, case)
    assert not found["out"].any()
    assert not any(found[f"d values[{j}]"].any() for j in range(5))


@over(
    "pair",
    lambda backend: pairs({"dtype": backend.dtypes, "layout": [contiguous, channels_last]}),
    ALL,
    ids=words,
)
def test_equal_bits_where_nothing_is_below(backend, pair):
    case = make_case((2, 12, 5, 7), 5, 3, pair["dtype"], pair["layout"])
    exact = backend.evaluate(case)
    case.tolerance = float(exact["weights"].min()) / 2
    found = backend.evaluate(case)
    for name, x in found.items():
        assert same_bits(x, exact[name]), name


@over("layout", lambda backend: [contiguous, channels_last], ALL, words)
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
def test_what_is_left_out_may_be_anything(backend, layout, number):
    """And what is not shows; without a tolerance everything does."""
    heads, per_head, depth = 3, 2, 4
    case = spread(make_case((2, 6, 4, 5), depth, heads, backend.exact, layout, dout=layout))
    clean = backend.evaluate(case)
    out = clean["weights"] < case.tolerance  # [B, G, T]
    assert out.any()
    for j, value in enumerate(case.values):
        value[out[..., j].repeat_interleave(per_head, 1)] = number
    found = backend.evaluate(case)
    for name, x in found.items():
        assert same_bits(x, clean[name]), name
    tolerance, case.tolerance = case.tolerance, 0.0
    everything = backend.evaluate(case)
    assert (everything["out"].isfinite().flatten(2).all(2) == ~_any_head(out, per_head)).all()
    case.tolerance = tolerance
    kept = (~out).nonzero()[0]
    case.values[int(kept[2])][int(kept[0]), int(kept[1]) * per_head] = number
    assert not backend.evaluate(case)["out"].isfinite().all()


def _any_head(out: Tensor, per_head: int) -> Tensor:
    """Which channels `[B, C]` are of a head that leaves something out."""
    return out.any(-1).repeat_interleave(per_head, 1)


@over("form", lambda backend: FORMS, ALL, words)
def test_a_gradient_that_is_left_out_may_be_anything(backend, form):
    """The pull form: what a value's gradient leaves out of the later layers' output gradients."""
    torch.manual_seed(4)
    B, C, G, T = 2, 6, 3, 4
    rows = [torch.randn(B, C, dtype=backend.exact) * 3 for _ in range(2 * T)]
    maps = [torch.randn(B, C, 3, 5, dtype=backend.exact) for _ in range(2 * T)]
    rows = [backend.put(r) for r in rows]
    values, douts = (
        [backend.put(m).contiguous(memory_format=form) for m in maps[i::2]] for i in (0, 1)
    )
    q, k = rows[::2], rows[1::2]

    def step(douts: list[Tensor], tolerance: float) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [v.detach().requires_grad_() for v in values]
        history = ek.LayerHistory(tolerance=tolerance)
        outs, weights = [], []
        for t in range(T):
            outs.append(history.attend(q[t], k[t], leaves[t], heads=G))
            weights.append(history.weights)
        return weights, list(torch.autograd.grad(outs, leaves, douts))

    tolerance = between(step(douts, 0.0)[0][1:])
    weights, clean = step(douts, tolerance)
    poisoned, found_out = [d.clone() for d in douts], torch.zeros(T, B, C, dtype=torch.bool)
    for t in range(1, T):
        # Whole heads of a layer's gradient, of which some earlier value takes no part.
        out = (weights[t] < tolerance).cpu()
        for b, g in out.any(-1).nonzero().tolist():
            channels = slice(g * C // G, (g + 1) * C // G)
            poisoned[t][b, channels] = torch.inf
            found_out[:, b, channels] |= ~torch.nn.functional.pad(
                out[b, g], (0, T - t - 1), value=True
            ).unsqueeze(1)
    assert found_out.any()
    assert not found_out.all()
    _, found = step(poisoned, tolerance)
    for j in range(T):
        assert torch.equal(found[j].isfinite().flatten(2).all(2).cpu(), ~found_out[j]), j
        finite = ~found_out[j]
        assert torch.equal(found[j].cpu()[finite], clean[j].cpu()[finite]), j


def run_mixed(backend: Backend, depth: int, form: Any) -> list[Tensor]:
    """Layers of several tolerances that share a history, in the widest dtype that the backend serves."""
    torch.manual_seed(6)
    B, C, G = 2, 12, 3

    def leaves(*shape: int, scale: float = 1.0) -> list[Tensor]:
        made = [torch.randn(shape, dtype=backend.exact) * scale for _ in range(depth)]
        made = [backend.put(m) for m in made]
        if len(shape) == 4:
            made = [m.contiguous(memory_format=form) for m in made]
        return [m.requires_grad_() for m in made]

    q, k, v = leaves(B, C, scale=3.0), leaves(B, C), leaves(B, C, 4, 5)
    history = ek.LayerHistory(tolerance=MIXED[-1])
    outs = []
    for t in range(depth):
        own = MIXED[t % len(MIXED)] if t % 2 else None
        outs.append(history.attend(q[t], k[t], v[t], heads=G, tolerance=own))
    loss = sum((out.double() * (i + 1)).sin().sum() for i, out in enumerate(outs))
    loss = loss + history.kl.sum() + history.weights.square().sum()
    return [*(o.detach() for o in outs), *torch.autograd.grad(loss, [*q, *k, *v])]


MIXED = (0.0, 0.013, 1e-7, 0.21)


@over("form", lambda backend: FORMS, ALL)
def test_layers_of_several_tolerances(backend, form):
    depth = 4 if backend.is_slow else 7
    found = run_mixed(backend, depth, form)
    with ek.use_backend("eager"):
        expected = run_mixed(backend, depth, form)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, **backend.tolerance, msg=lambda m, i=i: f"{i}: {m}")


def sharpen(modules: nn.ModuleList, x: Tensor) -> None:
    """Queries so long that weights spread, and a tolerance among those of all layers."""
    for module in modules:
        layer = getattr(module, "attn", module)
        nn.init.normal_(layer.Wq.weight)
        nn.init.normal_(layer.Wk.weight)
        layer.Wq.weight.data *= 25 if x.dtype == torch.float64 else 5
    found: list[Tensor] = []
    with ek.use_backend("eager"), torch.no_grad():
        double = copy.deepcopy(modules).to("cpu", torch.float64)
        y, history = x.detach().to("cpu", torch.float64), ek.LayerHistory()
        for module in double:
            y = module(y, history) if isinstance(module, ek.ELA) else y + module(y, history)
            if history.weights.shape[-1] > 1:
                found.append(history.weights)
    tolerance = between(found)
    for module in modules:
        getattr(module, "attn", module).tolerance = tolerance


def stages(backend: Backend) -> list[dict[str, Any]]:
    """In half precision weights differ too much for one tolerance to part them alike."""
    return pairs(
        {
            "kind": ["layer", "block"],
            "dtype": [d for d in (torch.float64, torch.float32) if d in backend.dtypes],
            "form": FORMS,
            "size": [((3, 12, 5, 7), 3), ((2, 64, 4, 4), 16)],
        }
    )


def near_by_norm(backend: Backend, modules: nn.ModuleList, x: Tensor) -> Results:
    """In float32, against float64: single numbers of sharp weights are sums of much larger ones."""
    modules, x = modules.to(backend.device), leaf(x, backend.device)
    found = step()(copy.deepcopy(modules), x)
    cpu = torch.device("cpu")
    with ek.use_backend("eager"):
        exact = step()(modules.to(cpu, torch.float64), leaf(x, cpu, torch.float64))
    assert list(found) == list(exact)
    together = filters_together(exact)
    for name, got in filters_together({n: t.cpu().double() for n, t in found.items()}).items():
        want = together[name].double()
        error = (got - want).norm()
        assert error <= 5e-5 * want.norm() + 1e-5, name
    return found


@over("pair", stages, [b for b in ALL if b.has_kernels], ids=words)
def test_stages(backend, pair):
    (shape, head_dim), depth = pair["size"], 3 if backend.is_slow else 5
    modules, x = make(pair["kind"], shape, depth, head_dim, pair["dtype"], pair["form"])
    sharpen(modules, x)
    if backend.is_as_exact_as_eager:
        found = check(backend, step(), modules, x)
    else:
        found = near_by_norm(backend, modules, x)
    layer = getattr(modules[0], "attn", modules[0])
    assert (found["weights"] < layer.tolerance).any()


@over("pair", lambda b: pairs({"kind": ["layer", "block"], "form": FORMS}), ALL, ids=words)
def test_whole_layers_are_served(backend, pair, made):
    modules, x = make(pair["kind"], (2, 12, 4, 5), 2, 3, backend.exact, pair["form"])
    modules, x = modules.to(backend.device), leaf(x, backend.device)
    for module in modules:
        getattr(module, "attn", module).tolerance = 1e-3
    step()(modules, x)
    if backend.has_kernels:
        assert made == ["layer"] * 2 + ["layer_backward"] * 2


@over("layout", lambda backend: [contiguous, channels_last], ALL, words)
def test_a_tolerance_that_float32_has_not(backend, layout):
    """It leaves out what is zero, and nothing else."""
    case = make_case((2, 6, 4, 5), 3, 2, backend.exact, layout, scale=0.1, dout=layout)
    case.keys[0][:] = -1e4 * case.q  # in one head of two at least the softmax ends at zero
    case.scale = 100.0
    case.tolerance = 1e-60
    clean = backend.evaluate(case)
    out = clean["weights"] == 0
    assert out.any()
    for j, value in enumerate(case.values):
        value[out[..., j].repeat_interleave(3, 1)] = torch.inf
    found = backend.evaluate(case)
    assert all(same_bits(x, clean[name]) for name, x in found.items())


@over("dtype", lambda backend: backend.dtypes, ALL)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=words)
def test_the_output_keeps_the_memory_format(backend, dtype, layout):
    case = backend.case(spread(make_case((2, 6, 4, 5), 3, 2, dtype, layout)))
    out = ek.layer_attention(
        case.q, case.keys, case.values, case.heads, case.scale, tolerance=case.tolerance
    ).out
    expected = torch.channels_last if layout is channels_last else torch.contiguous_format
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=expected)


def test_a_tolerance_that_is_none(backend):
    case = make_case()
    for tolerance, error in ((-0.1, ValueError), (1.0, ValueError), (float("nan"), ValueError)):
        case.tolerance = tolerance
        with pytest.raises(error, match=r"tolerance: got .*; allowed is a weight from 0"):
            backend.evaluate(case)
    for given in (True, "1e-3", None):
        with pytest.raises(TypeError, match=r"tolerance: got .*; allowed is a float"):
            ek.layer_attention(case.q, case.keys, case.values, case.heads, tolerance=given)
    for given in (-1, 2.0):
        with pytest.raises(ValueError, match="tolerance: got"):
            ek.LayerHistory(tolerance=given)
        with pytest.raises(ValueError, match="tolerance: got"):
            ek.LayerAttention(8, 4, tolerance=given)
        with pytest.raises(ValueError, match="tolerance: got"):
            ek.ELA(8, 4, tolerance=given)
        with pytest.raises(ValueError, match="tolerance: got"):
            ek.LayerHistory().attend(
                case.q, case.keys[0], case.values[0], heads=case.heads, tolerance=given
            )


def test_evaluate_passes_it_on():
    """What the tests above rest on."""
    case = spread(make_case((3, 6, 4, 5), 5, 2, torch.float64))
    with ek.use_backend("eager"):
        found = evaluate(case)
    assert_matches(found, case)
    case.tolerance = 0.0
    with pytest.raises(AssertionError):
        assert_matches(found, case)
