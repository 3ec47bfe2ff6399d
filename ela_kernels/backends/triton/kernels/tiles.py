"""What the Triton kernels share: tables of pointers, the part of a map that one program works on, and the scores.

A map is read as tiles. Planar: rows of a tile are segments, each a run of up to COLS contiguous elements of one head
(of one channel, where there are gaps between channels); segments are numbered through the whole batch, so that small
maps fill a tile as well. Interleaved: rows are positions and columns are channels. What belongs to a head lies along
the segments or along the channels, which is what the names below call the "line" of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_table(pointers, offs_t):
    """The pointers of a tuple as one vector of addresses; `offs_t` counts them."""
    table = tl.zeros(offs_t.shape, tl.int64)
    for j in tl.static_range(len(pointers)):
        table = tl.where(offs_t == j, pointers[j].to(tl.int64), table)
    return table.to(tl.pointer_type(pointers[0].dtype.element_ty))


@triton.jit
def decoded(code):
    """A number that `plan.encoded` made: Triton compiles anew for 1 and for multiples of 16, and codes are neither."""
    return (code - 3) // 32


@triton.jit
def number_table(codes, offs_t):
    """The numbers of a tuple as one vector."""
    table = tl.zeros(offs_t.shape, tl.int32)
    for j in tl.static_range(len(codes)):
        table = tl.where(offs_t == j, decoded(codes[j]), table)
    return table


@triton.jit
def where_exists(mask, j, count):
    """`mask` where map j is one of `count`; nothing otherwise.

    Compared by element: the interpreter of Triton 3.9 takes a scalar truth that is broadcast for an int32.
    """
    return mask & (tl.full(mask.shape, j, tl.int32) < count)


@triton.jit
def along(line, INTERLEAVED: tl.constexpr):
    """One number for each segment or channel, spread over a tile."""
    if INTERLEAVED:
        return line[None, :]
    else:
        return line[:, None]


@triton.jit
def across(position, INTERLEAVED: tl.constexpr):
    """One number for each position, spread over a tile."""
    if INTERLEAVED:
        return position[:, None]
    else:
        return position[None, :]


@triton.jit
def retained(w, tolerance):
    """Which weights are not below the tolerance. A NaN is not: what it is multiplied with shows it.

    A weight that was not read is zero, and below every tolerance above zero.
    """
    return ~(w < tolerance)


@triton.jit
def read_retained(
    pointers,
    mask,
    kept,  # of each line, spread over the tile
    UNIT: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,  # interleaved: so many channels, from a multiple of it on, are of one head
    INTERLEAVED: tl.constexpr,
):
    """A tile of a map without its lines that are left out: they are zero, whatever they hold.

    Interleaved, UNIT neighbouring channels are read at once, which may be of several heads: they are read where one of
    them is retained. The compiler is told that they go together, or it would read by single elements; told of an
    operation of this very function, as a call would lose it.
    """
    if INTERLEAVED and UNIT > 1:
        is_read = kept
        if FOLD % UNIT != 0:
            runs = tl.max(tl.reshape(kept.to(tl.int32), [COLS // UNIT, UNIT]), axis=1)
            runs = tl.broadcast_to(runs[:, None], [COLS // UNIT, UNIT])
            is_read = tl.reshape(runs, [1, COLS]) != 0
        tile = tl.load(pointers, mask=tl.max_constancy(mask & is_read, [1, UNIT]), other=0.0)
        return tile if FOLD % UNIT == 0 else tl.where(kept, tile, 0.0)
    else:
        return tl.load(pointers, mask=mask & kept, other=0.0)


@triton.jit
def line_sum(tile, INTERLEAVED: tl.constexpr):
    """The sum of each line of a tile."""
    if INTERLEAVED:
        return tl.sum(tile, axis=0)
    else:
        return tl.sum(tile, axis=1)


@triton.jit
def tile_at(
    pid,
    batch,
    channels,
    heads,
    positions,
    rows,  # planar: rows of a sample, heads or channels
    row_units,  # planar: elements of a row / UNIT
    chunks,  # planar: segments of a row; interleaved: tiles of positions
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Where a program's tile lies.

    Strides and row lengths come in units of UNIT elements, 16 bytes where all of them allow it: Triton asks of a number
    only whether 16 divides it, and reads by 16 bytes where it knows enough.

    Returns:
        sample, row and column as int64, to be multiplied with strides: `[ROWS, 1]` or `[1, COLS]` each; the mask of the
        tile; and along its line: `item`, b * G + g, whether it exists, its segment or channel; the tile's number in its
        form's partial sums.
    """
    if INTERLEAVED:
        strips = tl.cdiv(channels, COLS)
        b = pid // (chunks * strips)
        tile = pid % (chunks * strips) // strips
        c = pid % strips * COLS + tl.arange(0, COLS)
        n = tile * ROWS + tl.arange(0, ROWS)
        mask_line = c < channels
        item = b * heads + tl.minimum(c, channels - 1) // (channels // heads)
        sample = tl.full([1, 1], 0, tl.int64) + b
        mask = (n < positions)[:, None] & mask_line[None, :]
        number = (b * chunks + tile).to(tl.int64)
        return sample, n.to(tl.int64)[:, None], c[None, :], mask, item, mask_line, c, number
    else:
        segment = pid * ROWS + tl.arange(0, ROWS)
        mask_line = segment < batch * rows * chunks
        segment = tl.where(mask_line, segment, 0)
        b = segment // (rows * chunks)
        row = segment % (rows * chunks) // chunks
        offs = ((segment % chunks).to(tl.int64) * COLS)[:, None] + tl.arange(0, COLS)[None, :]
        item = b * heads + row // (rows // heads)
        mask = mask_line[:, None] & (offs < row_units * UNIT)
        number = pid.to(tl.int64)
        sample = b.to(tl.int64)[:, None]
        return sample, row.to(tl.int64)[:, None], offs, mask, item, mask_line, segment, number


@triton.jit
def offsets(sample, row, column, batch_units, row_units, UNIT: tl.constexpr):
    """Offsets of a tile in a map whose strides are given in units of UNIT elements.

    A stride of one is a constant, which has no `to`: it is made wide by what it is multiplied with.
    """
    unit = tl.full([1, 1], UNIT, tl.int64)
    return sample * (unit * batch_units) + row * (unit * row_units) + column


@triton.jit
def part_at(number, place, channels, chunks, INTERLEAVED: tl.constexpr):
    """Where the sums of a tile's lines are in partial sums `[B * chunks, C]`; a planar tile's rows are of channels."""
    if INTERLEAVED:
        return number * channels + place
    else:
        sample = (place // (channels * chunks)).to(tl.int64)
        return (sample * chunks + place % chunks) * channels + place // chunks % channels


@triton.jit
def moments(
    tile,  # float32
    mask,
    number,
    place,
    positions,
    chunks,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The mean of each line of a tile, and the sum of squared distances from it."""
    if INTERLEAVED:
        count = tl.minimum(positions - number % chunks * ROWS, ROWS).to(tl.float32)
    else:
        count = tl.minimum(positions - place % chunks * COLS, COLS).to(tl.float32)
    mean = line_sum(tl.where(mask, tile, 0.0), INTERLEAVED) / count
    distance = tl.where(mask, tile - along(mean, INTERLEAVED), 0.0)
    return mean, line_sum(distance * distance, INTERLEAVED)


@triton.jit
def scores(
    q_ptr,  # [B, C]
    key_ptrs,  # depth of [B, C]
    stride_qb,
    stride_kb,
    item,  # [HEADS], b * G + g
    mask_item,
    heads,
    head_dim,
    depth,
    scale,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`scale * <q, k_j>` of some heads, `[HEADS, T]`; -inf beyond the depth."""
    offs_t = tl.arange(0, T)
    k_ptrs = pointer_table(key_ptrs, offs_t)
    b = (item // heads).to(tl.int64)
    first = (item % heads).to(tl.int64) * head_dim
    total = tl.zeros([HEADS, T], tl.float32)
    for d in range(0, head_dim, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = mask_item[:, None] & (offs_d < head_dim)[None, :]
        q_offs = (b * stride_qb + first)[:, None] + offs_d[None, :]
        q = tl.load(q_ptr + q_offs, mask=mask_d, other=0.0).to(tl.float32)
        k_offs = (b * stride_kb + first)[:, None, None] + offs_d[None, None, :]
        k = tl.load(
            k_ptrs[None, :, None] + k_offs,
            mask=mask_d[:, None, :] & (offs_t < depth)[None, :, None],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(q[:, None, :] * k, axis=2)
    return tl.where((offs_t < depth)[None, :], total * scale, float("-inf"))


@triton.jit
def log_softmax(s):
    """Logarithm of the softmax along the depth of `[HEADS, T]`; a NaN makes the whole head NaN, as in PyTorch."""
    shifted = s - tl.max(s, axis=1)[:, None]
    return shifted - tl.log(tl.sum(tl.exp(shifted), axis=1))[:, None]


@triton.jit
def divergence_terms(prev, log_weights):
    """`prev * (log prev - log weights)`, zero where prev is zero."""
    return tl.where(prev == 0.0, 0.0, prev * (tl.log(prev) - log_weights))
