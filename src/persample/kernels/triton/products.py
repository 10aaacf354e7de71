"""The products of single samples in Triton: formed, squared and added up in registers.

A program owns a tile of the weight and walks through the positions of some samples, one block after the other. With the
last block of a sample its g_i is complete in registers, and is added to Σ g_i, and its square to Σ g_i². Programs that
share a tile take different samples and store partial sums, which are added up in their order, so results repeat.
"""

import triton
import triton.language as tl


@triton.jit
def moments(
    delta,  # δ, read as (image, group · output, position)
    x,  # the input, read as (image, group · channel, pixel)
    totals,  # (parts, G · O, K) or, of one part alone, the sums themselves
    squares,
    samples,  # B
    images,  # R, of a sample
    positions,  # L, of an image
    outputs,  # O, of a group
    columns,  # K = channels · entries of a window
    per_program,  # how many samples a program takes
    row_length,  # of the image of positions
    channels,  # of a group
    window_width,  # how many entries a window has along a row
    window_size,  # how many it has
    delta_image,  # strides
    delta_output,
    delta_position,
    x_image,
    x_channel,
    x_row,  # from a row of positions to the next
    x_position,  # and from a position to the next in its row
    x_window_row,
    x_window_entry,
    windows: tl.constexpr,  # whether positions lie in rows and columns belong to windows
    one_block: tl.constexpr,  # whether a sample's positions fit one block
    precision: tl.constexpr,
    block_o: tl.constexpr,
    block_k: tl.constexpr,
    block_l: tl.constexpr,
):
    """Store Σ g_i and Σ g_i² of some samples, for a tile of the weight, with g_i = Σ_l δ_il [[x]]_ilᵀ."""
    tile, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column_tiles = (columns + block_k - 1) // block_k
    o = (tile // column_tiles) * block_o + tl.arange(0, block_o)
    k = (tile % column_tiles) * block_k + tl.arange(0, block_k)
    if windows:  # columns in the order of the windows' entries, the channels of each side by side
        channel, entry = k % channels, k // channels
        column_offset = (
            channel * x_channel + (entry // window_width) * x_window_row + (entry % window_width) * x_window_entry
        )
        column = channel * window_size + entry
    else:
        column_offset, column = k * x_channel, k
    first = part * per_program
    count = tl.minimum(per_program, samples - first)
    blocks = (positions + block_l - 1) // block_l
    of_a_sample = blocks * images
    delta += (first * images).to(tl.int64) * delta_image + group * outputs * delta_output
    x += (first * images).to(tl.int64) * x_image + group * channels * x_channel
    delta_rows, x_columns = delta + o[:, None] * delta_output, x + column_offset[None, :]
    o_inside, k_inside = (o < outputs)[:, None], (k < columns)[None, :]

    g = tl.full((block_o, block_k), 0, tl.float32)
    total, square = g, g
    for step in range(count * of_a_sample):
        image = step // blocks
        position = (step - image * blocks) * block_l + tl.arange(0, block_l)
        inside = position < positions
        if windows:
            row = position // row_length
            position_offset = row * x_row + (position - row * row_length) * x_position
        else:
            position_offset = position * x_position
        d = tl.load(
            delta_rows + image.to(tl.int64) * delta_image + position[None, :] * delta_position,
            mask=o_inside & inside[None, :],
            other=0.0,
        )
        a = tl.load(
            x_columns + image.to(tl.int64) * x_image + position_offset[:, None],
            mask=inside[:, None] & k_inside,
            other=0.0,
        )
        if one_block:
            g = tl.dot(d, a, input_precision=precision)
            total += g
            square += g * g
        else:
            g = tl.dot(d, a, g, input_precision=precision)
            if (step + 1) % of_a_sample == 0:
                total += g
                square += g * g
                g = tl.full((block_o, block_k), 0, tl.float32)
    rows = part.to(tl.int64) * tl.num_programs(2) * outputs + group * outputs + o
    place = rows[:, None] * columns + column[None, :]
    tl.store(totals + place, total, mask=o_inside & k_inside)
    tl.store(squares + place, square, mask=o_inside & k_inside)


@triton.jit
def one_position(
    delta,  # (B, O)
    x,  # (B, K)
    totals,  # (parts, O, K) or, of one part alone, the sums themselves
    squares,
    samples,
    outputs,
    columns,
    per_program,
    delta_sample,  # strides
    delta_output,
    x_sample,
    x_column,
    precision: tl.constexpr,
    block_o: tl.constexpr,
    block_k: tl.constexpr,
    block_l: tl.constexpr,
):
    """Store δᵀ x and (δ²)ᵀ (x²) of some samples, for a tile of the weight, from one sweep through both."""
    tile, part = tl.program_id(0), tl.program_id(1)
    column_tiles = (columns + block_k - 1) // block_k
    o = (tile // column_tiles) * block_o + tl.arange(0, block_o)
    k = (tile % column_tiles) * block_k + tl.arange(0, block_k)
    first = part * per_program
    last = tl.minimum(first + per_program, samples)
    o_inside, k_inside = (o < outputs)[:, None], (k < columns)[None, :]
    total = tl.full((block_o, block_k), 0, tl.float32)
    square = total
    for start in range(first, last, block_l):
        sample = start + tl.arange(0, block_l)
        inside = sample < last
        rows = sample.to(tl.int64)
        d = tl.load(
            delta + rows[None, :] * delta_sample + o[:, None] * delta_output,
            mask=o_inside & inside[None, :],
            other=0.0,
        )
        a = tl.load(x + rows[:, None] * x_sample + k[None, :] * x_column, mask=inside[:, None] & k_inside, other=0.0)
        total = tl.dot(d, a, total, input_precision=precision)
        d, a = d.to(tl.float32), a.to(tl.float32)
        square = tl.dot(d * d, a * a, square, input_precision=precision)
    place = (part.to(tl.int64) * outputs + o)[:, None] * columns + k[None, :]
    tl.store(totals + place, total, mask=o_inside & k_inside)
    tl.store(squares + place, square, mask=o_inside & k_inside)
