"""Query, key and value from a feature map, and the gradients that go back to it.

Least bytes: forward, the map read once and the value written once, with the sums for the pooled mean taken from the
same read; backward, the value's gradient, the map and the residual gradient read once and the map's gradient written
once, with the sums for the filters' gradients from the same reads. Neighbours in space come from the caches.

A program takes LINES planes (planar) or channels (interleaved), and one patch of PH x PW positions after the other.
What it sums over its patches it adds up at their end and writes as a partial sum, `[B, groups, ...]`; a second launch,
of `rows.py`, adds those in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.rows import filter_partials, turned
from ela_kernels.backends.triton.kernels.tiles import across, along, line_sum


@triton.jit
def _lines_at(block, batch, channels, LINES: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Sample, channel and existence of a program's lines, `[LINES]` each; planes are numbered through the batch."""
    if INTERLEAVED:
        strips = tl.cdiv(channels, LINES)
        c = block % strips * LINES + tl.arange(0, LINES)
        return tl.full([LINES], 0, tl.int32) + block // strips, c, c < channels
    else:
        plane = block * LINES + tl.arange(0, LINES)
        mask_line = plane < batch * channels
        plane = tl.where(mask_line, plane, 0)
        return plane // channels, plane % channels, mask_line


@triton.jit
def _line_offsets(b, c, batch_units, inner_units, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where lines begin in a map whose strides are given in units of UNIT elements, spread over a tile."""
    first = b.to(tl.int64) * batch_units * UNIT
    if INTERLEAVED:
        first += c
    else:
        first += c.to(tl.int64) * inner_units * UNIT
    return along(first, INTERLEAVED)


@triton.jit
def _position_offsets(h, w, width, inner_units, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where positions are in a line, spread over a tile."""
    at = h.to(tl.int64) * width + w
    if INTERLEAVED:
        at = at * inner_units * UNIT
    return across(at, INTERLEAVED)


@triton.jit
def _shift(dh, dw, width, inner_units, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """How far a neighbour is: one number for a whole tile, so that its pointers are made once and not for each tap."""
    at = width.to(tl.int64) * dh + dw
    if INTERLEAVED:
        at = at * inner_units * UNIT
    return at


@triton.jit
def _has(h, w, height, width, dh: tl.constexpr, dw: tl.constexpr):
    """Which positions of a map have a neighbour `dh` below and `dw` to the right, each -1, 0 or 1."""
    there = h < height
    if dh < 0:
        there = there & (h > 0)
    if dh > 0:
        there = there & (h < height - 1)
    if dw < 0:
        there = there & (w > 0)
    if dw > 0:
        there = there & (w < width - 1)
    return there


@triton.jit
def _taps(wv_ptr, c, mask_line):
    """The nine numbers of each channel's filter, `[LINES]` each."""
    taps = ()
    for k in tl.static_range(9):
        tap = tl.load(wv_ptr + c * 9 + k, mask=mask_line, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _times(taps, factor):
    """Each channel's filter times a number."""
    scaled = ()
    for k in tl.static_range(9):
        scaled = scaled + (taps[k] * factor,)
    return scaled


@triton.jit(do_not_specialize=["batch", "height", "width", "patches_w", "groups", "steps"])
def layer_producer_fwd_kernel(
    x_ptr,
    wv_ptr,  # [C, 3, 3]
    v_ptr,
    sums_ptr,  # [B, groups, C]
    batch,
    channels,
    height,
    width,
    patches_w,
    groups,  # programs that share the patches of a line
    steps,  # patches of a program
    stride_xb,
    stride_xr,
    stride_vb,
    stride_vr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    pid = tl.program_id(0)
    group = pid % groups
    b, c, mask_line = _lines_at(pid // groups, batch, channels, LINES, INTERLEAVED)
    x_lines = x_ptr + _line_offsets(b, c, stride_xb, stride_xr, UNIT, INTERLEAVED)
    v_lines = v_ptr + _line_offsets(b, c, stride_vb, stride_vr, UNIT, INTERLEAVED)
    taps = _taps(wv_ptr, c, mask_line)
    offs = tl.arange(0, PH * PW)
    if INTERLEAVED:
        total = tl.zeros([PH * PW, LINES], tl.float32)
    else:
        total = tl.zeros([LINES, PH * PW], tl.float32)
    # A patch beyond the last lies below the map.
    for patch in range(group * steps, group * steps + steps):
        h = patch // patches_w * PH + offs // PW
        w = patch % patches_w * PW + offs % PW
        here = across((h < height) & (w < width), INTERLEAVED) & along(mask_line, INTERLEAVED)
        x_at = x_lines + _position_offsets(h, w, width, stride_xr, UNIT, INTERLEAVED)
        acc = tl.zeros(total.shape, tl.float32)
        for k in tl.static_range(9):
            shift = _shift(k // 3 - 1, k % 3 - 1, width, stride_xr, UNIT, INTERLEAVED)
            there = across(_has(h, w, height, width, k // 3 - 1, k % 3 - 1), INTERLEAVED)
            x = tl.load(x_at + shift, mask=here & there, other=0.0).to(tl.float32)
            acc += along(taps[k], INTERLEAVED) * x
            if k == 4:
                total += x
        v_at = v_lines + _position_offsets(h, w, width, stride_vr, UNIT, INTERLEAVED)
        tl.store(v_at, acc.to(v_ptr.dtype.element_ty), mask=here)
    at = (b.to(tl.int64) * groups + group) * channels + c
    tl.store(sums_ptr + at, line_sum(total, INTERLEAVED), mask=mask_line)


@triton.jit(
    do_not_specialize=[
        "batch",
        "height",
        "width",
        "patches_w",
        "groups",
        "steps",
        "size",
        "head_dim",
        "tiles",
        "blocks",
    ]
)
def layer_producer_bwd_kernel(
    dv_ptr,
    x_ptr,
    residual_ptr,
    wv_ptr,  # [C, 3, 3]
    dq_ptr,  # [B, C]
    dk_ptr,  # [B, C]
    wq_ptr,  # [size]
    wk_ptr,  # [size]
    mean_ptr,  # [B, C]
    gates_ptr,  # [B, G], a factor of dv
    dx_ptr,
    taps_ptr,  # [B, groups, 9, C]
    filters_ptr,  # [2, size, blocks], of query and key
    batch,
    channels,
    height,
    width,
    patches_w,
    groups,
    steps,
    stride_gb,
    stride_gr,
    stride_xb,
    stride_xr,
    stride_rb,
    stride_rr,
    stride_db,
    stride_dr,
    size,
    head_dim,
    tiles,  # programs that work on maps; those after them on the gradients of the filters over the channels
    blocks,
    HAS_DV: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    HAS_KEY: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_TAPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < tiles:
        group = pid % groups
        b, c, mask_line = _lines_at(pid // groups, batch, channels, LINES, INTERLEAVED)
        dv_lines = dv_ptr + _line_offsets(b, c, stride_gb, stride_gr, UNIT, INTERLEAVED)
        x_lines = x_ptr + _line_offsets(b, c, stride_xb, stride_xr, UNIT, INTERLEAVED)
        r_lines = residual_ptr + _line_offsets(b, c, stride_rb, stride_rr, UNIT, INTERLEAVED)
        dx_lines = dx_ptr + _line_offsets(b, c, stride_db, stride_dr, UNIT, INTERLEAVED)
        if INTERLEAVED:
            zeros = tl.zeros([PH * PW, LINES], tl.float32)
        else:
            zeros = tl.zeros([LINES, PH * PW], tl.float32)
        if HAS_GATES:
            gate = tl.load(gates_ptr + (b * channels + c) // head_dim, mask=mask_line, other=0.0)
        if NEED_X:
            taps = _taps(wv_ptr, c, mask_line)
            if HAS_GATES:
                taps = _times(taps, gate)
            dmean = tl.zeros([LINES], tl.float32)
            if HAS_QUERY:
                dmean += turned(dq_ptr, wq_ptr, b, c, mask_line, channels, size)
            if HAS_KEY:
                dmean += turned(dk_ptr, wk_ptr, b, c, mask_line, channels, size)
            dmean = along(dmean / (height.to(tl.float32) * width), INTERLEAVED)
        sums = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
        offs = tl.arange(0, PH * PW)
        for patch in range(group * steps, group * steps + steps):
            h = patch // patches_w * PH + offs // PW
            w = patch % patches_w * PW + offs % PW
            here = across((h < height) & (w < width), INTERLEAVED)
            here = here & along(mask_line, INTERLEAVED)
            if NEED_TAPS:
                x_at = _position_offsets(h, w, width, stride_xr, UNIT, INTERLEAVED)
                x = tl.load(x_lines + x_at, mask=here, other=0.0).to(tl.float32)
            dx = zeros
            if HAS_DV:
                more = ()
                dv_at = dv_lines + _position_offsets(h, w, width, stride_gr, UNIT, INTERLEAVED)
                for k in tl.static_range(9):
                    # What went from here to the positions around, each by another tap.
                    shift = _shift(1 - k // 3, 1 - k % 3, width, stride_gr, UNIT, INTERLEAVED)
                    there = _has(h, w, height, width, 1 - k // 3, 1 - k % 3)
                    there = here & across(there, INTERLEAVED)
                    dv = tl.load(dv_at + shift, mask=there, other=0.0).to(tl.float32)
                    # The sums first, and the gates read anew after the loop: otherwise one of Triton 3.6 to 3.8 spills.
                    if NEED_TAPS:
                        more = more + (sums[k] + x * dv,)
                    if NEED_X:
                        dx += along(taps[k], INTERLEAVED) * dv
                if NEED_TAPS:
                    sums = more
            if NEED_X:
                dx += dmean
                if HAS_RESIDUAL:
                    r_at = _position_offsets(h, w, width, stride_rr, UNIT, INTERLEAVED)
                    dx += tl.load(r_lines + r_at, mask=here, other=0.0).to(tl.float32)
                dx_at = _position_offsets(h, w, width, stride_dr, UNIT, INTERLEAVED)
                tl.store(dx_lines + dx_at, dx.to(dx_ptr.dtype.element_ty), mask=here)
        if NEED_TAPS:
            if HAS_GATES:
                gate = tl.load(
                    gates_ptr + (b * channels + c) // head_dim, mask=mask_line, other=0.0
                )
            for k in tl.static_range(9):
                at = ((b.to(tl.int64) * groups + group) * 9 + k) * channels + c
                total = line_sum(sums[k], INTERLEAVED)
                if HAS_GATES:
                    total *= gate
                tl.store(taps_ptr + at, total, mask=mask_line)
    else:
        block = pid - tiles
        if HAS_QUERY:
            filter_partials(
                dq_ptr, mean_ptr, filters_ptr, block, blocks, batch, channels, size, BLOCK
            )
        if HAS_KEY:
            filter_partials(
                dk_ptr,
                mean_ptr,
                filters_ptr + size * blocks,
                block,
                blocks,
                batch,
                channels,
                size,
                BLOCK,
            )
