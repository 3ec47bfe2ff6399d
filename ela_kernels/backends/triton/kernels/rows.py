"""Query and key from the sums of a map, what their gradients give the mean and the filters, and the filters' sums.

Rows are small, `[B, C]` against the map's `[B, C, H, W]`. What programs summed apart is added here in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["groups", "positions", "size"])
def layer_rows_fwd_kernel(
    sums_ptr,  # [B, groups, C]
    wq_ptr,  # [size]
    wk_ptr,  # [size]
    mean_ptr,  # [B, C]
    q_ptr,  # [B, C]
    k_ptr,  # [B, C]
    channels,
    groups,
    positions,
    size,
    HAS_QUERY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The pooled mean, and query and key from it; the means of neighbouring channels are added up once more.

    A launch of its own. The attention's programs could make the rows of their heads themselves, but every tile of a
    head would do it again, by far more tiles than heads. Compiled for compute capability 9.0, up to eight taps and one
    sum a channel, heads of 16: 25 to 39 % more instructions planar and up to twice the barriers; 66 to 79 % more
    interleaved, where 62 registers become 96 and a tile reads its 128 channels' sums for every tap. And interleaved
    maps have up to dozens of sums a channel.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    q, k = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for i in range(size):
        channel = c + i - size // 2
        there = (channel >= 0) & (channel < channels)
        acc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for first in range(0, groups, BLOCK_S):
            part = first + tl.arange(0, BLOCK_S)
            at = (b * groups + part)[:, None] * channels + channel[None, :]
            mask = (part < groups)[:, None] & there[None, :]
            acc += tl.load(sums_ptr + at, mask=mask, other=0.0)
        # Rounded as it is stored: what the backward reads is what the filters saw.
        mean = (tl.sum(acc, axis=0) / positions).to(mean_ptr.dtype.element_ty)
        if i == size // 2:
            tl.store(mean_ptr + b * channels + c, mean, mask=mask_c)
        if HAS_QUERY:
            q += tl.load(wq_ptr + i).to(tl.float32) * mean.to(tl.float32)
        k += tl.load(wk_ptr + i).to(tl.float32) * mean.to(tl.float32)
    if HAS_QUERY:
        tl.store(q_ptr + b * channels + c, q.to(q_ptr.dtype.element_ty), mask=mask_c)
    tl.store(k_ptr + b * channels + c, k.to(k_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def turned(drow_ptr, filter_ptr, b, c, mask_line, channels, size):
    """What a row's gradient `[B, C]` gives the mean through the filter that made the row, `[LINES]`."""
    first = b.to(tl.int64) * channels
    total = tl.zeros(c.shape, tl.float32)
    for i in range(size):
        channel = c - i + size // 2
        there = mask_line & (channel >= 0) & (channel < channels)
        drow = tl.load(drow_ptr + first + channel, mask=there, other=0.0).to(tl.float32)
        total += tl.load(filter_ptr + i).to(tl.float32) * drow
    return total


@triton.jit
def filter_partials(
    drow_ptr, mean_ptr, partial_ptr, block, blocks, batch, channels, size, BLOCK: tl.constexpr
):
    """`<drow, shifted mean>` over BLOCK elements of the batch, for every tap; partial sums `[size, blocks]`."""
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < batch.to(tl.int64) * channels
    c = (offs % channels).to(tl.int32)
    drow = tl.load(drow_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for i in range(size):
        shift = i - size // 2
        there = mask & (c + shift >= 0) & (c + shift < channels)
        mean = tl.load(mean_ptr + offs + shift, mask=there, other=0.0).to(tl.float32)
        tl.store(partial_ptr + i * blocks + block, tl.sum(drow * mean, axis=0))


@triton.jit
def _column_sums(ptr, column, rows, columns, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums of some columns of a matrix `[rows, columns]`."""
    acc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_S):
        row = first + tl.arange(0, BLOCK_S)
        at = row.to(tl.int64)[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        acc += tl.load(ptr + at, mask=mask, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(
    do_not_specialize=["parts", "size", "blocks", "batch", "tap_programs", "decay_programs"]
)
def layer_filters_bwd_kernel(
    taps_ptr,  # [parts, 9, C]
    filters_ptr,  # [2, size, blocks]
    dwv_ptr,  # [C, 3, 3]
    dwq_ptr,  # [size]
    dwk_ptr,  # [size]
    decay_ptr,  # [B, C], of a light layer
    ddecay_ptr,  # [C]
    channels,
    parts,
    size,
    blocks,
    batch,
    tap_programs,  # programs that add up partial sums of taps
    decay_programs,  # after them, programs for the decay; and then one for each tap of query and key
    HAS_QUERY: tl.constexpr,
    HAS_KEY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The partial sums of the filters' gradients added up."""
    pid = tl.program_id(0)
    if pid < tap_programs:
        column = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        sums = _column_sums(taps_ptr, column, parts, 9 * channels, BLOCK_S, BLOCK_C)
        tl.store(
            dwv_ptr + column % channels * 9 + column // channels,
            sums.to(dwv_ptr.dtype.element_ty),
            mask=column < 9 * channels,
        )
    elif pid < tap_programs + decay_programs:
        c = (pid - tap_programs) * BLOCK_C + tl.arange(0, BLOCK_C)
        sums = _column_sums(decay_ptr, c, batch, channels, BLOCK_S, BLOCK_C)
        tl.store(ddecay_ptr + c, sums.to(ddecay_ptr.dtype.element_ty), mask=c < channels)
    else:
        number = pid - tap_programs - decay_programs
        offs = tl.arange(0, BLOCK_S * BLOCK_C)
        row = tl.zeros([BLOCK_S * BLOCK_C], tl.float32)
        for start in range(0, blocks, BLOCK_S * BLOCK_C):
            block = start + offs
            partial = filters_ptr + number.to(tl.int64) * blocks + block
            row += tl.load(partial, mask=block < blocks, other=0.0)
        total = tl.sum(row, axis=0)
        if HAS_QUERY:
            if number < size:
                tl.store(dwq_ptr + number, total.to(dwq_ptr.dtype.element_ty))
        if HAS_KEY:
            if number >= size:
                tl.store(dwk_ptr + number - size, total.to(dwk_ptr.dtype.element_ty))
