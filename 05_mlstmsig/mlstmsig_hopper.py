"""Stage 05: the mLSTMsig on Hopper GPUs (H100, H200) in bfloat16, forward and backward, in Gluon, Triton's lower level.

mlstmsig_tfla.py beside this file computes the same on any GPU. There, a chunk is cut into tiles of an L x L matrix, and
the states between chunks go through memory. Here a program walks along a whole sequence in tiles of 64 steps and keeps
the state on chip: TFLA (arXiv 2503.14376) with its inner level made recurrent. Work stays linear in T, no state is
written and read again, and everything comes from memory once. Of a tile, with P = Q K^T * Wr:

    forward, tile by tile            backward, from the last tile to the first
    H  = w_read * (Q C) + P V        dV = w_end * (K dC) + P^T dH
    C <- decay C + (w_end * K)^T V   dK = w_end * (V dC^T) + dP^T Q,    dP = dH V^T * Wr
                                     dC <- decay dC + (w_read * Q)^T dH
    and once more for the gradient of the queries:  dQ = w_read * (dH C^T) + dP K

So there are two kernels, each used twice: state_times_keys_kernel (h and dv) and state_times_values_kernel (dq, dk).
It is mlstm_hopper.py of stage 04 without stabilizers and normalizer. Gate weights come from rows_kernel, whose
docstring lists what a walk reads of a tile. Few sequences and wide heads (d_qk > 128 or d_hv > 256) need more kernels
than these: see the heads of their sections.

The warps of a program have different jobs ("warp specialization") and wait for each other at barriers in shared memory:
    load     one warp: has the copy engine (TMA) bring tile after tile into a ring of buffers
    scores   one warpgroup: P or dP of the next tiles, gate weights applied; it needs no state and runs ahead
    state    the others: keep the state in their registers, multiply with it, and add to it

Glossary (name in code = symbol = shape; NT tiles of 64 steps):
    b        sum of log sigmoid(f) since the tile began, without resets
    decay    e^g of each tile, g its last b                                   (B, NH, NT)
    Wr       s e^(b_i - b_j) sigmoid(i_j), gate weights within a tile         (64 x 64), s = 1 / sqrt(d_qk)
    w_read, w_end    rows 5 and 6 of rows_kernel

Not included: other number formats, other GPUs, heads beyond d_qk = 256 and d_hv = 512 (mlstmsig_tfla.py has them all).
Copy this file: it needs torch and triton, 3.6 or newer.
"""

from collections import namedtuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError(
        "mlstmsig_hopper.py needs Triton 3.6 or newer. mlstmsig_reference.py beside it computes the same without it."
    ) from error

__all__ = ["mlstmsig_hopper"]

State = tuple[Tensor]

# Steps in a tile, tiles from one stored state to the next, and tiles of which spans are multiples.
BLOCK = 64
BORDER = 8
GRAIN = 8
# A forget gate below this begins a new document: e^-110 is 0 in float32, so that nothing is lost but the digits that
# b would lose behind it.
FORGOTTEN = tl.constexpr(-110.0)
LOG2_E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------
# same as 03_chunkwise/mlstm_limit_chunk.py::head
@triton.jit
def head(ptr, bh, NH, stride_b, stride_h):
    """Where head bh = b * NH + h of a (B, NH, ...) tensor begins."""
    return ptr + bh // NH * stride_b + bh % NH * stride_h


@triton.jit
def later(start_1, start_2):
    return tl.maximum(start_1, start_2)


# same as 04_tfla_triton/mlstm_hopper.py::sooner
@triton.jit
def sooner(end_1, end_2):
    return tl.minimum(end_1, end_2)


# same as 05_mlstmsig/mlstmsig_tfla.py::log_sigmoid
@triton.jit
def log_sigmoid(x):
    """In float64, where nothing visible is lost in 1 + e^-|x|."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def rows_kernel(
    i_ptr, f_ptr, rows_ptr, decay_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    T, NT, NH, s, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The rows of some tiles, and their decays. Grid: (tiles / TILES) * B * NH. Steps past T write nothing.

    Of each tile there are eight rows of 64 steps in float32, (B, NH, NT * 8, 64):
        0, 1  log2 of s e^b, and of sigmoid(i) e^-b
        2, 3  start, end: where in the tile step i's document begins, and where step j's ends
        4, 7  nothing; stage 04 has more numbers to keep
        5     w_read: s e^b, weight of the tile's first state
        6     w_end: sigmoid(i) e^(g - b) with g the last b, weight of the step in the next state
    """
    groups = tl.cdiv(NT, TILES)
    bh, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    tile = group * TILES + tl.arange(0, TILES)
    offs_l = tl.arange(0, BLOCK)[None, :]
    offs_t = (tile[:, None] * BLOCK + offs_l).to(tl.int64)  # (TILES, BLOCK)
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    i = tl.load(i_ptr + offs_t * stride_it, mask=offs_t < T, other=-float("inf")).to(tl.float64)
    f = tl.load(f_ptr + offs_t * stride_ft, mask=offs_t < T, other=float("inf")).to(tl.float64)
    has_next = (offs_l < BLOCK - 1) & (offs_t + 1 < T)
    f_next = tl.load(f_ptr + (offs_t + 1) * stride_ft, mask=has_next, other=0.0).to(tl.float32)

    reset = f < FORGOTTEN
    b = tl.cumsum(tl.where(reset, 0.0, log_sigmoid(f)), 1)
    u = log_sigmoid(i) - b
    start = tl.associative_scan(tl.where(reset, offs_l, -1), 1, later)
    end = tl.associative_scan(tl.where(f_next < FORGOTTEN, offs_l + 1, BLOCK), 1, sooner, reverse=True)
    g = tl.sum(tl.where(offs_l == BLOCK - 1, b, 0.0), axis=1)[:, None]
    start_last = tl.max(start, axis=1)[:, None]
    w_read = tl.where(start < 0, tl.exp(b.to(tl.float32)) * s, 0.0)
    w_end = tl.where(offs_l >= start_last, tl.exp((g + u).to(tl.float32)), 0.0)
    decay = tl.where(start_last < 0, tl.exp(g.to(tl.float32)), 0.0)
    log_s = tl.log(tl.full((), 1.0, dtype=tl.float64) * s)

    row, mask = rows_ptr + (bh * NT + tile[:, None]) * 8 * BLOCK + offs_l, tile[:, None] < NT
    tl.store(row, ((log_s + b) * LOG2_E).to(tl.float32), mask=mask)
    tl.store(row + BLOCK, (u * LOG2_E).to(tl.float32), mask=mask)
    tl.store(row + 2 * BLOCK, start.to(tl.float32), mask=mask)
    tl.store(row + 3 * BLOCK, end.to(tl.float32), mask=mask)
    tl.store(row + 4 * BLOCK, tl.zeros_like(w_read), mask=mask)
    tl.store(row + 5 * BLOCK, w_read, mask=mask)
    tl.store(row + 6 * BLOCK, w_end, mask=mask)
    tl.store(row + 7 * BLOCK, tl.zeros_like(w_end), mask=mask)
    tl.store(decay_ptr + bh * NT + tile[:, None], decay, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Spans of few sequences, in plain Triton
#
# Where sequences are so few that most of the GPU would stand idle, they are cut into spans that are walked along at the
# same time. What each span starts from, starts_kernel puts together from what pieces of the spans before it add to the
# state (but for dq, which takes it from the borders, see state_times_keys_kernel).
# walk_kernel finds what pieces add, for all but those of which pieces_kernel says that they are forgotten by the end
# of their span (backward: by its beginning).
# ---------------------------------------------------------------------------------------------------------------------
# same as 04_tfla_triton/mlstm_hopper.py::product
@triton.jit
def product(a, b):
    return a * b


# same as 04_tfla_triton/mlstm_hopper.py::piece_decays
@triton.jit
def piece_decays(decay_ptr, number, span, NT, PIECE, PER_SPAN, BLOCK_PIECE: tl.constexpr):
    """What each of these pieces of a span multiplies the state by; 1 if there is no such piece."""
    tile = tl.arange(0, BLOCK_PIECE)[None, :]
    offs = (span * PER_SPAN + number[:, None]) * PIECE + tile
    inside = ((number >= 0) & (number < PER_SPAN))[:, None] & (tile < PIECE) & (offs < NT)
    return tl.reduce(tl.load(decay_ptr + offs, mask=inside, other=1.0), 1, product)


# same as 04_tfla_triton/mlstm_hopper.py::pieces_kernel
@triton.jit
def pieces_kernel(
    decay_ptr, decays_ptr, weights_ptr, NT, PIECE, PER_SPAN,
    BACKWARD: tl.constexpr, BLOCK_PIECES: tl.constexpr, BLOCK_PIECE: tl.constexpr,
):  # fmt: skip
    """Of each piece what it multiplies the state by, and what the pieces behind it do until the span ends (backward:
    those before it, until it begins). Grid: spans, B * NH."""
    span, bh, pieces = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.cdiv(NT, PIECE)
    number = tl.arange(0, BLOCK_PIECES)
    decay_ptr += bh * NT
    own = piece_decays(decay_ptr, number, span, NT, PIECE, PER_SPAN, BLOCK_PIECE)
    next_one = number - 1 if BACKWARD else number + 1
    then = piece_decays(decay_ptr, next_one, span, NT, PIECE, PER_SPAN, BLOCK_PIECE)
    weights = tl.associative_scan(then, 0, product, reverse=not BACKWARD)
    piece = span * PER_SPAN + number
    mask = (number < PER_SPAN) & (piece < pieces)
    tl.store(decays_ptr + bh * pieces + piece, own, mask=mask)
    tl.store(weights_ptr + bh * pieces + piece, weights, mask=mask)


# same as 04_tfla_triton/mlstm_hopper.py::add_piece
@triton.jit
def add_piece(C, C_ptr, decays_ptr, weights_ptr, piece, SIZE, offs):
    """The state after a piece, from the state before it and what the piece makes of an empty one."""
    size = tl.where(tl.load(weights_ptr + piece) == 0.0, 0, SIZE)  # without weight it was not even computed
    return C * tl.load(decays_ptr + piece) + tl.load(C_ptr + piece * SIZE + offs, mask=offs < size, other=0.0)


# same as 04_tfla_triton/mlstm_hopper.py::starts_kernel
@triton.jit
def starts_kernel(
    C_ptr, decays_ptr, weights_ptr, first_ptr, start_ptr, PIECES, PER_SPAN, SIZE,
    BACKWARD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The state that each span of PER_SPAN pieces, the last one of less, starts from. Grid: entries of C, B * NH."""
    bh, spans = tl.program_id(1).to(tl.int64), tl.cdiv(PIECES, PER_SPAN)
    offs = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    C = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    if first_ptr is not None:
        C = tl.load(first_ptr + bh * SIZE + offs, mask=offs < SIZE, other=0.0)
    C_ptr, start_ptr = C_ptr + bh * PIECES * SIZE, start_ptr + bh * spans * SIZE
    decays_ptr, weights_ptr = decays_ptr + bh * PIECES, weights_ptr + bh * PIECES
    tl.store(start_ptr + ((spans - 1) * SIZE if BACKWARD else 0) + offs, C, mask=offs < SIZE)
    if BACKWARD:
        for n in range(PIECES - PER_SPAN):
            piece = PIECES - 1 - n
            C = add_piece(C, C_ptr, decays_ptr, weights_ptr, piece, SIZE, offs)
            if piece % PER_SPAN == 0:
                tl.store(start_ptr + (piece // PER_SPAN - 1) * SIZE + offs, C, mask=offs < SIZE)
    else:
        for piece in range((spans - 1) * PER_SPAN):
            C = add_piece(C, C_ptr, decays_ptr, weights_ptr, piece, SIZE, offs)
            if (piece + 1) % PER_SPAN == 0:
                tl.store(start_ptr + (piece + 1) // PER_SPAN * SIZE + offs, C, mask=offs < SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# What the walks share
# ---------------------------------------------------------------------------------------------------------------------
# What all roles of a program know: it walks along `count` tiles of NT, from `first` on, in head `head` of sequence
# `batch`, with its decays at decay_ptr. Tiles come into rings of buffers: here are the ring of their rows, and the
# barriers "full" and "empty" of all rings that the copy engine fills. BACKWARD, a walk goes from the last tile to the
# first, and w_read and w_end have exchanged their roles.
#
# A barrier has a phase, 0 at first, that flips when all have arrived; to wait for a phase is to wait until it is over.
# The number-th tile has its buffer in round number // STAGES: "full" is waited for in that round's phase, "empty" in
# that of the round before, which for the first round counts as over.
Walk = namedtuple("Walk", "batch head first count NT decay_ptr rows full empty")


# same as 04_tfla_triton/mlstm_hopper.py::new_barriers
@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Barriers that open after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(number):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers


# same as 04_tfla_triton/mlstm_hopper.py::ring
@gluon.jit
def ring(descriptor, STAGES: gl.constexpr):
    """STAGES buffers for what the copy engine brings of a tile, or takes away."""
    return gl.allocate_shared_memory(descriptor.dtype, [STAGES] + descriptor.block_type.shape, descriptor.layout)  # noqa: RUF005, Gluon knows +


# same as 04_tfla_triton/mlstm_hopper.py::program_of_span
@gluon.jit
def program_of_span(TILES: gl.constexpr, NT, NH, SPAN):
    """(tile of the head dimension, head among all heads, its sequence, its number there, span among the spans of all
    heads, its first tile, how many tiles)."""
    spans = (NT + SPAN - 1) // SPAN
    tile, program = gl.program_id(0) % TILES, gl.program_id(0) // TILES
    bh, first = (program // spans).to(gl.int64), program % spans * SPAN
    batch, head_ = (bh // NH).to(gl.int32), (bh % NH).to(gl.int32)
    return tile, bh, batch, head_, program.to(gl.int64), first, gl.minimum(SPAN, NT - first)


# same as 04_tfla_triton/mlstm_hopper.py::tile_at
@gluon.jit
def tile_at(walk, number, BACKWARD: gl.constexpr):
    """The tile that comes number-th."""
    return walk.first + (walk.count - 1 - number) if BACKWARD else walk.first + number


# same as 04_tfla_triton/mlstm_hopper.py::next_decay
@gluon.jit
def next_decay(walk, number, BACKWARD: gl.constexpr):
    """The decay of the tile that the walk comes to next; after the last tile its own, which nobody uses."""
    return gl.load(walk.decay_ptr + tile_at(walk, gl.minimum(number + 1, walk.count - 1), BACKWARD))


# same as 04_tfla_triton/mlstm_hopper.py::buffer
@gluon.jit
def buffer(ring, number):
    """What the number-th tile has in a ring, of buffers or of barriers."""
    return ring.index(number % ring.shape[0])


# same as 04_tfla_triton/mlstm_hopper.py::matrix
@gluon.jit
def matrix(ring, number):
    """The number-th tile of q, k, v or the like, (steps x columns)."""
    return buffer(ring, number).reshape([ring.shape[3], ring.shape[4]])


# same as 04_tfla_triton/mlstm_hopper.py::rows_of
@gluon.jit
def rows_of(walk, number):
    """The eight rows of the number-th tile, each a vector in plain order."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return buffer(walk.rows, number)._reinterpret(gl.float32, [walk.rows.shape[3], walk.rows.shape[4]], layout)


# same as 04_tfla_triton/mlstm_hopper.py::wait_full
@gluon.jit
def wait_full(barriers, number):
    """Until a buffer has what it is to have of the number-th tile."""
    mbarrier.wait(buffer(barriers, number), number // barriers.shape[0] & 1)


# same as 04_tfla_triton/mlstm_hopper.py::wait_empty
@gluon.jit
def wait_empty(barriers, number):
    """Until what the buffer had before the number-th tile is needed no more."""
    mbarrier.wait(buffer(barriers, number), (number // barriers.shape[0] & 1) ^ 1)


# same as 04_tfla_triton/mlstm_hopper.py::arrive
@gluon.jit
def arrive(barriers, number):
    """Says that the number-th tile's buffer is full, or empty."""
    mbarrier.arrive(buffer(barriers, number), count=1)


# same as 04_tfla_triton/mlstm_hopper.py::size_in_bytes
@gluon.constexpr_function
def size_in_bytes(descriptors):
    return sum(descriptor.block_type.nbytes for descriptor in descriptors)


# same as 04_tfla_triton/mlstm_hopper.py::load_partition
@gluon.jit
def load_partition(walk, descriptors, rings, columns, BACKWARD: gl.constexpr):
    """Fills these rings as fast as the other roles empty them. Past the end of the sequence there are zeros.

    columns: the first one of each.
    """
    for number in range(walk.count):
        wait_empty(walk.empty, number)
        full = buffer(walk.full, number)
        mbarrier.expect(full, size_in_bytes(descriptors))
        for x in gl.static_range(len(descriptors)):
            row = tile_at(walk, number, BACKWARD) * descriptors[x].block_type.shape[2]
            place = [walk.batch, walk.head, row, columns[x]]
            tma.async_copy_global_to_shared(descriptors[x], place, full, buffer(rings[x], number))


@gluon.jit
def gates(rows, BACKWARD: gl.constexpr, layout: gl.constexpr):
    """Wr, with steps i as rows and j as columns; backward: Wr^T.

    Either way a document is seen by the row's own bound, so that the columns need one number each: log2 of their part.
    The exponent is masked, not the product: elsewhere it may be huge.
    """
    BLOCK: gl.constexpr = rows.shape[1]
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    own, other = (1, 0) if BACKWARD else (0, 1)
    exponent = rows.index(own).load(gl.SliceLayout(1, layout))[:, None]
    exponent += rows.index(other).load(gl.SliceLayout(0, layout))[None, :]
    bound = rows.index(3 if BACKWARD else 2).load(gl.SliceLayout(1, layout)).to(gl.int32)[:, None]
    if BACKWARD:
        mask = (column >= row) & (column < bound)
    else:
        mask = (column <= row) & (column >= bound)
    return gl.exp2(gl.where(mask, exponent, -float("inf")))


# same as 04_tfla_triton/mlstm_hopper.py::products_of_rows
@gluon.jit
def products_of_rows(walk, a_ring, b_ring, number):
    """Waits for the number-th tile and starts its A B^T."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    wait_full(walk.full, number)
    a, b = matrix(a_ring, number), matrix(b_ring, number)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=layout)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


# same as 04_tfla_triton/mlstm_hopper.py::scores_partition
@gluon.jit
def scores_partition(walk, smem, BACKWARD: gl.constexpr):
    """P = A B^T * Wr (backward: Wr^T) of tile after tile, in bfloat16.

    While the others are told of a tile, the matrix unit has the products of the next.
    """
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    scores = products_of_rows(walk, smem.a, smem.b, 0)
    scores = warpgroup_mma_wait(0, deps=[scores])
    for number in range(walk.count):
        P = scores * gates(rows_of(walk, number), BACKWARD, layout)
        wait_empty(smem.P_empty, number)
        buffer(smem.P, number).store(P.to(gl.bfloat16))
        # Past the last tile, that one once more, which nobody looks at.
        scores = products_of_rows(walk, smem.a, smem.b, gl.minimum(number + 1, walk.count - 1))
        fence_async_shared()
        arrive(smem.P_full, number)
        arrive(walk.empty, number)
        scores = warpgroup_mma_wait(0, deps=[scores])


# same as 04_tfla_triton/mlstm_hopper.py::weighted_keys
@gluon.jit
def weighted_keys(b, weight):
    """The rows of a tile in shared memory times their weights, in bfloat16, in registers."""
    D: gl.constexpr = b.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    weight = weight.load(gl.SliceLayout(1, layout))[:, None]
    return (b.load(layout).to(gl.float32) * weight).to(gl.bfloat16)


# same as 04_tfla_triton/mlstm_hopper.py::load_state
@gluon.jit
def load_state(
    ptr, first_row, first_column, stride_row, stride_column, ROWS, COLUMNS, BR: gl.constexpr, BC: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """A tile (BR x BC) of C or of C^T, in float32; 0 outside of it, or where there is none."""
    if ptr is None:
        return gl.zeros([BR, BC], gl.float32, layout=layout)
    else:
        row = first_row + gl.arange(0, BR, layout=gl.SliceLayout(1, layout))[:, None]
        column = first_column + gl.arange(0, BC, layout=gl.SliceLayout(0, layout))[None, :]
        mask = (row < ROWS) & (column < COLUMNS)
        return gl.load(ptr + row * stride_row + column * stride_column, mask=mask, other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# h and dv
# ---------------------------------------------------------------------------------------------------------------------
# Buffers and barriers of state_times_keys_kernel, beside those of its walk.
KeysBuffers = namedtuple("KeysBuffers", "a b x P weighted y P_full P_empty")


@gluon.jit
def keys_state_partition(
    walk, smem, y_desc, first_ptr, last_ptr, border_ptr, carry_ptr, first_v,
    DQK: gl.constexpr, DHV: gl.constexpr, BORDER: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Keeps a tile of C^T (BV x BK) in registers, where a matrix product can read its left operand."""
    WARPS: gl.constexpr = gl.num_warps()
    BLOCK: gl.constexpr = walk.rows.shape[4]
    BK: gl.constexpr = smem.b.shape[4]
    BV: gl.constexpr = smem.x.shape[4]
    layout_C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BK, 16])
    layout_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout_y, 2)
    READ: gl.constexpr = 6 if BACKWARD else 5  # the rows with the weights for reading from the state,
    WRITE: gl.constexpr = 5 if BACKWARD else 6  # and for adding to it
    C = load_state(first_ptr, first_v, 0, 1, DHV, DHV, DQK, BV, BK, layout_C)
    zero = gl.zeros([BV, BLOCK], gl.float32, layout=layout_y)
    v = first_v + gl.arange(0, BV, layout=gl.SliceLayout(1, layout_C))[:, None]
    k = gl.arange(0, BK, layout=gl.SliceLayout(0, layout_C))[None, :]
    SIZE: gl.constexpr = (DHV + BV - 1) // BV * BV * BK  # of the state with the zeros that fill its tiles
    decay = gl.load(walk.decay_ptr + tile_at(walk, 0, BACKWARD))
    for number in range(walk.count):
        tile = tile_at(walk, number, BACKWARD)
        border = (tile // BORDER - 1) * SIZE + v * BK + k
        if not BACKWARD and tile % BORDER == 0 and tile > 0:
            gl.store(border_ptr + border, C.to(gl.bfloat16))
        C_operand = gl.convert_layout(C.to(gl.bfloat16), operand)
        wait_full(walk.full, number)
        a, b, x = matrix(smem.a, number), matrix(smem.b, number), matrix(smem.x, number).permute((1, 0))
        rows = rows_of(walk, number)

        y = warpgroup_mma(C_operand, a.permute((1, 0)), zero, use_acc=False, is_async=True)  # (BV, BLOCK)
        smem.weighted.store(weighted_keys(b, rows.index(WRITE)))  # while the product runs
        fence_async_shared()
        read = rows.index(READ).load(gl.SliceLayout(0, layout_y))[None, :]
        C = C * decay
        decay = next_decay(walk, number, BACKWARD)
        wait_full(smem.P_full, number)
        y = warpgroup_mma_wait(0, deps=[y])
        y = warpgroup_mma(x, buffer(smem.P, number).permute((1, 0)), y * read, is_async=True)
        C = warpgroup_mma(x, smem.weighted, C, is_async=True)
        y = warpgroup_mma_wait(1, deps=[y])
        tma.store_wait(0)  # the last tile's y has left its buffer
        smem.y.reshape([BLOCK, BV]).permute((1, 0)).store(y.to(gl.bfloat16))
        fence_async_shared()
        C = warpgroup_mma_wait(0, deps=[C])
        arrive(smem.P_empty, number)
        arrive(walk.empty, number)
        tma.async_copy_shared_to_global(y_desc, [walk.batch, walk.head, tile * BLOCK, first_v], smem.y)
        if BACKWARD and tile % BORDER == 0 and tile > 0:
            C_then = gl.load(border_ptr + border).to(gl.float32)
            gl.store(carry_ptr + tile // BORDER, gl.sum(gl.sum(C_then * C, axis=1), axis=0))
    tma.store_wait(0)
    if last_ptr is not None:  # noqa: SIM102, it is decided when this is compiled
        if (walk.first == 0) if BACKWARD else (walk.first + walk.count == walk.NT):
            gl.store(last_ptr + k * DHV + v, C, mask=(v < DHV) & (k < DQK))


@gluon.jit(do_not_specialize=["NT", "SPAN"])  # Triton 3.6 fails on a loop that it knows to be one round
def state_times_keys_kernel(
    a_desc, b_desc, x_desc, y_desc, rows_desc, decay_ptr, first_ptr, last_ptr, border_ptr, carry_ptr,
    NT, NH, BH, SPAN, BACKWARD: gl.constexpr, BLOCK: gl.constexpr, BORDER: gl.constexpr, DQK: gl.constexpr,
    DHV: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr, P_STAGES: gl.constexpr,
):  # fmt: skip
    """Y = read * (A C) + P X, C <- decay C + (write * B)^T X, for BV columns of X and Y.

    Grid: (tiles of DHV) * spans * B * NH.
    first_ptr: the states that the spans start from, or None. last_ptr: the state after the sequence, backward before
    it. border_ptr: C^T at the borders, written forward, read backward. carry_ptr: <C, dC> there, of each program.
    forward     A, B, X, Y = Q, K, V, H: also, for the gates, C^T as every BORDER-th tile but the first finds it,
                (B, NH, borders - 1, DHV, DQK) filled up to whole tiles, in bfloat16
    backward    A, B, X, Y = K, Q, dH, dV, and C is dC: also the tile's part of <C, dC> at these borders
    """
    TILES: gl.constexpr = (DHV + BV - 1) // BV
    tile_v, bh, batch, head_, span, first, count = program_of_span(TILES, NT, NH, SPAN)
    full, empty, rows = new_barriers(STAGES, 1), new_barriers(STAGES, 2), ring(rows_desc, STAGES)
    walk = Walk(batch, head_, first, count, NT, decay_ptr + bh * NT, rows, full, empty)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    smem = KeysBuffers(
        a=ring(a_desc, STAGES),
        b=ring(b_desc, STAGES),
        x=ring(x_desc, STAGES),
        P=gl.allocate_shared_memory(gl.bfloat16, [P_STAGES, BLOCK, BLOCK], swizzled),
        weighted=gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BK], swizzled),
        y=gl.allocate_shared_memory(gl.bfloat16, y_desc.block_type.shape, y_desc.layout),
        P_full=new_barriers(P_STAGES, 1),
        P_empty=new_barriers(P_STAGES, 1),
    )
    fence_async_shared()
    borders = (NT + BORDER - 1) // BORDER
    border_ptr += bh * (borders - 1) * TILES * BV * BK
    if first_ptr is not None:
        first_ptr += span * DQK * DHV
    if last_ptr is not None:
        last_ptr += bh * DQK * DHV
    if carry_ptr is not None:
        carry_ptr += (tile_v * BH + bh) * (borders + 1)
    descriptors, rings = (rows_desc, a_desc, b_desc, x_desc), (walk.rows, smem.a, smem.b, smem.x)
    gl.warp_specialize(
        [
            (
                keys_state_partition,
                (
                    walk, smem, y_desc, first_ptr, last_ptr, border_ptr, carry_ptr, tile_v * BV, DQK, DHV, BORDER,
                    BACKWARD,
                ),
            ),
            (scores_partition, (walk, smem, BACKWARD)),
            (load_partition, (walk, descriptors, rings, (0, 0, 0, tile_v * BV), BACKWARD)),
        ],
        [4, 1],
        [96 if BK + BV == 128 else 112, 24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Wide heads, and the states that spans start from
#
# Heads of d_qk > 128 or d_hv > 256 leave no registers for the scores beside the state. Their walks are walk_kernel's:
# it loads, multiplies with the state and adds to it, but forms no scores. What happens within a tile comes before the
# walk, P for h and dv, in bfloat16, (B, NH, NT * 64, 64), from scores_tile_kernel, or after it, on the products with
# the state in float32: values_tile_kernel, for dq and dk.
# The states that spans start from it finds as well, of heads of any size, and multiplies with none then.
# ---------------------------------------------------------------------------------------------------------------------
# Buffers of walk_kernel, beside those of its walk.
WalkBuffers = namedtuple("WalkBuffers", "a b x P weighted")


# same as 04_tfla_triton/mlstm_hopper.py::walk_state_partition
@gluon.jit
def walk_state_partition(
    walk, smem, first_row, first_column, y_desc, first_ptr, last_ptr, y_ptr, border_ptr, carry_ptr, at_end,
    HALF: gl.constexpr, DQK: gl.constexpr, DHV: gl.constexpr, BORDER: gl.constexpr, SIZE: gl.constexpr,
    BACKWARD: gl.constexpr,
):  # fmt: skip
    """Keeps 64 rows of the state in registers, in pieces of 64 columns, each in turn the left operand of a product.

    All products are transposed: Y is (64 x BLOCK).
    """
    BLOCK: gl.constexpr = walk.rows.shape[4]
    BC: gl.constexpr = smem.b.shape[4]
    PIECES: gl.constexpr = BC // 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    ROWS_ARE_KEYS: gl.constexpr = y_desc is None
    ROWS: gl.constexpr = DQK if ROWS_ARE_KEYS else DHV
    COLUMNS: gl.constexpr = DHV if ROWS_ARE_KEYS else DQK
    stride_row: gl.constexpr = DHV if ROWS_ARE_KEYS else 1
    stride_column: gl.constexpr = 1 if ROWS_ARE_KEYS else DHV
    READ: gl.constexpr = 6 if BACKWARD else 5  # the rows with the weights for reading from the state,
    WRITE: gl.constexpr = 5 if BACKWARD else 6  # and for adding to it
    y = gl.zeros([64, BLOCK], gl.float32, layout=layout)
    first_row += HALF * 64
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]
    # One buffer for two things of a tile: the weighted rows of X, then Y.
    weighted = smem.weighted.index(HALF).reshape([BLOCK, 64])
    C = ()
    for piece in gl.static_range(PIECES):
        C_piece = load_state(
            first_ptr, first_row, first_column + piece * 64, stride_row, stride_column, ROWS, COLUMNS, 64, 64, layout
        )
        C = C + (C_piece,)  # noqa: RUF005, Gluon knows +
    decay = gl.load(walk.decay_ptr + tile_at(walk, 0, BACKWARD))
    for number in range(walk.count):
        tile = tile_at(walk, number, BACKWARD)
        x = matrix(smem.x, number).slice(HALF * 64, 64, dim=1)
        b, rows = matrix(smem.b, number), rows_of(walk, number)
        wait_full(walk.full, number)
        decayed = ()
        for piece in gl.static_range(PIECES):
            decayed = decayed + (C[piece] * decay,)  # noqa: RUF005, Gluon knows +
            if smem.a is not None:
                C_operand = gl.convert_layout(C[piece].to(gl.bfloat16), operand)
                if piece > 0:  # there is no room for more than one operand beside C
                    y = warpgroup_mma_wait(0, deps=[y])
                a = matrix(smem.a, number).slice(piece * 64, 64, dim=1)
                y = warpgroup_mma(C_operand, a.permute((1, 0)), y, use_acc=piece > 0, is_async=True)
        decay = next_decay(walk, number, BACKWARD)
        if y_desc is not None:
            tma.store_wait(0)  # the last tile's Y has left its buffer
        for half in gl.static_range(2):  # of the steps, to need fewer registers at a time
            some = weighted_keys(x.slice(half * 32, 32), rows.index(WRITE).slice(half * 32, 32))
            weighted.slice(half * 32, 32).store(some)
        fence_async_shared()
        y = warpgroup_mma_wait(0, deps=[y])
        C = ()
        for piece in gl.static_range(PIECES):
            b_piece = b.slice(piece * 64, 64, dim=1)
            C = C + (warpgroup_mma(weighted.permute((1, 0)), b_piece, decayed[piece], is_async=True),)  # noqa: RUF005, Gluon knows +
        if y_ptr is not None:
            gl.store(y_ptr + (tile * BLOCK + column) * ROWS + row, y, mask=row < ROWS)
        if smem.P is not None:
            P = matrix(smem.P, number)
            P = P if BACKWARD else P.permute((1, 0))
            y = y * rows.index(READ).load(gl.SliceLayout(0, layout))[None, :]
            y = warpgroup_mma(x.permute((1, 0)), P, y, is_async=True)
        done = warpgroup_mma_wait(0, deps=(y,) + C)  # noqa: RUF005, Gluon knows +
        y, C = done[0], done[1:]
        if y_desc is not None:
            weighted.permute((1, 0)).store(y.to(gl.bfloat16))
            fence_async_shared()
        arrive(walk.empty, number)
        if y_desc is not None:
            place = [walk.batch, walk.head, tile * BLOCK, first_row]
            tma.async_copy_shared_to_global(y_desc, place, smem.weighted.index(HALF))
        if border_ptr is not None and not BACKWARD:  # noqa: SIM102, it is decided when this is compiled
            if (tile + 1) % BORDER == 0 and tile + 1 < walk.NT:
                for piece in gl.static_range(PIECES):
                    border = border_ptr + ((tile + 1) // BORDER - 1) * SIZE + row * BC + piece * 64 + column
                    gl.store(border, C[piece].to(gl.bfloat16))
        if carry_ptr is not None:  # noqa: SIM102, it is decided when this is compiled
            if tile % BORDER == 0 and tile > 0:
                overlap = gl.zeros([64, 64], gl.float32, layout=layout)
                for piece in gl.static_range(PIECES):
                    border = border_ptr + (tile // BORDER - 1) * SIZE + row * BC + piece * 64 + column
                    overlap += gl.load(border).to(gl.float32) * C[piece]
                gl.store(carry_ptr + tile // BORDER, gl.sum(gl.sum(overlap, axis=1), axis=0))
    tma.store_wait(0)
    if last_ptr is not None:  # noqa: SIM102, it is decided when this is compiled
        if at_end:
            for piece in gl.static_range(PIECES):
                k = first_column + piece * 64 + column
                mask = (row < ROWS) & (k < COLUMNS)
                gl.store(last_ptr + row * stride_row + k * stride_column, C[piece], mask=mask)


# same as 04_tfla_triton/mlstm_hopper.py::walk_second_half_partition
@gluon.jit
def walk_second_half_partition(
    walk, smem, first_row, first_column, y_desc, first_ptr, last_ptr, y_ptr, border_ptr, carry_ptr, at_end,
    DQK: gl.constexpr, DHV: gl.constexpr, BORDER: gl.constexpr, SIZE: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """A state of at most 64 rows has none."""
    if smem.weighted.shape[0] > 1:
        walk_state_partition(
            walk, smem, first_row, first_column, y_desc, first_ptr, last_ptr, y_ptr, border_ptr, carry_ptr, at_end,
            1, DQK, DHV, BORDER, SIZE, BACKWARD,
        )  # fmt: skip


# same as 04_tfla_triton/mlstm_hopper.py::walk_kernel
@gluon.jit(do_not_specialize=["NT", "SPAN", "SPANS", "FIRST_SPAN"])  # Triton 3.6 fails on a loop known to be one round
def walk_kernel(
    a_desc, b_desc, x_desc, P_desc, y_desc, rows_desc, decay_ptr, first_ptr, last_ptr, y_ptr, border_ptr, carry_ptr,
    weights_ptr, NT, NH, BH, SPAN, SPANS, FIRST_SPAN,
    BACKWARD: gl.constexpr, BLOCK: gl.constexpr, BORDER: gl.constexpr, DQK: gl.constexpr, DHV: gl.constexpr,
    BR: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A walk that keeps BR x BC of the state, 64 rows in each of one or two warpgroups, and forms no scores.

    y_desc      Y = read * (A C) + P X, C <- decay C + B^T (write * X), with P from memory, of heads that are too wide
                for state_times_keys_kernel: A, B, X, Y as there, but X is weighted, of which a program has less.
                The rows it keeps are those of C^T.
    y_ptr       Y = A C^T alone, in float32, (tiles of columns, B * NH, NT, BLOCK, DQK), C <- decay C + (write * X)^T B:
                A, B, X = dH, V, K for dq, and with dC for C, backward, V, dH, Q for dk.
    neither     C alone, where each span ends whose weight is not 0. Here the spans are the pieces of spans.
    Grid: (tiles of the state) * SPANS * B * NH.
    """
    # The rows of the state in registers are those of d_qk, or with y_desc of d_hv. A launch has SPANS of a head's
    # `spans` spans, from FIRST_SPAN on. A piece whose weight is 0 is not walked along: its count is 0. at_end: whether
    # the state is to be written, of pieces always, else where the sequence ends.
    ROWS_ARE_KEYS: gl.constexpr = y_desc is None
    ROWS: gl.constexpr = DQK if ROWS_ARE_KEYS else DHV
    COLUMNS: gl.constexpr = DHV if ROWS_ARE_KEYS else DQK
    TILES_R: gl.constexpr = (ROWS + BR - 1) // BR
    TILES_C: gl.constexpr = (COLUMNS + BC - 1) // BC
    HALVES: gl.constexpr = BR // 64
    SIZE: gl.constexpr = TILES_R * BR * BC
    tile, program = gl.program_id(0) % (TILES_R * TILES_C), gl.program_id(0) // (TILES_R * TILES_C)
    tile_r, tile_c = tile // TILES_C, tile % TILES_C
    first_row, first_column = tile_r * BR, tile_c * BC
    bh, span = (program // SPANS).to(gl.int64), FIRST_SPAN + program % SPANS
    batch, head_ = (bh // NH).to(gl.int32), (bh % NH).to(gl.int32)
    first, spans, borders = span * SPAN, (NT + SPAN - 1) // SPAN, (NT + BORDER - 1) // BORDER
    count = gl.minimum(SPAN, NT - first)
    if weights_ptr is not None:
        count = gl.where(gl.load(weights_ptr + bh * spans + span) != 0.0, count, 0)
    if ROWS_ARE_KEYS:
        at_end = count > 0
    else:
        at_end = (first == 0) if BACKWARD else (first + count == NT)

    full, empty, rows = new_barriers(STAGES, 1), new_barriers(STAGES, HALVES), ring(rows_desc, STAGES)
    walk = Walk(batch, head_, first, count, NT, decay_ptr + bh * NT, rows, full, empty)
    b_smem, x_smem = ring(b_desc, STAGES), ring(x_desc, STAGES)
    descriptors, rings, columns = (rows_desc, b_desc, x_desc), (rows, b_smem, x_smem), (0, first_column, first_row)
    if a_desc is None:
        a_smem: gl.constexpr = None
    else:
        a_smem = ring(a_desc, STAGES)
        descriptors, rings, columns = descriptors + (a_desc,), rings + (a_smem,), columns + (first_column,)  # noqa: RUF005
    if P_desc is None:
        P_smem: gl.constexpr = None
    else:
        P_smem = ring(P_desc, STAGES)
        descriptors, rings, columns = descriptors + (P_desc,), rings + (P_smem,), columns + (0,)  # noqa: RUF005
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 4)
    weighted_smem = gl.allocate_shared_memory(gl.bfloat16, [HALVES, 1, 1, BLOCK, 64], swizzled)
    smem = WalkBuffers(a_smem, b_smem, x_smem, P_smem, weighted_smem)
    fence_async_shared()
    if first_ptr is not None:
        first_ptr += (bh * spans + span) * DQK * DHV
    if last_ptr is not None:
        last_ptr += ((bh * spans + span) if ROWS_ARE_KEYS else bh) * DQK * DHV
    if y_ptr is not None:
        y_ptr += (tile_c * BH + bh) * NT * DQK * BLOCK
    if border_ptr is not None:
        border_ptr += bh * (borders - 1) * SIZE
    if carry_ptr is None:
        second_carry_ptr: gl.constexpr = None
    else:
        carry_ptr += (tile_r * HALVES * BH + bh) * (borders + 1)
        second_carry_ptr = carry_ptr + BH * (borders + 1)
    gl.warp_specialize(
        [
            (
                walk_state_partition,
                (
                    walk, smem, first_row, first_column, y_desc, first_ptr, last_ptr, y_ptr, border_ptr, carry_ptr,
                    at_end, 0, DQK, DHV, BORDER, SIZE, BACKWARD,
                ),
            ),
            (
                walk_second_half_partition,
                (
                    walk, smem, first_row, first_column, y_desc, first_ptr, last_ptr, y_ptr, border_ptr,
                    second_carry_ptr, at_end, DQK, DHV, BORDER, SIZE, BACKWARD,
                ),
            ),
            (load_partition, (walk, descriptors, rings, columns, BACKWARD)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# dq and dk
# ---------------------------------------------------------------------------------------------------------------------
# Buffers and barriers of state_times_values_kernel, beside those of its walk.
ValuesBuffers = namedtuple("ValuesBuffers", "a b x own P weighted C y P_full P_empty")


@gluon.jit
def values_state_partition(
    walk, smem, y_desc, state_ptr, first_ptr, first_k, T, DQK: gl.constexpr, DHV: gl.constexpr, BACKWARD: gl.constexpr
):  # fmt: skip
    """Keeps a tile of C^T (BV x BK) in registers and puts it into shared memory anew for each product with it."""
    WARPS: gl.constexpr = gl.num_warps()
    BLOCK: gl.constexpr = walk.rows.shape[4]
    BV: gl.constexpr = smem.C.shape[0]
    BK: gl.constexpr = smem.C.shape[1]
    layout_C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BK, 16])
    layout_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, BK * 4 // WARPS, 16])
    READ: gl.constexpr = 6 if BACKWARD else 5
    WRITE: gl.constexpr = 5 if BACKWARD else 6
    C = load_state(first_ptr, 0, first_k, 1, DHV, DHV, DQK, BV, BK, layout_C)
    zero = gl.zeros([BLOCK, BK], gl.float32, layout=layout_y)
    offs_l = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout_y))
    for number in range(walk.count):
        tile = tile_at(walk, number, BACKWARD)
        decay = gl.load(walk.decay_ptr + tile)
        smem.C.store(C.to(gl.bfloat16))
        wait_full(walk.full, number)
        a, b, x, own = matrix(smem.a, number), matrix(smem.b, number), matrix(smem.x, number), matrix(smem.own, number)
        rows = rows_of(walk, number)
        smem.weighted.store(weighted_keys(b, rows.index(WRITE)))
        fence_async_shared()
        C = C * decay
        read = rows.index(READ).load(gl.SliceLayout(1, layout_y))[:, None]

        y = warpgroup_mma(a, smem.C, zero, use_acc=False, is_async=True)  # (BLOCK, BK)
        C = warpgroup_mma(x.permute((1, 0)), smem.weighted, C, is_async=True)
        wait_full(smem.P_full, number)
        y = warpgroup_mma_wait(1, deps=[y]) * read
        own_y = own.load(layout_y).to(gl.float32) * y
        y = warpgroup_mma(buffer(smem.P, number), b, y, is_async=True)
        offs_t = tile * BLOCK + offs_l
        gl.store(state_ptr + offs_t, gl.sum(own_y, axis=1), mask=offs_t < T)  # the state's part of q . dq or k . dk
        y, C = warpgroup_mma_wait(0, deps=[y, C])
        tma.store_wait(0)
        smem.y.reshape([BLOCK, BK]).store(y.to(gl.bfloat16))
        fence_async_shared()
        arrive(smem.P_empty, number)
        arrive(walk.empty, number)
        tma.async_copy_shared_to_global(y_desc, [walk.batch, walk.head, tile * BLOCK, first_k], smem.y)
    tma.store_wait(0)


@gluon.jit
def values_scores_partition(walk, smem, tile_ptr, T, BACKWARD: gl.constexpr):
    """P = A X^T * Wr (backward: Wr^T) of tile after tile; the row sums of P * (own B^T), before P is rounded."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=layout)
    offs_l = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    for number in range(walk.count):
        dP = products_of_rows(walk, smem.a, smem.x, number)
        P = warpgroup_mma_wait(0, deps=[dP]) * gates(rows_of(walk, number), BACKWARD, layout)
        wait_empty(smem.P_empty, number)
        buffer(smem.P, number).store(P.to(gl.bfloat16))
        fence_async_shared()
        arrive(smem.P_full, number)
        own, b = matrix(smem.own, number), matrix(smem.b, number)
        scores = warpgroup_mma(own, b.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        offs_t = tile_at(walk, number, BACKWARD) * BLOCK + offs_l
        gl.store(tile_ptr + offs_t, gl.sum(P * scores, axis=1), mask=offs_t < T)
        arrive(walk.empty, number)


@gluon.jit(do_not_specialize=["NT", "SPAN"])  # Triton 3.6 fails on a loop that it knows to be one round
def state_times_values_kernel(
    a_desc, b_desc, x_desc, own_desc, y_desc, rows_desc, tile_ptr, state_ptr, decay_ptr, first_ptr,
    T, NT, NH, BH, SPAN, BACKWARD: gl.constexpr, BLOCK: gl.constexpr, DQK: gl.constexpr, DHV: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Y = read * (A C^T) + P B, C <- decay C + (write * B)^T X, P = A X^T * Wr, for BK columns of B and Y.

    Grid: (tiles of DQK) * spans * B * NH.
    forward     A, B, X, Y, own = dH, K, V, dQ, Q
    backward    A, B, X, Y, own = V, Q, dH, dK, K, and C is dC
    Also, for the gates, q . dq or k . dk in two parts: the tile's, the row sums of P * Q K^T, and the state's.
    """
    TILES: gl.constexpr = (DQK + BK - 1) // BK
    tile_k, bh, batch, head_, span, first, count = program_of_span(TILES, NT, NH, SPAN)
    full, empty, rows = new_barriers(STAGES, 1), new_barriers(STAGES, 2), ring(rows_desc, STAGES)
    walk = Walk(batch, head_, first, count, NT, decay_ptr + bh * NT, rows, full, empty)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    smem = ValuesBuffers(
        a=ring(a_desc, STAGES),
        b=ring(b_desc, STAGES),
        x=ring(x_desc, STAGES),
        own=ring(own_desc, STAGES),
        P=gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK, BLOCK], swizzled),
        weighted=gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BK], swizzled),
        C=gl.allocate_shared_memory(gl.bfloat16, [BV, BK], swizzled),
        y=gl.allocate_shared_memory(gl.bfloat16, y_desc.block_type.shape, y_desc.layout),
        P_full=new_barriers(1, 1),
        P_empty=new_barriers(1, 1),
    )
    fence_async_shared()
    if first_ptr is not None:
        first_ptr += span * DQK * DHV
    first_k, offs = tile_k * BK, (tile_k * BH + bh) * T
    descriptors = (rows_desc, a_desc, b_desc, x_desc, own_desc)
    rings = (walk.rows, smem.a, smem.b, smem.x, smem.own)
    gl.warp_specialize(
        [
            (values_state_partition, (walk, smem, y_desc, state_ptr + offs, first_ptr, first_k, T, DQK, DHV, BACKWARD)),
            (values_scores_partition, (walk, smem, tile_ptr + offs, T, BACKWARD)),
            (load_partition, (walk, descriptors, rings, (0, 0, first_k, 0, first_k), BACKWARD)),
        ],
        [4, 1],
        [136, 24],
    )


# ---------------------------------------------------------------------------------------------------------------------
# What happens within the tiles of wide heads, in plain Triton
# ---------------------------------------------------------------------------------------------------------------------
# same as 04_tfla_triton/mlstm_hopper.py::load_part
@triton.jit
def load_part(x_ptr, stride_t, offs_t, T, first, D, PART: tl.constexpr):
    """Some columns of a tile of x (.., T, D), 0 outside of it."""
    columns = first + tl.arange(0, PART)[None, :]
    mask = (offs_t < T)[:, None] & (columns < D)
    return tl.load(x_ptr + offs_t[:, None] * stride_t + columns, mask=mask, other=0.0)


# same as 04_tfla_triton/mlstm_hopper.py::load_sum
@triton.jit
def load_sum(y_ptr, stride_part, offs_l, first, D, PARTS: tl.constexpr, PART: tl.constexpr):
    """Some columns of what the walks left of a tile, (BLOCK x D), summed up over the walks' tiles of columns."""
    columns = first + tl.arange(0, PART)[None, :]
    y_ptr += offs_l[:, None] * D + columns
    y = tl.load(y_ptr, mask=columns < D, other=0.0)
    for part in tl.static_range(1, PARTS):
        y += tl.load(y_ptr + part * stride_part, mask=columns < D, other=0.0)
    return y


# same as 04_tfla_triton/mlstm_hopper.py::products
@triton.jit
def products(a_ptr, b_ptr, stride_at, stride_bt, offs_t, T, D, BLOCK: tl.constexpr, PART: tl.constexpr):
    """A B^T of a tile."""
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(0, D, PART):
        a = load_part(a_ptr, stride_at, offs_t, T, first, D, PART)
        b = load_part(b_ptr, stride_bt, offs_t, T, first, D, PART)
        acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def tile_weights(rows_ptr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """As `gates`."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    own, other, bounds = (1, 0, 3) if BACKWARD else (0, 1, 2)
    log_w = tl.load(rows_ptr + own * BLOCK + i) + tl.load(rows_ptr + other * BLOCK + j)
    bound = tl.load(rows_ptr + bounds * BLOCK + i).to(tl.int32)
    if BACKWARD:
        mask = (j >= i) & (j < bound)
    else:
        mask = (j <= i) & (j >= bound)
    return tl.exp2(tl.where(mask, log_w, -float("inf")))


@triton.jit
def scores_tile_kernel(
    q_ptr, k_ptr, rows_ptr, P_ptr, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    T, NT, NH, DQK, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """P = Q K^T * Wr, with zeros past T. Grid: NT * B * NH."""
    bh, tile = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    offs_l = tl.arange(0, BLOCK)
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    P = products(q_ptr, k_ptr, stride_qt, stride_kt, offs_t, T, DQK, BLOCK, PART)
    P = P * tile_weights(rows_ptr + (bh * NT + tile) * 8 * BLOCK, False, BLOCK)
    P_ptr += (bh * NT + tile) * BLOCK * BLOCK + offs_l[:, None] * BLOCK + offs_l[None, :]
    tl.store(P_ptr, P.to(P_ptr.dtype.element_ty))


@triton.jit
def values_tile_kernel(
    a_ptr, b_ptr, x_ptr, own_ptr, y_ptr, rows_ptr, out_ptr, tile_ptr, state_ptr,
    stride_ab, stride_ah, stride_at, stride_bb, stride_bh, stride_bt, stride_xb, stride_xh, stride_xt,
    stride_ownb, stride_ownh, stride_ownt, stride_outb, stride_outh, stride_outt,
    T, NT, NH, stride_part, DQK: tl.constexpr, DHV, PARTS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """read * Y + P B, with P = A X^T * Wr (backward: Wr^T) and Y = A C^T, as state_times_values_kernel: dq or dk.

    Also q . dq or k . dk in two parts. Grid: NT * B * NH.
    """
    bh, tile = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    offs_l = tl.arange(0, BLOCK)
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    a_ptr, x_ptr = head(a_ptr, bh, NH, stride_ab, stride_ah), head(x_ptr, bh, NH, stride_xb, stride_xh)
    b_ptr, own_ptr = head(b_ptr, bh, NH, stride_bb, stride_bh), head(own_ptr, bh, NH, stride_ownb, stride_ownh)
    out_ptr = head(out_ptr, bh, NH, stride_outb, stride_outh) + offs_t[:, None] * stride_outt
    rows_ptr, y_ptr = rows_ptr + (bh * NT + tile) * 8 * BLOCK, y_ptr + (bh * NT + tile) * BLOCK * DQK
    READ: tl.constexpr = 6 if BACKWARD else 5
    read = tl.load(rows_ptr + READ * BLOCK + offs_l)

    P = products(a_ptr, x_ptr, stride_at, stride_xt, offs_t, T, DHV, BLOCK, PART)
    P = P * tile_weights(rows_ptr, BACKWARD, BLOCK)
    scores = products(own_ptr, b_ptr, stride_ownt, stride_bt, offs_t, T, DQK, BLOCK, PART)
    tl.store(tile_ptr + bh * T + offs_t, tl.sum(P * scores, axis=1), mask=offs_t < T)
    P, own_y = P.to(b_ptr.dtype.element_ty), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, DQK, PART):  # all of d_qk is more than registers can hold
        offs_k = first + tl.arange(0, PART)[None, :]
        y = load_sum(y_ptr, stride_part, offs_l, first, DQK, PARTS, PART) * read[:, None]
        own_y += tl.sum(load_part(own_ptr, stride_ownt, offs_t, T, first, DQK, PART).to(tl.float32) * y, axis=1)
        out = tl.dot(P, load_part(b_ptr, stride_bt, offs_t, T, first, DQK, PART), y)
        tl.store(out_ptr + offs_k, out.to(out_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_k < DQK))
    tl.store(state_ptr + bh * T + offs_t, own_y, mask=offs_t < T)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the gates
# ---------------------------------------------------------------------------------------------------------------------
# same as 05_mlstmsig/mlstmsig_tfla.py::sigmoid_minus
@triton.jit
def sigmoid_minus(x):
    """sigmoid(-x) = d log sigmoid(x) / dx, with all its digits where it is small."""
    return tl.exp(tl.minimum(-x, 0.0)) / (1.0 + tl.exp(-tl.abs(x)))


# same as 04_tfla_triton/mlstm_hopper.py::one_after_the_other
@triton.jit
def one_after_the_other(a_1, b_1, a_2, b_2):
    """Of two maps x -> a x + b: the second one of what the first one gives."""
    return a_1 * a_2, a_2 * b_1 + b_2


@triton.jit
def dgates_kernel(
    i_ptr, f_ptr, decay_ptr, q_dq_tile_ptr, q_dq_state_ptr, k_dk_tile_ptr, k_dk_state_ptr, carry_ptr, di_ptr, df_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    stride_dib, stride_dih, stride_dit, stride_dfb, stride_dfh, stride_dft,
    T, NT, NH, BH, TILES_K, TILES_V, BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """di and df of the tiles from one border to the next. Grid: borders * B * NH.

    di_bar is k . dk. f_t weakens everything that crosses step t, so df_bar_t is the sum over all that does. In a tile:
      state before the tile, k_j v_j with j < t -> h_r with r >= t      sum over r >= t of to_h = q . dq - k . dk's part
                                                                        from the tile itself
      k_j v_j with j < t -> state after the tile                        sum over j < t of to_state, k . dk's state part
      state before -> state after                                       pass
    as in mlstmsig_tfla.py. But there pass = decay <C, dC> is known for every chunk; here C and dC meet at the borders
    alone. <C, dC> where a tile begins is pass + all of to_h, where it ends pass + all of to_state: so pass is
    found tile by tile from the border before, and again from the border behind. Either way gathers what C and dC lose
    in bfloat16, and the two are weighted by the squares of what they summed up. What is found where next to nothing
    passes (decay far below 2^-10, half of bfloat16's last digit) is such loss alone, and left out.
    """
    borders = tl.cdiv(NT, BORDER)
    bh, c = (tl.program_id(0) // borders).to(tl.int64), tl.program_id(0) % borders
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    di_ptr, df_ptr = head(di_ptr, bh, NH, stride_dib, stride_dih), head(df_ptr, bh, NH, stride_dfb, stride_dfh)
    tile = c * BORDER + tl.arange(0, BORDER)
    offs_t = (tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)  # (BORDER, BLOCK)
    mask = offs_t < T

    to_h, to_state = tl.zeros((BORDER, BLOCK), dtype=tl.float32), tl.zeros((BORDER, BLOCK), dtype=tl.float32)
    di_bar = tl.zeros((BORDER, BLOCK), dtype=tl.float32)
    for tile_k in range(TILES_K):
        offs = (tile_k * BH + bh) * T + offs_t
        to_h += tl.load(q_dq_state_ptr + offs, mask=mask, other=0.0)
        to_h += tl.load(q_dq_tile_ptr + offs, mask=mask, other=0.0)
        k_dk_tile = tl.load(k_dk_tile_ptr + offs, mask=mask, other=0.0)
        to_h, di_bar = to_h - k_dk_tile, di_bar + k_dk_tile
        to_state += tl.load(k_dk_state_ptr + offs, mask=mask, other=0.0)
    di_bar += to_state
    before, after = tl.full((), 0.0, dtype=tl.float32), tl.full((), 0.0, dtype=tl.float32)
    for tile_v in range(TILES_V):
        carry = carry_ptr + (tile_v * BH + bh) * (borders + 1) + c
        before, after = before + tl.load(carry), after + tl.load(carry + 1)

    decay = tl.load(decay_ptr + bh * NT + tile, mask=tile < NT, other=1.0)
    keep = tl.where(tile < NT, decay * decay / (decay * decay + 2.0**-20), 1.0)  # past T everything passes
    all_h, all_state = tl.sum(to_h, axis=1), tl.sum(to_state, axis=1)
    a, b = tl.associative_scan((keep, all_state - keep * all_h), 0, one_after_the_other)
    from_before = a * before + b - all_state
    a, b = tl.associative_scan((keep, all_h - keep * all_state), 0, one_after_the_other, reverse=True)
    from_after = a * after + b - all_h
    # Of a pass found from before: what was summed up in the tiles before, and to_h of the tile. Likewise from behind.
    squares = all_h * all_h + all_state * all_state
    error_before = tl.cumsum(squares, 0) - squares + all_h * all_h
    error_after = tl.cumsum(squares, 0, reverse=True) - squares + all_state * all_state
    both = error_before + error_after
    passing = from_after + (from_before - from_after) * (error_after / tl.where(both > 0.0, both, 1.0))

    # The sums over r >= t are formed from the end: where there is no gradient any more, df is exactly 0.
    df_bar = passing[:, None] + tl.cumsum(to_h, 1, reverse=True) + (tl.cumsum(to_state, 1) - to_state)
    i = tl.load(i_ptr + offs_t * stride_it, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(f_ptr + offs_t * stride_ft, mask=mask, other=0.0).to(tl.float32)
    df = tl.where(f == -float("inf"), 0.0, df_bar * sigmoid_minus(f))
    tl.store(di_ptr + offs_t * stride_dit, (di_bar * sigmoid_minus(i)).to(di_ptr.dtype.element_ty), mask=mask)
    tl.store(df_ptr + offs_t * stride_dft, df.to(df_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------
# A launch takes the CPU about as long as the smallest kernels take the GPU, so a few things here are done once, or
# without the functions that Triton has for them: layouts, descriptors, rounding up.
LAYOUTS = {torch.bfloat16: gl.NVMMASharedLayout(128, 16, 4), torch.float32: gl.NVMMASharedLayout(0, 32, 4)}


# same as 04_tfla_triton/mlstm_hopper.py::ceil_div
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# same as 04_tfla_triton/mlstm_hopper.py::power_of_2
def power_of_2(D: int) -> int:
    """The smallest one that D fits into."""
    return 1 << (D - 1).bit_length()


# same as 04_tfla_triton/mlstm_hopper.py::describe
def describe(x: Tensor, columns: int, number: int = BLOCK) -> TensorDescriptor:
    """x (B, NH, .., D) as the copy engine reads and writes it: of a tile `number` rows, some columns of them."""
    return TensorDescriptor(x, x.shape, x.stride(), [1, 1, number, columns], LAYOUTS[x.dtype])


# same as 04_tfla_triton/mlstm_hopper.py::copy_engine_reads
def copy_engine_reads(x: Tensor) -> bool:
    """It wants multiples of 16 bytes from one row, head and sequence to the next."""
    strides = zip(x.stride()[:-1], x.shape[:-1], strict=True)
    return x.stride(-1) == 1 and all(s % 8 == 0 and (s > 0 or size == 1) for s, size in strides)


# same as 04_tfla_triton/mlstm_hopper.py::is_wide
def is_wide(DQK: int, DHV: int) -> bool:
    """Whether the state leaves no registers for the scores, so that walk_kernel and the tiles' kernels take over."""
    return DQK > 128 or DHV > 256


# Registers of each thread, on average, with which two programs of small heads fit into a multiprocessor: while one of
# them starts or ends, the other goes on.
HALF = 80


# same as 04_tfla_triton/mlstm_hopper.py::keys_options
def keys_options(DQK: int, DHV: int) -> dict:
    """Tiles and warps of state_times_keys_kernel. The state takes half of a program's registers.

    Of the smallest tiles, two programs share the multiprocessor's memory, too.
    """
    BK, BV = 128 if DQK > 64 else 64, 128 if DHV > 64 else 64
    small = max(BK, BV) == 64
    return {
        "BLOCK": BLOCK, "BORDER": BORDER, "DQK": DQK, "DHV": DHV, "BK": BK, "BV": BV, "STAGES": 3,
        "P_STAGES": 1 if small else 2, "num_warps": BV // 16, "maxnreg": HALF if small else None,
    }  # fmt: skip


# same as 04_tfla_triton/mlstm_hopper.py::walk_options
def walk_options(ROWS: int, COLUMNS: int, DQK: int, DHV: int, most: int = 2) -> dict:
    """Tiles of walk_kernel. most: stages that fit into shared memory where a tile has 256 columns."""
    BC = max(64, min(256, power_of_2(COLUMNS)))
    return {
        "BLOCK": BLOCK, "BORDER": BORDER, "DQK": DQK, "DHV": DHV, "BR": 128 if ROWS > 64 else 64, "BC": BC,
        "STAGES": most if BC == 256 else most + 1, "num_warps": 4,
    }  # fmt: skip


# same as 04_tfla_triton/mlstm_hopper.py::keys_tile
def keys_tile(DQK: int, DHV: int) -> tuple[int, int]:
    """Columns of d_hv and of d_qk in a program that computes h or dv."""
    if is_wide(DQK, DHV):
        o = walk_options(DHV, DQK, DQK, DHV)
        return o["BR"], o["BC"]
    o = keys_options(DQK, DHV)
    return o["BV"], o["BK"]


# Columns at a time, warps and stages where a program has a tile of wide heads.
TILE = {"PART": 64, "num_warps": 4, "num_stages": 3}


# same as 04_tfla_triton/mlstm_hopper.py::values_options
def values_options(DQK: int, DHV: int) -> dict:
    """Tiles and warps where a program has 64 columns of d_qk. More stages do not fit into shared memory."""
    BV = max(64, power_of_2(DHV))
    return {"BLOCK": BLOCK, "DQK": DQK, "DHV": DHV, "BK": 64, "BV": BV, "STAGES": 2, "num_warps": 4}


# same as 04_tfla_triton/mlstm_hopper.py::span_of
def span_of(q: Tensor, NT: int, tiles: int, grain: int = GRAIN) -> int:
    """Tiles in a span: the whole sequence, or less of it where multiprocessors would stay without a program."""
    if q.device.type == "meta":
        return NT
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    spans = max(1, programs // (tiles * q.shape[0] * q.shape[1]))
    return min(NT, ceil_div(ceil_div(NT, spans), grain) * grain)


# same as 04_tfla_triton/mlstm_hopper.py::starts_of_spans
def starts_of_spans(
    k: Tensor, v: Tensor, rows: Tensor, decay: Tensor, first: Tensor | None, SPAN: int, *, backward: bool
) -> Tensor | None:
    """The states C that the spans start from, (B, NH, spans, DQK, DHV); backward: dC where they end, of q and dh.

    For that each span is cut into pieces, up to eight, and what they add is computed for all of them at once, but for
    those that are forgotten before it matters.
    """
    (B, NH, T, DQK), DHV = k.shape, v.shape[-1]
    NT, PIECE = ceil_div(T, BLOCK), max(GRAIN, SPAN // 8)
    SPANS, PIECES, PER_SPAN = ceil_div(NT, SPAN), ceil_div(NT, PIECE), SPAN // PIECE
    if SPANS == 1:
        return first

    def empty(*shape: int) -> Tensor:
        return torch.empty(B, NH, *shape, dtype=torch.float32, device=k.device)

    C, decays, weights, starts = empty(PIECES, DQK, DHV), empty(PIECES), empty(PIECES), empty(SPANS, DQK, DHV)
    pieces_kernel[(SPANS, B * NH)](
        decay, decays, weights, NT, PIECE, PER_SPAN, backward, power_of_2(PER_SPAN), power_of_2(PIECE), num_warps=1
    )
    # The last span's pieces, backward the first one's, are not asked for.
    needed, p = PIECES - PER_SPAN if backward else (SPANS - 1) * PER_SPAN, walk_options(DQK, DHV, DQK, DHV, most=4)
    tiles = ceil_div(DQK, p["BR"]) * ceil_div(DHV, p["BC"])
    walk_kernel[(tiles * needed * B * NH,)](
        None, describe(v, p["BC"]), describe(k, p["BR"]), None, None, describe(rows, BLOCK, 8), decay, None, C,
        None, None, None, weights, NT, NH, B * NH, PIECE, needed, PER_SPAN if backward else 0,
        BACKWARD=backward, **p,
    )  # fmt: skip
    starts_kernel[(ceil_div(DQK * DHV, 1024), B * NH)](
        C, decays, weights, first, starts, PIECES, PER_SPAN, DQK * DHV, backward, 1024, num_warps=4
    )
    return starts


# same as 04_tfla_triton/mlstm_hopper.py::walk_along_keys
def walk_along_keys(
    a: Tensor, b: Tensor, x: Tensor, y: Tensor, P: Tensor, rows: Tensor, decay: Tensor, starts: Tensor | None,
    last: Tensor | None, borders: Tensor, carry: Tensor | None, SPAN: int, *, backward: bool,
) -> None:  # fmt: skip
    """Y = h or dv of wide heads."""
    (B, NH, T, DQK), DHV = a.shape, x.shape[-1]
    BH, NT, o = B * NH, ceil_div(T, BLOCK), walk_options(DHV, DQK, DQK, DHV)
    SPANS = ceil_div(NT, SPAN)
    walk_kernel[(ceil_div(DHV, o["BR"]) * SPANS * BH,)](
        describe(a, o["BC"]), describe(b, o["BC"]), describe(x, o["BR"]), describe(P, BLOCK), describe(y, 64),
        describe(rows, BLOCK, 8), decay, starts, last, None, borders, carry,
        None, NT, NH, BH, SPAN, SPANS, 0, BACKWARD=backward, **o,
    )  # fmt: skip


# same as 04_tfla_triton/mlstm_hopper.py::walk_along_values
def walk_along_values(
    a: Tensor, b: Tensor, x: Tensor, rows: Tensor, decay: Tensor, starts: Tensor | None, SPAN: int, *, backward: bool
) -> Tensor:
    """A times the state, in float32 and parts to be added, (parts, B * NH, NT, BLOCK, DQK), for dq or dk."""
    (B, NH, T, DHV), DQK = a.shape, x.shape[-1]
    BH, NT, o = B * NH, ceil_div(T, BLOCK), walk_options(DQK, DHV, DQK, DHV)
    parts, SPANS = ceil_div(DHV, o["BC"]), ceil_div(NT, SPAN)
    y = torch.empty(parts, BH, NT, BLOCK, DQK, dtype=torch.float32, device=a.device)
    walk_kernel[(ceil_div(DQK, o["BR"]) * parts * SPANS * BH,)](
        describe(a, o["BC"]), describe(b, o["BC"]), describe(x, o["BR"]), None, None, describe(rows, BLOCK, 8),
        decay, starts, None, y, None, None, None, NT, NH, BH, SPAN, SPANS, 0, BACKWARD=backward, **o,
    )  # fmt: skip
    return y


def saved_shapes(q: Tensor, v: Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the forward pass keeps: rows, decay, C^T at the borders, in whole tiles; of wide heads P
    too."""
    (B, NH, T, DQK), DHV = q.shape, v.shape[-1]
    NT, BV, BK = (T + BLOCK - 1) // BLOCK, *keys_tile(DQK, DHV)
    whole = (DHV + BV - 1) // BV * BV, BK
    return [
        ((B, NH, NT * 8, BLOCK), torch.float32), ((B, NH, NT), torch.float32),
        ((B, NH, max(NT - 1, 0) // BORDER, *whole), torch.bfloat16),
        ((B, NH, NT * BLOCK if is_wide(DQK, DHV) else 0, BLOCK), torch.bfloat16),
    ]  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C_0: Tensor | None, return_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the final state if it is asked for, and what the backward pass will need."""
    _check_device(q, k, v)
    (B, NH, T, DQK), DHV = q.shape, v.shape[-1]
    BH, NT = B * NH, ceil_div(T, BLOCK)
    h, C_0 = torch.empty_like(v), None if C_0 is None else C_0.contiguous()
    saved = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in saved_shapes(q, v)]
    if h.numel() == 0:
        return h, *(_empty_state(q, v) if C_0 is None else [C_0.clone()]), *saved
    C_T = torch.empty(B, NH, DQK, DHV, dtype=torch.float32, device=q.device) if return_state else None
    rows, decay, borders, P = saved
    rows_kernel[(ceil_div(NT, 8) * BH,)](
        i, f, rows, decay, *i.stride(), *f.stride(), T, NT, NH, DQK**-0.5, BLOCK, 8, num_warps=4
    )
    tiles = ceil_div(DHV, keys_tile(DQK, DHV)[0])
    SPAN = span_of(q, NT, tiles)
    starts = starts_of_spans(k, v, rows, decay, C_0, SPAN, backward=False)
    if is_wide(DQK, DHV):
        scores_tile_kernel[(NT * BH,)](q, k, rows, P, *q.stride()[:3], *k.stride()[:3], T, NT, NH, DQK, BLOCK, **TILE)
        walk_along_keys(q, k, v, h, P, rows, decay, starts, C_T, borders, None, SPAN, backward=False)
    else:
        o = keys_options(DQK, DHV)
        keys, values = (lambda x: describe(x, o["BK"])), (lambda x: describe(x, o["BV"]))
        state_times_keys_kernel[(tiles * ceil_div(NT, SPAN) * BH,)](
            keys(q), keys(k), values(v), values(h), describe(rows, BLOCK, 8), decay, starts, C_T, borders, None,
            NT, NH, BH, SPAN, BACKWARD=False, **o,
        )  # fmt: skip
    return h, *((C_T,) if return_state else _no_state(q)), *saved


def launch_backward(
    dh: Tensor, dC_T: Tensor | None, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C_0: Tensor | None,
    C_T: Tensor, rows: Tensor, decay: Tensor, borders: Tensor, P: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, di, df, dC_0."""
    (B, NH, T, DQK), DHV = q.shape, v.shape[-1]
    BH, NT = B * NH, ceil_div(T, BLOCK)
    dq, dk, dv, di, df = (torch.empty_like(x) for x in (q, k, v, i, f))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    if dh.numel() == 0:
        return dq, dk, dv, di, df, *(_empty_state(q, v) if dC_T is None else [dC_T.clone()])
    dh = dh if copy_engine_reads(dh) and dh.data_ptr() % 16 == 0 else dh.clone(memory_format=torch.contiguous_format)
    C_0, dC_T = (None if C is None else C.contiguous() for C in (C_0, dC_T))
    dC_0 = None if C_0 is None else empty(B, NH, DQK, DHV)
    wide, rows_ = is_wide(DQK, DHV), describe(rows, BLOCK, 8)

    # dv, with <C, dC> at the borders; in float64 where the sequence begins and ends, so that how PyTorch adds, which
    # depends on the size of a batch, does not show in float32
    BV, _ = keys_tile(DQK, DHV)
    tiles_v = ceil_div(DHV, BV)
    SPAN = span_of(q, NT, tiles_v, BORDER)
    ends = starts_of_spans(q, dh, rows, decay, dC_T, SPAN, backward=True)
    parts_v = tiles_v * (BV // 64 if wide else 1)
    carry = empty(parts_v, B, NH, borders.shape[2] + 2)
    # There is no state at the ends but what is said below. Without spans this is the first launch. One with the copy
    # engine's descriptors must not be: the thread that autograd calls this in may have no CUDA context yet.
    carry[..., :: borders.shape[2] + 1] = 0
    if wide:
        walk_along_keys(k, q, dh, dv, P, rows, decay, ends, dC_0, borders, carry, SPAN, backward=True)
    else:
        o = keys_options(DQK, DHV)
        keys, values = (lambda x: describe(x, o["BK"])), (lambda x: describe(x, o["BV"]))
        state_times_keys_kernel[(tiles_v * ceil_div(NT, SPAN) * BH,)](
            keys(k), keys(q), values(dh), values(dv), rows_, decay, ends, dC_0, borders, carry, NT, NH, BH, SPAN,
            BACKWARD=True, **o,
        )  # fmt: skip
    for number, C, dC in ((0, C_0, dC_0), (-1, C_T, dC_T)):
        if dC is not None:
            carry[0, ..., number] = (C * dC).sum(dim=(-2, -1), dtype=torch.float64)

    # dq and dk
    p, starts = values_options(DQK, DHV), C_0
    tiles_k = 1 if wide else ceil_div(DQK, p["BK"])
    if SPAN < NT:  # the states that the spans start from are among those at the borders
        starts, every = empty(B, NH, ceil_div(NT, SPAN), DQK, DHV), SPAN // BORDER
        starts[:, :, 0] = 0 if C_0 is None else C_0
        starts[:, :, 1:] = borders[:, :, every - 1 :: every, :DHV, :DQK].mT
    q_dq_tile, q_dq_state, k_dk_tile, k_dk_state = empty(4, tiles_k, B, NH, T)
    for BACKWARD, a, b, x, own, y, tile, state, first in (
        (False, dh, k, v, q, dq, q_dq_tile, q_dq_state, starts),
        (True, v, q, dh, k, dk, k_dk_tile, k_dk_state, ends),
    ):
        if wide:
            parts = walk_along_values(a, x, b, rows, decay, first, SPAN, backward=BACKWARD)
            strides = (stride for z in (a, b, x, own, y) for stride in z.stride()[:3])
            values_tile_kernel[(NT * BH,)](
                a, b, x, own, parts, rows, y, tile, state, *strides,
                T, NT, NH, parts.stride(0), DQK, DHV, len(parts), BACKWARD, BLOCK, **TILE,
            )  # fmt: skip
            del parts  # of heads of 256/512 it is twice as large as q and k together
        else:
            a_, b_, x_, own_ = describe(a, p["BV"]), describe(b, p["BK"]), describe(x, p["BV"]), describe(own, p["BK"])
            state_times_values_kernel[(tiles_k * ceil_div(NT, SPAN) * BH,)](
                a_, b_, x_, own_, describe(y, p["BK"]), rows_, tile, state, decay, first,
                T, NT, NH, BH, SPAN, BACKWARD=BACKWARD, **p,
            )  # fmt: skip
    dgates_kernel[(ceil_div(NT, BORDER) * BH,)](
        i, f, decay, q_dq_tile, q_dq_state, k_dk_tile, k_dk_state, carry, di, df,
        *i.stride(), *f.stride(), *di.stride(), *df.stride(),
        T, NT, NH, BH, tiles_k, parts_v, BORDER, BLOCK, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, di, df, *((dC_0,) if C_0 is not None else _no_state(q))


# torch.compile sees each of the two as one operation that it need not look into.
forward_op = torch.library.custom_op("tfla::mlstmsig_hopper", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("tfla::mlstmsig_hopper_backward", launch_backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, i, f, C_0, return_state):
    saved = (q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(q, v))
    return torch.empty_like(v), *(_empty_state(q, v) if return_state or v.numel() == 0 else _no_state(q)), *saved


@backward_op.register_fake
def _(dh, dC_T, q, k, v, i, f, C_0, *_):
    dstate = _no_state(q) if C_0 is None and dh.numel() > 0 else _empty_state(q, v)
    return *(torch.empty_like(x) for x in (q, k, v, i, f)), *dstate


def setup_context(ctx, inputs, output) -> None:
    *tensors, C_0, ctx.return_state = inputs
    ctx.save_for_backward(*tensors, C_0, *output[1:])
    ctx.with_state = C_0 is not None
    ctx.set_materialize_grads(False)  # a state that nobody used has the gradient None, and needs no work


def backward(ctx, dh, dC_T, *_):
    dh = torch.zeros_like(ctx.saved_tensors[2]) if dh is None else dh
    dC_T = dC_T if ctx.return_state else None  # what stands in a state's place has no gradient
    *gradients, dC_0 = backward_op(dh, dC_T, *ctx.saved_tensors)
    return *gradients, dC_0 if ctx.with_state else None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def mlstmsig_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTMsig (paper section 4) on a Hopper GPU, in bfloat16.

    There is no chunk_size: a sequence is walked along in tiles of 64 steps, in spans where there are few sequences.

    Args:
        q, k: queries and keys, (B, NH, T, DQK), bfloat16; DQK <= 256. Any B >= 0, NH >= 1, T >= 0. The last dimension
            must be contiguous; the others may be strided, a transposed (B, T, NH, DQK) is not copied. As the GPU's copy
            engine wants it, DQK, DHV, and all strides must be multiples of 8, and data begin at a multiple of 16 bytes.
        v: values, (B, NH, T, DHV), bfloat16; DHV <= 512.
        i, f: gate pre-activations, (B, NH, T), bfloat16 or float32, any strides. -inf is allowed in both:
            f = -inf forgets everything before the step, i = -inf writes nothing.
        initial_state: (C,), (B, NH, DQK, DHV), float32; None is the empty memory, C = 0.
        return_state: also return the state after the last step, in float32.

    Returns:
        h, (B, NH, T, DHV) in the dtype and memory layout of v; with return_state the pair (h, (C,)).
        Differentiable once in q, k, v, i, f and the initial state, exactly, and deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state)
    _check_hopper(q, k, v)
    (C_0,) = (None,) if initial_state is None else initial_state
    h, C, *_ = forward_op(q, k, v, i, f, C_0, return_state)
    return (h, (C,)) if return_state else h


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------
# same as 05_mlstmsig/mlstmsig_tfla.py::_empty_state
def _empty_state(q: Tensor, v: Tensor) -> State:
    """The memory before anything was written, for a sequence or for a step."""
    return (torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32, device=q.device),)


def _no_state(q: Tensor) -> State:
    """In place of a state, or of its gradient, that nobody asked for: in short sequences it is much to write."""
    return (torch.empty(0, dtype=torch.float32, device=q.device),)


# same as 05_mlstmsig/mlstmsig_tfla.py::_check_inputs
def _check_inputs(q, k, v, i, f, state, *, time: bool = True) -> None:
    """Raises an error that names the argument, what it was and what it must be."""
    layout, state_name = ("(B, NH, T, D)", "initial_state") if time else ("(B, NH, D)", "state")
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != (4 if time else 3) or x.shape[1] < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape {layout} with NH >= 1 and D >= 1, got {tuple(x.shape)}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    expected = [("k", k, q.shape, (q.dtype,)), ("v", v, (*q.shape[:-1], v.shape[-1]), (q.dtype,))]
    expected += [(name, x, q.shape[:-1], (q.dtype, torch.float32)) for name, x in (("i", i), ("f", f))]
    if state is not None:
        if not isinstance(state, (tuple, list)) or len(state) != 1:
            raise TypeError(f"{state_name} must be a tuple (C,), got {type(state).__name__}")
        shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
        expected.append((f"{state_name}'s C", state[0], shape, (torch.float32,)))
    for name, x, shape, dtypes in expected:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit q and v, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(sorted({str(d) for d in dtypes}))} to fit q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_hopper(q, k, v) -> None:
    """What this file asks for beyond _check_inputs."""
    if q.dtype != torch.bfloat16:
        raise TypeError(f"q must be bfloat16, got {q.dtype}; mlstmsig_tfla.py takes others")
    for name, x, most in (("q", q, 256), ("v", v, 512)):
        if x.shape[-1] > most or x.shape[-1] % 8:
            raise ValueError(
                f"{name} must have at most {most} columns, a multiple of 8, got {x.shape[-1]}; "
                "mlstmsig_tfla.py takes others"
            )
    if is_wide(q.shape[-1], v.shape[-1]) and q.shape[2] >= 2**23:  # the walk counts in 32 bits
        raise ValueError(
            f"q must have fewer than 2^23 steps in heads so wide, got {q.shape[2]}; mlstmsig_tfla.py takes more"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() > 0 and not copy_engine_reads(x):
            raise ValueError(
                f"{name} must be contiguous in its last dimension and have strides of multiples of 8, "
                f"got strides {x.stride()}; mlstmsig_tfla.py takes others"
            )


def _check_device(q, k, v) -> None:
    """What can be asked of a tensor only when the kernels are launched: torch.compile's have no place in memory."""
    if q.device.type != "meta" and (q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9):
        raise ValueError(f"q must be on a Hopper GPU (H100, H200), got {q.device}; mlstmsig_tfla.py runs elsewhere")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes, got address {x.data_ptr()}")
