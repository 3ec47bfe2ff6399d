"""The gradients of attention over depth at every position, and the gather of its pull form.

The backward needs `<dout, v>` of all values before it can write the first gradient. It reads the values for these sums,
works out the coefficients of each gradient from planes [B, T, N], and reads the values again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.position import (
    direction,
    map_at,
    map_offsets,
    place_of,
)


@triton.jit(do_not_specialize=["channels", "positions", "lane_units", "blocks", "depth"])
def position_bwd_sums_kernel(
    table_ptr,
    like_ptr,
    row_ptr,
    query_ptr,
    dout_ptr,
    planes_ptr,  # [3, B, depth, N]: <dout, v>, the score, and the inverse root mean square
    batch,
    channels,
    positions,
    lane_units,
    blocks,
    depth,
    stride_vb,
    stride_vi,
    stride_kb,
    stride_ki,
    stride_qb,
    stride_qi,
    stride_db,
    stride_di,
    eps,
    NORMED: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    b, n, c, mask = place_of(
        tl.program_id(0), channels, positions, lane_units, blocks, UNIT, P, C, INTERLEAVED
    )
    row, query = direction(
        row_ptr, query_ptr, b, n, c, mask, channels, stride_qb, stride_qi,
        UNIT, INTERLEAVED, HAS_QUERY,
    )  # fmt: skip
    u = row * query
    mask_n = n < positions
    if HAS_DOUT:
        at_d = map_offsets(b, n, c, stride_db, stride_di, UNIT, INTERLEAVED)
        dout = tl.load(dout_ptr + at_d, mask=mask, other=0.0).to(tl.float32)
    at_v = map_offsets(b, n, c, stride_vb, stride_vi, UNIT, INTERLEAVED)
    at_k = map_offsets(b, n, c, stride_kb, stride_ki, UNIT, INTERLEAVED)
    plane = tl.full([1], batch, tl.int64) * depth * positions
    for t in range(depth):
        if HAS_KEYS:
            k_ptr = map_at(table_ptr, depth + t, like_ptr, ALIGNED)
            k = tl.load(k_ptr + at_k, mask=mask, other=0.0).to(tl.float32)
        else:
            v_ptr = map_at(table_ptr, t, like_ptr, ALIGNED)
            k = tl.load(v_ptr + at_v, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(u * k, axis=1)
        at = (b * depth + t) * positions + n
        if NORMED:
            inverse = 1.0 / tl.sqrt(tl.sum(k * k, axis=1) / channels + eps)
            score *= inverse
            tl.store(planes_ptr + 2 * plane + at, inverse, mask=mask_n)
        tl.store(planes_ptr + plane + at, score, mask=mask_n)
        if HAS_DOUT:
            v = k
            if HAS_KEYS:
                v_ptr = map_at(table_ptr, t, like_ptr, ALIGNED)
                v = tl.load(v_ptr + at_v, mask=mask, other=0.0).to(tl.float32)
            tl.store(planes_ptr + at, tl.sum(dout * v, axis=1), mask=mask_n)


@triton.jit(do_not_specialize=["places", "positions", "depth", "prev_depth"])
def position_bwd_coefficients_kernel(
    planes_ptr,  # [3, B, depth, N]: as the sums left them; alpha and beta take the place of the first two
    weights_ptr,  # [B, depth, N]
    dweights_ptr,
    dkl_ptr,  # [B, N]
    prev_ptr,  # [B, prev_depth, N]
    dprev_ptr,
    places,
    positions,
    depth,
    prev_depth,
    channels,
    NORMED: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    HAS_DKL: tl.constexpr,
    HAS_DPREV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < places
    b, n = at // positions, at % positions
    plane = tl.full([1], places, tl.int64) * depth
    mean = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    dkl = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_DKL:
        dkl = tl.load(dkl_ptr + at, mask=mask, other=0.0)
    for t in range(depth):
        of_t = (b * depth + t) * positions + n
        w = tl.load(weights_ptr + of_t, mask=mask, other=0.0)
        arrived = tl.zeros([BLOCK], tl.float32)
        if HAS_DOUT:
            arrived += tl.load(planes_ptr + of_t, mask=mask, other=0.0)
        if HAS_DWEIGHTS:
            arrived += tl.load(dweights_ptr + of_t, mask=mask, other=0.0)
        mean += w * arrived
        if HAS_DKL:
            there = mask & (tl.full([BLOCK], t, tl.int32) < prev_depth)
            mass += tl.load(prev_ptr + (b * prev_depth + t) * positions + n, mask=there, other=0.0)
        if HAS_DPREV:
            score = tl.load(planes_ptr + plane + of_t, mask=mask, other=0.0)
            larger = tl.maximum(highest, score)
            shrink = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - larger))
            total = total * shrink + tl.exp(score - larger)
            highest = larger
    for t in range(depth):
        of_t = (b * depth + t) * positions + n
        w = tl.load(weights_ptr + of_t, mask=mask, other=0.0)
        arrived = tl.zeros([BLOCK], tl.float32)
        if HAS_DOUT:
            arrived += tl.load(planes_ptr + of_t, mask=mask, other=0.0)
        if HAS_DWEIGHTS:
            arrived += tl.load(dweights_ptr + of_t, mask=mask, other=0.0)
        dscore = w * (arrived - mean)
        score = tl.load(planes_ptr + plane + of_t, mask=mask, other=0.0)
        if HAS_DKL:
            there = mask & (tl.full([BLOCK], t, tl.int32) < prev_depth)
            of_prev = (b * prev_depth + t) * positions + n
            prev = tl.load(prev_ptr + of_prev, mask=there, other=0.0)
            dscore += dkl * (mass * w - prev)
            if HAS_DPREV:
                log_weight = score - highest - tl.log(total)
                dprev = tl.where(prev == 0.0, 0.0, dkl * (tl.log(prev) + 1.0 - log_weight))
                tl.store(dprev_ptr + of_prev, dprev, mask=there)
        shrink_by = tl.zeros([BLOCK], tl.float32)
        towards = dscore
        if NORMED:
            inverse = tl.load(planes_ptr + 2 * plane + of_t, mask=mask, other=0.0)
            towards = dscore * inverse
            shrink_by = towards * inverse * score / channels
        tl.store(planes_ptr + of_t, towards, mask=mask)
        tl.store(planes_ptr + plane + of_t, shrink_by, mask=mask)


@triton.jit(do_not_specialize=["channels", "positions", "lane_units", "blocks", "depth"])
def position_bwd_maps_kernel(
    table_ptr,  # [4, depth]: values, keys, their gradients
    like_ptr,
    row_ptr,
    query_ptr,
    dout_ptr,
    weights_ptr,
    planes_ptr,
    dquery_ptr,
    partial_ptr,  # [programs, C]: parts of the row's gradient
    batch,
    channels,
    positions,
    lane_units,
    blocks,
    depth,
    stride_vb,
    stride_vi,
    stride_kb,
    stride_ki,
    stride_qb,
    stride_qi,
    stride_db,
    stride_di,
    stride_gb,  # of all gradients
    stride_gi,
    HAS_KEYS: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_DQUERY: tl.constexpr,
    DVALUES: tl.constexpr,
    DKEYS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    pid = tl.program_id(0)
    b, n, c, mask = place_of(pid, channels, positions, lane_units, blocks, UNIT, P, C, INTERLEAVED)
    row, query = direction(
        row_ptr, query_ptr, b, n, c, mask, channels, stride_qb, stride_qi,
        UNIT, INTERLEAVED, HAS_QUERY,
    )  # fmt: skip
    u = row * query
    mask_n = n < positions
    at_v = map_offsets(b, n, c, stride_vb, stride_vi, UNIT, INTERLEAVED)
    at_k = map_offsets(b, n, c, stride_kb, stride_ki, UNIT, INTERLEAVED)
    at_g = map_offsets(b, n, c, stride_gb, stride_gi, UNIT, INTERLEAVED)
    dout = tl.zeros([P, C], tl.float32)
    if HAS_DOUT:
        at_d = map_offsets(b, n, c, stride_db, stride_di, UNIT, INTERLEAVED)
        dout = tl.load(dout_ptr + at_d, mask=mask, other=0.0).to(tl.float32)
    plane = tl.full([1], batch, tl.int64) * depth * positions
    du = tl.zeros([P, C], tl.float32)
    for t in range(depth):
        at = (b * depth + t) * positions + n
        w = tl.load(weights_ptr + at, mask=mask_n, other=0.0)[:, None]
        alpha = tl.load(planes_ptr + at, mask=mask_n, other=0.0)[:, None]
        beta = tl.load(planes_ptr + plane + at, mask=mask_n, other=0.0)[:, None]
        if HAS_KEYS:
            k_ptr = map_at(table_ptr, depth + t, like_ptr, ALIGNED)
            k = tl.load(k_ptr + at_k, mask=mask, other=0.0).to(tl.float32)
        else:
            k_ptr = map_at(table_ptr, t, like_ptr, ALIGNED)
            k = tl.load(k_ptr + at_v, mask=mask, other=0.0).to(tl.float32)
        du += alpha * k
        dkey = alpha * u - beta * k
        if DVALUES:
            dv_ptr = map_at(table_ptr, 2 * depth + t, like_ptr, ALIGNED)
            dv = w * dout
            if not HAS_KEYS:
                dv += dkey
            tl.store(dv_ptr + at_g, dv.to(like_ptr.dtype.element_ty), mask=mask)
        if DKEYS:
            dk_ptr = map_at(table_ptr, 3 * depth + t, like_ptr, ALIGNED)
            tl.store(dk_ptr + at_g, dkey.to(like_ptr.dtype.element_ty), mask=mask)
    if HAS_DQUERY:
        dq = (du * row).to(like_ptr.dtype.element_ty)
        tl.store(dquery_ptr + at_g, dq, mask=mask)
    part = tl.sum(du * query, axis=0)
    tl.store(partial_ptr + pid.to(tl.int64) * channels + c, part, mask=c < channels)


@triton.jit(do_not_specialize=["channels", "positions", "lane_units", "blocks", "sources", "index"])
def position_gather_kernel(
    table_ptr,  # [6, sources]: output gradients, queries, weights, coefficients, rows, and the depth of each
    like_ptr,
    planes_like_ptr,
    value_ptr,
    dvalue_ptr,
    batch,
    channels,
    positions,
    lane_units,
    blocks,
    sources,
    index,
    stride_vb,
    stride_vi,
    stride_db,
    stride_di,
    stride_qb,
    stride_qi,
    stride_gb,
    stride_gi,
    HAS_QUERY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    b, n, c, mask = place_of(
        tl.program_id(0), channels, positions, lane_units, blocks, UNIT, P, C, INTERLEAVED
    )
    mask_n = n < positions
    at_d = map_offsets(b, n, c, stride_db, stride_di, UNIT, INTERLEAVED)
    at_q = map_offsets(b, n, c, stride_qb, stride_qi, UNIT, INTERLEAVED)
    total = tl.zeros([P, C], tl.float32)
    shrink = tl.zeros([P], tl.float32)
    for m in range(sources):
        depth = tl.load(table_ptr + 5 * sources + m)
        at = (b * depth + index) * positions + n
        weights_ptr = map_at(table_ptr, 2 * sources + m, planes_like_ptr, False)
        planes_ptr = map_at(table_ptr, 3 * sources + m, planes_like_ptr, False)
        row_ptr = map_at(table_ptr, 4 * sources + m, planes_like_ptr, False)
        w = tl.load(weights_ptr + at, mask=mask_n, other=0.0)
        alpha = tl.load(planes_ptr + at, mask=mask_n, other=0.0)
        shrink += tl.load(planes_ptr + depth * batch * positions + at, mask=mask_n, other=0.0)
        u = tl.load(row_ptr + c, mask=c < channels, other=0.0)[None, :]
        if HAS_QUERY:
            q_ptr = map_at(table_ptr, sources + m, like_ptr, ALIGNED)
            u = u * tl.load(q_ptr + at_q, mask=mask, other=0.0).to(tl.float32)
        d_ptr = map_at(table_ptr, m, like_ptr, ALIGNED)
        dout = tl.load(d_ptr + at_d, mask=mask, other=0.0).to(tl.float32)
        total += w[:, None] * dout + alpha[:, None] * u
    at_v = map_offsets(b, n, c, stride_vb, stride_vi, UNIT, INTERLEAVED)
    v = tl.load(value_ptr + at_v, mask=mask, other=0.0).to(tl.float32)
    total -= shrink[:, None] * v
    at_g = map_offsets(b, n, c, stride_gb, stride_gi, UNIT, INTERLEAVED)
    tl.store(dvalue_ptr + at_g, total.to(dvalue_ptr.dtype.element_ty), mask=mask)
