"""The gradient of one layer: dot products of its output gradient with every value, then everything small.

Least bytes: the output gradient and every value read once; in the push form every value's gradient written once, from
the same read of the output gradient. Partial sums are written by every tile and added in a fixed order by the second
launch: the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.tiles import (
    along,
    decoded,
    log_softmax,
    number_table,
    offsets,
    pointer_table,
    read_retained,
    retained,
    scores,
    tile_at,
)

# Values that are read before the first sum: each is several vectors, and more of them cost predicates, which spill.
DOTS_GROUP = tl.constexpr(2)


@triton.jit(do_not_specialize=["batch", "heads", "positions", "rows", "chunks", "depth"])
def layer_attention_bwd_dots_kernel(
    dout_ptr,
    value_ptrs,  # depth of maps
    dvalue_ptrs,  # push form: depth of maps
    wanted,  # push form: 1 where a value's gradient is wanted, encoded
    weights_ptr,  # [B, G, depth]
    partial_ptr,  # planar [segments, depth], interleaved [B, tiles, depth, C / FOLD]
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_db,
    stride_dr,
    stride_vb,
    stride_vr,
    stride_gb,
    stride_gr,
    depth,
    tolerance,
    PUSH: tl.constexpr,
    LEAVES_OUT: tl.constexpr,  # values of a weight below the tolerance are not read, and their sums are zero
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,  # interleaved: neighbouring channels of one head that one partial sum covers
    T: tl.constexpr,
):
    sample, row, column, mask, item, mask_line, place, number = tile_at(
        tl.program_id(0),
        batch,
        channels,
        heads,
        positions,
        rows,
        row_units,
        chunks,
        UNIT,
        ROWS,
        COLS,
        INTERLEAVED,
    )
    dout_offs = offsets(sample, row, column, stride_db, stride_dr, UNIT)
    dout = tl.load(dout_ptr + dout_offs, mask=mask, other=0.0).to(tl.float32)
    v_offs = offsets(sample, row, column, stride_vb, stride_vr, UNIT)
    g_offs = offsets(sample, row, column, stride_gb, stride_gr, UNIT)
    if INTERLEAVED:
        groups = channels // FOLD
        folded = tl.program_id(0) % tl.cdiv(channels, COLS) * (COLS // FOLD)
        folded += tl.arange(0, COLS // FOLD)
        mask_sums = folded < groups
    else:
        mask_sums = mask_line
    w_ptrs = weights_ptr + item.to(tl.int64) * depth
    for first in tl.static_range(0, T, DOTS_GROUP):
        if first < depth:
            # All reads before the first sum: a sum may need a barrier, which no read can be moved across. What is read
            # beyond the depth is the last map once more, from a cache, and goes nowhere.
            read = ()
            ws = ()
            kept = ()
            if LEAVES_OUT:
                for j in tl.static_range(first, min(first + DOTS_GROUP, T)):
                    w = tl.load(w_ptrs + tl.minimum(j, depth - 1), mask=mask_line, other=0.0)
                    ws = ws + (along(w, INTERLEAVED),)
                    kept = kept + (retained(along(w, INTERLEAVED), tolerance),)
            for j in tl.static_range(first, min(first + DOTS_GROUP, T)):
                if LEAVES_OUT:
                    v_ptrs = value_ptrs[j] + v_offs
                    is_kept = kept[j - first]
                    v = read_retained(v_ptrs, mask, is_kept, UNIT, COLS, FOLD, INTERLEAVED)
                else:
                    v = tl.load(value_ptrs[j] + v_offs, mask=mask, other=0.0)
                read = read + (v,)
            for j in tl.static_range(first, min(first + DOTS_GROUP, T)):
                if j < depth:
                    # Not the value alone is zero: the gradient may be infinite. Which of the three selects spills no
                    # register is what compiling showed.
                    d = dout
                    if LEAVES_OUT and PUSH and not INTERLEAVED:
                        d = tl.where(kept[j - first], dout, 0.0)
                    products = d * read[j - first].to(tl.float32)
                    if (
                        LEAVES_OUT
                        and not (PUSH and not INTERLEAVED)
                        and not (INTERLEAVED and UNIT > 1)
                    ):
                        products = tl.where(kept[j - first], products, 0.0)
                    if INTERLEAVED:
                        sums = tl.sum(products, axis=0, keep_dims=LEAVES_OUT and UNIT > 1)
                        if LEAVES_OUT and UNIT > 1:
                            sums = tl.reshape(tl.where(kept[j - first], sums, 0.0), [COLS])
                        if FOLD > 1:
                            sums = tl.sum(tl.reshape(sums, [COLS // FOLD, FOLD]), axis=1)
                        at = (number * depth + j) * groups + folded
                    else:
                        sums = tl.sum(products, axis=1)
                        at = place.to(tl.int64) * depth + j
                    tl.store(partial_ptr + at, sums, mask=mask_sums)
                    if PUSH:
                        if decoded(wanted[j]) != 0:
                            if LEAVES_OUT and not INTERLEAVED:
                                dv = ws[j - first] * d
                            elif LEAVES_OUT:
                                dv = tl.where(kept[j - first], ws[j - first] * dout, 0.0)
                            else:
                                w = tl.load(w_ptrs + j, mask=mask_line, other=0.0)
                                dv = along(w, INTERLEAVED) * dout
                            dv = dv.to(dvalue_ptrs[j].dtype.element_ty)
                            tl.store(dvalue_ptrs[j] + g_offs, dv, mask=mask)


@triton.jit
def _summed_dots(
    partial_ptr,
    item,
    channels,
    heads,
    rows,
    chunks,
    depth,
    INTERLEAVED: tl.constexpr,
    FOLD: tl.constexpr,
    T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The partial sums of one head added up, `[T]`."""
    offs_t = tl.arange(0, T)
    mask_t = offs_t < depth
    b, g = (item // heads).to(tl.int64), item % heads
    head_groups = channels // heads // FOLD
    count = chunks * (head_groups if INTERLEAVED else rows // heads)
    acc = tl.zeros([BLOCK_S, T], tl.float32)
    for start in range(0, count, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        if INTERLEAVED:
            tile, group = part // head_groups, g * head_groups + part % head_groups
            at = ((b * chunks + tile) * depth)[:, None] + offs_t[None, :]
            at = at * (head_groups * heads) + group[:, None]
        else:
            at = ((b * rows + g * (rows // heads)) * chunks + part)[:, None] * depth
            at = at + offs_t[None, :]
        acc += tl.load(partial_ptr + at, mask=(part < count)[:, None] & mask_t[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["heads", "rows", "chunks", "depth"])
def depth_mix_bwd_tail_kernel(
    partial_ptr,
    dweights_ptr,  # [B, G, depth]
    channels,
    heads,
    rows,
    chunks,
    depth,
    INTERLEAVED: tl.constexpr,
    FOLD: tl.constexpr,
    T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of weights that are given the dot products are the gradient."""
    item = tl.program_id(0)
    offs_t = tl.arange(0, T)
    dweights = _summed_dots(
        partial_ptr, item, channels, heads, rows, chunks, depth, INTERLEAVED, FOLD, T, BLOCK_S
    )
    tl.store(dweights_ptr + item.to(tl.int64) * depth + offs_t, dweights, mask=offs_t < depth)


@triton.jit(do_not_specialize=["heads", "rows", "chunks", "depth", "prev_depth"])
def layer_attention_bwd_tail_kernel(
    q_ptr,  # [B, C]
    key_ptrs,  # depth of [B, C]
    prev_ptr,  # [B, G, prev_depth]
    weights_ptr,  # [B, G, depth]
    partial_ptr,
    dweights_ptr,  # [B, G, depth]
    dkl_ptr,  # [B, G]
    dscores_ptr,  # [B, G, depth]
    dq_ptr,  # [B, C]
    dkey_ptrs,  # push form: depth of [B, C]
    wanted,  # push form: 1 where a key's gradient is wanted, encoded
    dprev_ptr,  # [B, G, prev_depth]
    channels,
    heads,
    rows,
    chunks,
    stride_qb,
    stride_kb,
    depth,
    prev_depth,
    scale,
    HAS_DOTS: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    HAS_DKL: tl.constexpr,
    HAS_DQ: tl.constexpr,
    PUSH: tl.constexpr,
    HAS_DPREV: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FOLD: tl.constexpr,
    T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0)
    offs_t = tl.arange(0, T)
    mask_t = offs_t < depth
    head_dim = channels // heads
    offs_w = item.to(tl.int64) * depth + offs_t
    weights = tl.load(weights_ptr + offs_w, mask=mask_t, other=0.0)
    total = tl.zeros([T], tl.float32)
    if HAS_DOTS:
        total += _summed_dots(
            partial_ptr, item, channels, heads, rows, chunks, depth, INTERLEAVED, FOLD, T, BLOCK_S
        )
    if HAS_DWEIGHTS:
        total += tl.load(dweights_ptr + offs_w, mask=mask_t, other=0.0)
    dscores = weights * (total - tl.sum(weights * total, axis=0))
    if HAS_DKL:
        # d kl / d s = mass of prev * weights - prev
        mask_p = offs_t < prev_depth
        offs_p = item.to(tl.int64) * prev_depth + offs_t
        prev = tl.load(prev_ptr + offs_p, mask=mask_p, other=0.0)
        dkl = tl.load(dkl_ptr + item)
        dscores += dkl * (tl.sum(prev, axis=0) * weights - prev)
        if HAS_DPREV:
            # From the scores, never from a rounded weight.
            one = tl.arange(0, 1)
            s = scores(
                q_ptr,
                key_ptrs,
                stride_qb,
                stride_kb,
                item + one,
                one == 0,
                heads,
                head_dim,
                depth,
                scale,
                1,
                T,
                BLOCK_D,
            )
            log_weights = tl.reshape(log_softmax(s), [T])
            dprev = tl.where(prev == 0.0, 0.0, dkl * (tl.log(prev) + 1.0 - log_weights))
            tl.store(dprev_ptr + offs_p, dprev, mask=mask_p)
    dscores *= scale
    tl.store(dscores_ptr + offs_w, dscores, mask=mask_t)
    dscores = tl.where(mask_t, dscores, 0.0)
    b, g = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    for d in range(0, head_dim, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < head_dim
        mask_td = mask_t[:, None] & mask_d[None, :]
        row_offs = (b * heads + g) * head_dim + offs_d
        if HAS_DQ:
            k_offs = b * stride_kb + g * head_dim + offs_d
            k_ptrs = pointer_table(key_ptrs, offs_t)[:, None] + k_offs[None, :]
            k = tl.load(k_ptrs, mask=mask_td, other=0.0).to(tl.float32)
            dq = tl.sum(dscores[:, None] * k, axis=0)
            tl.store(dq_ptr + row_offs, dq.to(dq_ptr.dtype.element_ty), mask=mask_d)
        if PUSH:
            q_offs = b * stride_qb + g * head_dim + offs_d
            q = tl.load(q_ptr + q_offs, mask=mask_d, other=0.0).to(tl.float32)
            dkeys = dscores[:, None] * q[None, :]
            dkey_table = pointer_table(dkey_ptrs, offs_t)[:, None] + row_offs[None, :]
            is_wanted = number_table(wanted, offs_t) != 0
            tl.store(
                dkey_table,
                dkeys.to(dkey_ptrs[0].dtype.element_ty),
                mask=mask_td & is_wanted[:, None],
            )
