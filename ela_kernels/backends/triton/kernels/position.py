"""Attention over depth at every position: scores, softmax and sum of T maps in one read of them.

A program has some positions with all their channels. The forward goes through the values once, with the softmax's
maximum and sum carried along, so that each is read once from memory, whatever T is. Addresses of the maps come from a
table in memory and not as arguments: the loop over the depth is one of run time, for any depth, and is compiled once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.tiles import decoded


@triton.jit(do_not_specialize=["first"])
def position_table_kernel(table_ptr, first, pointers):
    """Writes the addresses of some tensors into the table, from `first` on."""
    for j in tl.static_range(len(pointers)):
        tl.store(table_ptr + first + j, pointers[j].to(tl.int64))


@triton.jit(do_not_specialize=["first"])
def position_numbers_kernel(table_ptr, first, codes):
    """Writes some numbers, as `plan.encoded` made them, into the table."""
    for j in tl.static_range(len(codes)):
        tl.store(table_ptr + first + j, decoded(codes[j]).to(tl.int64))


@triton.jit
def map_at(table_ptr, i, like_ptr, ALIGNED: tl.constexpr):
    """The i-th map of a table, of the element type of `like_ptr`."""
    address = tl.load(table_ptr + i)
    pointer = address.to(tl.pointer_type(like_ptr.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def place_of(
    pid,
    channels,
    positions,
    lane_units,
    blocks,
    UNIT: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Sample, positions `[P]` and channels `[C]` of a program, and the mask `[P, C]`.

    What lies together in memory, channels or positions, is counted in units of UNIT elements too: a mask that may end
    anywhere would make reads of single elements.
    """
    b = (pid // blocks).to(tl.int64)
    n = (pid % blocks).to(tl.int64) * P + tl.arange(0, P)
    c = tl.arange(0, C)
    if INTERLEAVED:
        mask = (n < positions)[:, None] & (c < lane_units * UNIT)[None, :]
    else:
        mask = (n < lane_units * UNIT)[:, None] & (c < channels)[None, :]
    return b, n, c, mask


@triton.jit
def map_offsets(b, n, c, stride_b, stride_i, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Offsets of a tile; strides come in units of UNIT elements, 16 bytes where all of them allow it."""
    unit = tl.full([1, 1], UNIT, tl.int64)
    if INTERLEAVED:
        return b * (unit * stride_b) + n[:, None] * (unit * stride_i) + c[None, :]
    else:
        return b * (unit * stride_b) + c.to(tl.int64)[None, :] * (unit * stride_i) + n[:, None]


@triton.jit
def direction(
    row_ptr, query_ptr, b, n, c, mask, channels, stride_b, stride_i,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_QUERY: tl.constexpr,
):  # fmt: skip
    """The factor of each channel `[1, C]`, and the query `[P, C]`, or ones."""
    row = tl.load(row_ptr + c, mask=c < channels, other=0.0)[None, :]
    if HAS_QUERY:
        at = map_offsets(b, n, c, stride_b, stride_i, UNIT, INTERLEAVED)
        query = tl.load(query_ptr + at, mask=mask, other=0.0).to(tl.float32)
    else:
        query = tl.full([1, 1], 1.0, tl.float32)
    return row, query


@triton.jit(do_not_specialize=["channels", "positions", "lane_units", "blocks", "depth"])
def position_fwd_kernel(
    table_ptr,  # [depth, of values, then of keys]
    like_ptr,
    row_ptr,  # [C]
    query_ptr,
    out_ptr,
    scores_ptr,  # [B, depth, N]
    norm_ptr,  # [2, B, N]: the largest score, and the sum of the exponentials of the others' distances from it
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
    stride_ob,
    stride_oi,
    eps,
    NORMED: tl.constexpr,
    HAS_KEYS: tl.constexpr,
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
    row, query = direction(
        row_ptr, query_ptr, b, n, c, mask, channels, stride_qb, stride_qi,
        UNIT, INTERLEAVED, HAS_QUERY,
    )  # fmt: skip
    u = row * query
    mask_n = n < positions
    highest = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    sums = tl.zeros([P, C], tl.float32)
    at_v = map_offsets(b, n, c, stride_vb, stride_vi, UNIT, INTERLEAVED)
    at_k = map_offsets(b, n, c, stride_kb, stride_ki, UNIT, INTERLEAVED)
    for t in range(depth):
        v_ptr = map_at(table_ptr, t, like_ptr, ALIGNED)
        v = tl.load(v_ptr + at_v, mask=mask, other=0.0).to(tl.float32)
        k = v
        if HAS_KEYS:
            k_ptr = map_at(table_ptr, depth + t, like_ptr, ALIGNED)
            k = tl.load(k_ptr + at_k, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(u * k, axis=1)
        if NORMED:
            score = score / tl.sqrt(tl.sum(k * k, axis=1) / channels + eps)
        tl.store(scores_ptr + (b * depth + t) * positions + n, score, mask=mask_n)
        larger = tl.maximum(highest, score)
        # Without what would be the distance of two infinities before the first value.
        shrink = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - larger))
        e = tl.exp(score - larger)
        total = total * shrink + e
        sums = sums * shrink[:, None] + e[:, None] * v
        highest = larger
    at_o = map_offsets(b, n, c, stride_ob, stride_oi, UNIT, INTERLEAVED)
    out = sums / total[:, None]
    tl.store(out_ptr + at_o, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(norm_ptr + b * positions + n, highest, mask=mask_n)
    tl.store(norm_ptr + (batch + b) * positions + n, total, mask=mask_n)


@triton.jit(do_not_specialize=["places", "positions", "depth", "prev_depth"])
def position_weights_kernel(
    weights_ptr,  # [B, depth, N]: scores, which become weights
    norm_ptr,  # [2, B, N]
    prev_ptr,  # [B, prev_depth, N]
    kl_ptr,  # [B, N]
    places,  # B * N
    positions,
    depth,
    prev_depth,
    HAS_PREV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < places
    b, n = at // positions, at % positions
    highest = tl.load(norm_ptr + at, mask=mask, other=0.0)
    total = tl.load(norm_ptr + places + at, mask=mask, other=1.0)
    log_total = tl.log(total)
    kl = tl.zeros([BLOCK], tl.float32)
    for t in range(depth):
        w_ptr = weights_ptr + (b * depth + t) * positions + n
        distance = tl.load(w_ptr, mask=mask, other=0.0) - highest
        if HAS_PREV:
            there = mask & (tl.full([BLOCK], t, tl.int32) < prev_depth)
            prev = tl.load(prev_ptr + (b * prev_depth + t) * positions + n, mask=there, other=0.0)
            kl += tl.where(prev == 0.0, 0.0, prev * (tl.log(prev) - (distance - log_total)))
        tl.store(w_ptr, tl.exp(distance) / total, mask=mask)
    if HAS_PREV:
        tl.store(kl_ptr + at, kl, mask=mask)
