"""The light form of a layer, `out = gate * act(v) + decay * prev` with `gate = sigmoid(scale * <q, k>)` of a head.

Least bytes: v and prev read once and out written once, with the moments for a norm's statistics from the same tile.
Backward: dout, v and prev read once for their dot products, and dprev written; the value's gradient, gate * dout, is
never stored: the kernel that convolves it takes dout and the gate. Behind an activation it is no multiple of dout, and
is written by the same launch.

Tiles are those of `tiles.tile_at`, a planar tile's rows being of channels, since the decay is one number a channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.activation import activated, slope
from ela_kernels.backends.triton.kernels.tiles import (
    along,
    line_sum,
    moments,
    offsets,
    part_at,
    tile_at,
)


@triton.jit
def _write_gates(
    q_ptr,  # [B, C]
    k_ptr,  # [B, C]
    gates_ptr,  # [B, G]
    item,  # [HEADS], b * G + g
    mask_item,
    head_dim,
    scale,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    total = tl.zeros([HEADS], tl.float32)
    for d in range(0, head_dim, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        at = item.to(tl.int64)[:, None] * head_dim + offs_d[None, :]
        mask = mask_item[:, None] & (offs_d < head_dim)[None, :]
        q = tl.load(q_ptr + at, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(q * k, axis=1)
    gates = 1.0 / (1.0 + tl.exp(-(total * scale)))
    tl.store(gates_ptr + item, gates, mask=mask_item)


@triton.jit(do_not_specialize=["items"])
def light_layer_gates_kernel(
    q_ptr,
    k_ptr,
    gates_ptr,
    items,
    head_dim,
    scale,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    _write_gates(q_ptr, k_ptr, gates_ptr, item, item < items, head_dim, scale, HEADS, BLOCK_D)


@triton.jit
def _decay_of(decay_ptr, place, mask_line, channels, chunks, INTERLEAVED: tl.constexpr):
    """The decay of each line of a tile."""
    if INTERLEAVED:
        c = place
    else:
        c = place // chunks % channels
    return tl.load(decay_ptr + c, mask=mask_line, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "heads", "positions", "rows", "chunks", "parts"])
def light_layer_fwd_kernel(
    q_ptr,  # [B, C]
    k_ptr,  # [B, C]
    decay_ptr,  # [C]
    v_ptr,
    prev_ptr,
    out_ptr,
    gates_ptr,  # [B, G]
    partial_ptr,  # [2, parts, C], means of the output, and sums of squared distances from them
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_vb,
    stride_vr,
    stride_pb,
    stride_pr,
    stride_ob,
    stride_or,
    parts,
    scale,
    HAS_GATES: tl.constexpr,  # the gates are written already
    ACT: tl.constexpr,
    STATISTICS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
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
    if not HAS_GATES:
        head_dim = channels // heads
        if INTERLEAVED:
            strips = tl.cdiv(channels, COLS)
            head = pid % strips * COLS // head_dim + tl.arange(0, HEADS)
            own, mask_own = pid // (chunks * strips) * heads + head, head < heads
        else:
            own = pid * ROWS // (head_dim * chunks) + tl.arange(0, HEADS)
            mask_own = own < batch * heads
        # Every program writes the gates of its heads, all the same bits, and reads them back by line.
        _write_gates(q_ptr, k_ptr, gates_ptr, own, mask_own, head_dim, scale, HEADS, BLOCK_D)
        tl.debug_barrier()
    v_offs = offsets(sample, row, column, stride_vb, stride_vr, UNIT)
    v = tl.load(v_ptr + v_offs, mask=mask, other=0.0)
    prev_offs = offsets(sample, row, column, stride_pb, stride_pr, UNIT)
    prev = tl.load(prev_ptr + prev_offs, mask=mask, other=0.0)
    gate = tl.load(gates_ptr + item, mask=mask_line, other=0.0)
    decay = _decay_of(decay_ptr, place, mask_line, channels, chunks, INTERLEAVED)
    acc = along(gate, INTERLEAVED) * activated(v.to(tl.float32), ACT)
    acc += along(decay, INTERLEAVED) * prev.to(tl.float32)
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


@triton.jit(do_not_specialize=["batch", "heads", "positions", "rows", "chunks", "parts"])
def light_layer_bwd_kernel(
    dout_ptr,
    v_ptr,
    prev_ptr,
    decay_ptr,  # [C]
    gates_ptr,  # [B, G]
    dprev_ptr,
    dv_ptr,
    partial_ptr,  # [2, parts, C], dot products of dout with the value, and with the previous output
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_gb,
    stride_gr,
    stride_vb,
    stride_vr,
    stride_pb,
    stride_pr,
    stride_db,
    stride_dr,
    stride_wb,
    stride_wr,
    parts,
    ACT: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_DECAY: tl.constexpr,
    NEED_PREV: tl.constexpr,
    NEED_VALUE: tl.constexpr,  # the gradient of the value, where that passes an activation
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
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
    g_offs = offsets(sample, row, column, stride_gb, stride_gr, UNIT)
    dout = tl.load(dout_ptr + g_offs, mask=mask, other=0.0)
    if NEED_GATE or NEED_VALUE:
        v_offs = offsets(sample, row, column, stride_vb, stride_vr, UNIT)
        v = tl.load(v_ptr + v_offs, mask=mask, other=0.0).to(tl.float32)
    if NEED_DECAY:
        prev_offs = offsets(sample, row, column, stride_pb, stride_pr, UNIT)
        prev = tl.load(prev_ptr + prev_offs, mask=mask, other=0.0)
    dout = dout.to(tl.float32)
    at = part_at(number, place, channels, chunks, INTERLEAVED)
    if NEED_PREV:
        decay = _decay_of(decay_ptr, place, mask_line, channels, chunks, INTERLEAVED)
        dprev = (along(decay, INTERLEAVED) * dout).to(dprev_ptr.dtype.element_ty)
        d_offs = offsets(sample, row, column, stride_db, stride_dr, UNIT)
        tl.store(dprev_ptr + d_offs, dprev, mask=mask)
    if NEED_VALUE:
        gate = tl.load(gates_ptr + item, mask=mask_line, other=0.0)
        dv = (along(gate, INTERLEAVED) * slope(v, ACT) * dout).to(dv_ptr.dtype.element_ty)
        w_offs = offsets(sample, row, column, stride_wb, stride_wr, UNIT)
        tl.store(dv_ptr + w_offs, dv, mask=mask)
    if NEED_GATE:
        dots = line_sum(dout * activated(v, ACT), INTERLEAVED)
        tl.store(partial_ptr + at, dots, mask=mask_line)
    if NEED_DECAY:
        dots = line_sum(dout * prev.to(tl.float32), INTERLEAVED)
        tl.store(partial_ptr + parts.to(tl.int64) * channels + at, dots, mask=mask_line)


@triton.jit
def _summed_dots(
    partial_ptr,
    b,  # [HEADS]
    c,  # [HEADS, BLOCK_D]
    mask,
    channels,
    chunks,
    HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The dot products of some channels of a sample, `[HEADS, BLOCK_D]`, from its partial sums."""
    acc = tl.zeros([BLOCK_S, HEADS, BLOCK_D], tl.float32)
    for start in range(0, chunks, BLOCK_S):
        chunk = start + tl.arange(0, BLOCK_S)
        part = (b * chunks)[None, :] + chunk[:, None]
        at = part[:, :, None] * channels + c[None, :, :]
        there = (chunk < chunks)[:, None, None] & mask[None, :, :]
        acc += tl.load(partial_ptr + at, mask=there, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["items", "heads", "chunks", "parts"])
def light_layer_bwd_rows_kernel(
    q_ptr,  # [B, C]
    k_ptr,  # [B, C]
    gates_ptr,  # [B, G]
    partial_ptr,  # [2, parts, C]
    dq_ptr,  # [B, C]
    dk_ptr,  # [B, C]
    decays_ptr,  # [B, C], each sample's part of the decay's gradient
    items,
    heads,
    head_dim,
    chunks,  # parts of a sample
    parts,
    scale,
    HAS_QUERY: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The partial dot products of some heads added up: the gradients of their query, key and decay."""
    item = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    mask_item = item < items
    b = (item // heads).to(tl.int64)
    channels = heads.to(tl.int64) * head_dim
    first = ((item % heads).to(tl.int64) * head_dim)[:, None]
    row = b[:, None] * channels
    if HAS_QUERY or HAS_KEY:
        dgate = tl.zeros([HEADS], tl.float32)
        for d in range(0, head_dim, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            c = first + offs_d[None, :]
            mask = mask_item[:, None] & (offs_d < head_dim)[None, :]
            dots = _summed_dots(partial_ptr, b, c, mask, channels, chunks, HEADS, BLOCK_S, BLOCK_D)
            dgate += tl.sum(dots, axis=1)
        gate = tl.load(gates_ptr + item, mask=mask_item, other=0.0)
        dscore = (dgate * gate * (1.0 - gate) * scale)[:, None]
    for d in range(0, head_dim, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        c = first + offs_d[None, :]
        mask = mask_item[:, None] & (offs_d < head_dim)[None, :]
        if HAS_DECAY:
            decay_ptr = partial_ptr + parts.to(tl.int64) * channels
            dots = _summed_dots(decay_ptr, b, c, mask, channels, chunks, HEADS, BLOCK_S, BLOCK_D)
            tl.store(decays_ptr + row + c, dots, mask=mask)
        if HAS_QUERY:
            k = tl.load(k_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(dq_ptr + row + c, (dscore * k).to(dq_ptr.dtype.element_ty), mask=mask)
        if HAS_KEY:
            q = tl.load(q_ptr + row + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(dk_ptr + row + c, (dscore * q).to(dk_ptr.dtype.element_ty), mask=mask)
