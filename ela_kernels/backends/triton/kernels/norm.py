"""What follows the retrieval o in a residual block: out = x + mask * act(norm(o)), and its backward.

Least bytes: o and x read once and out written; the norm's statistics come from the launch that wrote o. Backward: dout
and o read for two sums a channel, read again for the gradient of o, which is written; with given statistics no sum is
needed for that gradient, and one pass does both.

Tiles are those of `tiles.tile_at` with a head for each channel: `item` is b * C + c. Partial sums are `[2, parts, C]`,
a part being what one program saw of a channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ela_kernels.backends.triton.kernels.tiles import along, line_sum, offsets, part_at, tile_at


@triton.jit(do_not_specialize=["parts", "chunks", "positions"])
def layer_norm_statistics_kernel(
    partial_ptr,  # [2, parts, C]: means, and sums of squared distances from them
    statistics_ptr,  # [2, C]
    channels,
    parts,
    chunks,  # parts of a sample
    positions,
    SPAN: tl.constexpr,  # positions of a part, but for a sample's last
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of every channel; no difference of large sums is taken."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    offs = tl.arange(0, BLOCK_P)
    count = tl.zeros([BLOCK_P, 1], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + offs
        there = part < parts
        at = part.to(tl.int64)[:, None] * channels + c[None, :]
        mask = there[:, None] & mask_c[None, :]
        part_mean = tl.load(partial_ptr + at, mask=mask, other=0.0)
        squares_ptr = partial_ptr + parts.to(tl.int64) * channels
        part_square = tl.load(squares_ptr + at, mask=mask, other=0.0)
        more = tl.where(there, tl.minimum(positions - part % chunks * SPAN, SPAN), 0)
        more = more.to(tl.float32)[:, None]
        together = count + more
        share = more / tl.maximum(together, 1.0)
        distance = part_mean - mean
        mean += distance * share
        square += part_square + distance * distance * (count * share)
        count = together
    # Joined as distances from one of the means: their sum cancels no more than the distances themselves do.
    origin = tl.sum(tl.where((offs == 0)[:, None], mean, 0.0), axis=0)
    total = tl.sum(count, axis=0)
    distance = tl.where(count > 0.0, mean - origin[None, :], 0.0)
    moved = tl.sum(count * distance, axis=0) / total
    distance -= moved[None, :]
    variance = tl.sum(square + count * distance * distance, axis=0) / total
    tl.store(statistics_ptr + c, origin + moved, mask=mask_c)
    tl.store(statistics_ptr + channels + c, variance, mask=mask_c)


@triton.jit
def _norm_at(
    statistics_ptr,
    gamma_ptr,
    beta_ptr,
    mask_ptr,
    item,
    mask_line,
    channels,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Mean, 1 / sqrt(variance + eps) * gamma, beta and drop factor of each line of a tile."""
    c = item % channels
    mean = tl.load(statistics_ptr + c, mask=mask_line, other=0.0)
    variance = tl.load(statistics_ptr + channels + c, mask=mask_line, other=1.0)
    scale = 1.0 / tl.sqrt(variance + eps)
    if HAS_GAMMA:
        scale *= tl.load(gamma_ptr + c, mask=mask_line, other=0.0).to(tl.float32)
    shift = tl.zeros(c.shape, tl.float32)
    if HAS_BETA:
        shift += tl.load(beta_ptr + c, mask=mask_line, other=0.0).to(tl.float32)
    factor = tl.full(c.shape, 1.0, tl.float32)
    if HAS_MASK:
        factor *= tl.load(mask_ptr + item // channels, mask=mask_line, other=0.0).to(tl.float32)
    return mean, scale, shift, factor


@triton.jit(do_not_specialize=["batch", "positions", "rows", "chunks"])
def layer_norm_fwd_kernel(
    o_ptr,
    x_ptr,
    out_ptr,
    statistics_ptr,  # [2, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    mask_ptr,  # [B]
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_ob,
    stride_or,
    stride_xb,
    stride_xr,
    stride_yb,
    stride_yr,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RELU: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    sample, row, column, mask, item, mask_line, _, _ = tile_at(
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
    o_offs = offsets(sample, row, column, stride_ob, stride_or, UNIT)
    o = tl.load(o_ptr + o_offs, mask=mask, other=0.0)
    x_offs = offsets(sample, row, column, stride_xb, stride_xr, UNIT)
    x = tl.load(x_ptr + x_offs, mask=mask, other=0.0)
    mean, scale, shift, factor = _norm_at(
        statistics_ptr,
        gamma_ptr,
        beta_ptr,
        mask_ptr,
        item,
        mask_line,
        channels,
        eps,
        HAS_GAMMA,
        HAS_BETA,
        HAS_MASK,
    )
    z = (o.to(tl.float32) - along(mean, INTERLEAVED)) * along(scale, INTERLEAVED)
    z += along(shift, INTERLEAVED)
    if RELU:
        z = tl.where(z < 0.0, 0.0, z)  # a NaN stays one
    out = x.to(tl.float32) + along(factor, INTERLEAVED) * z
    out_offs = offsets(sample, row, column, stride_yb, stride_yr, UNIT)
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "positions", "rows", "chunks", "parts"])
def layer_norm_bwd_kernel(
    o_ptr,
    dout_ptr,
    do_ptr,
    also_ptr,
    statistics_ptr,  # [2, C]
    gamma_ptr,  # [C]
    beta_ptr,  # [C]
    mask_ptr,  # [B]
    moved_ptr,  # [2, C], means over batch and space of the gradient g, and of g * (o - mean) / variance
    partial_ptr,  # [2, parts, C]
    batch,
    channels,
    heads,
    positions,
    rows,
    row_units,
    chunks,
    stride_ob,
    stride_or,
    stride_gb,
    stride_gr,
    stride_db,
    stride_dr,
    stride_ab,
    stride_ar,
    eps,
    parts,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_MASK: tl.constexpr,
    RELU: tl.constexpr,
    SUMS: tl.constexpr,  # write partial sums of g and of g * (o - mean), g being the gradient at the norm's output
    WRITES: tl.constexpr,  # write the gradient of o
    MOVED: tl.constexpr,  # statistics are those of the batch, and move with o
    HAS_ALSO: tl.constexpr,  # another gradient of o is added
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
    o_offs = offsets(sample, row, column, stride_ob, stride_or, UNIT)
    o = tl.load(o_ptr + o_offs, mask=mask, other=0.0)
    g_offs = offsets(sample, row, column, stride_gb, stride_gr, UNIT)
    dout = tl.load(dout_ptr + g_offs, mask=mask, other=0.0)
    mean, scale, shift, factor = _norm_at(
        statistics_ptr,
        gamma_ptr,
        beta_ptr,
        mask_ptr,
        item,
        mask_line,
        channels,
        eps,
        HAS_GAMMA,
        HAS_BETA,
        HAS_MASK,
    )
    distance = o.to(tl.float32) - along(mean, INTERLEAVED)
    g = along(factor, INTERLEAVED) * dout.to(tl.float32)
    if RELU:
        z = distance * along(scale, INTERLEAVED) + along(shift, INTERLEAVED)
        g = tl.where(z <= 0.0, 0.0, g)
    if SUMS:
        # Beyond the map dout is zero, and so is g.
        at = part_at(number, place, channels, chunks, INTERLEAVED)
        tl.store(partial_ptr + at, line_sum(g, INTERLEAVED), mask=mask_line)
        products_ptr = partial_ptr + parts.to(tl.int64) * channels
        tl.store(products_ptr + at, line_sum(g * distance, INTERLEAVED), mask=mask_line)
    if WRITES:
        if MOVED:
            c = item % channels
            by_one = tl.load(moved_ptr + c, mask=mask_line, other=0.0)
            by_value = tl.load(moved_ptr + channels + c, mask=mask_line, other=0.0)
            g -= along(by_one, INTERLEAVED) + distance * along(by_value, INTERLEAVED)
        do = along(scale, INTERLEAVED) * g
        if HAS_ALSO:
            a_offs = offsets(sample, row, column, stride_ab, stride_ar, UNIT)
            do += tl.load(also_ptr + a_offs, mask=mask, other=0.0).to(tl.float32)
        d_offs = offsets(sample, row, column, stride_db, stride_dr, UNIT)
        tl.store(do_ptr + d_offs, do.to(do_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "count"])
def layer_norm_sums_kernel(
    partial_ptr,  # [2, parts, C]
    statistics_ptr,  # [2, C]
    moved_ptr,  # [2, C], as layer_norm_bwd_kernel reads it
    dgamma_ptr,  # [C]
    dbeta_ptr,  # [C]
    channels,
    parts,
    count,  # numbers of a channel
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The partial sums of the backward added up, and what follows from them."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        at = part.to(tl.int64)[:, None] * channels + c[None, :]
        mask = (part < parts)[:, None] & mask_c[None, :]
        sums += tl.load(partial_ptr + at, mask=mask, other=0.0)
        products_ptr = partial_ptr + parts.to(tl.int64) * channels
        products += tl.load(products_ptr + at, mask=mask, other=0.0)
    total, product = tl.sum(sums, axis=0), tl.sum(products, axis=0)
    variance = tl.load(statistics_ptr + channels + c, mask=mask_c, other=1.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    if HAS_GAMMA:
        dgamma = (product * inverse).to(dgamma_ptr.dtype.element_ty)
        tl.store(dgamma_ptr + c, dgamma, mask=mask_c)
    if HAS_BETA:
        tl.store(dbeta_ptr + c, total.to(dbeta_ptr.dtype.element_ty), mask=mask_c)
    if MOVED:
        tl.store(moved_ptr + c, total / count, mask=mask_c)
        by_value = product * inverse * inverse / count
        tl.store(moved_ptr + channels + c, by_value, mask=mask_c)
