"""Scores, softmax, divergence and aggregation in one launch; and the weights-only pass.

Least bytes: every value and the residual, where there is one, read once, the output written once. Scores
cost a read of the keys for each tile, from the caches; the tile is made large enough for that to stay small (see
plan.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.tiles import (
    along,
    divergence_terms,
    log_softmax,
    moments,
    offsets,
    part_at,
    read_retained,
    retained,
    scores,
    tile_at,
    where_exists,
)

# Values that are read before the first of them is used.
GROUP = tl.constexpr(4)


@triton.jit
def _write_weights(
    q_ptr,
    key_ptrs,
    prev_ptr,  # [B, G, prev_depth]
    weights_ptr,  # [B, G, depth]
    kl_ptr,  # [B, G]
    stride_qb,
    stride_kb,
    item,
    mask_item,
    heads,
    head_dim,
    depth,
    prev_depth,
    scale,
    HAS_PREV: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = scores(
        q_ptr,
        key_ptrs,
        stride_qb,
        stride_kb,
        item,
        mask_item,
        heads,
        head_dim,
        depth,
        scale,
        HEADS,
        T,
        BLOCK_D,
    )
    log_weights = log_softmax(s)
    offs_t = tl.arange(0, T)
    mask_w = mask_item[:, None] & (offs_t < depth)[None, :]
    offs = item.to(tl.int64)[:, None] * depth + offs_t[None, :]
    tl.store(weights_ptr + offs, tl.exp(log_weights), mask=mask_w)
    if HAS_PREV:
        mask_p = mask_item[:, None] & (offs_t < prev_depth)[None, :]
        offs = item.to(tl.int64)[:, None] * prev_depth + offs_t[None, :]
        prev = tl.load(prev_ptr + offs, mask=mask_p, other=0.0)
        kl = tl.sum(divergence_terms(prev, log_weights), axis=1)
        tl.store(kl_ptr + item, kl, mask=mask_item)


@triton.jit(do_not_specialize=["batch", "heads", "depth", "prev_depth"])
def layer_attention_weights_kernel(
    q_ptr,
    key_ptrs,
    prev_ptr,
    weights_ptr,
    kl_ptr,
    batch,
    heads,
    head_dim,
    stride_qb,
    stride_kb,
    depth,
    prev_depth,
    scale,
    HAS_PREV: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    _write_weights(
        q_ptr,
        key_ptrs,
        prev_ptr,
        weights_ptr,
        kl_ptr,
        stride_qb,
        stride_kb,
        item,
        item < batch * heads,
        heads,
        head_dim,
        depth,
        prev_depth,
        scale,
        HAS_PREV,
        HEADS,
        T,
        BLOCK_D,
    )


@triton.jit(
    do_not_specialize=[
        "batch",
        "heads",
        "positions",
        "rows",
        "chunks",
        "depth",
        "prev_depth",
        "parts",
    ]
)
def layer_attention_fwd_kernel(
    q_ptr,  # [B, C]
    key_ptrs,  # depth of [B, C]
    value_ptrs,  # depth of [B, C, N] or [B, N, C], by strides
    prev_ptr,  # [B, G, prev_depth]
    residual_ptr,
    out_ptr,
    weights_ptr,  # [B, G, depth]
    kl_ptr,  # [B, G]
    partial_ptr,  # [2, parts, C], means of the output, and sums of squared distances from them
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_qb,
    stride_kb,
    stride_vb,
    stride_vr,
    stride_xb,
    stride_xr,
    stride_ob,
    stride_or,
    depth,
    prev_depth,
    parts,
    scale,
    tolerance,
    HAS_PREV: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,  # the weights are written already
    LEAVES_OUT: tl.constexpr,  # values of a weight below the tolerance are not read
    HAS_RESIDUAL: tl.constexpr,
    STATISTICS: tl.constexpr,  # a planar tile's rows are of channels
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,  # of what leaves something out; as of `read_retained`
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    sample, row, column, mask, item, mask_line, place, number = tile_at(
        pid,
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
    if not HAS_WEIGHTS:
        head_dim = channels // heads
        if INTERLEAVED:
            strips = tl.cdiv(channels, COLS)
            head = pid % strips * COLS // head_dim + tl.arange(0, HEADS)
            own, mask_own = pid // (chunks * strips) * heads + head, head < heads
        else:
            own, mask_own = item, mask_line
        # Every program writes the weights of its heads, all the same bits, and reads them back by element.
        _write_weights(
            q_ptr,
            key_ptrs,
            prev_ptr,
            weights_ptr,
            kl_ptr,
            stride_qb,
            stride_kb,
            own,
            mask_own,
            heads,
            head_dim,
            depth,
            prev_depth,
            scale,
            HAS_PREV,
            HEADS,
            T,
            BLOCK_D,
        )
        tl.debug_barrier()
    v_offs = offsets(sample, row, column, stride_vb, stride_vr, UNIT)
    w_ptrs = weights_ptr + item.to(tl.int64) * depth
    acc = tl.zeros([ROWS, COLS], tl.float32)
    # Element by element, each of a map's reads has predicates: of four maps they spill where weights have a say too.
    AT_ONCE: tl.constexpr = 2 if LEAVES_OUT and UNIT == 1 else GROUP
    for first in tl.static_range(0, T, AT_ONCE):
        if first < depth:
            ws = ()
            if LEAVES_OUT:  # before the first value: a weight says whether its value is read
                for j in tl.static_range(first, min(first + AT_ONCE, T)):
                    w_mask = where_exists(mask_line, j, depth)
                    ws = ws + (tl.load(w_ptrs + j, mask=w_mask, other=0.0),)
            for j in tl.static_range(first, min(first + AT_ONCE, T)):
                if LEAVES_OUT:
                    w = ws[j - first]
                    v_ptrs = value_ptrs[j] + v_offs
                    kept = retained(along(w, INTERLEAVED), tolerance)  # no map beyond the depth
                    v = read_retained(v_ptrs, mask, kept, UNIT, COLS, FOLD, INTERLEAVED)
                else:
                    w = tl.load(w_ptrs + j, mask=where_exists(mask_line, j, depth), other=0.0)
                    v_mask = where_exists(mask, j, depth)
                    v = tl.load(value_ptrs[j] + v_offs, mask=v_mask, other=0.0)
                acc += along(w, INTERLEAVED) * v.to(tl.float32)
    if HAS_RESIDUAL:
        x_offs = offsets(sample, row, column, stride_xb, stride_xr, UNIT)
        acc += tl.load(residual_ptr + x_offs, mask=mask, other=0.0).to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets(sample, row, column, stride_ob, stride_or, UNIT), out, mask=mask)
    if STATISTICS:
        mean, square = moments(
            out.to(tl.float32),
            mask,
            number,
            place,
            positions,
            chunks,
            ROWS,
            COLS,
            INTERLEAVED,
        )
        at = part_at(number, place, channels, chunks, INTERLEAVED)
        tl.store(partial_ptr + at, mean, mask=mask_line)
        tl.store(partial_ptr + parts.to(tl.int64) * channels + at, square, mask=mask_line)
