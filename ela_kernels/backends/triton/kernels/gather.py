"""The gather of the pull form: gradients of one layer's key and value, sums over the layers that retrieved it.

Least bytes: every output gradient read once, where it is retained, and the value's gradient written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.tiles import (
    along,
    decoded,
    offsets,
    read_retained,
    retained,
    tile_at,
    where_exists,
)

# Output gradients that are read before the first of them is used.
GROUP = tl.constexpr(4)


@triton.jit
def _gather_key(
    query_ptrs,
    dscores_ptrs,
    score_depths,
    dkey_ptr,
    first,
    batch,
    channels,
    head_dim,
    stride_qb,
    index,
    sources,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of the key's gradient, numbered through the whole batch."""
    offs = first + tl.arange(0, BLOCK).to(tl.int64)
    mask = offs < batch.to(tl.int64) * channels
    b, c = offs // channels, offs % channels
    item = b * (channels // head_dim) + c // head_dim
    acc = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, Q, GROUP):
        if start < sources:
            for m in tl.static_range(start, min(start + GROUP, Q)):
                there = where_exists(mask, m, sources)
                s_offs = item * decoded(score_depths[m]) + index
                dscores = tl.load(dscores_ptrs[m] + s_offs, mask=there, other=0.0)
                q = tl.load(query_ptrs[m] + b * stride_qb + c, mask=there, other=0.0)
                acc += dscores * q.to(tl.float32)
    tl.store(dkey_ptr + offs, acc.to(dkey_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "batch",
        "heads",
        "positions",
        "rows",
        "chunks",
        "index",
        "tiles",
        "queries",
        "sources",
    ]
)
def layer_attention_bwd_gather_kernel(
    query_ptrs,  # of [B, C]
    dscores_ptrs,  # of [B, G, t]
    score_depths,  # t of each, encoded
    dkey_ptr,  # [B, C]
    dout_ptrs,  # of maps
    weights_ptrs,  # of [B, G, t]
    weight_depths,  # t of each, encoded
    dvalue_ptr,
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_qb,
    stride_db,
    stride_dr,
    stride_vb,
    stride_vr,
    index,  # the wanted column of weights and score gradients
    tiles,  # programs that work on the value's gradient; those after them on the key's
    queries,
    sources,
    tolerances,  # of each weight's layer
    LEAVES_OUT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,  # of what leaves something out; as of `read_retained`
    Q: tl.constexpr,
    M: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < tiles:
        sample, row, column, mask, item, mask_line, _, _ = tile_at(
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
        d_offs = offsets(sample, row, column, stride_db, stride_dr, UNIT)
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.static_range(0, M, GROUP):
            if first < sources:
                ws = ()
                if LEAVES_OUT:
                    for m in tl.static_range(first, min(first + GROUP, M)):
                        w_offs = item.to(tl.int64) * decoded(weight_depths[m]) + index
                        w_mask = where_exists(mask_line, m, sources)
                        ws = ws + (tl.load(weights_ptrs[m] + w_offs, mask=w_mask, other=0.0),)
                for m in tl.static_range(first, min(first + GROUP, M)):
                    if LEAVES_OUT:
                        w = ws[m - first]
                        d_mask = where_exists(mask, m, sources)
                        d_ptrs = dout_ptrs[m] + d_offs
                        kept = retained(along(w, INTERLEAVED), tolerances[m])
                        dout = read_retained(d_ptrs, d_mask, kept, UNIT, COLS, FOLD, INTERLEAVED)
                    else:
                        w_offs = item.to(tl.int64) * decoded(weight_depths[m]) + index
                        w_mask = where_exists(mask_line, m, sources)
                        w = tl.load(weights_ptrs[m] + w_offs, mask=w_mask, other=0.0)
                        d_mask = where_exists(mask, m, sources)
                        dout = tl.load(dout_ptrs[m] + d_offs, mask=d_mask, other=0.0)
                    acc += along(w, INTERLEAVED) * dout.to(tl.float32)
        dvalue = acc.to(dvalue_ptr.dtype.element_ty)
        v_offs = offsets(sample, row, column, stride_vb, stride_vr, UNIT)
        tl.store(dvalue_ptr + v_offs, dvalue, mask=mask)
    else:
        _gather_key(
            query_ptrs,
            dscores_ptrs,
            score_depths,
            dkey_ptr,
            (pid - tiles).to(tl.int64) * BLOCK_KEY,
            batch,
            channels,
            channels // heads,
            stride_qb,
            index,
            queries,
            Q,
            BLOCK_KEY,
        )
