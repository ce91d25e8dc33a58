"""Stage 04: the mLSTM on Hopper GPUs (H100, H200) in bfloat16, forward and backward, in Gluon, Triton's lower level.

mlstm_tfla.py beside this file computes the same on any GPU. There, a chunk is cut into tiles of an L x L matrix, and
the states between chunks go through memory. Here a program walks along a whole sequence in tiles of 64 steps and keeps
the state on chip: TFLA (arXiv 2503.14376) with its inner level made recurrent. Work stays linear in T, no state is
written and read again, and everything comes from memory once. Of a tile, with P = Q K^T * Wr:

    forward, tile by tile            backward, from the last tile to the first
    H  = w_read * (Q C) + P V        dV = w_end * (K dC) + P^T dH
    C <- decay C + (w_end * K)^T V   dK = w_end * (V dC^T + dn) + dP^T Q,    dP = (dH V^T + delta) * Wr
                                     dC <- decay dC + (w_read * Q)^T dH
    and once more for the gradient of the queries:  dQ = w_read * (dH C^T + delta n) + dP K

h and dv are computed by one kernel, state_times_keys_kernel. dq_kernel also finds delta, the gradient through the
normalizer: that takes dh . h, for which a program must have all of d_qk; in dk_kernel it has 64 columns.
Stabilizers and gate weights come from passes before; the docstring of rows_kernel lists what a walk reads of a tile.
Few sequences and wide heads (d_qk > 128 or d_hv > 256) need more kernels than these: see the heads of their sections.

    forward     summary_kernel -> stabilizers_kernel -> rows_kernel -> h
    backward    rows_backward_kernel -> dv -> dq_kernel -> dk_kernel -> dgates_kernel

The warps of a program have different jobs ("warp specialization") and wait for each other at barriers in shared memory:
    load     one warp: has the copy engine (TMA) bring tile after tile into a ring of buffers
    scores   one warpgroup: P or dP of the next tiles, gate weights applied; it needs no state and runs ahead
    n        two warps: the normalizer state, for h, or its gradient, for dk
    state    the others: keep the state in their registers, multiply with it, and add to it

Glossary (name in code = symbol = shape; NT tiles of 64 steps):
    b, u     sum of log sigmoid(f) since the tile began, without resets; i_j - b_j, so that log D_ij = b_i + u_j
    m, n     stabilizers and normalizer states where tiles begin and end     (B, NH, NT+1), (B, NH, NT+1, DQK)
    decay    e^(g + m_{c-1} - m_c) of each tile, g the last b of a tile      (B, NH, NT)
    S, r     normalizer product n . s q, and 1 / D, D = max{|S|, e^(-m)}     (B, NH, T)
    Wr       s r e^(b_i + u_j - m_i), gate weights within a tile             (64 x 64), s = 1 / sqrt(d_qk)
    w_read, w_end    rows 5 and 6 of rows_kernel; in the equations w_read has r in it, as Wr has
    delta    D times the gradient of S                                       (B, NH, T)

Not included: other number formats, other GPUs, heads beyond d_qk = 256 and d_hv = 512 (mlstm_tfla.py has them all).
Copy this file: it needs torch and triton, 3.6 or newer.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
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
        "mlstm_hopper.py needs Triton 3.6 or newer. mlstm_tfla.py beside it runs with older ones, and "
        "mlstm_chunkwise.py in 03_chunkwise computes the same without Triton."
    ) from error

__all__ = ["mlstm_hopper"]

State = tuple[Tensor, Tensor, Tensor]

# Steps in a tile, tiles from one stored state to the next, and tiles of which spans are multiples.
BLOCK = 64
BORDER = 16
GRAIN = 8
# log sigmoid(f) below this, f = -inf above all, begins a new document. It is left out of the sums, and the masks keep
# the old document out. No stabilizer is lower: what weighs less than e^(-10^7) is nothing.
FORGOTTEN = tl.constexpr(-1e7)
# The floor e^(-m) of the denominator must stay a number that one can divide by. So m is capped there.
M_CAP = tl.constexpr(60.0)
LOG2_E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------------------------------------------------------------
# Gates, stabilizers and normalizer states, in plain Triton
# ---------------------------------------------------------------------------------------------------------------------
# same as 03_chunkwise/mlstm_limit_chunk.py::head
@triton.jit
def head(ptr, bh, NH, stride_b, stride_h):
    """Where head bh = b * NH + h of a (B, NH, ...) tensor begins."""
    return ptr + bh // NH * stride_b + bh % NH * stride_h


# same as 04_tfla_triton/mlstm_tfla.py::two_parts
@triton.jit
def two_parts(x):
    """x in float64 as the sum of two float32: multiples of 1/64, which add up without rounding, and what is left."""
    x = tl.where(x < -1e30, -1e30, x)  # -inf would leave inf - inf; tl.maximum would hide NaN
    high = (tl.floor(x * 64.0) / 64.0).to(tl.float32)
    return high, (x - high).to(tl.float32)


# same as 04_tfla_triton/mlstm_tfla.py::join_stretches
@triton.jit
def join_stretches(start_1, u_max_1, start_2, u_max_2):
    """Of two stretches of steps, one after the other: where the last document began, and its largest u."""
    return tl.maximum(start_1, start_2), tl.where(start_2 >= 0, u_max_2, tl.maximum(u_max_1, u_max_2))


@triton.jit
def sooner(end_1, end_2):
    return tl.minimum(end_1, end_2)


@triton.jit
def largest_after(g_1, a_1, g_2, a_2):
    """Of two maps m -> max(m + g, a): the second one of what the first one gives."""
    return g_1 + g_2, tl.maximum(a_1 + g_2, a_2)


@triton.jit
def one_after_the_other(a_1, b_1, a_2, b_2):
    """Of two maps x -> a x + b: the second one of what the first one gives."""
    return a_1 * a_2, a_2 * b_1 + b_2


@triton.jit
def log_sigmoid(f):
    """In float32, to 1e-6 of itself: log(1 + x) = 2 artanh(z), z = x / (2 + x) <= 1/3, by its series."""
    x = tl.exp(-tl.abs(f))
    z = x / (2.0 + x)
    square, series = z * z, 1.0 / 15.0
    for odd in tl.static_range(13, 0, -2):
        series = series * square + 1.0 / odd
    return tl.minimum(f, 0.0) - 2.0 * z * series


@triton.jit
def tile_gates(i_ptr, f_ptr, offs_l, offs_t, stride_it, stride_ft, T):
    """b, u, start of the document and largest u in it so far, of tiles side by side (TILES, BLOCK), in float64."""
    i = tl.load(i_ptr + offs_t * stride_it, mask=offs_t < T, other=-float("inf")).to(tl.float64)
    f = tl.load(f_ptr + offs_t * stride_ft, mask=offs_t < T, other=float("inf")).to(tl.float32)
    reset = f < FORGOTTEN
    b = tl.cumsum(tl.where(reset, 0.0, log_sigmoid(f)).to(tl.float64), 1)
    u = i - b
    start, u_max = tl.associative_scan((tl.where(reset, offs_l, -1), u), 1, join_stretches)
    return b, u, start, u_max


@triton.jit
def summary_kernel(
    i_ptr, f_ptr, g_ptr, a_ptr, stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    T, NT, NH, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What tiles do to the stabilizer, m -> max(m + g, a). Grid: (tiles / TILES) * B * NH.

    g is -inf where a document begins in the tile; a = max_j (g + u_j) of the steps that are in the document at its end.
    """
    groups = tl.cdiv(NT, TILES)
    bh, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    tile, offs_l = group * TILES + tl.arange(0, TILES), tl.arange(0, BLOCK)[None, :]
    offs_t = (tile[:, None] * BLOCK + offs_l).to(tl.int64)  # (TILES, BLOCK)
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    b, _, start, u_max = tile_gates(i_ptr, f_ptr, offs_l, offs_t, stride_it, stride_ft, T)
    last = offs_l == BLOCK - 1
    g, a = tl.sum(tl.where(last, b, 0.0), axis=1), tl.sum(tl.where(last, b + u_max, 0.0), axis=1)
    g = tl.where(tl.max(start, axis=1) < 0, g, -float("inf"))
    tl.store(g_ptr + bh * NT + tile, g, mask=tile < NT)
    tl.store(a_ptr + bh * NT + tile, tl.maximum(a, FORGOTTEN), mask=tile < NT)


@triton.jit
def stabilizers_kernel(g_ptr, a_ptr, m_0_ptr, m_ptr, NT, TILES: tl.constexpr):
    """m_c = max(g + m_{c-1}, a) of all tiles c of a head. Grid: B * NH. Loop: over the tiles, TILES at a time."""
    bh = tl.program_id(0).to(tl.int64)
    g_ptr, a_ptr, m_ptr = g_ptr + bh * NT, a_ptr + bh * NT, m_ptr + bh * (NT + 1)
    if m_0_ptr is None:
        m_before = tl.full((), 0.0, dtype=tl.float64)
    else:
        m_before = tl.maximum(tl.load(m_0_ptr + bh), FORGOTTEN).to(tl.float64)
    tl.store(m_ptr, m_before.to(tl.float32))
    for first in range(0, NT, TILES):
        tile = first + tl.arange(0, TILES)
        g = tl.load(g_ptr + tile, mask=tile < NT, other=0.0)
        a = tl.load(a_ptr + tile, mask=tile < NT, other=-float("inf"))
        g, a = tl.associative_scan((g, a), 0, largest_after)
        m = tl.maximum(g + m_before, a)
        tl.store(m_ptr + tile + 1, m.to(tl.float32), mask=tile < NT)
        m_before = tl.sum(tl.where(tile == first + TILES - 1, m, 0.0))


@triton.jit
def sums_kernel(
    k_ptr, rows_ptr, x_ptr, stride_kb, stride_kh, stride_kt,
    T, NT, NH, DQK, BACKWARD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DQK: tl.constexpr,
):  # fmt: skip
    """What a tile adds to n: the sum of w_end k, or to dn: of w_read delta q. Grid: NT * B * NH."""
    bh, tile = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    offs_l, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_DQK)[None, :]
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    mask = (offs_t < T)[:, None] & (offs_k < DQK)
    k = tl.load(head(k_ptr, bh, NH, stride_kb, stride_kh) + offs_t[:, None] * stride_kt + offs_k, mask=mask, other=0.0)
    rows_ptr += (bh * NT + tile) * 8 * BLOCK + offs_l
    if BACKWARD:
        w = tl.load(rows_ptr + 5 * BLOCK) * tl.load(rows_ptr + 7 * BLOCK)
    else:
        w = tl.load(rows_ptr + 6 * BLOCK)
    x = tl.sum(k.to(tl.float32) * w[:, None], axis=0)[None, :]
    tl.store(x_ptr + (bh * NT + tile) * DQK + offs_k, x, mask=offs_k < DQK)


@triton.jit
def vectors_kernel(
    x_ptr, decay_ptr, first_ptr, n_ptr, NT, DQK,
    BACKWARD: tl.constexpr, TILES: tl.constexpr, BLOCK_DQK: tl.constexpr,
):  # fmt: skip
    """n or its gradient dn at all tile borders of a head. Grid: (tiles of DQK) * B * NH. Loop: TILES at a time.

    forward     n_c = decay n_{c-1} + x_c
    backward    dn_{c-1} = decay dn_c + x_c, from the last tile to the first
    """
    tiles_k = tl.cdiv(DQK, BLOCK_DQK)
    bh, tile_k = (tl.program_id(0) // tiles_k).to(tl.int64), tl.program_id(0) % tiles_k
    offs_k, number = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tl.arange(0, TILES)
    columns = offs_k < DQK
    x_ptr, n_ptr, decay_ptr = x_ptr + bh * NT * DQK, n_ptr + bh * (NT + 1) * DQK, decay_ptr + bh * NT
    n_before = tl.zeros((BLOCK_DQK,), dtype=tl.float32)
    if first_ptr is not None:
        n_before = tl.load(first_ptr + bh * DQK + offs_k, mask=columns, other=0.0)
    tl.store(n_ptr + (NT if BACKWARD else 0) * DQK + offs_k, n_before, mask=columns)
    for first in range(0, NT, TILES):
        inside = first + number < NT
        tile = NT - 1 - first - number if BACKWARD else first + number
        mask = inside[:, None] & columns[None, :]
        x = tl.load(x_ptr + tile[:, None] * DQK + offs_k[None, :], mask=mask, other=0.0)
        decay = tl.load(decay_ptr + tile, mask=inside, other=1.0)
        decays, sums = tl.associative_scan((decay[:, None] + tl.zeros_like(x), x), 0, one_after_the_other)
        n = decays * n_before[None, :] + sums
        border = tile if BACKWARD else tile + 1
        tl.store(n_ptr + border[:, None] * DQK + offs_k[None, :], n, mask=mask)
        n_before = tl.sum(tl.where(number[:, None] == TILES - 1, n, 0.0), axis=0)


@triton.jit
def store_row(rows_ptr, x, first, offs_l, mask, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(rows_ptr + (first + NUMBER) * BLOCK + offs_l, x.to(tl.float32), mask=mask)


@triton.jit
def rows_kernel(
    i_ptr, f_ptr, m_ptr, rows_ptr, decay_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    T, NT, NH, s, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The rows of some tiles, and their decays. Grid: (tiles / TILES) * B * NH. Steps past T write nothing.

    Of each tile there are eight rows of 64 steps in float32, (B, NH, NT * 8, 64). rows_backward_kernel makes those
    "with r in them", for the backward pass and for h of wide heads:
        0, 1  w_row: log2 of s e^(b_i - m_i), in two parts; with r in it: of s r e^(b_i - m_i)
        2, 3  u_j in base 2, in two parts
        4     bounds: (start + 1) * 128 + end. Step i's document begins at `start` of the tile (-1: before it), step
              j's ends before `end` (64: not in it)
        5     w_read: s e^(b_i + m_{c-1} - m_i), weight of the tile's first state; with r in it: times r
        6     w_end: e^(g + u_j - m_c), weight of step j in the next state
        7     e^(-m_i), the floor of the denominator; with r in it: delta, and before it is known its sign
    """
    groups = tl.cdiv(NT, TILES)
    bh, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    tile, offs_l = (group * TILES + tl.arange(0, TILES))[:, None], tl.arange(0, BLOCK)[None, :]
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)  # (TILES, BLOCK)
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    b, u, start, u_max = tile_gates(i_ptr, f_ptr, offs_l, offs_t, stride_it, stride_ft, T)
    has_next = (offs_l < BLOCK - 1) & (offs_t + 1 < T)
    f_next = tl.load(f_ptr + (offs_t + 1) * stride_ft, mask=has_next, other=0.0).to(tl.float32)
    end = tl.associative_scan(tl.where(f_next < FORGOTTEN, offs_l + 1, BLOCK), 1, sooner, reverse=True)
    g = tl.sum(tl.where(offs_l == BLOCK - 1, b, 0.0), axis=1)[:, None]
    start_last = tl.max(start, axis=1)[:, None]

    m_ptr += bh * (NT + 1) + tile
    m_first = tl.load(m_ptr, mask=tile < NT, other=0.0).to(tl.float64)
    m_last = tl.load(m_ptr + 1, mask=tile < NT, other=0.0).to(tl.float64)
    log_w_state = tl.where(start < 0, b + m_first, -float("inf"))
    m = tl.maximum(tl.maximum(log_w_state, b + u_max), FORGOTTEN).to(tl.float32)
    w_row, w_row_rest = two_parts((b - m + tl.log(tl.full((), 1.0, dtype=tl.float64) * s)) * LOG2_E)
    u_2, u_2_rest = two_parts(u * LOG2_E)

    row, mask = (bh * NT + tile) * 8, tile < NT
    store_row(rows_ptr, w_row, row, offs_l, mask, 0, BLOCK)
    store_row(rows_ptr, w_row_rest, row, offs_l, mask, 1, BLOCK)
    store_row(rows_ptr, u_2, row, offs_l, mask, 2, BLOCK)
    store_row(rows_ptr, u_2_rest, row, offs_l, mask, 3, BLOCK)
    store_row(rows_ptr, (start + 1) * 128 + end, row, offs_l, mask, 4, BLOCK)
    store_row(rows_ptr, tl.exp((log_w_state - m).to(tl.float32)) * s, row, offs_l, mask, 5, BLOCK)
    w_end = tl.where(offs_l >= start_last, tl.exp((g + u - m_last).to(tl.float32)), 0.0)
    store_row(rows_ptr, w_end, row, offs_l, mask, 6, BLOCK)
    store_row(rows_ptr, tl.exp(-tl.minimum(m, M_CAP)), row, offs_l, mask, 7, BLOCK)
    decay = tl.where(start_last < 0, tl.exp((g + m_first - m_last).to(tl.float32)), 0.0)
    tl.store(decay_ptr + bh * NT + tile, decay, mask=mask)


@triton.jit
def rows_backward_kernel(
    rows_ptr, S_ptr, new_rows_ptr, T, NT, ASSUME_NORM: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The rows with r in them, for the backward pass and for wide heads' h. Grid: (tiles / TILES) * B * NH.

    In place of delta, -[|S| wins the max] sign(S) dh . h, there is what dh . h is to be multiplied by.
    """
    groups = tl.cdiv(NT, TILES)
    bh, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    tile, offs_l = (group * TILES + tl.arange(0, TILES))[:, None], tl.arange(0, BLOCK)[None, :]
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    offs, mask = (bh * NT + tile) * 8 * BLOCK + offs_l, tile < NT
    S = tl.load(S_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
    floor = tl.load(rows_ptr + offs + 7 * BLOCK, mask=mask, other=1.0)
    D = tl.maximum(tl.abs(S), floor)
    w_row = tl.load(rows_ptr + offs, mask=mask, other=0.0).to(tl.float64)
    w_row += tl.load(rows_ptr + offs + BLOCK, mask=mask, other=0.0).to(tl.float64)
    w_row, w_row_rest = two_parts(w_row - tl.log(D.to(tl.float64)) * LOG2_E)
    tl.store(new_rows_ptr + offs, w_row, mask=mask)
    tl.store(new_rows_ptr + offs + BLOCK, w_row_rest, mask=mask)
    for row in tl.static_range(2, 7):
        x = tl.load(rows_ptr + offs + row * BLOCK, mask=mask, other=0.0)
        tl.store(new_rows_ptr + offs + row * BLOCK, x / D if row == 5 else x, mask=mask)
    sign = tl.where(tl.abs(S) > floor, tl.where(S > 0, -1.0, 1.0), 0.0)
    tl.store(new_rows_ptr + offs + 7 * BLOCK, tl.zeros_like(sign) if ASSUME_NORM else sign, mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Spans of few sequences, in plain Triton
#
# Where sequences are so few that most of the GPU would stand idle, they are cut into spans that are walked along at the
# same time. What each span starts from, starts_kernel puts together from what pieces of the spans before it add to the
# state (but for dq, which takes it from the borders, see state_times_keys_kernel).
# walk_kernel finds what pieces add, for all but those of which pieces_kernel says that they are forgotten by the end
# of their span (backward: by its beginning). n comes from sums_kernel and vectors_kernel then.
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def product(a, b):
    return a * b


@triton.jit
def piece_decays(decay_ptr, number, span, NT, PIECE, PER_SPAN, BLOCK_PIECE: tl.constexpr):
    """What each of these pieces of a span multiplies the state by; 1 if there is no such piece."""
    tile = tl.arange(0, BLOCK_PIECE)[None, :]
    offs = (span * PER_SPAN + number[:, None]) * PIECE + tile
    inside = ((number >= 0) & (number < PER_SPAN))[:, None] & (tile < PIECE) & (offs < NT)
    return tl.reduce(tl.load(decay_ptr + offs, mask=inside, other=1.0), 1, product)


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


@triton.jit
def add_piece(C, C_ptr, decays_ptr, weights_ptr, piece, SIZE, offs):
    """The state after a piece, from the state before it and what the piece makes of an empty one."""
    size = tl.where(tl.load(weights_ptr + piece) == 0.0, 0, SIZE)  # without weight it was not even computed
    return C * tl.load(decays_ptr + piece) + tl.load(C_ptr + piece * SIZE + offs, mask=offs < size, other=0.0)


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


@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Barriers that open after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(number):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers


@gluon.jit
def ring(descriptor, STAGES: gl.constexpr):
    """STAGES buffers for what the copy engine brings of a tile, or takes away."""
    return gl.allocate_shared_memory(descriptor.dtype, [STAGES] + descriptor.block_type.shape, descriptor.layout)  # noqa: RUF005, Gluon knows +


@gluon.jit
def program_of_span(TILES: gl.constexpr, NT, NH, SPAN):
    """(tile of the head dimension, head among all heads, its sequence, its number there, span among the spans of all
    heads, its first tile, how many tiles)."""
    spans = (NT + SPAN - 1) // SPAN
    tile, program = gl.program_id(0) % TILES, gl.program_id(0) // TILES
    bh, first = (program // spans).to(gl.int64), program % spans * SPAN
    batch, head_ = (bh // NH).to(gl.int32), (bh % NH).to(gl.int32)
    return tile, bh, batch, head_, program.to(gl.int64), first, gl.minimum(SPAN, NT - first)


@gluon.jit
def tile_at(walk, number, BACKWARD: gl.constexpr):
    """The tile that comes number-th."""
    return walk.first + (walk.count - 1 - number) if BACKWARD else walk.first + number


@gluon.jit
def next_decay(walk, number, BACKWARD: gl.constexpr):
    """The decay of the tile that the walk comes to next; after the last tile its own, which nobody uses."""
    return gl.load(walk.decay_ptr + tile_at(walk, gl.minimum(number + 1, walk.count - 1), BACKWARD))


@gluon.jit
def buffer(ring, number):
    """What the number-th tile has in a ring, of buffers or of barriers."""
    return ring.index(number % ring.shape[0])


@gluon.jit
def matrix(ring, number):
    """The number-th tile of q, k, v or the like, (steps x columns)."""
    return buffer(ring, number).reshape([ring.shape[3], ring.shape[4]])


@gluon.jit
def rows_of(walk, number):
    """The eight rows of the number-th tile, each a vector in plain order."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return buffer(walk.rows, number)._reinterpret(gl.float32, [walk.rows.shape[3], walk.rows.shape[4]], layout)


@gluon.jit
def wait_full(barriers, number):
    """Until a buffer has what it is to have of the number-th tile."""
    mbarrier.wait(buffer(barriers, number), number // barriers.shape[0] & 1)


@gluon.jit
def wait_empty(barriers, number):
    """Until what the buffer had before the number-th tile is needed no more."""
    mbarrier.wait(buffer(barriers, number), (number // barriers.shape[0] & 1) ^ 1)


@gluon.jit
def arrive(barriers, number):
    """Says that the number-th tile's buffer is full, or empty."""
    mbarrier.arrive(buffer(barriers, number), count=1)


@gluon.constexpr_function
def size_in_bytes(descriptors):
    return sum(descriptor.block_type.nbytes for descriptor in descriptors)


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

    Either way a document is seen by the row's own bound. The exponent is masked, not the product: elsewhere it may be
    huge.
    """
    BLOCK: gl.constexpr = rows.shape[1]
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))[:, None]
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    own, other = (2, 0) if BACKWARD else (0, 2)
    exponent = rows.index(own).load(gl.SliceLayout(1, layout))[:, None]
    exponent += rows.index(other).load(gl.SliceLayout(0, layout))[None, :]
    rest = rows.index(own + 1).load(gl.SliceLayout(1, layout))[:, None]
    rest += rows.index(other + 1).load(gl.SliceLayout(0, layout))[None, :]
    bounds = rows.index(4).load(gl.SliceLayout(1, layout)).to(gl.int32)[:, None]  # start + 1, and end in seven bits
    if BACKWARD:
        mask = (column >= row) & (column < (bounds & 127))
    else:
        mask = (column <= row) & (column >= (bounds >> 7) - 1)
    return gl.exp2(gl.where(mask, exponent + rest, -float("inf")))


@gluon.jit
def products_of_rows(walk, a_ring, b_ring, number):
    """Waits for the number-th tile and starts its A B^T."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    wait_full(walk.full, number)
    a, b = matrix(a_ring, number), matrix(b_ring, number)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=layout)
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


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


@gluon.jit
def in_parts(n, row):
    """n as the matrix unit takes it, in three of eight rows in bfloat16, digits after digits.

    All digits of float32, since whether |S| is above its floor decides whether there is a gradient through S.
    """
    high = n.to(gl.bfloat16)
    rest = n - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    zero = gl.zeros_like(high)
    lower = gl.where(row == 1, middle[None, :], gl.where(row == 2, low[None, :], zero[None, :]))
    return gl.where(row == 0, high[None, :], lower)


@gluon.jit
def normalizer_partition(
    walk, b_ring, n_ring, n_full, n_ptr, first_k, DQK: gl.constexpr, KNOWN: gl.constexpr, BACKWARD: gl.constexpr
):  # fmt: skip
    """Keeps some columns of n in registers, or backward of dn, and tells the others of it.

    forward     n <- decay n + sum of w_end k, of B = K; the scores' warps need it
    backward    dn <- decay dn + sum of w_read delta q, of B = Q; the state's warps need it
    n_ptr: n at all tile borders of the head. If it is not KNOWN, it is there only where the sequence begins (backward:
    ends), and is written everywhere else.
    """
    BLOCK: gl.constexpr = b_ring.shape[3]
    BK: gl.constexpr = b_ring.shape[4]
    SOME: gl.constexpr = 16  # steps at a time, to need fewer registers
    # All steps of a column are one thread's: nothing is summed up across threads.
    COLUMNS: gl.constexpr = BK // (32 * gl.num_warps())
    layout: gl.constexpr = gl.BlockedLayout([SOME, COLUMNS], [1, 32], [1, gl.num_warps()], [0, 1])
    parts: gl.constexpr = gl.BlockedLayout([8, COLUMNS], [1, 32], [1, gl.num_warps()], [0, 1])
    vector: gl.constexpr = gl.SliceLayout(0, layout)
    offs_k = first_k + gl.arange(0, BK, layout=vector)
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, parts))[:, None]
    mask = offs_k < DQK
    n = gl.load(n_ptr + (walk.first + walk.count if BACKWARD else walk.first) * DQK + offs_k, mask=mask, other=0.0)
    decay = gl.load(walk.decay_ptr + tile_at(walk, 0, BACKWARD))
    for number in range(walk.count):
        tile = tile_at(walk, number, BACKWARD)
        wait_full(walk.full, number)
        b, rows = matrix(b_ring, number), rows_of(walk, number)
        if BACKWARD:
            buffer(n_ring, number).store(n)
        else:
            buffer(n_ring, number).store(in_parts(gl.convert_layout(n, gl.SliceLayout(0, parts)), row))
            fence_async_shared()
        arrive(n_full, number)
        border = n_ptr + (tile if BACKWARD else tile + 1) * DQK + offs_k
        if KNOWN:
            n = gl.load(border, mask=mask, other=0.0)
        else:
            total = gl.zeros([SOME, BK], gl.float32, layout=layout)
            for start in gl.static_range(0, BLOCK, SOME):
                weight = rows.index(5 if BACKWARD else 6).slice(start, SOME).load(gl.SliceLayout(1, layout))
                if BACKWARD:
                    weight = weight * rows.index(7).slice(start, SOME).load(gl.SliceLayout(1, layout))
                total += b.slice(start, SOME).load(layout).to(gl.float32) * weight[:, None]
            n = n * decay + gl.sum(total, axis=0)
            decay = next_decay(walk, number, BACKWARD)
            gl.store(border, n, mask=mask)
        arrive(walk.empty, number)


@gluon.jit
def weighted_keys(b, weight):
    """The rows of a tile in shared memory times their weights, in bfloat16, in registers."""
    D: gl.constexpr = b.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    weight = weight.load(gl.SliceLayout(1, layout))[:, None]
    return (b.load(layout).to(gl.float32) * weight).to(gl.bfloat16)


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
# Buffers and barriers of state_times_keys_kernel, beside those of its walk. n needs no "empty" of its own: who reads n
# arrives at the tile's "empty" as well, and a tile that is full again has a free n.
KeysBuffers = namedtuple("KeysBuffers", "a b x P r n weighted y P_full P_empty n_full")


@gluon.jit
def h_scores(walk, smem, number):
    """Waits for the number-th tile and starts its Q K^T and q . n."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    scores = products_of_rows(walk, smem.a, smem.b, number)
    wait_full(smem.n_full, number)
    zero = gl.zeros([BLOCK, 8], gl.float32, layout=narrow)
    n = buffer(smem.n, number).permute((1, 0))
    return warpgroup_mma(matrix(smem.a, number), n, zero, use_acc=False, is_async=True), scores


@gluon.jit
def h_scores_partition(walk, smem, S_ptr, tile_v, T):
    """As scores_partition; also S, and r, by which the state's warps divide what they read, as P is divided here."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    vector: gl.constexpr = gl.SliceLayout(1, layout)
    offs_l = gl.arange(0, BLOCK, layout=vector)
    q_n, scores = h_scores(walk, smem, 0)
    q_n, scores = warpgroup_mma_wait(0, deps=[q_n, scores])
    for number in range(walk.count):
        rows = rows_of(walk, number)
        P = scores * gates(rows, False, layout)
        S = gl.convert_layout(gl.sum(q_n, axis=1), vector) * rows.index(5).load(vector) + gl.sum(P, axis=1)
        r = 1.0 / gl.maximum(gl.maximum(S, -S), rows.index(7).load(vector))
        P = P * r[:, None]
        wait_empty(smem.P_empty, number)
        buffer(smem.P, number).store(P.to(gl.bfloat16))
        buffer(smem.r, number).store(r)
        q_n_next, scores_next = h_scores(walk, smem, gl.minimum(number + 1, walk.count - 1))
        fence_async_shared()
        arrive(smem.P_full, number)
        arrive(walk.empty, number)
        if tile_v == 0:
            offs_t = (walk.first + number) * BLOCK + offs_l
            gl.store(S_ptr + offs_t, S, mask=offs_t < T)
        q_n, scores = warpgroup_mma_wait(0, deps=[q_n_next, scores_next])


@gluon.jit
def keys_scores_partition(walk, smem, S_ptr, tile_v, T, BACKWARD: gl.constexpr):
    if BACKWARD:
        scores_partition(walk, smem, True)
    else:
        h_scores_partition(walk, smem, S_ptr, tile_v, T)


@gluon.jit
def keys_normalizer_partition(
    walk, smem, n_ptr, DQK: gl.constexpr, KNOWN: gl.constexpr, BACKWARD: gl.constexpr
):  # fmt: skip
    """dv needs none."""
    if not BACKWARD:
        normalizer_partition(walk, smem.b, smem.n, smem.n_full, n_ptr, 0, DQK, KNOWN, False)


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
    if first_ptr is None:
        # No decay is negative, so this adds 0. But where C is known to be 0, ptxas of Triton 3.6 may die of it.
        C += gl.where(decay < 0.0, v * 1.0 + k * 1.0, 0.0)
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
        if not BACKWARD:
            read = read * buffer(smem.r, number).load(gl.SliceLayout(0, layout_y))[None, :]
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
    a_desc, b_desc, x_desc, y_desc, rows_desc, decay_ptr, first_ptr, last_ptr, n_ptr, S_ptr, border_ptr, carry_ptr,
    T, NT, NH, BH, SPAN, N_KNOWN: gl.constexpr, BACKWARD: gl.constexpr, BLOCK: gl.constexpr, BORDER: gl.constexpr,
    DQK: gl.constexpr, DHV: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
    P_STAGES: gl.constexpr,
):  # fmt: skip
    """Y = read * (A C) + P X, C <- decay C + (write * B)^T X, for BV columns of X and Y.

    Grid: (tiles of DHV) * spans * B * NH.
    first_ptr: the states that the spans start from, or None. last_ptr: the state after the sequence, backward before
    it. border_ptr: C^T at the borders, written forward, read backward. carry_ptr: <C, dC> there, of each program.
    forward     A, B, X, Y = Q, K, V, H: also n, S, and, for the gates, C^T as every BORDER-th tile but the first finds
                it, (B, NH, borders - 1, DHV, DQK) filled up to whole tiles, in bfloat16
    backward    A, B, X, Y = K, Q, dH, dV, and C is dC: also the tile's part of <C, dC> at these borders
    """
    TILES: gl.constexpr = (DHV + BV - 1) // BV
    SMALL: gl.constexpr = BK + BV == 128
    N_REGISTERS: gl.constexpr = 24 if BACKWARD else (40 if SMALL else 64)
    SCORES_REGISTERS: gl.constexpr = (96 if BACKWARD else 88) if SMALL else 112
    tile_v, bh, batch, head_, span, first, count = program_of_span(TILES, NT, NH, SPAN)
    full, empty, rows = new_barriers(STAGES, 1), new_barriers(STAGES, 2 if BACKWARD else 3), ring(rows_desc, STAGES)
    walk = Walk(batch, head_, first, count, NT, decay_ptr + bh * NT, rows, full, empty)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    smem = KeysBuffers(
        a=ring(a_desc, STAGES),
        b=ring(b_desc, STAGES),
        x=ring(x_desc, STAGES),
        P=gl.allocate_shared_memory(gl.bfloat16, [P_STAGES, BLOCK, BLOCK], swizzled),
        r=gl.allocate_shared_memory(gl.float32, [P_STAGES, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        n=gl.allocate_shared_memory(gl.bfloat16, [STAGES, 8, BK], swizzled),
        weighted=gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BK], swizzled),
        y=gl.allocate_shared_memory(gl.bfloat16, y_desc.block_type.shape, y_desc.layout),
        P_full=new_barriers(P_STAGES, 1),
        P_empty=new_barriers(P_STAGES, 1),
        n_full=new_barriers(STAGES, 1),
    )
    fence_async_shared()
    borders = (NT + BORDER - 1) // BORDER
    border_ptr += bh * (borders - 1) * TILES * BV * BK
    if n_ptr is not None:
        n_ptr += bh * (NT + 1) * DQK
    if S_ptr is not None:
        S_ptr += bh * T
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
            (keys_scores_partition, (walk, smem, S_ptr, tile_v, T, BACKWARD)),
            (keys_normalizer_partition, (walk, smem, n_ptr, DQK, N_KNOWN, BACKWARD)),
            (load_partition, (walk, descriptors, rings, (0, 0, 0, tile_v * BV), BACKWARD)),
        ],
        [4, 2, 1],
        [SCORES_REGISTERS, N_REGISTERS, N_REGISTERS],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Wide heads, and the states that spans start from
#
# Heads of d_qk > 128 or d_hv > 256 leave no registers for the scores beside the state. Their walks are walk_kernel's:
# it loads, multiplies with the state and adds to it, but forms no scores. What happens within a tile comes before the
# walk, P for h and dv, in bfloat16, (B, NH, NT * 64, 64), or after it, on the products with the state in float32:
#
#     forward     .. -> rows_kernel -> sums_kernel -> vectors_kernel -> scores_tile_kernel -> rows_backward_kernel -> h
#     backward    rows_backward_kernel -> dv -> dH C^T -> dq_tile_kernel -> sums_kernel -> vectors_kernel
#                 -> V dC^T -> dk_tile_kernel -> dgates_kernel
#
# The states that spans start from it finds as well, of heads of any size, and multiplies with none then.
# ---------------------------------------------------------------------------------------------------------------------
# Buffers of walk_kernel, beside those of its walk.
WalkBuffers = namedtuple("WalkBuffers", "a b x P weighted")


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
# dq and delta
# ---------------------------------------------------------------------------------------------------------------------
# Buffers and barriers of dq_kernel, beside those of its walk.
DqBuffers = namedtuple("DqBuffers", "dh k v q n P delta q_y weighted P_full q_y_full")
# 8 rows of a column to each thread; half of the threads are there twice.
SUMS_LAYOUT = gl.constexpr(gl.BlockedLayout([8, 1], [1, 32], [1, 4], [1, 0]))


@gluon.jit
def column_sums(x, sums):
    """The sums of x (64 x 64) over its rows. Rows lie across lanes and warps: by way of shared memory it is quicker."""
    sums.store(gl.sum(x.reshape([4, 2, 8, 64]), axis=1).reshape([32, 64]))
    total = gl.sum(sums.slice(0, 8).load(SUMS_LAYOUT), axis=0)
    for eighth in gl.static_range(1, 4):
        total += gl.sum(sums.slice(eighth * 8, 8).load(SUMS_LAYOUT), axis=0)
    return total


@gluon.jit
def dq_state_partition(
    walk, smem, dq_desc, first_ptr, HALF: gl.constexpr, DQK: gl.constexpr, DHV: gl.constexpr
):  # fmt: skip
    """Keeps 64 rows of C in registers, in pieces of 64 columns, each in turn the left operand of a product.

    There is no room for more than one such operand beside C, so one piece waits for the other. Meanwhile the other
    half's warpgroup has the matrix unit. All products are transposed: y is C dH^T (64 x BLOCK).
    """
    BLOCK: gl.constexpr = walk.rows.shape[4]
    PIECES: gl.constexpr = smem.v.shape[4] // 64
    first_k: gl.constexpr = HALF * 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    vector: gl.constexpr = gl.SliceLayout(0, layout)
    zero = gl.zeros([64, BLOCK], gl.float32, layout=layout)
    # One buffer for three things of a tile: partial sums, then the weighted keys, then dq.
    weighted = smem.weighted.index(HALF).reshape([BLOCK, 64])
    sums = smem.weighted.index(HALF)._reinterpret(gl.float32, [32, 64], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    C = ()
    for piece in gl.static_range(PIECES):
        C = C + (load_state(first_ptr, first_k, piece * 64, DHV, 1, DQK, DHV, 64, 64, layout),)  # noqa: RUF005, Gluon knows +
    decay = gl.load(walk.decay_ptr + tile_at(walk, 0, False))
    for number in range(walk.count):
        tile = tile_at(walk, number, False)
        wait_full(walk.full, number)
        dh, v = matrix(smem.dh, number), matrix(smem.v, number)
        k, q = matrix(smem.k, number).slice(first_k, 64, dim=1), matrix(smem.q, number).slice(first_k, 64, dim=1)
        rows = rows_of(walk, number)

        y, decayed = zero, ()
        for piece in gl.static_range(PIECES):
            C_operand = gl.convert_layout(C[piece].to(gl.bfloat16), operand)
            decayed = decayed + (C[piece] * decay,)  # noqa: RUF005, Gluon knows +
            if piece > 0:
                y = warpgroup_mma_wait(0, deps=[y])
            dh_piece = dh.slice(piece * 64, 64, dim=1).permute((1, 0))
            y = warpgroup_mma(C_operand, dh_piece, y, use_acc=piece > 0, is_async=True)
        decay = next_decay(walk, number, False)
        tma.store_wait(0)  # the last tile's dq has left its buffer
        y = warpgroup_mma_wait(0, deps=[y])
        smem.q_y.index(HALF).store(column_sums(q.permute((1, 0)).load(layout).to(gl.float32) * y, sums))
        arrive(smem.q_y_full, number)

        # While the scores' warps find delta:
        y = y * rows.index(5).load(vector)[None, :]
        for half in gl.static_range(2):  # of the steps, to need fewer registers at a time
            some = weighted_keys(k.slice(half * 32, 32), rows.index(6).slice(half * 32, 32))
            weighted.slice(half * 32, 32).store(some)
        fence_async_shared()
        C = ()
        for piece in gl.static_range(PIECES):
            v_piece = v.slice(piece * 64, 64, dim=1)
            C = C + (warpgroup_mma(weighted.permute((1, 0)), v_piece, decayed[piece], is_async=True),)  # noqa: RUF005, Gluon knows +
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        n = buffer(smem.n, number)._reinterpret(gl.float32, [smem.n.shape[4] // 64, 64], plain)
        n = n.index(HALF).load(gl.SliceLayout(1, layout))[:, None]
        wait_full(smem.P_full, number)
        y = y + n * smem.delta.load(vector)[None, :]
        y = warpgroup_mma(k.permute((1, 0)), smem.P.permute((1, 0)), y, is_async=True)
        done = warpgroup_mma_wait(0, deps=(y,) + C)  # noqa: RUF005, Gluon knows +
        y, C = done[0], done[1:]
        weighted.permute((1, 0)).store(y.to(gl.bfloat16))
        fence_async_shared()
        arrive(walk.empty, number)
        place = [walk.batch, walk.head, tile * BLOCK, first_k]
        tma.async_copy_shared_to_global(dq_desc, place, smem.weighted.index(HALF))
    tma.store_wait(0)


@gluon.jit
def dq_second_half_partition(walk, smem, dq_desc, first_ptr, DQK: gl.constexpr, DHV: gl.constexpr):
    """Heads of d_qk <= 64 have none."""
    if smem.weighted.shape[0] > 1:
        dq_state_partition(walk, smem, dq_desc, first_ptr, 1, DQK, DHV)


@gluon.jit
def dq_scores_partition(walk, smem, delta_ptr, q_dq_ptr, T):
    """P = (dH V^T + delta) * Wr of tile after tile; before that delta, from dh . h.

    dh . h is w_read q . y, in the state's warps, and the row sums of Q K^T * dH V^T * Wr, before anything is rounded.
    From the h that was returned it would be wrong in its third digit, and dq and dk, where terms cancel, in their
    second. q . dq is dh . h + delta S r, so where delta is not 0, q . dq is.

    P, delta and q . y have one buffer each, and no "empty". P is written when both halves have sent q . y of the tile,
    so after their products with the P before; they send it after P_full of the tile before, when q . y had been read.
    """
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    vector: gl.constexpr = gl.SliceLayout(1, layout)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=layout)
    offs_l = gl.arange(0, BLOCK, layout=vector)
    for number in range(walk.count):
        tile = tile_at(walk, number, False)
        wait_full(walk.full, number)
        dh, v, k, q = matrix(smem.dh, number), matrix(smem.v, number), matrix(smem.k, number), matrix(smem.q, number)
        rows = rows_of(walk, number)
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        dP = warpgroup_mma(dh, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores]) * gates(rows, False, layout)
        dP = warpgroup_mma_wait(0, deps=[dP])
        dh_h, sign, read = gl.sum(scores * dP, axis=1), rows.index(7).load(vector), rows.index(5).load(vector)
        Wr = gates(rows, False, layout)  # formed anew: there are not registers enough for three such tiles
        dP = dP * Wr

        wait_full(smem.q_y_full, number)
        q_y = smem.q_y.index(0).load(vector)
        if smem.q_y.shape[0] > 1:
            q_y += smem.q_y.index(1).load(vector)
        dh_h += read * q_y
        delta = sign * dh_h
        smem.P.store((dP + delta[:, None] * Wr).to(gl.bfloat16))
        smem.delta.store(delta * read)
        fence_async_shared()
        arrive(smem.P_full, number)
        arrive(walk.empty, number)
        gl.store(delta_ptr + tile * 8 * BLOCK + offs_l, delta)
        offs_t = tile * BLOCK + offs_l
        gl.store(q_dq_ptr + offs_t, gl.where(sign == 0.0, dh_h, 0.0), mask=offs_t < T)


@gluon.jit(do_not_specialize=["NT", "SPAN"])  # Triton 3.6 fails on a loop that it knows to be one round
def dq_kernel(
    dh_desc, k_desc, v_desc, q_desc, dq_desc, n_desc, rows_desc, rows_ptr, q_dq_ptr, decay_ptr, first_ptr,
    T, NT, NH, SPAN, BLOCK: gl.constexpr, DQK: gl.constexpr, DHV: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ = w_read * (dH C^T + delta n) + P K, with dP for P; also delta, which takes its place in the rows, and q . dq.

    Grid: spans * B * NH. delta needs dh . h over all columns, so a program has all of d_qk: one half to each of two
    warpgroups, as no warpgroup has registers for more of C.
    """
    HALVES: gl.constexpr = BK // 64
    _, bh, batch, head_, span, first, count = program_of_span(1, NT, NH, SPAN)
    full, empty, rows = new_barriers(STAGES, 1), new_barriers(STAGES, HALVES + 1), ring(rows_desc, STAGES)
    walk = Walk(batch, head_, first, count, NT, decay_ptr + bh * NT, rows, full, empty)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    smem = DqBuffers(
        dh=ring(dh_desc, STAGES),
        k=ring(k_desc, STAGES),
        v=ring(v_desc, STAGES),
        q=ring(q_desc, STAGES),
        n=ring(n_desc, STAGES),
        P=gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BLOCK], gl.NVMMASharedLayout(128, 16, 2)),
        delta=gl.allocate_shared_memory(gl.float32, [BLOCK], plain),
        q_y=gl.allocate_shared_memory(gl.float32, [HALVES, BLOCK], plain),
        weighted=ring(dq_desc, HALVES),
        P_full=new_barriers(1, 1),
        q_y_full=new_barriers(1, HALVES),
    )
    fence_async_shared()
    if first_ptr is not None:
        first_ptr += span * DQK * DHV
    delta_ptr = rows_ptr + (bh * NT * 8 + 7) * BLOCK
    descriptors = (rows_desc, dh_desc, k_desc, v_desc, q_desc, n_desc)
    rings = (walk.rows, smem.dh, smem.k, smem.v, smem.q, smem.n)
    gl.warp_specialize(
        [
            (dq_state_partition, (walk, smem, dq_desc, first_ptr, 0, DQK, DHV)),
            (dq_second_half_partition, (walk, smem, dq_desc, first_ptr, DQK, DHV)),
            (dq_scores_partition, (walk, smem, delta_ptr, q_dq_ptr + bh * T, T)),
            (load_partition, (walk, descriptors, rings, (0, 0, 0, 0, 0, 0), False)),
        ],
        # Of a second half that is not there, one warp, which ends at once.
        [4 if HALVES > 1 else 1, 4, 1],
        [192 if HALVES > 1 else 24, 104, 24],
    )


# ---------------------------------------------------------------------------------------------------------------------
# dk
# ---------------------------------------------------------------------------------------------------------------------
# Buffers and barriers of dk_kernel, beside those of its walk.
DkBuffers = namedtuple("DkBuffers", "v q dh k dn P weighted dC dk P_full P_empty dn_full")


@gluon.jit
def dk_state_partition(
    walk, smem, dk_desc, k_dk_ptr, first_ptr, first_k, T, DQK: gl.constexpr, DHV: gl.constexpr
):  # fmt: skip
    """Keeps a tile of dC^T (BV x BK) in registers and puts it into shared memory anew for each product with it."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    BV: gl.constexpr = smem.dC.shape[0]
    BK: gl.constexpr = smem.dC.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    dC = load_state(first_ptr, 0, first_k, 1, DHV, DHV, DQK, BV, BK, layout)
    zero = gl.zeros([BLOCK, BK], gl.float32, layout=layout)
    offs_l = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    for number in range(walk.count):
        tile = tile_at(walk, number, True)
        decay = gl.load(walk.decay_ptr + tile)
        smem.dC.store(dC.to(gl.bfloat16))
        wait_full(walk.full, number)
        v, q, dh, k = matrix(smem.v, number), matrix(smem.q, number), matrix(smem.dh, number), matrix(smem.k, number)
        rows = rows_of(walk, number)
        smem.weighted.store(weighted_keys(q, rows.index(5)))
        fence_async_shared()
        dC = dC * decay
        read = rows.index(6).load(gl.SliceLayout(1, layout))[:, None]

        y = warpgroup_mma(v, smem.dC, zero, use_acc=False, is_async=True)  # (BLOCK, BK)
        dC = warpgroup_mma(dh.permute((1, 0)), smem.weighted, dC, is_async=True)
        wait_full(smem.dn_full, number)
        dn = buffer(smem.dn, number).load(gl.SliceLayout(0, layout))[None, :]
        wait_full(smem.P_full, number)
        y = (warpgroup_mma_wait(1, deps=[y]) + dn) * read
        k_y = k.load(layout).to(gl.float32) * y
        y = warpgroup_mma(buffer(smem.P, number), q, y, is_async=True)
        offs_t = tile * BLOCK + offs_l
        gl.store(k_dk_ptr + offs_t, gl.sum(k_y, axis=1), mask=offs_t < T)  # the state's part of k . dk
        y, dC = warpgroup_mma_wait(0, deps=[y, dC])
        tma.store_wait(0)
        smem.dk.reshape([BLOCK, BK]).store(y.to(gl.bfloat16))
        fence_async_shared()
        arrive(smem.P_empty, number)
        arrive(walk.empty, number)
        tma.async_copy_shared_to_global(dk_desc, [walk.batch, walk.head, tile * BLOCK, first_k], smem.dk)
    tma.store_wait(0)


@gluon.jit
def dk_scores_partition(walk, smem, k_dk_ptr, T):
    """P = (V dH^T + delta) * Wr^T of tile after tile, from the last to the first; the row sums of P * K Q^T."""
    BLOCK: gl.constexpr = walk.rows.shape[4]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=layout)
    offs_l = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout))
    for number in range(walk.count):
        tile = tile_at(walk, number, True)
        dP = products_of_rows(walk, smem.v, smem.dh, number)
        rows = rows_of(walk, number)
        dP = warpgroup_mma_wait(0, deps=[dP]) + rows.index(7).load(gl.SliceLayout(0, layout))[None, :]
        P = dP * gates(rows, True, layout)
        wait_empty(smem.P_empty, number)
        buffer(smem.P, number).store(P.to(gl.bfloat16))
        fence_async_shared()
        arrive(smem.P_full, number)
        k, q = matrix(smem.k, number), matrix(smem.q, number)
        scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        offs_t = tile * BLOCK + offs_l
        gl.store(k_dk_ptr + offs_t, gl.sum(P * scores, axis=1), mask=offs_t < T)
        arrive(walk.empty, number)


@gluon.jit(do_not_specialize=["NT", "SPAN"])  # Triton 3.6 fails on a loop that it knows to be one round
def dk_kernel(
    v_desc, q_desc, dh_desc, k_desc, dk_desc, rows_desc, dn_ptr, k_dk_tile_ptr, k_dk_state_ptr, decay_ptr, first_ptr,
    T, NT, NH, BH, SPAN, DN_KNOWN: gl.constexpr, BLOCK: gl.constexpr, DQK: gl.constexpr, DHV: gl.constexpr,
    BK: gl.constexpr, BV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK = w_end * (V dC^T + dn) + P Q, P = dP^T = (V dH^T + delta) * Wr^T, for BK columns.

    Grid: (tiles of DQK) * spans * B * NH. Also dn; and for the gates k . dk in two parts: the tile's, which are the row
    sums of P * K Q^T, and the state's.
    """
    TILES: gl.constexpr = (DQK + BK - 1) // BK
    tile_k, bh, batch, head_, span, first, count = program_of_span(TILES, NT, NH, SPAN)
    full, empty, rows = new_barriers(STAGES, 1), new_barriers(STAGES, 3), ring(rows_desc, STAGES)
    walk = Walk(batch, head_, first, count, NT, decay_ptr + bh * NT, rows, full, empty)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    smem = DkBuffers(
        v=ring(v_desc, STAGES),
        q=ring(q_desc, STAGES),
        dh=ring(dh_desc, STAGES),
        k=ring(k_desc, STAGES),
        dn=gl.allocate_shared_memory(gl.float32, [STAGES, BK], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        P=gl.allocate_shared_memory(gl.bfloat16, [1, BLOCK, BLOCK], swizzled),
        weighted=gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BK], swizzled),
        dC=gl.allocate_shared_memory(gl.bfloat16, [BV, BK], swizzled),
        dk=gl.allocate_shared_memory(gl.bfloat16, dk_desc.block_type.shape, dk_desc.layout),
        P_full=new_barriers(1, 1),
        P_empty=new_barriers(1, 1),
        dn_full=new_barriers(STAGES, 1),
    )
    fence_async_shared()
    if first_ptr is not None:
        first_ptr += span * DQK * DHV
    first_k, offs = tile_k * BK, (tile_k * BH + bh) * T
    dn_ptr += bh * (NT + 1) * DQK
    descriptors, rings = (rows_desc, v_desc, q_desc, dh_desc, k_desc), (walk.rows, smem.v, smem.q, smem.dh, smem.k)
    gl.warp_specialize(
        [
            (dk_state_partition, (walk, smem, dk_desc, k_dk_state_ptr + offs, first_ptr, first_k, T, DQK, DHV)),
            (dk_scores_partition, (walk, smem, k_dk_tile_ptr + offs, T)),
            (normalizer_partition, (walk, smem.q, smem.dn, smem.dn_full, dn_ptr, first_k, DQK, DN_KNOWN, True)),
            (load_partition, (walk, descriptors, rings, (0, 0, first_k, 0, first_k), True)),
        ],
        [4, 2, 1],
        [136, 104, 104],
    )


# ---------------------------------------------------------------------------------------------------------------------
# What happens within the tiles of wide heads, in plain Triton
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def load_part(x_ptr, stride_t, offs_t, T, first, D, PART: tl.constexpr):
    """Some columns of a tile of x (.., T, D), 0 outside of it."""
    columns = first + tl.arange(0, PART)[None, :]
    mask = (offs_t < T)[:, None] & (columns < D)
    return tl.load(x_ptr + offs_t[:, None] * stride_t + columns, mask=mask, other=0.0)


@triton.jit
def load_sum(y_ptr, stride_part, offs_l, first, D, PARTS: tl.constexpr, PART: tl.constexpr):
    """Some columns of what the walks left of a tile, (BLOCK x D), summed up over the walks' tiles of columns."""
    columns = first + tl.arange(0, PART)[None, :]
    y_ptr += offs_l[:, None] * D + columns
    y = tl.load(y_ptr, mask=columns < D, other=0.0)
    for part in tl.static_range(1, PARTS):
        y += tl.load(y_ptr + part * stride_part, mask=columns < D, other=0.0)
    return y


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
    own, other = (2, 0) if BACKWARD else (0, 2)
    log_w = tl.load(rows_ptr + own * BLOCK + i) + tl.load(rows_ptr + other * BLOCK + j)
    log_w += tl.load(rows_ptr + (own + 1) * BLOCK + i) + tl.load(rows_ptr + (other + 1) * BLOCK + j)
    bounds = tl.load(rows_ptr + 4 * BLOCK + i).to(tl.int32)
    if BACKWARD:
        mask = (j >= i) & (j < (bounds & 127))
    else:
        mask = (j <= i) & (j >= (bounds >> 7) - 1)
    return tl.exp2(tl.where(mask, log_w, -float("inf")))


@triton.jit
def scores_tile_kernel(
    q_ptr, k_ptr, n_ptr, rows_ptr, P_ptr, S_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    T, NT, NH, DQK, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """P = Q K^T * Wr, with zeros past T, and S. Grid: NT * B * NH."""
    bh, tile = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    offs_l = tl.arange(0, BLOCK)
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    rows_ptr, n_ptr = rows_ptr + (bh * NT + tile) * 8 * BLOCK, n_ptr + (bh * (NT + 1) + tile) * DQK
    scores, q_n = tl.zeros((BLOCK, BLOCK), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, DQK, PART):
        offs_k = first + tl.arange(0, PART)
        q = load_part(q_ptr, stride_qt, offs_t, T, first, DQK, PART)
        k = load_part(k_ptr, stride_kt, offs_t, T, first, DQK, PART)
        n = tl.load(n_ptr + offs_k, mask=offs_k < DQK, other=0.0)
        scores, q_n = tl.dot(q, tl.trans(k), scores), q_n + tl.sum(q.to(tl.float32) * n[None, :], axis=1)
    P = scores * tile_weights(rows_ptr, False, BLOCK)
    S = tl.load(rows_ptr + 5 * BLOCK + offs_l) * q_n + tl.sum(P, axis=1)
    r = 1.0 / tl.maximum(tl.abs(S), tl.load(rows_ptr + 7 * BLOCK + offs_l))
    P_ptr += (bh * NT + tile) * BLOCK * BLOCK + offs_l[:, None] * BLOCK + offs_l[None, :]
    tl.store(P_ptr, (P * r[:, None]).to(P_ptr.dtype.element_ty))
    tl.store(S_ptr + bh * T + offs_t, S, mask=offs_t < T)


@triton.jit
def dq_tile_kernel(
    dh_ptr, k_ptr, v_ptr, q_ptr, y_ptr, n_ptr, rows_ptr, dq_ptr, q_dq_ptr,
    stride_dhb, stride_dhh, stride_dht, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_qb, stride_qh, stride_qt, stride_dqb, stride_dqh, stride_dqt,
    T, NT, NH, stride_part, DQK: tl.constexpr, DHV, PARTS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """dQ = w_read * (Y + delta n) + dP K, Y = dH C^T, as dq_kernel; delta and q . dq too. Grid: NT * B * NH."""
    bh, tile = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    offs_l = tl.arange(0, BLOCK)
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    dh_ptr, v_ptr = head(dh_ptr, bh, NH, stride_dhb, stride_dhh), head(v_ptr, bh, NH, stride_vb, stride_vh)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    dq_ptr = head(dq_ptr, bh, NH, stride_dqb, stride_dqh) + offs_t[:, None] * stride_dqt
    rows_ptr, n_ptr = rows_ptr + (bh * NT + tile) * 8 * BLOCK, n_ptr + (bh * (NT + 1) + tile) * DQK
    y_ptr += (bh * NT + tile) * BLOCK * DQK
    read, sign = tl.load(rows_ptr + 5 * BLOCK + offs_l), tl.load(rows_ptr + 7 * BLOCK + offs_l)

    dP = products(dh_ptr, v_ptr, stride_dht, stride_vt, offs_t, T, DHV, BLOCK, PART)
    scores, q_y = tl.zeros((BLOCK, BLOCK), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, DQK, PART):
        q = load_part(q_ptr, stride_qt, offs_t, T, first, DQK, PART)
        k = load_part(k_ptr, stride_kt, offs_t, T, first, DQK, PART)
        y = load_sum(y_ptr, stride_part, offs_l, first, DQK, PARTS, PART)
        scores, q_y = tl.dot(q, tl.trans(k), scores), q_y + tl.sum(q.to(tl.float32) * y, axis=1)
    Wr = tile_weights(rows_ptr, False, BLOCK)
    dP = dP * Wr
    dh_h = tl.sum(scores * dP, axis=1) + read * q_y
    delta = sign * dh_h
    P = (delta[:, None] * Wr + dP).to(k_ptr.dtype.element_ty)
    tl.store(rows_ptr + 7 * BLOCK + offs_l, delta)
    tl.store(q_dq_ptr + bh * T + offs_t, tl.where(sign == 0.0, dh_h, 0.0), mask=offs_t < T)
    for first in range(0, DQK, PART):  # all of d_qk is more than registers can hold
        offs_k = first + tl.arange(0, PART)[None, :]
        n = tl.load(n_ptr + offs_k, mask=offs_k < DQK, other=0.0)
        y = load_sum(y_ptr, stride_part, offs_l, first, DQK, PARTS, PART) + delta[:, None] * n
        dq = tl.dot(P, load_part(k_ptr, stride_kt, offs_t, T, first, DQK, PART), y * read[:, None])
        tl.store(dq_ptr + offs_k, dq.to(dq_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_k < DQK))


@triton.jit
def dk_tile_kernel(
    v_ptr, q_ptr, dh_ptr, k_ptr, y_ptr, dn_ptr, rows_ptr, dk_ptr, k_dk_tile_ptr, k_dk_state_ptr,
    stride_vb, stride_vh, stride_vt, stride_qb, stride_qh, stride_qt, stride_dhb, stride_dhh, stride_dht,
    stride_kb, stride_kh, stride_kt, stride_dkb, stride_dkh, stride_dkt,
    T, NT, NH, stride_part, DQK: tl.constexpr, DHV, PARTS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """dK = w_end * (Y + dn) + dP^T Q, Y = V dC^T, and the two parts of k . dk, as dk_kernel. Grid: NT * B * NH."""
    bh, tile = (tl.program_id(0) // NT).to(tl.int64), tl.program_id(0) % NT
    offs_l = tl.arange(0, BLOCK)
    offs_t = (tile * BLOCK + offs_l).to(tl.int64)
    dh_ptr, v_ptr = head(dh_ptr, bh, NH, stride_dhb, stride_dhh), head(v_ptr, bh, NH, stride_vb, stride_vh)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    dk_ptr = head(dk_ptr, bh, NH, stride_dkb, stride_dkh) + offs_t[:, None] * stride_dkt
    rows_ptr, dn_ptr = rows_ptr + (bh * NT + tile) * 8 * BLOCK, dn_ptr + (bh * (NT + 1) + tile + 1) * DQK
    y_ptr += (bh * NT + tile) * BLOCK * DQK
    read, delta = tl.load(rows_ptr + 6 * BLOCK + offs_l), tl.load(rows_ptr + 7 * BLOCK + offs_l)

    dP = products(v_ptr, dh_ptr, stride_vt, stride_dht, offs_t, T, DHV, BLOCK, PART)
    P = (dP + delta[None, :]) * tile_weights(rows_ptr, True, BLOCK)
    k_dk = tl.sum(P * products(k_ptr, q_ptr, stride_kt, stride_qt, offs_t, T, DQK, BLOCK, PART), axis=1)
    tl.store(k_dk_tile_ptr + bh * T + offs_t, k_dk, mask=offs_t < T)
    P, k_y = P.to(q_ptr.dtype.element_ty), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, DQK, PART):
        offs_k = first + tl.arange(0, PART)[None, :]
        dn = tl.load(dn_ptr + offs_k, mask=offs_k < DQK, other=0.0)
        y = (load_sum(y_ptr, stride_part, offs_l, first, DQK, PARTS, PART) + dn) * read[:, None]
        k_y += tl.sum(load_part(k_ptr, stride_kt, offs_t, T, first, DQK, PART).to(tl.float32) * y, axis=1)
        dk = tl.dot(P, load_part(q_ptr, stride_qt, offs_t, T, first, DQK, PART), y)
        tl.store(dk_ptr + offs_k, dk.to(dk_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_k < DQK))
    tl.store(k_dk_state_ptr + bh * T + offs_t, k_y, mask=offs_t < T)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of the gates
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def product_at(n_ptr, dn_ptr, border, offs_k, DQK):
    """n . dn at a tile border."""
    n = tl.load(n_ptr + border * DQK + offs_k, mask=offs_k < DQK, other=0.0)
    return tl.sum(n * tl.load(dn_ptr + border * DQK + offs_k, mask=offs_k < DQK, other=0.0), axis=0)


@triton.jit
def dgates_kernel(
    f_ptr, decay_ptr, n_ptr, dn_ptr, q_dq_ptr, k_dk_tile_ptr, k_dk_state_ptr, carry_ptr,
    di_rest_ptr, df_bar_rest_ptr, di_ptr, df_ptr,
    stride_fb, stride_fh, stride_ft, stride_dib, stride_dih, stride_dit, stride_dfb, stride_dfh, stride_dft,
    T, NT, NH, BH, DQK, TILES_K, TILES_V, BORDER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DQK: tl.constexpr,
):  # fmt: skip
    """di and df of the tiles from one border to the next. Grid: borders * B * NH.

    di is k . dk. f_t weakens everything that crosses step t, so df_bar_t is the sum over all that does. In a tile:
      state before the tile, k_j v_j with j < t -> h_r with r >= t      sum over r >= t of to_h = q . dq - k . dk's part
                                                                        from the tile itself
      k_j v_j with j < t -> state after the tile                        sum over j < t of to_state, k . dk's state part
      state before -> state after                                       pass
    as in mlstm_tfla.py. But there pass = decay <C', dC'>, n and dn included, is known for every chunk; here C and dC
    meet at the borders alone. <C', dC'> where a tile begins is pass + all of to_h, where it ends pass + all of
    to_state: so pass is found tile by tile from the border before, and again from the border behind. Either way gathers
    what C and dC lose in bfloat16, and the two are weighted by the squares of what they summed up. What is found where
    next to nothing passes (decay far below 2^-12) is such loss alone, and left out.
    """
    borders = tl.cdiv(NT, BORDER)
    bh, c = (tl.program_id(0) // borders).to(tl.int64), tl.program_id(0) % borders
    f_ptr = head(f_ptr, bh, NH, stride_fb, stride_fh)
    di_ptr, df_ptr = head(di_ptr, bh, NH, stride_dib, stride_dih), head(df_ptr, bh, NH, stride_dfb, stride_dfh)
    tile = c * BORDER + tl.arange(0, BORDER)
    offs_t = (tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)  # (BORDER, BLOCK)
    mask = offs_t < T

    to_h = tl.load(q_dq_ptr + bh * T + offs_t, mask=mask, other=0.0)
    to_state, di = tl.zeros((BORDER, BLOCK), dtype=tl.float32), tl.zeros((BORDER, BLOCK), dtype=tl.float32)
    for tile_k in range(TILES_K):
        offs = (tile_k * BH + bh) * T + offs_t
        k_dk_tile = tl.load(k_dk_tile_ptr + offs, mask=mask, other=0.0)
        to_h, di = to_h - k_dk_tile, di + k_dk_tile
        to_state += tl.load(k_dk_state_ptr + offs, mask=mask, other=0.0)
    di += to_state
    n_ptr, dn_ptr, offs_k = n_ptr + bh * (NT + 1) * DQK, dn_ptr + bh * (NT + 1) * DQK, tl.arange(0, BLOCK_DQK)
    before = product_at(n_ptr, dn_ptr, c * BORDER, offs_k, DQK)
    after = product_at(n_ptr, dn_ptr, tl.minimum((c + 1) * BORDER, NT), offs_k, DQK)
    for tile_v in range(TILES_V):
        carry = carry_ptr + (tile_v * BH + bh) * (borders + 1) + c
        before, after = before + tl.load(carry), after + tl.load(carry + 1)

    decay = tl.load(decay_ptr + bh * NT + tile, mask=tile < NT, other=1.0)
    keep = tl.where(tile < NT, decay * decay / (decay * decay + 2.0**-24), 1.0)  # past T everything passes
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
    if di_rest_ptr is not None:
        di += tl.load(di_rest_ptr + bh * T + offs_t, mask=mask, other=0.0)
        df_bar += tl.load(df_bar_rest_ptr + bh * T + offs_t, mask=mask, other=0.0)
    f = tl.load(f_ptr + offs_t * stride_ft, mask=mask, other=0.0).to(tl.float32)
    sigmoid_minus_f = tl.exp(tl.minimum(-f, 0.0)) / (1.0 + tl.exp(-tl.abs(f)))
    df = tl.where(f == -float("inf"), 0.0, df_bar * sigmoid_minus_f)  # d log sigmoid(f) / df = sigmoid(-f)
    tl.store(di_ptr + offs_t * stride_dit, di.to(di_ptr.dtype.element_ty), mask=mask)
    tl.store(df_ptr + offs_t * stride_dft, df.to(df_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------
# A launch takes the CPU about as long as the smallest kernels take the GPU, so a few things here are done once, or
# without the functions that Triton has for them: layouts, descriptors, rounding up.
LAYOUTS = {torch.bfloat16: gl.NVMMASharedLayout(128, 16, 4), torch.float32: gl.NVMMASharedLayout(0, 32, 4)}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(D: int) -> int:
    """The smallest one that D fits into."""
    return 1 << (D - 1).bit_length()


def describe(x: Tensor, columns: int, number: int = BLOCK) -> TensorDescriptor:
    """x (B, NH, .., D) as the copy engine reads and writes it: of a tile `number` rows, some columns of them."""
    return TensorDescriptor(x, x.shape, x.stride(), [1, 1, number, columns], LAYOUTS[x.dtype])


def copy_engine_reads(x: Tensor) -> bool:
    """It wants multiples of 16 bytes from one row, head and sequence to the next."""
    strides = zip(x.stride()[:-1], x.shape[:-1], strict=True)
    return x.stride(-1) == 1 and all(s % 8 == 0 and (s > 0 or size == 1) for s, size in strides)


def is_wide(DQK: int, DHV: int) -> bool:
    """Whether the state leaves no registers for the scores, so that walk_kernel and the tiles' kernels take over."""
    return DQK > 128 or DHV > 256


# Registers of each thread, on average, with which two programs of small heads fit into a multiprocessor: while one of
# them starts or ends, the other goes on.
HALF = 80


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


def walk_options(ROWS: int, COLUMNS: int, DQK: int, DHV: int, most: int = 2) -> dict:
    """Tiles of walk_kernel. most: stages that fit into shared memory where a tile has 256 columns."""
    BC = max(64, min(256, power_of_2(COLUMNS)))
    return {
        "BLOCK": BLOCK, "BORDER": BORDER, "DQK": DQK, "DHV": DHV, "BR": 128 if ROWS > 64 else 64, "BC": BC,
        "STAGES": most if BC == 256 else most + 1, "num_warps": 4,
    }  # fmt: skip


def keys_tile(DQK: int, DHV: int) -> tuple[int, int]:
    """Columns of d_hv and of d_qk in a program that computes h or dv."""
    if is_wide(DQK, DHV):
        o = walk_options(DHV, DQK, DQK, DHV)
        return o["BR"], o["BC"]
    o = keys_options(DQK, DHV)
    return o["BV"], o["BK"]


# Columns at a time, warps and stages where a program has a tile of wide heads.
TILE = {"PART": 64, "num_warps": 4, "num_stages": 3}


def values_options(DQK: int, DHV: int) -> dict:
    """Tiles and warps where a program has 64 columns of d_qk. More stages do not fit into shared memory."""
    BV = max(64, power_of_2(DHV))
    return {"BLOCK": BLOCK, "DQK": DQK, "DHV": DHV, "BK": 64, "BV": BV, "STAGES": 2, "num_warps": 4}


def dq_options(DQK: int, DHV: int) -> dict:
    """Tiles of dq_kernel: 64 rows and all columns of the state to a warpgroup."""
    return {
        "BLOCK": BLOCK, "DQK": DQK, "DHV": DHV, "BK": 128 if DQK > 64 else 64, "STAGES": 2, "num_warps": 4,
        "maxnreg": HALF if max(DQK, DHV) <= 64 else None,
    }  # fmt: skip


def tiles_at_once(NT: int) -> int:
    """Of vectors_kernel: many in long sequences, where the loop over them takes its time; no more than there are."""
    return max(16, min(128, power_of_2(NT)))


def span_of(q: Tensor, NT: int, tiles: int, grain: int = GRAIN) -> int:
    """Tiles in a span: the whole sequence, or less of it where multiprocessors would stay without a program."""
    if q.device.type == "meta":
        return NT
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    spans = max(1, programs // (tiles * q.shape[0] * q.shape[1]))
    return min(NT, ceil_div(ceil_div(NT, spans), grain) * grain)


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


def with_normalizer(rows: Tensor, S: Tensor, T: int, NT: int, assume_norm: bool) -> Tensor:
    """The rows with r in them, for the backward pass and for wide heads' h."""
    new, groups = torch.empty_like(rows), ceil_div(NT, 8) * S.shape[0] * S.shape[1]
    rows_backward_kernel[(groups,)](rows, S, new, T, NT, assume_norm, BLOCK, 8, num_warps=4)
    return new


def find_vectors(
    k: Tensor, rows: Tensor, decay: Tensor, first: Tensor | None, n: Tensor, *, everywhere: bool, backward: bool
) -> None:
    """n where tiles border, or, backward, dn, with q for k; or only where the walk starts, which finds the others."""
    (B, NH, T, DQK), NT = k.shape, n.shape[2] - 1
    if not everywhere:
        n[:, :, NT if backward else 0] = 0 if first is None else first
        return
    x = torch.empty(B, NH, NT, DQK, dtype=torch.float32, device=k.device)
    sums_kernel[(NT * B * NH,)](
        k, rows, x, *k.stride()[:3], T, NT, NH, DQK, backward, BLOCK, power_of_2(DQK), num_warps=2
    )
    vectors_kernel[(ceil_div(DQK, 16) * B * NH,)](
        x, decay, first, n, NT, DQK, backward, tiles_at_once(NT), 16, num_warps=4
    )


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
    """Shapes and types of what the forward pass keeps: rows, decay, n, S, C^T at the borders, in whole tiles;
    of wide heads P too."""
    (B, NH, T, DQK), DHV = q.shape, v.shape[-1]
    NT, BV, BK = (T + BLOCK - 1) // BLOCK, *keys_tile(DQK, DHV)
    whole = (DHV + BV - 1) // BV * BV, BK
    return [
        ((B, NH, NT * 8, BLOCK), torch.float32), ((B, NH, NT), torch.float32), ((B, NH, NT + 1, DQK), torch.float32),
        ((B, NH, T), torch.float32), ((B, NH, max(NT - 1, 0) // BORDER, *whole), torch.bfloat16),
        ((B, NH, NT * BLOCK if is_wide(DQK, DHV) else 0, BLOCK), torch.bfloat16),
    ]  # fmt: skip


# same as 03_chunkwise/mlstm_limit_chunk.py::contiguous_state
def contiguous_state(C: Tensor | None, n: Tensor | None, m: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in (C, n, m)]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None,
    assume_norm: bool, return_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h, the final state if it is asked for, and what the backward pass will need."""
    _check_device(q, k, v)
    (B, NH, T, DQK), DHV = q.shape, v.shape[-1]
    BH, NT = B * NH, ceil_div(T, BLOCK)
    h, state = torch.empty_like(v), contiguous_state(C_0, n_0, m_0)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    saved = [empty(*shape, dtype=dtype) for shape, dtype in saved_shapes(q, v)]
    if h.numel() == 0:
        return h, *(_empty_state(q, v) if C_0 is None else [x.clone() for x in state]), *saved
    C_T = empty(B, NH, DQK, DHV) if return_state else None
    rows, decay, n, S, borders, P = saved
    g, a = empty(B, NH, NT, dtype=torch.float64), empty(B, NH, NT, dtype=torch.float64)
    m = empty(B, NH, NT + 1)
    gates, groups = (*i.stride(), *f.stride()), ceil_div(NT, 8) * BH
    summary_kernel[(groups,)](i, f, g, a, *gates, T, NT, NH, BLOCK, 8, num_warps=4)
    stabilizers_kernel[(BH,)](g, a, state[2], m, NT, 64, num_warps=1)
    rows_kernel[(groups,)](i, f, m, rows, decay, *gates, T, NT, NH, DQK**-0.5, BLOCK, 8, num_warps=8)

    tiles = ceil_div(DHV, keys_tile(DQK, DHV)[0])
    SPAN = span_of(q, NT, tiles)
    find_vectors(k, rows, decay, state[1], n, everywhere=is_wide(DQK, DHV) or SPAN < NT, backward=False)
    starts = starts_of_spans(k, v, rows, decay, state[0], SPAN, backward=False)
    if is_wide(DQK, DHV):
        scores_tile_kernel[(NT * BH,)](
            q, k, n, rows, P, S, *q.stride()[:3], *k.stride()[:3], T, NT, NH, DQK, BLOCK,
            **TILE,
        )  # fmt: skip
        read_rows = with_normalizer(rows, S, T, NT, False)
        walk_along_keys(q, k, v, h, P, read_rows, decay, starts, C_T, borders, None, SPAN, backward=False)
    else:
        o = keys_options(DQK, DHV)
        keys, values = (lambda x: describe(x, o["BK"])), (lambda x: describe(x, o["BV"]))
        state_times_keys_kernel[(tiles * ceil_div(NT, SPAN) * BH,)](
            keys(q), keys(k), values(v), values(h), describe(rows, BLOCK, 8),
            decay, starts, C_T, n, S, borders, None, T, NT, NH, BH, SPAN, SPAN < NT, BACKWARD=False, **o,
        )  # fmt: skip
    final = (C_T, n[:, :, -1].clone(), m[:, :, -1].clone()) if return_state else _no_state(q)
    return h, *final, *saved


def launch_backward(
    dh: Tensor, dC_T: Tensor | None, dn_T: Tensor | None, dm_T: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None,
    C_T: Tensor, rows: Tensor, decay: Tensor, n: Tensor, S: Tensor, borders: Tensor, P: Tensor, assume_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, di, df, dC_0, dn_0, dm_0."""
    (B, NH, T, DQK), DHV = q.shape, v.shape[-1]
    BH, NT = B * NH, ceil_div(T, BLOCK)
    dq, dk, dv, di, df = (torch.empty_like(x) for x in (q, k, v, i, f))
    if dh.numel() == 0:
        dstate = _empty_state(q, v) if dC_T is None else (x.clone() for x in (dC_T, dn_T, dm_T))
        return dq, dk, dv, di, df, *dstate

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    dh = dh if copy_engine_reads(dh) and dh.data_ptr() % 16 == 0 else dh.clone(memory_format=torch.contiguous_format)
    C_0, dC_T = (None if C is None else C.contiguous() for C in (C_0, dC_T))
    dC_0, wide = None if C_0 is None else empty(B, NH, DQK, DHV), is_wide(DQK, DHV)
    rows = with_normalizer(rows, S, T, NT, assume_norm)

    # dv, with <C, dC> at the borders
    BV, _ = keys_tile(DQK, DHV)
    tiles_v = ceil_div(DHV, BV)
    SPAN = span_of(q, NT, tiles_v)
    ends = starts_of_spans(q, dh, rows, decay, dC_T, SPAN, backward=True)
    parts_v = tiles_v * (BV // 64 if wide else 1)
    carry = empty(parts_v, B, NH, borders.shape[2] + 2)
    if wide:
        walk_along_keys(k, q, dh, dv, P, rows, decay, ends, dC_0, borders, carry, SPAN, backward=True)
    else:
        o = keys_options(DQK, DHV)
        keys, values = (lambda x: describe(x, o["BK"])), (lambda x: describe(x, o["BV"]))
        state_times_keys_kernel[(tiles_v * ceil_div(NT, SPAN) * BH,)](
            keys(k), keys(q), values(dh), values(dv), describe(rows, BLOCK, 8), decay, ends, dC_0, None, None,
            borders, carry, T, NT, NH, BH, SPAN, False, BACKWARD=True, **o,
        )  # fmt: skip

    # dq and delta
    p = walk_options(DQK, DHV, DQK, DHV) if wide else dq_options(DQK, DHV)
    tiles = ceil_div(DQK, p["BR"]) * ceil_div(DHV, p["BC"]) if wide else 1
    starts, SPAN_DQ = C_0, span_of(q, NT, tiles, BORDER)
    if SPAN_DQ < NT:  # the states that the spans start from are among those at the borders
        starts = empty(B, NH, ceil_div(NT, SPAN_DQ), DQK, DHV)
        starts[:, :, 0] = 0 if C_0 is None else C_0
        every = SPAN_DQ // BORDER
        starts[:, :, 1:] = borders[:, :, every - 1 :: every, :DHV, :DQK].mT
    q_dq = empty(B, NH, T)
    if wide:
        y = walk_along_values(dh, v, k, rows, decay, starts, SPAN_DQ, backward=False)
        dq_tile_kernel[(NT * BH,)](
            dh, k, v, q, y, n, rows, dq, q_dq, *dh.stride()[:3], *k.stride()[:3], *v.stride()[:3], *q.stride()[:3],
            *dq.stride()[:3], T, NT, NH, y.stride(0), DQK, DHV, len(y), BLOCK, **TILE,
        )  # fmt: skip
        del y  # of heads of 256/512 it is twice as large as q and k together: not to be kept beside that of dk
    else:
        o = values_options(DQK, DHV)
        v_, dh_, rows_ = describe(v, o["BV"]), describe(dh, o["BV"]), describe(rows, BLOCK, 8)
        dq_kernel[(ceil_div(NT, SPAN_DQ) * BH,)](
            dh_, describe(k, p["BK"]), v_, describe(q, p["BK"]), describe(dq, 64), describe(n, p["BK"], 1),
            rows_, rows, q_dq, decay, starts, T, NT, NH, SPAN_DQ, **p,
        )  # fmt: skip

    # dn and dk
    dn, dn_T = torch.empty_like(n), None if dn_T is None else dn_T.contiguous()
    find_vectors(q, rows, decay, dn_T, dn, everywhere=wide or SPAN < NT, backward=True)
    if wide:
        tiles_k = 1
        k_dk_tile, k_dk_state = empty(2, tiles_k, B, NH, T)
        y = walk_along_values(v, dh, q, rows, decay, ends, SPAN, backward=True)
        dk_tile_kernel[(NT * BH,)](
            v, q, dh, k, y, dn, rows, dk, k_dk_tile, k_dk_state,
            *v.stride()[:3], *q.stride()[:3], *dh.stride()[:3], *k.stride()[:3], *dk.stride()[:3],
            T, NT, NH, y.stride(0), DQK, DHV, len(y), BLOCK, **TILE,
        )  # fmt: skip
    else:
        tiles_k = ceil_div(DQK, o["BK"])
        k_dk_tile, k_dk_state = empty(2, tiles_k, B, NH, T)
        dk_kernel[(tiles_k * ceil_div(NT, SPAN) * BH,)](
            v_, describe(q, o["BK"]), dh_, describe(k, o["BK"]), describe(dk, o["BK"]), rows_, dn,
            k_dk_tile, k_dk_state, decay, ends, T, NT, NH, BH, SPAN, SPAN < NT, **o,
        )  # fmt: skip

    # m is a gauge: it has no gradient of its own, but <C'_0, dC'_0>, and the rest of m_T's if there is one.
    # In float64, so that how PyTorch adds, which depends on the size of a batch, does not show in float32.
    def product(x: Tensor, dx: Tensor, dims: int) -> Tensor:
        return (x * dx).sum(dim=tuple(range(-dims, 0)), dtype=torch.float64)

    dstate, di_rest, df_bar_rest = _no_state(q), None, None
    carry[..., :: borders.shape[2] + 1] = 0  # at both ends of the sequence, where there is no state
    if C_0 is not None:
        dn_0 = dn[:, :, 0].clone()
        overlap = product(C_0, dC_0, 2)
        carry[0, ..., 0] = overlap
        dstate = dC_0, dn_0, (overlap + product(n_0, dn_0, 1)).float()
    if dC_T is not None:
        overlap = product(C_T, dC_T, 2)
        carry[0, ..., -1] = overlap
        dm_rest = dm_T - (overlap + product(n[:, :, -1], dn_T, 1)).float()
        m_first = torch.zeros_like(dm_T) if m_0 is None else m_0
        di_rest, df_bar_rest, dm_0_rest = stabilizer_gradient(i.double(), f.double(), m_first, dm_rest)
        di_rest, df_bar_rest = di_rest.float().contiguous(), df_bar_rest.float().contiguous()
        if C_0 is not None:
            dstate = *dstate[:2], dstate[2] + dm_0_rest
    dgates_kernel[(ceil_div(NT, BORDER) * BH,)](
        f, decay, n, dn, q_dq, k_dk_tile, k_dk_state, carry, di_rest, df_bar_rest, di, df,
        *f.stride(), *di.stride(), *df.stride(),
        T, NT, NH, BH, DQK, tiles_k, parts_v, BORDER, BLOCK, power_of_2(DQK), num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, di, df, *dstate


# torch.compile sees each of the two as one operation that it need not look into.
forward_op = torch.library.custom_op("tfla::mlstm_hopper", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("tfla::mlstm_hopper_backward", launch_backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, i, f, C_0, n_0, m_0, assume_norm, return_state):
    saved = (q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(q, v))
    return torch.empty_like(v), *(_empty_state(q, v) if return_state or v.numel() == 0 else _no_state(q)), *saved


@backward_op.register_fake
def _(dh, dC_T, dn_T, dm_T, q, k, v, i, f, C_0, *_):
    dstate = _no_state(q) if C_0 is None and dh.numel() > 0 else _empty_state(q, v)
    return *(torch.empty_like(x) for x in (q, k, v, i, f)), *dstate


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.assume_norm, ctx.return_state = inputs
    _, C_T, _, _, *saved = output
    ctx.save_for_backward(*tensors, C_T, *saved)
    ctx.set_materialize_grads(False)  # a state that nobody used has the gradient None, and needs no work


def backward(ctx, dh, dC_T, dn_T, dm_T, *_):
    q, k, v, i, f, C_0, *rest = ctx.saved_tensors
    dstate = [dC_T, dn_T, dm_T] if ctx.return_state else [None] * 3  # what stands in a state's place has no gradient
    if any(x is not None for x in dstate):
        dstate = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(_empty_state(q, v), dstate, strict=True)]
    dh = torch.zeros_like(v) if dh is None else dh
    gradients = backward_op(dh, *dstate, q, k, v, i, f, C_0, *rest, ctx.assume_norm)
    return *gradients[:5], *(gradients[5:] if C_0 is not None else (None, None, None)), None, None


forward_op.register_autograd(backward, setup_context=setup_context)


# same as 02_parallel/mlstm_parallel.py::stabilizer_gradient
def stabilizer_gradient(i: Tensor, f: Tensor, m_0: Tensor, dm_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient that reaches i, log sigmoid(f) and m_0 through the returned m_T itself.

    h and everything computed from a state in a way that respects the gauge of (C, n, m) give dm_rest = 0. Otherwise it
    belongs to the largest log-weight at step T, which m_T is: that of one step j, or of the initial state.
    """
    f_bar = F.logsigmoid(f)
    behind = F.pad(f_bar[..., 1:].flip(-1).cumsum(dim=-1).flip(-1), (0, 1))  # sum over r > j
    log_weight_0 = behind[..., :1] + f_bar[..., :1] + m_0[..., None]
    candidates = torch.cat([log_weight_0, behind + i], dim=-1)
    winner = candidates.argmax(dim=-1, keepdim=True)
    dm_rest = torch.where(candidates.gather(-1, winner) > -torch.inf, dm_rest[..., None], 0)  # else m_T = 0, a constant
    step = torch.arange(1, i.shape[-1] + 1, device=i.device)
    rest_i, rest_f = torch.where(step == winner, dm_rest, 0), torch.where(step > winner, dm_rest, 0)
    return rest_i, rest_f, torch.where(winner == 0, dm_rest, 0)[..., 0]


def mlstm_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: State | None = None,
    return_state: bool = False,
    assume_norm: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM (paper section 2) on a Hopper GPU, in bfloat16.

    There is no chunk_size: a sequence is walked along in tiles of 64 steps, in spans where there are few sequences.

    Args:
        q, k: queries and keys, (B, NH, T, DQK), bfloat16; DQK <= 256. Any B >= 0, NH >= 1, T >= 0. The last dimension
            must be contiguous; the others may be strided, a transposed (B, T, NH, DQK) is not copied. As the GPU's copy
            engine wants it, DQK, DHV, and all strides must be multiples of 8, and data begin at a multiple of 16 bytes.
        v: values, (B, NH, T, DHV), bfloat16; DHV <= 512.
        i, f: gate pre-activations, (B, NH, T), bfloat16 or float32, any strides. -inf is allowed in both:
            f = -inf forgets everything before the step, i = -inf writes nothing.
        initial_state: (C, n, m), (B, NH, DQK, DHV), (B, NH, DQK), (B, NH), float32; None is the empty memory,
            C = 0, n = 0, m = 0.
        return_state: also return the state after the last step, in float32.
        assume_norm: leave the normalizer's gradient out, as mlstm_tfla can; here that saves no time. It is right only
            where this gradient, dh . h at the steps at which |n . s q| > e^(-m), vanishes: if nothing reads h but a
            norm that ignores the scale of its input (RMSNorm or LayerNorm over each head, with an eps far below h's
            own mean square). Otherwise dq, dk, di and df are wrong. dv is right in any case.

    Returns:
        h, (B, NH, T, DHV) in the dtype and memory layout of v; with return_state the pair (h, (C, n, m)).
        Differentiable once in q, k, v, i, f and the initial state, exactly, and deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state)
    _check_hopper(q, k, v)
    if not isinstance(assume_norm, bool):
        raise TypeError(f"assume_norm must be True or False, got {assume_norm!r}")
    C_0, n_0, m_0 = (None, None, None) if initial_state is None else initial_state
    h, C, n, m, *_ = forward_op(q, k, v, i, f, C_0, n_0, m_0, assume_norm, return_state)
    return (h, (C, n, m)) if return_state else h


# same as 02_parallel/mlstm_parallel.py::_empty_state
def _empty_state(q: Tensor, v: Tensor) -> State:
    """The memory before anything was written."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return tuple(torch.zeros(shape, dtype=dtype, device=q.device) for shape in _state_shapes(q, v))


def _no_state(q: Tensor) -> State:
    """In place of a state, or of its gradient, that nobody asked for: in short sequences it is much to write."""
    return tuple(torch.empty(0, dtype=torch.float32, device=q.device) for _ in range(3))


# same as 02_parallel/mlstm_parallel.py::_state_shapes
def _state_shapes(q: Tensor, v: Tensor) -> list[tuple[int, ...]]:
    B, NH, _, DQK = q.shape
    return [(B, NH, DQK, v.shape[-1]), (B, NH, DQK), (B, NH)]


# same as 02_parallel/mlstm_parallel.py::_check_inputs
def _check_inputs(q, k, v, i, f, initial_state) -> None:
    """Raises an error that names the argument, what it was and what it must be."""
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape (B, NH, T, D) with NH >= 1 and D >= 1, got {tuple(x.shape)}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    expected = [("k", k, q.shape, (q.dtype,)), ("v", v, (*q.shape[:-1], v.shape[-1]), (q.dtype,))]
    expected += [(name, x, q.shape[:-1], (q.dtype, torch.float32)) for name, x in (("i", i), ("f", f))]
    if initial_state is not None:
        if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 3:
            raise TypeError(f"initial_state must be a tuple (C, n, m), got {type(initial_state).__name__}")
        state_dtype = torch.promote_types(q.dtype, torch.float32)
        for part, x, shape in zip("Cnm", initial_state, _state_shapes(q, v), strict=True):
            expected.append((f"initial_state's {part}", x, shape, (state_dtype,)))
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
        raise TypeError(f"q must be bfloat16, got {q.dtype}; mlstm_tfla.py takes others")
    for name, x, most in (("q", q, 256), ("v", v, 512)):
        if x.shape[-1] > most or x.shape[-1] % 8:
            raise ValueError(
                f"{name} must have at most {most} columns, a multiple of 8, got {x.shape[-1]}; "
                "mlstm_tfla.py takes others"
            )
    if is_wide(q.shape[-1], v.shape[-1]) and q.shape[2] >= 2**23:  # the walk counts in 32 bits
        raise ValueError(
            f"q must have fewer than 2^23 steps in heads so wide, got {q.shape[2]}; mlstm_tfla.py takes more"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() > 0 and not copy_engine_reads(x):
            raise ValueError(
                f"{name} must be contiguous in its last dimension and have strides of multiples of 8, "
                f"got strides {x.stride()}; mlstm_tfla.py takes others"
            )


def _check_device(q, k, v) -> None:
    """What can be asked of a tensor only when the kernels are launched: torch.compile's have no place in memory."""
    if q.device.type != "meta" and (q.device.type != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9):
        raise ValueError(f"q must be on a Hopper GPU (H100, H200), got {q.device}; mlstm_tfla.py runs elsewhere")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes, got address {x.data_ptr()}")
