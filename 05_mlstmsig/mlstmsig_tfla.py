"""Stage 05: Tiled Flash Linear Attention for the mLSTM with a sigmoid input gate, in Triton, forward and backward.

The input gate is a sigmoid here, so every weight is at most 1. None can overflow: there is no stabilizer m, no
normalizer n, and no max over them (TFLA, arXiv 2503.14376, section 4). Functions have the names and the order of stage
04's mlstm_tfla.py, so that a diff of the two files shows what the sigmoid saves:

    C_c = decay C_{c-1} + (w_end * K)^T V             between chunks
    H   = P V + w_read * (Q C_{c-1})                  within a chunk
    P   = Q K^T * Wr

    forward     gates_kernel -> states_kernel -> h_kernel
    backward    dq_kernel, dstates_kernel -> dk_kernel, dv_kernel -> dgates_kernel

Glossary (name in code = symbol = shape; L steps in a chunk, NC chunks, rows i and columns j of a chunk):
    start    where in the chunk step i's document begins; -1: before it  (B, NH, T)  int32
    b        sum_{r<=i} log sigmoid(f_r) since the chunk began, without resets; not stored
    w_row    log s + b                                            (B, NH, T, 2)  in two float32 parts
    u        log sigmoid(i_j) - b_j                               (B, NH, T, 2)  in two float32 parts
    Wr       s * gate weights, Wr_ij = e^(w_row_i + u_j)          (tiles of L x L)
    w_read   e^(w_row), s * weight of the chunk's first state in step i
    g        b at the chunk's last step, in two parts
    w_end    e^(g + u_j), weight of step j in the next state: the last row of Wr, without s
    decay    e^g, weight of the chunk's first state in the next
    C        the state that each chunk starts from                (B, NH, NC, DQK, DHV)
    dC       the gradient of the state that each chunk ends with  (B, NH, NC, DQK, DHV)
    X        gradient of log Wr_ij                                (tiles of L x L)

Precision: sums over gates are float64, all other sums float32. bfloat16 inputs are multiplied in bfloat16, float16 ones
as TF32 (float16's digits with the range that products with gate weights need), float32 ones as three TF32 products.

Below the kernels for training stands decode_kernel, one step of the recurrence for generation.

Copy this file: it needs torch and triton.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "mlstmsig_tfla.py needs Triton, which comes with PyTorch on Linux. "
        "mlstmsig_reference.py beside it computes the same without it."
    ) from error

__all__ = ["mlstmsig_decode_step", "mlstmsig_tfla"]

State = tuple[Tensor]

# Triton's interpreter (TRITON_INTERPRET=1, for machines without a GPU) cannot multiply bfloat16.
INTERPRETED = triton.knobs.runtime.interpret
# A forget gate below this, f = -inf above all, begins a new document. It is left out of the sums, and the masks keep
# the old document out: exactly, where inf - inf would be NaN.
LOG_FORGOTTEN = tl.constexpr(-1e7)
NO_START = tl.constexpr(2**30)


# ---------------------------------------------------------------------------------------------------------------------
# Small pieces that several kernels share
# ---------------------------------------------------------------------------------------------------------------------
# same as 03_chunkwise/mlstm_limit_chunk.py::load_tile
@triton.jit
def load_tile(ptr, rows, cols, stride_row, n_rows, n_cols):
    """The tile x[rows, cols] of a matrix with n_rows x n_cols entries; 0 outside of it."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)


# same as 03_chunkwise/mlstm_limit_chunk.py::store_tile
@triton.jit
def store_tile(ptr, x, rows, cols, stride_row, n_rows, n_cols):
    """x[rows, cols] = the tile x, rounded to what ptr points to; nothing is written outside of the matrix."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(ptr + rows[:, None] * stride_row + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


# same as 03_chunkwise/mlstm_limit_chunk.py::head
@triton.jit
def head(ptr, bh, NH, stride_b, stride_h):
    """Where head bh = b * NH + h of a (B, NH, ...) tensor begins."""
    return ptr + bh // NH * stride_b + bh % NH * stride_h


# same as 03_chunkwise/mlstm_limit_chunk.py::operand
@triton.jit
def operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x as the matrix unit takes it. For TF32 it is rounded to 10 bits here; the hardware would cut the others off."""
    if PRECISION == "tf32":
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(DOT)


# same as 04_tfla_triton/mlstm_tfla.py::tile_of_program
@triton.jit
def tile_of_program(TILES, T, BLOCK):
    """(tile of the head dimension, tile of steps, head). Neighbours share q, k, v in the L2 cache."""
    program, steps = tl.program_id(0), tl.cdiv(T, BLOCK)
    return program % TILES, program // TILES % steps, (program // TILES // steps).to(tl.int64)


# same as 04_tfla_triton/mlstm_tfla.py::add_other_tiles
@triton.jit
def add_other_tiles(
    acc, x_ptr, y_ptr, rows_x, rows_y, stride_x, stride_y, n_x, n_y, D, own,
    TILES: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + X Y^T over all tiles of the head dimension D but the one called own, which the caller has added.

    With TILES = 1, as in heads of usual size, nothing is left to do, and the compiler drops the loop.
    """
    for other in range(1, TILES):
        offs_d = (own + other) % TILES * BLOCK + tl.arange(0, BLOCK)
        x = load_tile(x_ptr, rows_x, offs_d, stride_x, n_x, D)
        y = load_tile(y_ptr, rows_y, offs_d, stride_y, n_y, D)
        acc = tl.dot(operand(x, DOT, PRECISION), tl.trans(operand(y, DOT, PRECISION)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_row_gates(start_ptr, w_row_ptr, offs_gate, mask):
    """Of some rows: start, w_row in two parts, and w_read."""
    start = tl.load(start_ptr + offs_gate, mask=mask, other=NO_START)  # past T: a row that sees no column
    w_row, w_row_rest = load_two_parts(w_row_ptr, offs_gate, mask)
    return start, w_row, w_row_rest, tl.exp(tl.where(start < 0, w_row + w_row_rest, -float("inf")))


@triton.jit
def load_border(start_ptr, w_row_ptr, s, offs_last):
    """Of a chunk's last step: start, g in two parts, and decay."""
    start = tl.load(start_ptr + offs_last)
    w_row, w_row_rest = tl.load(w_row_ptr + 2 * offs_last), tl.load(w_row_ptr + 2 * offs_last + 1)
    # log s is taken out before exp: rounded into decay, it would add up over the chunks. In float64: from a large sum
    # in float32 it could not be taken exactly.
    log_s = tl.log(tl.full((), 1.0, dtype=tl.float64) * s)
    g, g_rest = two_parts(w_row.to(tl.float64) + w_row_rest.to(tl.float64) - log_s)
    return start, g, g_rest, tl.exp(tl.where(start < 0, g + g_rest, -float("inf")))


# same as 04_tfla_triton/mlstm_tfla.py::two_parts
@triton.jit
def two_parts(x):
    """x in float64 as the sum of two float32: multiples of 1/64, which add up without rounding, and what is left."""
    x = tl.where(x < -1e30, -1e30, x)  # -inf would leave inf - inf; tl.maximum would hide NaN
    high = (tl.floor(x * 64.0) / 64.0).to(tl.float32)
    return high, (x - high).to(tl.float32)


# same as 04_tfla_triton/mlstm_tfla.py::load_two_parts
@triton.jit
def load_two_parts(ptr, offs, mask):
    """A value that was stored by store_two_parts; far below everything outside of the mask."""
    return tl.load(ptr + 2 * offs, mask=mask, other=-1e30), tl.load(ptr + 2 * offs + 1, mask=mask, other=0.0)


# same as 04_tfla_triton/mlstm_tfla.py::store_two_parts
@triton.jit
def store_two_parts(ptr, x, offs, mask):
    high, rest = two_parts(x)
    tl.store(ptr + 2 * offs, high, mask=mask)
    tl.store(ptr + 2 * offs + 1, rest, mask=mask)


@triton.jit
def end_weights(start, g, g_rest, u, u_rest, offs_j):
    """w_end of the columns: e^(g + u_j), 0 for those of documents that ended before the chunk does."""
    return tl.exp(tl.where(offs_j >= start, (g + u) + (g_rest + u_rest), -float("inf")))


# same as 04_tfla_triton/mlstm_tfla.py::gate_weights
@triton.jit
def gate_weights(start, row, row_rest, u, u_rest, offs_i, offs_j):
    """The tile e^(row_i + u_j) for start_i <= j <= i, else 0. The exponent is masked: elsewhere it may be huge."""
    mask = (offs_i[:, None] >= offs_j[None, :]) & (offs_j[None, :] >= start[:, None])
    exponent = (row[:, None] + u[None, :]) + (row_rest[:, None] + u_rest[None, :])
    return tl.exp(tl.where(mask, exponent, -float("inf")))


# same as 04_tfla_triton/mlstm_tfla.py::gate_weights_transposed
@triton.jit
def gate_weights_transposed(start, row, row_rest, u, u_rest, offs_i, offs_j):
    """The same tile with steps j as rows and i as columns."""
    mask = (offs_i[None, :] >= offs_j[:, None]) & (offs_j[:, None] >= start[None, :])
    exponent = (row[None, :] + u[:, None]) + (row_rest[None, :] + u_rest[:, None])
    return tl.exp(tl.where(mask, exponent, -float("inf")))


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def log_sigmoid(x):
    """In float64, where nothing visible is lost in 1 + e^-|x|."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def join_stretches(start_1, start_2):
    """Of two stretches of steps, one after the other: where the last document began."""
    return tl.maximum(start_1, start_2)


@triton.jit
def gates_kernel(
    i_ptr, f_ptr, start_ptr, w_row_ptr, u_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    T, NC, NH, L, s, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """start, w_row and u of one chunk. Grid: NC * B * NH. Loop: over the chunk's steps, BLOCK_L at a time."""
    bh, c = (tl.program_id(0) // NC).to(tl.int64), tl.program_id(0) % NC
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    start_before, b_before = tl.full((), -1, dtype=tl.int32), tl.full((), 0.0, dtype=tl.float64)
    log_s = tl.log(tl.full((), 1.0, dtype=tl.float64) * s)
    for first in range(0, tl.minimum(L, T - c * L), BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_t = (c * L + offs_l).to(tl.int64)
        mask = (offs_t < T) & (offs_l < L)
        i = tl.load(i_ptr + offs_t * stride_it, mask=mask, other=-float("inf")).to(tl.float64)
        f = tl.load(f_ptr + offs_t * stride_ft, mask=mask, other=float("inf")).to(tl.float64)

        f_bar = log_sigmoid(f)
        reset = f_bar < LOG_FORGOTTEN
        b = b_before + tl.cumsum(tl.where(reset, 0.0, f_bar), 0)
        start = tl.associative_scan(tl.where(reset, offs_l, -1), 0, join_stretches)
        start = join_stretches(start_before, start)

        offs_gate = bh * T + offs_t
        tl.store(start_ptr + offs_gate, start, mask=mask)
        store_two_parts(w_row_ptr, log_s + b, offs_gate, mask)
        store_two_parts(u_ptr, log_sigmoid(i) - b, offs_gate, mask)

        last = tl.arange(0, BLOCK_L) == BLOCK_L - 1
        start_before, b_before = tl.max(start, axis=0), tl.sum(tl.where(last, b, 0.0), axis=0)


@triton.jit
def states_kernel(
    k_ptr, v_ptr, start_ptr, w_row_ptr, u_ptr, C_0_ptr, C_ptr, C_T_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    T, NC, NH, L, s,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that every chunk starts from. A program owns one tile of C and walks with it over all steps, in order.

    C (DQK x DHV)        grid: B * NH, tiles of C
    +---+---+---+---+    loop over chunks:
    |   | x |   |   |      store C; C <- decay * C
    +---+---+---+---+      loop over the chunk's tiles of steps: C += (w_end * K)^T V
    |   |   |   |   |    store C in float32: the final state
    +---+---+---+---+
    """
    bh = tl.program_id(0).to(tl.int64)
    tile_k, tile_v = tl.program_id(1) // tl.cdiv(DHV, BLOCK_DHV), tl.program_id(1) % tl.cdiv(DHV, BLOCK_DHV)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    k_ptr, v_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh), head(v_ptr, bh, NH, stride_vb, stride_vh)
    C_ptr, C_T_ptr = C_ptr + bh * NC * DQK * DHV, C_T_ptr + bh * DQK * DHV

    if C_0_ptr is None:
        C = tl.zeros((BLOCK_DQK, BLOCK_DHV), dtype=tl.float32)
    else:
        C = load_tile(C_0_ptr + bh * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)

    for c in range(NC):
        store_tile(C_ptr, C, offs_k, offs_v, DHV, DQK, DHV)
        C_ptr += DQK * DHV
        steps = tl.minimum(L, T - c * L)
        start, g, g_rest, decay = load_border(start_ptr, w_row_ptr, s, bh * T + c * L + steps - 1)
        C = C * decay
        for first in range(0, steps, BLOCK_L):
            offs_l = first + tl.arange(0, BLOCK_L)
            offs_t = (c * L + offs_l).to(tl.int64)
            u, u_rest = load_two_parts(u_ptr, bh * T + offs_t, offs_t < T)
            w_end = end_weights(start, g, g_rest, u, u_rest, offs_l)
            k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(tl.float32) * w_end[:, None]
            v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_L, BLOCK_DHV)
            C = tl.dot(tl.trans(operand(k, DOT, PRECISION)), v, C, input_precision=PRECISION)
    store_tile(C_T_ptr, C, offs_k, offs_v, DHV, DQK, DHV)


@triton.jit
def h_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, w_row_ptr, u_ptr, C_ptr, h_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_hb, stride_hh, stride_ht,
    T, NC, NH, L,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of one tile of steps and columns. Grid: (tiles of DHV) * (tiles of T) * B * NH.

    P (L x L)            V (L x DHV)      h = w_read * (Q C)
    +---+---+---+        +---+---+        loop over the tiles j of the row, up to the diagonal:
    |   |   |   |        |   | j |          P = Q K^T * Wr,  h += P V
    +---+---+---+        +---+---+
    | j | j |   |   @    |   | j |
    +---+---+---+        +---+---+        Tiles above the diagonal are never visited. Q stays on chip.
    |   |   |   |        |   |   |
    +---+---+---+        +---+---+
    """
    tile_v, tile, bh = tile_of_program(tl.cdiv(DHV, BLOCK_DHV), T, BLOCK_LQ)
    c = tile * BLOCK_LQ // L
    offs_i = tile * BLOCK_LQ - c * L + tl.arange(0, BLOCK_LQ)  # rows, counted within the chunk
    offs_ti = (c * L + offs_i).to(tl.int64)
    offs_k, offs_v = tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr, h_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh), head(h_ptr, bh, NH, stride_hb, stride_hh)
    TILES_K: tl.constexpr = (DQK + BLOCK_DQK - 1) // BLOCK_DQK

    C_ptr += (bh * NC + c) * DQK * DHV
    start, w_row, w_row_rest, w_read = load_row_gates(start_ptr, w_row_ptr, bh * T + offs_ti, offs_ti < T)
    q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK)  # (BLOCK_LQ, BLOCK_DQK)
    C = load_tile(C_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    h = tl.dot(q.to(DOT), operand(C, DOT, PRECISION), input_precision=PRECISION)  # (BLOCK_LQ, BLOCK_DHV)
    for other in range(1, TILES_K):
        offs_d = other * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
        q_d = load_tile(q_ptr, offs_ti, offs_d, stride_qt, T, DQK)
        C = load_tile(C_ptr, offs_d, offs_v, DHV, DQK, DHV)
        h = tl.dot(q_d.to(DOT), operand(C, DOT, PRECISION), h, input_precision=PRECISION)
    h = h * w_read[:, None]

    for first in range(0, tile * BLOCK_LQ - c * L + BLOCK_LQ, BLOCK_LKV):
        offs_j = first + tl.arange(0, BLOCK_LKV)
        offs_tj = (c * L + offs_j).to(tl.int64)
        k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(DOT)  # (BLOCK_LKV, BLOCK_DQK)
        scores = tl.dot(q.to(DOT), tl.trans(k), input_precision=PRECISION)
        scores = add_other_tiles(
            scores, q_ptr, k_ptr, offs_ti, offs_tj, stride_qt, stride_kt, T, T, DQK, 0,
            TILES_K, BLOCK_DQK, DOT, PRECISION,
        )  # fmt: skip
        u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
        P = scores * gate_weights(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LQ, BLOCK_LKV)
        v = load_tile(v_ptr, offs_tj, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_LKV, BLOCK_DHV)
        h = tl.dot(operand(P, DOT, PRECISION), v, h, input_precision=PRECISION)
    store_tile(h_ptr, h, offs_ti, offs_v, stride_ht, T, DHV)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, w_row_ptr, u_ptr, C_ptr, dq_ptr, q_dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, L,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of steps and columns. Grid: (tiles of DQK) * (tiles of T) * B * NH.

    The tiles of the row are visited as in h_kernel, once: without a normalizer there is no delta to be found first.

      dq = w_read * (dH C^T)
      dq += dP K,    dP = dH V^T * Wr

    q . dq goes to dgates_kernel, from the accumulator, before dq is rounded.
    """
    tile_k, tile, bh = tile_of_program(tl.cdiv(DQK, BLOCK_DQK), T, BLOCK_LQ)
    c = tile * BLOCK_LQ // L
    offs_i = tile * BLOCK_LQ - c * L + tl.arange(0, BLOCK_LQ)
    offs_ti = (c * L + offs_i).to(tl.int64)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tl.arange(0, BLOCK_DHV)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr, dh_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh), head(dh_ptr, bh, NH, stride_gb, stride_gh)
    dq_ptr = head(dq_ptr, bh, NH, stride_db, stride_dh)
    TILES_K: tl.constexpr = (DQK + BLOCK_DQK - 1) // BLOCK_DQK
    TILES_V: tl.constexpr = (DHV + BLOCK_DHV - 1) // BLOCK_DHV

    C_ptr += (bh * NC + c) * DQK * DHV
    start, w_row, w_row_rest, w_read = load_row_gates(start_ptr, w_row_ptr, bh * T + offs_ti, offs_ti < T)
    dh = load_tile(dh_ptr, offs_ti, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_LQ, BLOCK_DHV)
    C = load_tile(C_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    dq = tl.dot(dh, tl.trans(operand(C, DOT, PRECISION)), input_precision=PRECISION)
    dq = add_other_tiles(
        dq, dh_ptr, C_ptr, offs_ti, offs_k, stride_gt, DHV, T, DQK, DHV, 0, TILES_V, BLOCK_DHV, DOT, PRECISION
    )
    dq = dq * w_read[:, None]

    for first in range(0, tile * BLOCK_LQ - c * L + BLOCK_LQ, BLOCK_LKV):
        offs_j = first + tl.arange(0, BLOCK_LKV)
        offs_tj = (c * L + offs_j).to(tl.int64)
        v = load_tile(v_ptr, offs_tj, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_LKV, BLOCK_DHV)
        dP = tl.dot(dh, tl.trans(v), input_precision=PRECISION)
        dP = add_other_tiles(
            dP, dh_ptr, v_ptr, offs_ti, offs_tj, stride_gt, stride_vt, T, T, DHV, 0,
            TILES_V, BLOCK_DHV, DOT, PRECISION,
        )  # fmt: skip
        u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
        dP *= gate_weights(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LQ, BLOCK_LKV)
        k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(DOT)  # (BLOCK_LKV, BLOCK_DQK)
        dq = tl.dot(operand(dP, DOT, PRECISION), k, dq, input_precision=PRECISION)

    store_tile(dq_ptr, dq, offs_ti, offs_k, stride_dt, T, DQK)
    q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK).to(tl.float32)  # (BLOCK_LQ, BLOCK_DQK)
    BH = tl.num_programs(0) // TILES_K // tl.cdiv(T, BLOCK_LQ)
    tl.store(q_dq_ptr + (tile_k.to(tl.int64) * BH + bh) * T + offs_ti, tl.sum(q * dq, axis=1), mask=offs_ti < T)


@triton.jit
def dstates_kernel(
    q_ptr, dh_ptr, start_ptr, w_row_ptr, C_ptr, dC_T_ptr, dC_ptr, carry_ptr, dC_0_ptr,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
    T, NC, NH, L, s,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that every chunk ends with: states_kernel run backwards.

    dC (DQK x DHV)       grid: B * NH, tiles of dC
    +---+---+---+---+    loop over chunks, the last one first:
    |   | x |   |   |      store dC; carry = decay * <C, dC>, C the state that the chunk starts from
    +---+---+---+---+      dC <- decay * dC
    |   |   |   |   |      loop over the chunk's tiles of steps: dC += (w_read * Q)^T dH
    +---+---+---+---+    store dC in float32: the gradient of the initial state
    """
    bh = tl.program_id(0).to(tl.int64)
    tile_k, tile_v = tl.program_id(1) // tl.cdiv(DHV, BLOCK_DHV), tl.program_id(1) % tl.cdiv(DHV, BLOCK_DHV)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    q_ptr, dh_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(dh_ptr, bh, NH, stride_gb, stride_gh)
    border = (bh * NC + NC - 1) * DQK * DHV
    C_ptr, dC_ptr = C_ptr + border, dC_ptr + border
    carry_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + bh) * NC

    if dC_T_ptr is None:
        dC = tl.zeros((BLOCK_DQK, BLOCK_DHV), dtype=tl.float32)
    else:
        dC = load_tile(dC_T_ptr + bh * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)

    for chunks_done in range(NC):
        c = NC - 1 - chunks_done
        store_tile(dC_ptr, dC, offs_k, offs_v, DHV, DQK, DHV)
        steps = tl.minimum(L, T - c * L)
        _start, _g, _g_rest, decay = load_border(start_ptr, w_row_ptr, s, bh * T + c * L + steps - 1)
        C = load_tile(C_ptr, offs_k, offs_v, DHV, DQK, DHV).to(tl.float32)
        tl.store(carry_ptr + c, decay * tl.sum(tl.sum(C * dC, axis=1), axis=0))
        C_ptr, dC_ptr = C_ptr - DQK * DHV, dC_ptr - DQK * DHV

        dC = dC * decay
        for first in range(0, steps, BLOCK_L):
            offs_t = (c * L + first + tl.arange(0, BLOCK_L)).to(tl.int64)
            _start_i, _w_row_i, _w_row_rest_i, w_read = load_row_gates(
                start_ptr, w_row_ptr, bh * T + offs_t, offs_t < T
            )
            q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(tl.float32) * w_read[:, None]
            dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_L, BLOCK_DHV)
            dC = tl.dot(tl.trans(operand(q, DOT, PRECISION)), dh, dC, input_precision=PRECISION)
    store_tile(dC_0_ptr + bh * DQK * DHV, dC, offs_k, offs_v, DHV, DQK, DHV)


@triton.jit
def dk_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, w_row_ptr, u_ptr, dC_ptr, dk_ptr, k_dk_ptr, X_column_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, L, s,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one tile of steps and columns. Grid: (tiles of DQK) * (tiles of T) * B * NH.

    P^T (L x L)          Q (L x DQK)      dk = w_end * (V dC^T)
    +---+---+---+        +---+---+        loop over the tiles i of the row, from the diagonal on:
    |   |   |   |        |   |   |          dP^T = V dH^T * Wr^T
    +---+---+---+        +---+---+          dk  += dP^T Q
    |   | i | i |   @    |   | i |
    +---+---+---+        +---+---+        dP^T is formed as it is used, not by turning dP round: some versions of
    |   |   |   |        |   | i |        Triton get that wrong on Hopper.
    +---+---+---+        +---+---+

    k . dk goes to dgates_kernel, the state's part and the rest, which is X's column sums. dP^T is rounded as dq_kernel
    rounds dP: so what the products q . dq and k . dk have in common cancels there, but for rounding in float32 sums.
    """
    tile_k, tile, bh = tile_of_program(tl.cdiv(DQK, BLOCK_DQK), T, BLOCK_LKV)
    c = tile * BLOCK_LKV // L
    first_column = tile * BLOCK_LKV - c * L
    offs_j = first_column + tl.arange(0, BLOCK_LKV)  # columns, counted within the chunk
    offs_tj = (c * L + offs_j).to(tl.int64)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tl.arange(0, BLOCK_DHV)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr, dh_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh), head(dh_ptr, bh, NH, stride_gb, stride_gh)
    dk_ptr = head(dk_ptr, bh, NH, stride_db, stride_dh)
    TILES_K: tl.constexpr = (DQK + BLOCK_DQK - 1) // BLOCK_DQK
    TILES_V: tl.constexpr = (DHV + BLOCK_DHV - 1) // BLOCK_DHV

    dC_ptr += (bh * NC + c) * DQK * DHV
    v = load_tile(v_ptr, offs_tj, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_LKV, BLOCK_DHV)
    dC = load_tile(dC_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    dk = tl.dot(v, tl.trans(operand(dC, DOT, PRECISION)), input_precision=PRECISION)
    dk = add_other_tiles(
        dk, v_ptr, dC_ptr, offs_tj, offs_k, stride_vt, DHV, T, DQK, DHV, 0, TILES_V, BLOCK_DHV, DOT, PRECISION
    )
    steps = tl.minimum(L, T - c * L)
    start_end, g, g_rest, _decay = load_border(start_ptr, w_row_ptr, s, bh * T + c * L + steps - 1)
    u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
    dk = dk * end_weights(start_end, g, g_rest, u, u_rest, offs_j)[:, None]
    k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(tl.float32)  # (BLOCK_LKV, BLOCK_DQK)
    k_dk = tl.sum(k * dk, axis=1)

    for first in range(first_column // BLOCK_LQ * BLOCK_LQ, steps, BLOCK_LQ):
        offs_i = first + tl.arange(0, BLOCK_LQ)
        offs_ti = (c * L + offs_i).to(tl.int64)
        dh = load_tile(dh_ptr, offs_ti, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_LQ, BLOCK_DHV)
        dP_T = tl.dot(v, tl.trans(dh), input_precision=PRECISION)
        dP_T = add_other_tiles(
            dP_T, v_ptr, dh_ptr, offs_tj, offs_ti, stride_vt, stride_gt, T, T, DHV, 0,
            TILES_V, BLOCK_DHV, DOT, PRECISION,
        )  # fmt: skip
        start, w_row, w_row_rest, _w_read = load_row_gates(start_ptr, w_row_ptr, bh * T + offs_ti, offs_ti < T)
        dP_T *= gate_weights_transposed(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LKV, BLOCK_LQ)
        q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK).to(DOT)  # (BLOCK_LQ, BLOCK_DQK)
        dk = tl.dot(operand(dP_T, DOT, PRECISION), q, dk, input_precision=PRECISION)

    store_tile(dk_ptr, dk, offs_tj, offs_k, stride_dt, T, DQK)
    k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(tl.float32)  # again: the loop has no room for it
    X_column = tl.sum(k * dk, axis=1) - k_dk
    BH = tl.num_programs(0) // TILES_K // tl.cdiv(T, BLOCK_LKV)
    offs_column = (tile_k.to(tl.int64) * BH + bh) * T + offs_tj
    tl.store(k_dk_ptr + offs_column, k_dk, mask=offs_tj < T)
    tl.store(X_column_ptr + offs_column, X_column, mask=offs_tj < T)


@triton.jit
def dv_kernel(
    q_ptr, k_ptr, dh_ptr, start_ptr, w_row_ptr, u_ptr, dC_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, L, s,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one tile of steps and columns: h_kernel with rows and columns exchanged.

    P^T (L x L)          dH (L x DHV)     Grid: (tiles of DHV) * (tiles of T) * B * NH.
    +---+---+---+        +---+---+        dv = w_end * (K dC)
    |   |   |   |        |   |   |        loop over the tiles i of the row, from the diagonal on:
    +---+---+---+        +---+---+          dv += (K Q^T * Wr^T) dH
    |   | i | i |   @    |   | i |
    +---+---+---+        +---+---+
    |   |   |   |        |   | i |
    +---+---+---+        +---+---+
    """
    tile_v, tile, bh = tile_of_program(tl.cdiv(DHV, BLOCK_DHV), T, BLOCK_LKV)
    c = tile * BLOCK_LKV // L
    first_column = tile * BLOCK_LKV - c * L
    offs_j = first_column + tl.arange(0, BLOCK_LKV)
    offs_tj = (c * L + offs_j).to(tl.int64)
    offs_k, offs_v = tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    q_ptr, k_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(k_ptr, bh, NH, stride_kb, stride_kh)
    dh_ptr, dv_ptr = head(dh_ptr, bh, NH, stride_gb, stride_gh), head(dv_ptr, bh, NH, stride_db, stride_dh)
    TILES_K: tl.constexpr = (DQK + BLOCK_DQK - 1) // BLOCK_DQK

    dC_ptr += (bh * NC + c) * DQK * DHV
    k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(DOT)  # (BLOCK_LKV, BLOCK_DQK)
    dC = load_tile(dC_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    dv = tl.dot(k, operand(dC, DOT, PRECISION), input_precision=PRECISION)
    for other in range(1, TILES_K):
        offs_d = other * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
        k_d = load_tile(k_ptr, offs_tj, offs_d, stride_kt, T, DQK).to(DOT)
        dC = load_tile(dC_ptr, offs_d, offs_v, DHV, DQK, DHV)
        dv = tl.dot(k_d, operand(dC, DOT, PRECISION), dv, input_precision=PRECISION)

    steps = tl.minimum(L, T - c * L)
    start_end, g, g_rest, _decay = load_border(start_ptr, w_row_ptr, s, bh * T + c * L + steps - 1)
    u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
    dv *= end_weights(start_end, g, g_rest, u, u_rest, offs_j)[:, None]

    for first in range(first_column // BLOCK_LQ * BLOCK_LQ, steps, BLOCK_LQ):
        offs_i = first + tl.arange(0, BLOCK_LQ)
        offs_ti = (c * L + offs_i).to(tl.int64)
        q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK).to(DOT)  # (BLOCK_LQ, BLOCK_DQK)
        P_T = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        P_T = add_other_tiles(
            P_T, k_ptr, q_ptr, offs_tj, offs_ti, stride_kt, stride_qt, T, T, DQK, 0, TILES_K, BLOCK_DQK, DOT, PRECISION
        )
        start, w_row, w_row_rest, _w_read = load_row_gates(start_ptr, w_row_ptr, bh * T + offs_ti, offs_ti < T)
        P_T *= gate_weights_transposed(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LKV, BLOCK_LQ)
        dh = load_tile(dh_ptr, offs_ti, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_LQ, BLOCK_DHV)
        dv = tl.dot(operand(P_T, DOT, PRECISION), dh, dv, input_precision=PRECISION)
    store_tile(dv_ptr, dv, offs_tj, offs_v, stride_dt, T, DHV)


@triton.jit
def sigmoid_minus(x):
    """sigmoid(-x) = d log sigmoid(x) / dx, with all its digits where it is small."""
    return tl.exp(tl.minimum(-x, 0.0)) / (1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def dgates_kernel(
    i_ptr, f_ptr, q_dq_ptr, k_dk_ptr, X_column_ptr, carry_ptr, di_ptr, df_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    stride_dib, stride_dih, stride_dit, stride_dfb, stride_dfh, stride_dft,
    T, NC, NH, L, BH, TILES_K, TILES_C, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """di and df of one chunk. Grid: NC * B * NH. Loops: twice over the chunk's steps, BLOCK_L at a time.

    di_bar is k . dk, X's column sums included. f_t weakens everything that crosses step t, so df_bar_t is the sum over
    all that does:
      state before the chunk, k_j v_j with j < t -> h_r with r >= t     sum over r >= t of q . dq - X's column sums
      k_j v_j with j < t -> state after the chunk                       sum over j < t of the state's part of k . dk
      state before -> state after                                       carry
    As one sum over all later steps of the sequence, of q . dq - k . dk, it would be a small difference of large
    numbers. The parts that the tiles left are added up here, always in the same order.
    """
    bh, c = (tl.program_id(0) // NC).to(tl.int64), tl.program_id(0) % NC
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    di_ptr, df_ptr = head(di_ptr, bh, NH, stride_dib, stride_dih), head(df_ptr, bh, NH, stride_dfb, stride_dfh)

    # df_bar of the chunk's first step: the carry, and all that reaches h.
    df_bar_first = tl.full((), 0.0, dtype=tl.float64)
    for tile in range(TILES_C):
        df_bar_first += tl.load(carry_ptr + (tile * BH + bh) * NC + c).to(tl.float64)
    for first in range(0, tl.minimum(L, T - c * L), BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_t = (c * L + offs_l).to(tl.int64)
        mask = (offs_t < T) & (offs_l < L)
        for tile in range(TILES_K):
            offs = (tile * BH + bh) * T + offs_t
            to_h = tl.load(q_dq_ptr + offs, mask=mask, other=0.0).to(tl.float64)
            to_h -= tl.load(X_column_ptr + offs, mask=mask, other=0.0).to(tl.float64)
            df_bar_first += tl.sum(to_h, axis=0)

    # From step to step: what ended in h_t crosses no more, what k_t v_t gives to the next state does so from now on.
    for first in range(0, tl.minimum(L, T - c * L), BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_t = (c * L + offs_l).to(tl.int64)
        mask = (offs_t < T) & (offs_l < L)
        change, di_bar = tl.zeros((BLOCK_L,), dtype=tl.float64), tl.zeros((BLOCK_L,), dtype=tl.float32)
        for tile in range(TILES_K):
            offs = (tile * BH + bh) * T + offs_t
            q_dq = tl.load(q_dq_ptr + offs, mask=mask, other=0.0)
            k_dk = tl.load(k_dk_ptr + offs, mask=mask, other=0.0)
            X_column = tl.load(X_column_ptr + offs, mask=mask, other=0.0)
            change += k_dk.to(tl.float64) - (q_dq.to(tl.float64) - X_column.to(tl.float64))
            di_bar += k_dk + X_column
        df_bar = (df_bar_first + tl.cumsum(change, 0) - change).to(tl.float32)
        df_bar_first += tl.sum(change, axis=0)

        i = tl.load(i_ptr + offs_t * stride_it, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(f_ptr + offs_t * stride_ft, mask=mask, other=0.0).to(tl.float32)
        df = tl.where(f == -float("inf"), 0.0, df_bar * sigmoid_minus(f))
        tl.store(di_ptr + offs_t * stride_dit, (di_bar * sigmoid_minus(i)).to(di_ptr.dtype.element_ty), mask=mask)
        tl.store(df_ptr + offs_t * stride_dft, df.to(df_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------
# same as 03_chunkwise/mlstm_limit_chunk.py::describe_gpu
def describe_gpu(device: torch.device) -> tuple[bool, int]:
    """Whether it is an AMD GPU, and the bytes of on-chip (shared) memory that one program may use there."""
    if INTERPRETED:
        return False, 232448  # the interpreter has no limit: run what an H100 would run
    hip = torch.version.hip is not None
    return hip, 65536 if hip else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# The chunk size where none is asked for; half of it for small heads, whose states cost less traffic.
CHUNK_SIZE = 256


# same as 04_tfla_triton/mlstm_tfla.py::default_chunk_size
def default_chunk_size(DQK: int, DHV: int) -> int:
    return CHUNK_SIZE if DQK * DHV >= 128 * 256 else CHUNK_SIZE // 2


# What a program holds at once, kernel by kernel: steps (rows, columns), columns of q and k, columns of v, num_warps,
# num_stages. Chosen on an H200 at head dimensions 128 and 256, among what the compiler fits into registers.
TILES_BFLOAT16 = {
    "states": (64, 64, 128, 128, 4, 2),
    "h": (128, 64, 128, 256, 8, 2),
    "dq": (64, 64, 128, 256, 4, 1),
    "dstates": (128, 64, 64, 128, 4, 2),
    "dk": (64, 64, 128, 256, 4, 1),
    "dv": (32, 128, 128, 256, 8, 3),
}
# The same for heads that do not fit into one of those tiles.
TILES_WIDE = {
    "h": (128, 64, 128, 256, 8, 1),
    "dq": (64, 64, 128, 128, 4, 1),
    "dk": (64, 64, 128, 128, 4, 1),
    "dv": (64, 128, 128, 256, 8, 1),
}


# same as 04_tfla_triton/mlstm_tfla.py::launch_options
def launch_options(kernel: str, q: Tensor, v: Tensor, L: int) -> dict:
    """Everything about a launch that is compiled into the kernel: sizes, tiles, number formats."""
    DQK, DHV = q.shape[-1], v.shape[-1]
    hip, shared_memory = describe_gpu(q.device)
    bfloat16 = q.dtype == torch.bfloat16 and not INTERPRETED
    if bfloat16 or hip:
        precision = "ieee"
    else:
        precision = "tf32" if q.dtype == torch.float16 else "tf32x3"
    if bfloat16 and shared_memory > 200_000:
        wide = kernel in TILES_WIDE and (DQK > 128 or DHV > 256)
        tile = TILES_WIDE[kernel] if wide else TILES_BFLOAT16[kernel]
        rows, columns, block_k, block_v, num_warps, num_stages = tile
    else:
        # Three TF32 products instead of one keep three times as much in registers.
        rows = columns = 32
        block_k = block_v = 64 if shared_memory > 150_000 else 32
        num_warps, num_stages = 4, 1
    # In bfloat16 on Hopper, Triton 3.6 can read past the end of shared memory with tiles of 16 columns.
    smallest = 64 if bfloat16 else 16
    o = {
        "DQK": DQK, "DHV": DHV,
        "BLOCK_DQK": min(block_k, max(smallest, triton.next_power_of_2(DQK))),
        "BLOCK_DHV": min(block_v, max(smallest, triton.next_power_of_2(DHV))),
        "DOT": tl.bfloat16 if bfloat16 else tl.float32, "PRECISION": precision,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    if kernel in ("states", "dstates"):
        return o | {"BLOCK_L": min(rows, L)}
    return o | {"BLOCK_LQ": min(rows, L), "BLOCK_LKV": min(columns, L)}


# same as 03_chunkwise/mlstm_limit_chunk.py::tiles
def tiles(o: dict) -> tuple[int, int]:
    """How many tiles the head dimensions are cut into."""
    return triton.cdiv(o["DQK"], o["BLOCK_DQK"]), triton.cdiv(o["DHV"], o["BLOCK_DHV"])


def saved_shapes(q: Tensor, v: Tensor, L: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of what the forward pass keeps: start, w_row, u, C."""
    (B, NH, T, DQK), NC = q.shape, (q.shape[2] + L - 1) // L
    # The states go into the matrix unit again: they are stored as they will be multiplied.
    dtype_C = torch.bfloat16 if q.dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    return [
        ((B, NH, T), torch.int32), ((B, NH, T, 2), torch.float32), ((B, NH, T, 2), torch.float32),
        ((B, NH, NC, DQK, v.shape[-1]), dtype_C),
    ]  # fmt: skip


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C_0: Tensor | None, L: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the final state, and what the backward pass will need."""
    (B, NH, T, DQK), NC, s = q.shape, triton.cdiv(q.shape[2], L), q.shape[-1] ** -0.5
    h, C_0 = torch.empty_like(v), None if C_0 is None else C_0.contiguous()
    C_T = torch.empty(B, NH, DQK, v.shape[-1], dtype=torch.float32, device=q.device)
    saved = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in saved_shapes(q, v, L)]
    if h.numel() == 0:
        return h, C_T.zero_() if C_0 is None else C_T.copy_(C_0), *saved
    *gates, C = saved
    gates_kernel[(NC * B * NH,)](i, f, *gates, *i.stride(), *f.stride(), T, NC, NH, L, s, min(L, 256), num_warps=1)
    o = launch_options("states", q, v, L)
    tiles_k, tiles_v = tiles(o)
    states_kernel[(B * NH, tiles_k * tiles_v)](
        k, v, *gates, C_0, C, C_T, *k.stride()[:3], *v.stride()[:3], T, NC, NH, L, s, **o
    )
    o = launch_options("h", q, v, L)
    h_kernel[(tiles(o)[1] * triton.cdiv(T, o["BLOCK_LQ"]) * B * NH,)](
        q, k, v, *gates, C, h, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *h.stride()[:3], T, NC, NH, L, **o
    )
    return h, C_T, *saved


def launch_backward(
    dh: Tensor, dC_T: Tensor | None, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    start: Tensor, w_row: Tensor, u: Tensor, C: Tensor, L: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, di, df, dC_0."""
    (B, NH, T, DQK), NC, s = q.shape, triton.cdiv(q.shape[2], L), q.shape[-1] ** -0.5
    dq, dk, dv, di, df = (torch.empty_like(x) for x in (q, k, v, i, f))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    dC_0 = empty(B, NH, DQK, v.shape[-1])
    if dh.numel() == 0:
        return dq, dk, dv, di, df, dC_0.zero_() if dC_T is None else dC_0.copy_(dC_T)
    dh = dh if dh.stride(-1) == 1 else dh.contiguous()
    dC_T, gates = None if dC_T is None else dC_T.contiguous(), (start, w_row, u)

    strides = [stride for x in (q, k, v, dh) for stride in x.stride()[:3]]
    o = launch_options("dq", q, v, L)
    q_dq = empty(tiles(o)[0], B, NH, T)
    dq_kernel[(tiles(o)[0] * triton.cdiv(T, o["BLOCK_LQ"]) * B * NH,)](
        q, k, v, dh, *gates, C, dq, q_dq, *strides, *dq.stride()[:3], T, NC, NH, L, **o
    )
    o = launch_options("dstates", q, v, L)
    tiles_k, tiles_v = tiles(o)
    tiles_C = tiles_k * tiles_v
    dC, carry = torch.empty_like(C), empty(tiles_C, B, NH, NC)
    dstates_kernel[(B * NH, tiles_C)](
        q, dh, start, w_row, C, dC_T, dC, carry, dC_0, *q.stride()[:3], *dh.stride()[:3], T, NC, NH, L, s, **o
    )
    o = launch_options("dk", q, v, L)
    assert tiles(o)[0] == q_dq.shape[0], "dgates_kernel adds up what the tiles of dq and dk left in one loop"
    k_dk, X_column = torch.empty_like(q_dq), torch.empty_like(q_dq)
    dk_kernel[(tiles(o)[0] * triton.cdiv(T, o["BLOCK_LKV"]) * B * NH,)](
        q, k, v, dh, *gates, dC, dk, k_dk, X_column, *strides, *dk.stride()[:3], T, NC, NH, L, s, **o
    )
    o = launch_options("dv", q, v, L)
    dv_kernel[(tiles(o)[1] * triton.cdiv(T, o["BLOCK_LKV"]) * B * NH,)](
        q, k, dh, *gates, dC, dv, *strides[:6], *strides[9:], *dv.stride()[:3], T, NC, NH, L, s, **o
    )
    dgates_kernel[(NC * B * NH,)](
        i, f, q_dq, k_dk, X_column, carry, di, df, *i.stride(), *f.stride(), *di.stride(), *df.stride(),
        T, NC, NH, L, B * NH, k_dk.shape[0], tiles_C, min(L, 256), num_warps=1,
    )  # fmt: skip
    return dq, dk, dv, di, df, dC_0


# torch.compile sees each of the two as one operation that it need not look into.
forward_op = torch.library.custom_op("tfla::mlstmsig_tfla", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("tfla::mlstmsig_tfla_backward", launch_backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, i, f, C_0, L):
    saved = (q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(q, v, L))
    return torch.empty_like(v), *_empty_state(q, v), *saved


@backward_op.register_fake
def _(dh, dC_T, q, k, v, i, f, *_):
    return *(torch.empty_like(x) for x in (q, k, v, i, f)), *_empty_state(q, v)


def setup_context(ctx, inputs, output) -> None:
    *tensors, C_0, ctx.L = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.with_state = C_0 is not None
    ctx.set_materialize_grads(False)  # a state that nobody used has the gradient None, and needs no work


def backward(ctx, dh, dC_T, *_):
    dh = torch.zeros_like(ctx.saved_tensors[2]) if dh is None else dh
    *gradients, dC_0 = backward_op(dh, dC_T, *ctx.saved_tensors, ctx.L)
    return *gradients, dC_0 if ctx.with_state else None, None


forward_op.register_autograd(backward, setup_context=setup_context)


def mlstmsig_tfla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    chunk_size: int | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTMsig as Tiled Flash Linear Attention (paper sections 3 and 4), in Triton.

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, bfloat16 or float32. Any B >= 0, NH >= 1, T >= 0. The last
            dimension must be contiguous; the others may be strided, a transposed (B, T, NH, DQK) is not copied.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32, any strides. -inf is allowed in both:
            f = -inf forgets everything before the step, i = -inf writes nothing.
        chunk_size: steps in a chunk, L: any power of two >= 16. T need not be a multiple of it. For the backward pass
            one state per chunk is kept, DQK * DHV / L numbers a step and head. None: 256, or 128 for small heads.
        initial_state: (C,), (B, NH, DQK, DHV), float32; None is the empty memory, C = 0.
        return_state: also return the state after the last step, in float32.

    Returns:
        h, (B, NH, T, DHV) in the dtype and memory layout of v; with return_state the pair (h, (C,)). h is a weighted
        sum: it grows with the length of the memory, and may leave the range of float16 where its inputs are large.
        Differentiable once in q, k, v, i, f and the initial state, exactly, and deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state)
    _check_triton(q, k, v)
    if chunk_size is None:
        chunk_size = default_chunk_size(q.shape[-1], v.shape[-1])
    elif type(chunk_size) is not int or chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be None or a power of two >= 16, got {chunk_size!r}")
    (C_0,) = (None,) if initial_state is None else initial_state
    h, C, *_ = forward_op(q, k, v, i, f, C_0, chunk_size)
    return (h, (C,)) if return_state else h


# ---------------------------------------------------------------------------------------------------------------------
# One step, for generation
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, f_ptr, C_ptr, h_ptr, C_next_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ib, stride_ih, stride_fb, stride_fh,
    stride_hb, stride_hh,
    NH, s, DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
):  # fmt: skip
    """One step of one head, for a tile of the columns of C. Grid: (tiles of DHV) * B * NH.

    C (DQK x DHV)
    +---+---+---+---+
    |   | x |   |   |    loop over DQK: C' = sigmoid(f) C + sigmoid(i) k v^T, stored; h += C'^T (s q)
    |   | x |   |   |
    +---+---+---+---+
    """
    program = tl.program_id(0)
    tile_v, bh = program % tl.cdiv(DHV, BLOCK_DHV), (program // tl.cdiv(DHV, BLOCK_DHV)).to(tl.int64)
    b, h = bh // NH, bh % NH
    offs_v = tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)

    i = tl.load(i_ptr + b * stride_ib + h * stride_ih).to(tl.float32)
    f = tl.load(f_ptr + b * stride_fb + h * stride_fh).to(tl.float32)
    w_i, w_f = sigmoid_minus(-i), sigmoid_minus(-f)
    keep = (f > LOG_FORGOTTEN) | (f != f)  # NaN stays NaN

    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + offs_v, mask=offs_v < DHV, other=0.0).to(tl.float32)
    out = tl.zeros((BLOCK_DHV,), dtype=tl.float32)
    for first in range(0, DQK, BLOCK_DQK):
        offs_k = first + tl.arange(0, BLOCK_DQK)
        mask_k = offs_k < DQK
        q = tl.load(q_ptr + b * stride_qb + h * stride_qh + offs_k, mask=mask_k, other=0.0).to(tl.float32) * s
        k = tl.load(k_ptr + b * stride_kb + h * stride_kh + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        offs_C = bh * DQK * DHV + offs_k[:, None] * DHV + offs_v[None, :]
        mask = mask_k[:, None] & (offs_v[None, :] < DHV)
        C = tl.load(C_ptr + offs_C, mask=mask, other=0.0)  # (BLOCK_DQK, BLOCK_DHV)
        C = tl.where(keep, C * w_f, 0.0) + (w_i * k)[:, None] * v[None, :]
        out += tl.sum(q[:, None] * C, axis=0)
        tl.store(C_next_ptr + offs_C, C, mask=mask)
    h_ptr += b * stride_hb + h * stride_hh
    tl.store(h_ptr + offs_v, out.to(h_ptr.dtype.element_ty), mask=offs_v < DHV)


def launch_step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    (B, NH, DQK), DHV, C = q.shape, v.shape[-1], C.contiguous()
    h, C_next = torch.empty_like(v), torch.empty_like(C)
    # 32 KB of C a tile: enough in flight to keep the memory busy, and a whole cache line in each row.
    BLOCK_DQK, BLOCK_DHV = min(128, triton.next_power_of_2(DQK)), min(64, triton.next_power_of_2(DHV))
    if B > 0:
        decode_kernel[(triton.cdiv(DHV, BLOCK_DHV) * B * NH,)](
            q, k, v, i, f, C, h, C_next,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *i.stride(), *f.stride(), *h.stride()[:2],
            NH, DQK**-0.5, DQK, DHV, BLOCK_DQK, BLOCK_DHV, num_warps=4,
        )  # fmt: skip
    return h, C_next


# torch.compile sees it as one operation that it need not look into.
step_op = torch.library.custom_op("tfla::mlstmsig_decode_step", launch_step, mutates_args=())


@step_op.register_fake
def _(q, k, v, i, f, C):
    return torch.empty_like(v), C.new_empty(C.shape)


def mlstmsig_decode_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """One step of the mLSTMsig recurrence (paper section 4), in Triton.

    Functional: the given state is left as it is, a new one is returned. Assign it over the old one, and the allocator
    hands the same two blocks of memory out in turn. In a CUDA graph, copy it back into the graph's input.

    Args:
        q, k: (B, NH, DQK); float16, bfloat16 or float32, contiguous in the last dimension.
        v: (B, NH, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH), the dtype of q or float32. f = -inf forgets the state, i = -inf writes
            nothing.
        state: (C,), (B, NH, DQK, DHV), float32; None is the empty memory.

    Returns:
        h, (B, NH, DHV) in the dtype of v, and the state after the step, in float32. There is no gradient: under
        autograd, a backward pass through it raises an error.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, state, time=False)
    _check_triton(q, k, v)
    (C,) = _empty_state(q, v) if state is None else state
    h, C = step_op(q, k, v, i, f, C)
    return h, (C,)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------
def _empty_state(q: Tensor, v: Tensor) -> State:
    """The memory before anything was written, for a sequence or for a step."""
    return (torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=torch.float32, device=q.device),)


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


def _check_triton(q, k, v) -> None:
    """What the Triton kernels ask for beyond _check_inputs."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"q must be on a GPU, got {q.device}; to run on the CPU, set the environment variable TRITON_INTERPRET=1 "
            "before Triton is imported, or use mlstmsig_reference.py"
        )
