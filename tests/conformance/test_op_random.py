"""Random shapes, layouts, strides and dtypes against the oracle."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import ALL, Backend, on
from support.cases import Case, make_case
from support.layouts import MAP_LAYOUTS, TOKEN_LAYOUTS
from support.oracle import assert_matches


@st.composite
def cases(draw: st.DrawFn, backend: Backend) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    # A thousand positions of a sample take an interpreter seconds; a few hundred are in several programs as well.
    images, side = (2, 6) if backend.is_slow else (4, 11)
    heads, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    batch, depth = draw(st.integers(0, images)), draw(st.integers(1, 9))
    channels_last = draw(st.booleans())
    spatial = draw(st.lists(st.integers(1, side), min_size=1, max_size=3))
    channels = heads * head_dim
    layouts = st.sampled_from(TOKEN_LAYOUTS if channels_last else MAP_LAYOUTS)
    through = draw(st.sets(st.sampled_from(["out", "weights", "kl"]), min_size=1))
    case = make_case(
        (batch, *spatial, channels) if channels_last else (batch, channels, *spatial),
        depth,
        heads,
        draw(st.sampled_from(backend.dtypes)),
        draw(st.lists(layouts, min_size=1, max_size=3)),
        scale=draw(st.sampled_from([None, 0.3, -1.0])),
        prev_depth=draw(st.none() | st.integers(1, depth)),
        channels_last=channels_last,
        dout=draw(layouts),
        through=" ".join(through),
    )
    case.wanted = draw(st.lists(st.sampled_from(case.wanted), unique=True))
    return case


def check_random_calls(backend: Backend, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        # The backend is forced for the whole test: nothing of it changes between examples.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(case=cases(backend))
    def check(case: Case) -> None:
        assert_matches(backend.evaluate(case), case)

    check()


@on([b for b in ALL if not b.is_slow])
def test_random_calls(backend):
    check_random_calls(backend, 250)


@on([b for b in ALL if b.is_slow])
def test_a_few_random_calls(backend):
    check_random_calls(backend, 25)
