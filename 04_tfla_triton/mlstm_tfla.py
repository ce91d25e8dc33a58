"""Stage 04: Tiled Flash Linear Attention for the mLSTM in Triton, forward and backward. Chunks of any size.

In stage 03 a program held the L x L matrix of its whole chunk on chip, so L ended at 128. Here that matrix is cut into
tiles as well (TFLA, arXiv 2503.14376, section 3): a program owns a tile of steps and walks over the tiles of the chunk
that it needs. Larger chunks mean fewer states C in memory. The equations (section 2 there) are those of stage 03:

    C_c = e^(g + m_{c-1} - m_c) C_{c-1} + (w_end * K)^T V                           between chunks
    h_i = (P V + s w_state * (Q C_{c-1}))_i / max{ |S_i|, e^(-m_i) }                within a chunk
    P = s Q K^T * W,   S = P 1 + s w_state * (Q n_{c-1})

All stabilizers m come from a pass over the gates before the matrix work, so that no accumulator is ever rescaled.

    forward     gates_kernel -> states_kernel -> h_kernel
    backward    dq_kernel -> dstates_kernel -> dk_kernel, dv_kernel -> dgates_kernel

Glossary (name in code = symbol = shape; L steps in a chunk, NC chunks, rows i and columns j of a chunk):
    start    where in the chunk step i's document begins; -1: before it  (B, NH, T)  int32
    b        sum_{r<=i} log sigmoid(f_r) since the chunk began, without resets  (B, NH, T)  float64
    u        i_j - b_j, so that log D_ij = b_i + u_j                     (B, NH, T, 2)  in two float32 parts
    m_intra  max_{start<=j<=i} log D_ij                                  (B, NH, T)
    g        b at the chunk's last step
    C, n, m  the state at the chunk borders 0..NC             (B, NH, NC+1, DQK, DHV), (B, NH, NC+1, DQK), (B, NH, NC+1)
    W        e^(b_i + u_j - m_i), gate weights                           (tiles of L x L)
    w_state  e^(b_i + m_{c-1} - m_i), weight of the chunk's first state
    w_end    e^(g + u_j - m_c), weight of step j in the next state
    decay    e^(g + m_{c-1} - m_c), weight of the chunk's first state in the next
    S, r     normalizer product n . s q, and 1 / D, D = max{|S|, e^(-m)} (B, NH, T)
    Wr       s * r * W                                                   (tiles of L x L)
    w_row    log(s r) + b - m, so that Wr_ij = e^(w_row_i + u_j)         (B, NH, T, 2)
    w_read   s * r * w_state                                             (B, NH, T)
    delta    D times the gradient of S                                   (B, NH, T)
    X        gradient of log D_ij                                        (tiles of L x L)

Precision: sums over gates are float64, all other sums float32. bfloat16 inputs are multiplied in bfloat16, float16 ones
as TF32 (float16's digits with the range that products with gate weights need), float32 ones as three TF32 products.

Copy this file: it needs torch and triton.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "mlstm_tfla.py needs Triton, which comes with PyTorch on Linux. "
        "mlstm_chunkwise.py in 03_chunkwise computes the same without it."
    ) from error

__all__ = ["mlstm_tfla"]

State = tuple[Tensor, Tensor, Tensor]

# Triton's interpreter (TRITON_INTERPRET=1, for machines without a GPU) cannot multiply bfloat16.
INTERPRETED = triton.knobs.runtime.interpret
# A forget gate below this, f = -inf above all, begins a new document. It is left out of the sums, and the masks keep
# the old document out: exactly, where inf - inf would be NaN.
LOG_FORGOTTEN = tl.constexpr(-1e7)
# The floor e^(-m) of the denominator must stay a number that one can divide by, or a query of zeros would meet 0 / 0.
# So m is capped there, far beyond where the floor could still be seen in h.
M_CAP = tl.constexpr(60.0)
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


@triton.jit
def tile_of_program(TILES, T, BLOCK):
    """(tile of the head dimension, tile of steps, head). Neighbours share q, k, v in the L2 cache."""
    program, steps = tl.program_id(0), tl.cdiv(T, BLOCK)
    return program % TILES, program // TILES % steps, (program // TILES // steps).to(tl.int64)


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
def load_row_gates(start_ptr, b_ptr, m_intra_ptr, m_state, offs_gate, mask):
    """Of some rows: start, m, b - m and w_state, where the chunk's first state has the stabilizer m_state."""
    start = tl.load(start_ptr + offs_gate, mask=mask, other=NO_START)  # past T: a row that sees no column
    b = tl.load(b_ptr + offs_gate, mask=mask, other=0.0)
    log_w_state = tl.where(start < 0, b + m_state, -float("inf"))
    m = tl.maximum(log_w_state.to(tl.float32), tl.load(m_intra_ptr + offs_gate, mask=mask, other=0.0))
    m = tl.where(m == -float("inf"), 0.0, m)  # forgot everything, wrote nothing: any m describes an empty memory
    return start, m, b - m, tl.exp((log_w_state - m).to(tl.float32))


@triton.jit
def load_border(start_ptr, b_ptr, m_intra_ptr, m_state, offs_last):
    """Of a chunk's last step: start, the next m, g - m, and decay."""
    start, g = tl.load(start_ptr + offs_last), tl.load(b_ptr + offs_last)
    log_decay = tl.where(start < 0, g + m_state, -float("inf"))
    m = tl.maximum(log_decay.to(tl.float32), tl.load(m_intra_ptr + offs_last))
    m = tl.where(m == -float("inf"), 0.0, m)
    return start, m, g - m, tl.exp((log_decay - m).to(tl.float32))


@triton.jit
def two_parts(x):
    """x in float64 as the sum of two float32: multiples of 1/64, which add up without rounding, and what is left."""
    x = tl.where(x < -1e30, -1e30, x)  # -inf would leave inf - inf; tl.maximum would hide NaN
    high = (tl.floor(x * 64.0) / 64.0).to(tl.float32)
    return high, (x - high).to(tl.float32)


@triton.jit
def load_two_parts(ptr, offs, mask):
    """A value that was stored by store_two_parts; far below everything outside of the mask."""
    return tl.load(ptr + 2 * offs, mask=mask, other=-1e30), tl.load(ptr + 2 * offs + 1, mask=mask, other=0.0)


@triton.jit
def store_two_parts(ptr, x, offs, mask):
    high, rest = two_parts(x)
    tl.store(ptr + 2 * offs, high, mask=mask)
    tl.store(ptr + 2 * offs + 1, rest, mask=mask)


@triton.jit
def end_weights(start, g_m, u, u_rest, offs_j):
    """w_end of the columns: e^(g + u_j - m_c), 0 for those of documents that ended before the chunk does."""
    g_m, g_m_rest = two_parts(g_m)
    return tl.exp(tl.where(offs_j >= start, (g_m + u) + (g_m_rest + u_rest), -float("inf")))


@triton.jit
def gate_weights(start, row, row_rest, u, u_rest, offs_i, offs_j):
    """The tile e^(row_i + u_j) for start_i <= j <= i, else 0. The exponent is masked: elsewhere it may be huge."""
    mask = (offs_i[:, None] >= offs_j[None, :]) & (offs_j[None, :] >= start[:, None])
    exponent = (row[:, None] + u[None, :]) + (row_rest[:, None] + u_rest[None, :])
    return tl.exp(tl.where(mask, exponent, -float("inf")))


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
def join_stretches(start_1, u_max_1, start_2, u_max_2):
    """Of two stretches of steps, one after the other: where the last document began, and its largest u."""
    return tl.maximum(start_1, start_2), tl.where(start_2 >= 0, u_max_2, tl.maximum(u_max_1, u_max_2))


@triton.jit
def gates_kernel(
    i_ptr, f_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    T, NC, NH, L, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """start, b, u and m_intra of one chunk. Grid: NC * B * NH. Loop: over the chunk's steps, BLOCK_L at a time."""
    bh, c = (tl.program_id(0) // NC).to(tl.int64), tl.program_id(0) % NC
    i_ptr, f_ptr = head(i_ptr, bh, NH, stride_ib, stride_ih), head(f_ptr, bh, NH, stride_fb, stride_fh)
    start_before, b_before = tl.full((), -1, dtype=tl.int32), tl.full((), 0.0, dtype=tl.float64)
    u_max_before = tl.full((), -float("inf"), dtype=tl.float64)
    for first in range(0, tl.minimum(L, T - c * L), BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_t = (c * L + offs_l).to(tl.int64)
        mask = (offs_t < T) & (offs_l < L)
        i = tl.load(i_ptr + offs_t * stride_it, mask=mask, other=-float("inf")).to(tl.float64)
        f = tl.load(f_ptr + offs_t * stride_ft, mask=mask, other=float("inf")).to(tl.float64)

        f_bar = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))  # float64: nothing visible is lost in 1 + e^-|f|
        reset = f_bar < LOG_FORGOTTEN
        b = b_before + tl.cumsum(tl.where(reset, 0.0, f_bar), 0)
        u = i - b
        start, u_max = tl.associative_scan((tl.where(reset, offs_l, -1), u), 0, join_stretches)
        start, u_max = join_stretches(start_before, u_max_before, start, u_max)

        offs_gate = bh * T + offs_t
        tl.store(start_ptr + offs_gate, start, mask=mask)
        tl.store(b_ptr + offs_gate, b, mask=mask)
        store_two_parts(u_ptr, u, offs_gate, mask)
        tl.store(m_intra_ptr + offs_gate, (b + u_max).to(tl.float32), mask=mask)

        last = tl.arange(0, BLOCK_L) == BLOCK_L - 1
        start_before, b_before = tl.max(start, axis=0), tl.sum(tl.where(last, b, 0.0), axis=0)
        u_max_before = tl.max(tl.where(last, u_max, -float("inf")), axis=0)


@triton.jit
def states_kernel(
    k_ptr, v_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, C_0_ptr, n_0_ptr, m_0_ptr, C_ptr, n_ptr, m_ptr, C_T_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    T, NC, NH, L,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state at every chunk border. A program owns one tile of C and walks with it over all steps, in order.

    C (DQK x DHV)        grid: B * NH, tiles of C
    +---+---+---+---+    loop over chunks:
    |   | x |   |   |      store C, n, m of the border; C <- decay * C
    +---+---+---+---+      loop over the chunk's tiles of steps: C += (w_end * K)^T V
    |   |   |   |   |    store border NC, and C once more in float32: the final state
    +---+---+---+---+    The first column of tiles takes care of n, the first tile of m.
    """
    bh = tl.program_id(0).to(tl.int64)
    tile_k, tile_v = tl.program_id(1) // tl.cdiv(DHV, BLOCK_DHV), tl.program_id(1) % tl.cdiv(DHV, BLOCK_DHV)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    k_ptr, v_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh), head(v_ptr, bh, NH, stride_vb, stride_vh)
    C_ptr, C_T_ptr = C_ptr + bh * (NC + 1) * DQK * DHV, C_T_ptr + bh * DQK * DHV
    n_ptr, m_ptr = n_ptr + bh * (NC + 1) * DQK, m_ptr + bh * (NC + 1)

    if C_0_ptr is None:
        C = tl.zeros((BLOCK_DQK, BLOCK_DHV), dtype=tl.float32)
        n = tl.zeros((BLOCK_DQK,), dtype=tl.float32)
        m = tl.full((), 0.0, dtype=tl.float32)
    else:
        C = load_tile(C_0_ptr + bh * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)
        n = tl.load(n_0_ptr + bh * DQK + offs_k, mask=offs_k < DQK, other=0.0)
        m = tl.maximum(tl.load(m_0_ptr + bh), LOG_FORGOTTEN)  # m_0 = -inf: an empty memory

    for c in range(NC):
        store_tile(C_ptr, C, offs_k, offs_v, DHV, DQK, DHV)
        if tile_v == 0:
            tl.store(n_ptr + offs_k, n, mask=offs_k < DQK)
            if tile_k == 0:
                tl.store(m_ptr, m)
        C_ptr, n_ptr, m_ptr = C_ptr + DQK * DHV, n_ptr + DQK, m_ptr + 1

        steps = tl.minimum(L, T - c * L)
        start, m, g_m, decay = load_border(start_ptr, b_ptr, m_intra_ptr, m, bh * T + c * L + steps - 1)
        C, n = C * decay, n * decay
        for first in range(0, steps, BLOCK_L):
            offs_l = first + tl.arange(0, BLOCK_L)
            offs_t = (c * L + offs_l).to(tl.int64)
            u, u_rest = load_two_parts(u_ptr, bh * T + offs_t, offs_t < T)
            w_end = end_weights(start, g_m, u, u_rest, offs_l)
            k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(tl.float32) * w_end[:, None]
            v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_L, BLOCK_DHV)
            C = tl.dot(tl.trans(operand(k, DOT, PRECISION)), v, C, input_precision=PRECISION)
            n += tl.sum(k, axis=0)

    store_tile(C_ptr, C, offs_k, offs_v, DHV, DQK, DHV)
    store_tile(C_T_ptr, C, offs_k, offs_v, DHV, DQK, DHV)
    if tile_v == 0:
        tl.store(n_ptr + offs_k, n, mask=offs_k < DQK)
        if tile_k == 0:
            tl.store(m_ptr, m)


@triton.jit
def h_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, C_ptr, n_ptr, m_ptr, h_ptr, S_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_hb, stride_hh, stride_ht,
    T, NC, NH, L, s,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of one tile of steps and columns. Grid: (tiles of DHV) * (tiles of T) * B * NH.

    P (L x L)            V (L x DHV)      h = s * w_state * (Q C),  S likewise with n
    +---+---+---+        +---+---+        loop over the tiles j of the row, up to the diagonal:
    |   |   |   |        |   | j |          P = s * Q K^T * W,  S += P 1,  h += P V
    +---+---+---+        +---+---+        h / max{|S|, e^-m}
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

    border = bh * (NC + 1) + c
    start, m, b_m, w_state = load_row_gates(
        start_ptr, b_ptr, m_intra_ptr, tl.load(m_ptr + border), bh * T + offs_ti, offs_ti < T
    )  # fmt: skip
    q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK)  # (BLOCK_LQ, BLOCK_DQK)
    C = load_tile(C_ptr + border * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    n = tl.load(n_ptr + border * DQK + offs_k, mask=offs_k < DQK, other=0.0)
    h = tl.dot(q.to(DOT), operand(C, DOT, PRECISION), input_precision=PRECISION)  # (BLOCK_LQ, BLOCK_DHV)
    S = tl.sum(q.to(tl.float32) * n[None, :], axis=1)
    for other in range(1, TILES_K):
        offs_d = other * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
        q_d = load_tile(q_ptr, offs_ti, offs_d, stride_qt, T, DQK)
        C = load_tile(C_ptr + border * DQK * DHV, offs_d, offs_v, DHV, DQK, DHV)
        n = tl.load(n_ptr + border * DQK + offs_d, mask=offs_d < DQK, other=0.0)
        h = tl.dot(q_d.to(DOT), operand(C, DOT, PRECISION), h, input_precision=PRECISION)
        S += tl.sum(q_d.to(tl.float32) * n[None, :], axis=1)
    h, S = h * (s * w_state)[:, None], S * (s * w_state)
    b_m, b_m_rest = two_parts(b_m)

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
        P = scores * s * gate_weights(start, b_m, b_m_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LQ, BLOCK_LKV)
        S += tl.sum(P, axis=1)
        v = load_tile(v_ptr, offs_tj, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_LKV, BLOCK_DHV)
        h = tl.dot(operand(P, DOT, PRECISION), v, h, input_precision=PRECISION)

    D = tl.maximum(tl.abs(S), tl.exp(-tl.minimum(m, M_CAP)))
    store_tile(h_ptr, h / D[:, None], offs_ti, offs_v, stride_ht, T, DHV)
    if tile_v == 0:
        tl.store(S_ptr + bh * T + offs_ti, S, mask=offs_ti < T)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, S_ptr, C_ptr, n_ptr, m_ptr,
    dq_ptr, w_row_ptr, delta_ptr, w_read_ptr, q_dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, L, s,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    ASSUME_NORM: tl.constexpr,
):  # fmt: skip
    """dq of one tile of steps and columns, and what the other kernels ask about rows.

    Grid: (tiles of DQK) * (tiles of T) * B * NH. With Wr = s * r * W, the tiles of the row are visited as in h_kernel,
    twice:

      1.  dh . h = sum_j (Q K^T * Wr)_ij dP_ij + the state's part,    dP = dH V^T;
          from it delta = -[|S| wins the max] sign(S) dh . h
      2.  dq += ((dP + delta) * Wr) K

    dh . h is formed anew: from the h that was returned, which is rounded, delta would be wrong in its third digit. With
    ASSUME_NORM, delta is taken to be 0, and the first sweep forms dq as well. q . dq, summed without rounding, is
    dh . h, or exactly 0 where |S| wins the max and delta is there, since h then does not depend on the length of q.

    For the kernels that follow: w_row = log(s r) + b - m in two parts, w_read = s * r * w_state, delta, q . dq.
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

    # Weights of the rows
    border, offs_row, mask = bh * (NC + 1) + c, bh * T + offs_ti, offs_ti < T
    start, m, b_m, w_state = load_row_gates(start_ptr, b_ptr, m_intra_ptr, tl.load(m_ptr + border), offs_row, mask)
    S, floor = tl.load(S_ptr + offs_row, mask=mask, other=0.0), tl.exp(-tl.minimum(m, M_CAP))
    D = tl.maximum(tl.abs(S), floor)
    w_read = w_state * s / D
    b_m -= tl.log(D / s)
    w_row, w_row_rest = two_parts(b_m)

    # The share of the chunk's first state: C dh for dq, its own tile of DQK; and q . (C dh) = dh . (C^T q), over all.
    C_ptr, n_ptr = C_ptr + border * DQK * DHV, n_ptr + border * DQK
    q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK)  # (BLOCK_LQ, BLOCK_DQK)
    dh = load_tile(dh_ptr, offs_ti, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_LQ, BLOCK_DHV)
    C = load_tile(C_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    dq = tl.dot(dh, tl.trans(operand(C, DOT, PRECISION)), input_precision=PRECISION)
    dq = add_other_tiles(
        dq, dh_ptr, C_ptr, offs_ti, offs_k, stride_gt, DHV, T, DQK, DHV, 0, TILES_V, BLOCK_DHV, DOT, PRECISION
    )
    dh_h = tl.sum(q.to(tl.float32) * dq, axis=1)
    for other in range(1, TILES_K):
        offs_d = (tile_k + other) % TILES_K * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
        q_d = load_tile(q_ptr, offs_ti, offs_d, stride_qt, T, DQK).to(tl.float32)
        C = load_tile(C_ptr, offs_d, offs_v, DHV, DQK, DHV)
        C_dh = tl.dot(dh, tl.trans(operand(C, DOT, PRECISION)), input_precision=PRECISION)
        C_dh = add_other_tiles(
            C_dh, dh_ptr, C_ptr, offs_ti, offs_d, stride_gt, DHV, T, DQK, DHV, 0, TILES_V, BLOCK_DHV, DOT, PRECISION
        )
        dh_h += tl.sum(q_d * C_dh, axis=1)
    dq, dh_h = dq * w_read[:, None], dh_h * w_read

    # First sweep: dh . h, and with it delta
    for first in range(0, tile * BLOCK_LQ - c * L + BLOCK_LQ, BLOCK_LKV):
        offs_j = first + tl.arange(0, BLOCK_LKV)
        offs_tj = (c * L + offs_j).to(tl.int64)
        k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(DOT)  # (BLOCK_LKV, BLOCK_DQK)
        scores = tl.dot(q.to(DOT), tl.trans(k), input_precision=PRECISION)
        scores = add_other_tiles(
            scores, q_ptr, k_ptr, offs_ti, offs_tj, stride_qt, stride_kt, T, T, DQK, tile_k,
            TILES_K, BLOCK_DQK, DOT, PRECISION,
        )  # fmt: skip
        v = load_tile(v_ptr, offs_tj, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_LKV, BLOCK_DHV)
        dP = tl.dot(dh, tl.trans(v), input_precision=PRECISION)
        dP = add_other_tiles(
            dP, dh_ptr, v_ptr, offs_ti, offs_tj, stride_gt, stride_vt, T, T, DHV, 0,
            TILES_V, BLOCK_DHV, DOT, PRECISION,
        )  # fmt: skip
        u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
        dP *= gate_weights(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LQ, BLOCK_LKV)
        dh_h += tl.sum(scores * dP, axis=1)
        if ASSUME_NORM:
            dq = tl.dot(operand(dP, DOT, PRECISION), k, dq, input_precision=PRECISION)

    # Second sweep: dq
    delta, q_dq = dh_h * 0.0, dh_h
    if not ASSUME_NORM:
        delta = tl.where(tl.abs(S) > floor, tl.where(S > 0, -dh_h, dh_h), 0.0)
        q_dq = tl.where(tl.abs(S) > floor, 0.0, dh_h)
        n = tl.load(n_ptr + offs_k, mask=offs_k < DQK, other=0.0)
        dq += (delta * w_read)[:, None] * n[None, :]
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
            dP = (dP + delta[:, None]) * gate_weights(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)
            k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(DOT)  # (BLOCK_LKV, BLOCK_DQK)
            dq = tl.dot(operand(dP, DOT, PRECISION), k, dq, input_precision=PRECISION)

    store_tile(dq_ptr, dq, offs_ti, offs_k, stride_dt, T, DQK)
    if tile_k == 0:
        store_two_parts(w_row_ptr, b_m, offs_row, mask)
        tl.store(delta_ptr + offs_row, delta, mask=mask)
        tl.store(w_read_ptr + offs_row, w_read, mask=mask)
        tl.store(q_dq_ptr + offs_row, q_dq, mask=mask)


@triton.jit
def dstates_kernel(
    q_ptr, dh_ptr, start_ptr, b_ptr, m_intra_ptr, w_read_ptr, delta_ptr, C_ptr, n_ptr, m_ptr, dC_T_ptr, dn_T_ptr,
    dC_ptr, dn_ptr, carry_ptr, dC_0_ptr, dn_0_ptr,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
    T, NC, NH, L,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state at every chunk border: states_kernel run backwards.

    dC (DQK x DHV)       grid: B * NH, tiles of dC
    +---+---+---+---+    loop over chunks, the last one first:
    |   | x |   |   |      store dC, dn of the border behind; carry = decay * <C, dC>, C of the border before
    +---+---+---+---+      dC <- decay * dC
    |   |   |   |   |      loop over the chunk's tiles of steps: dC += (w_read * Q)^T dH
    +---+---+---+---+    store border 0: the gradient of the initial state
                         The first column of tiles takes care of dn.
    """
    bh = tl.program_id(0).to(tl.int64)
    tile_k, tile_v = tl.program_id(1) // tl.cdiv(DHV, BLOCK_DHV), tl.program_id(1) % tl.cdiv(DHV, BLOCK_DHV)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    q_ptr, dh_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh), head(dh_ptr, bh, NH, stride_gb, stride_gh)
    # Borders are walked backwards: dC, dn from border NC on, C, n from the one before it.
    border = bh * (NC + 1) + NC
    dC_ptr, dn_ptr = dC_ptr + border * DQK * DHV, dn_ptr + border * DQK
    C_ptr, n_ptr = C_ptr + (border - 1) * DQK * DHV, n_ptr + (border - 1) * DQK
    carry_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + bh) * NC

    if dC_T_ptr is None:
        dC = tl.zeros((BLOCK_DQK, BLOCK_DHV), dtype=tl.float32)
        dn = tl.zeros((BLOCK_DQK,), dtype=tl.float32)
    else:
        dC = load_tile(dC_T_ptr + bh * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)
        dn = tl.load(dn_T_ptr + bh * DQK + offs_k, mask=offs_k < DQK, other=0.0)

    for chunks_done in range(NC):
        c = NC - 1 - chunks_done
        store_tile(dC_ptr, dC, offs_k, offs_v, DHV, DQK, DHV)
        if tile_v == 0:
            tl.store(dn_ptr + offs_k, dn, mask=offs_k < DQK)
        steps, m_state = tl.minimum(L, T - c * L), tl.load(m_ptr + bh * (NC + 1) + c)
        _start, _m, _g_m, decay = load_border(start_ptr, b_ptr, m_intra_ptr, m_state, bh * T + c * L + steps - 1)
        C = load_tile(C_ptr, offs_k, offs_v, DHV, DQK, DHV).to(tl.float32)
        n = tl.load(n_ptr + offs_k, mask=offs_k < DQK, other=0.0)
        carry = tl.sum(C * dC, axis=1) + tl.where(tile_v == 0, n * dn, 0.0)  # (BLOCK_DQK,)
        tl.store(carry_ptr + c, decay * tl.sum(carry, axis=0))
        C_ptr, dC_ptr, n_ptr, dn_ptr = C_ptr - DQK * DHV, dC_ptr - DQK * DHV, n_ptr - DQK, dn_ptr - DQK

        dC, dn = dC * decay, dn * decay
        for first in range(0, steps, BLOCK_L):
            offs_t = (c * L + first + tl.arange(0, BLOCK_L)).to(tl.int64)
            w_read = tl.load(w_read_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
            delta = tl.load(delta_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
            q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(tl.float32) * w_read[:, None]
            dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_L, BLOCK_DHV)
            dC = tl.dot(tl.trans(operand(q, DOT, PRECISION)), dh, dC, input_precision=PRECISION)
            dn += tl.sum(q * delta[:, None], axis=0)

    store_tile(dC_0_ptr + bh * DQK * DHV, dC, offs_k, offs_v, DHV, DQK, DHV)
    if tile_v == 0:
        tl.store(dn_0_ptr + bh * DQK + offs_k, dn, mask=offs_k < DQK)


@triton.jit
def dk_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, w_row_ptr, delta_ptr, dC_ptr, dn_ptr, m_ptr,
    dk_ptr, k_dk_ptr, X_column_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, L,
    DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_LQ: tl.constexpr, BLOCK_LKV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one tile of steps and columns. Grid: (tiles of DQK) * (tiles of T) * B * NH.

    P^T (L x L)          Q (L x DQK)      dk = w_end * (V dC^T + dn)
    +---+---+---+        +---+---+        loop over the tiles i of the row, from the diagonal on:
    |   |   |   |        |   |   |          dP^T = (V dH^T + delta) * Wr^T
    +---+---+---+        +---+---+          dk  += dP^T Q
    |   | i | i |   @    |   | i |
    +---+---+---+        +---+---+        dP^T is formed as it is used, not by turning dP round: some versions of
    |   |   |   |        |   | i |        Triton get that wrong on Hopper.
    +---+---+---+        +---+---+

    The column sums of X = dP * Q K^T and of the state's part, k . dk, go to dgates_kernel, taken before any rounding.
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

    border = bh * (NC + 1) + c
    dC_ptr, dn_ptr = dC_ptr + (border + 1) * DQK * DHV, dn_ptr + (border + 1) * DQK
    v = load_tile(v_ptr, offs_tj, offs_v, stride_vt, T, DHV).to(DOT)  # (BLOCK_LKV, BLOCK_DHV)
    dC = load_tile(dC_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    dk = tl.dot(v, tl.trans(operand(dC, DOT, PRECISION)), input_precision=PRECISION)
    dk = add_other_tiles(
        dk, v_ptr, dC_ptr, offs_tj, offs_k, stride_vt, DHV, T, DQK, DHV, 0, TILES_V, BLOCK_DHV, DOT, PRECISION
    )
    m_state, steps = tl.load(m_ptr + border), tl.minimum(L, T - c * L)
    start_end, _m, g_m, _decay = load_border(start_ptr, b_ptr, m_intra_ptr, m_state, bh * T + c * L + steps - 1)
    u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
    dn = tl.load(dn_ptr + offs_k, mask=offs_k < DQK, other=0.0)
    dk = (dk + dn[None, :]) * end_weights(start_end, g_m, u, u_rest, offs_j)[:, None]
    k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK)  # (BLOCK_LKV, BLOCK_DQK)
    k_dk = tl.sum(k.to(tl.float32) * dk, axis=1)
    X_column = tl.zeros((BLOCK_LKV,), dtype=tl.float32)

    for first in range(first_column // BLOCK_LQ * BLOCK_LQ, steps, BLOCK_LQ):
        offs_i = first + tl.arange(0, BLOCK_LQ)
        offs_ti = (c * L + offs_i).to(tl.int64)
        mask = offs_ti < T
        q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK).to(DOT)  # (BLOCK_LQ, BLOCK_DQK)
        scores_T = tl.dot(k.to(DOT), tl.trans(q), input_precision=PRECISION)
        scores_T = add_other_tiles(
            scores_T, k_ptr, q_ptr, offs_tj, offs_ti, stride_kt, stride_qt, T, T, DQK, tile_k,
            TILES_K, BLOCK_DQK, DOT, PRECISION,
        )  # fmt: skip
        dh = load_tile(dh_ptr, offs_ti, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_LQ, BLOCK_DHV)
        dP_T = tl.dot(v, tl.trans(dh), input_precision=PRECISION)
        dP_T = add_other_tiles(
            dP_T, v_ptr, dh_ptr, offs_tj, offs_ti, stride_vt, stride_gt, T, T, DHV, 0,
            TILES_V, BLOCK_DHV, DOT, PRECISION,
        )  # fmt: skip
        start = tl.load(start_ptr + bh * T + offs_ti, mask=mask, other=NO_START)
        w_row, w_row_rest = load_two_parts(w_row_ptr, bh * T + offs_ti, mask)
        delta = tl.load(delta_ptr + bh * T + offs_ti, mask=mask, other=0.0)
        W_T = gate_weights_transposed(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LKV, BLOCK_LQ)
        dP_T = (dP_T + delta[None, :]) * W_T
        X_column += tl.sum(scores_T * dP_T, axis=1)
        dk = tl.dot(operand(dP_T, DOT, PRECISION), q, dk, input_precision=PRECISION)

    store_tile(dk_ptr, dk, offs_tj, offs_k, stride_dt, T, DQK)
    BH = tl.num_programs(0) // TILES_K // tl.cdiv(T, BLOCK_LKV)
    tl.store(k_dk_ptr + (tile_k.to(tl.int64) * BH + bh) * T + offs_tj, k_dk, mask=offs_tj < T)
    if tile_k == 0:
        tl.store(X_column_ptr + bh * T + offs_tj, X_column, mask=offs_tj < T)


@triton.jit
def dv_kernel(
    q_ptr, k_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, w_row_ptr, dC_ptr, m_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, L,
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

    border = bh * (NC + 1) + c
    dC_ptr += (border + 1) * DQK * DHV
    k = load_tile(k_ptr, offs_tj, offs_k, stride_kt, T, DQK).to(DOT)  # (BLOCK_LKV, BLOCK_DQK)
    dC = load_tile(dC_ptr, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
    dv = tl.dot(k, operand(dC, DOT, PRECISION), input_precision=PRECISION)
    for other in range(1, TILES_K):
        offs_d = other * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
        k_d = load_tile(k_ptr, offs_tj, offs_d, stride_kt, T, DQK).to(DOT)
        dC = load_tile(dC_ptr, offs_d, offs_v, DHV, DQK, DHV)
        dv = tl.dot(k_d, operand(dC, DOT, PRECISION), dv, input_precision=PRECISION)

    m_state, steps = tl.load(m_ptr + border), tl.minimum(L, T - c * L)
    start_end, _m, g_m, _decay = load_border(start_ptr, b_ptr, m_intra_ptr, m_state, bh * T + c * L + steps - 1)
    u, u_rest = load_two_parts(u_ptr, bh * T + offs_tj, offs_tj < T)
    dv *= end_weights(start_end, g_m, u, u_rest, offs_j)[:, None]

    for first in range(first_column // BLOCK_LQ * BLOCK_LQ, steps, BLOCK_LQ):
        offs_i = first + tl.arange(0, BLOCK_LQ)
        offs_ti = (c * L + offs_i).to(tl.int64)
        mask = offs_ti < T
        q = load_tile(q_ptr, offs_ti, offs_k, stride_qt, T, DQK).to(DOT)  # (BLOCK_LQ, BLOCK_DQK)
        P_T = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        P_T = add_other_tiles(
            P_T, k_ptr, q_ptr, offs_tj, offs_ti, stride_kt, stride_qt, T, T, DQK, 0, TILES_K, BLOCK_DQK, DOT, PRECISION
        )
        start = tl.load(start_ptr + bh * T + offs_ti, mask=mask, other=NO_START)
        w_row, w_row_rest = load_two_parts(w_row_ptr, bh * T + offs_ti, mask)
        P_T *= gate_weights_transposed(start, w_row, w_row_rest, u, u_rest, offs_i, offs_j)  # (BLOCK_LKV, BLOCK_LQ)
        dh = load_tile(dh_ptr, offs_ti, offs_v, stride_gt, T, DHV).to(DOT)  # (BLOCK_LQ, BLOCK_DHV)
        dv = tl.dot(operand(P_T, DOT, PRECISION), dh, dv, input_precision=PRECISION)
    store_tile(dv_ptr, dv, offs_tj, offs_v, stride_dt, T, DHV)


@triton.jit
def dgates_kernel(
    f_ptr, q_dq_ptr, k_dk_ptr, X_column_ptr, carry_ptr, di_rest_ptr, df_bar_rest_ptr, di_ptr, df_ptr,
    stride_fb, stride_fh, stride_ft, stride_ib, stride_ih, stride_it, stride_db, stride_dh, stride_dt,
    T, NC, NH, L, BH, TILES_K, TILES_C, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """di and df of one chunk. Grid: NC * B * NH. Loops: twice over the chunk's steps, BLOCK_L at a time.

    di is k . dk, X's column sums included. f_t weakens everything that crosses step t, so df_bar_t is the sum over all
    that does:
      state before the chunk, k_j v_j with j < t -> h_r with r >= t     sum over r >= t of q . dq - X's column sums
      k_j v_j with j < t -> state after the chunk                       sum over j < t of the state's part of k . dk
      state before -> state after                                       carry
    As one sum over all later steps of the sequence, of q . dq - k . dk, it would be a small difference of large
    numbers. The parts that the tiles left are added up here, always in the same order.
    """
    bh, c = (tl.program_id(0) // NC).to(tl.int64), tl.program_id(0) % NC
    f_ptr = head(f_ptr, bh, NH, stride_fb, stride_fh)
    di_ptr, df_ptr = head(di_ptr, bh, NH, stride_ib, stride_ih), head(df_ptr, bh, NH, stride_db, stride_dh)

    # df_bar of the chunk's first step: the carry, and all that reaches h.
    df_bar_first = tl.full((), 0.0, dtype=tl.float64)
    for tile in range(TILES_C):
        df_bar_first += tl.load(carry_ptr + (tile * BH + bh) * NC + c).to(tl.float64)
    for first in range(0, tl.minimum(L, T - c * L), BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_t = (c * L + offs_l).to(tl.int64)
        mask = (offs_t < T) & (offs_l < L)
        to_h = tl.load(q_dq_ptr + bh * T + offs_t, mask=mask, other=0.0).to(tl.float64)
        to_h -= tl.load(X_column_ptr + bh * T + offs_t, mask=mask, other=0.0).to(tl.float64)
        df_bar_first += tl.sum(to_h, axis=0)

    # From step to step: what ended in h_t crosses no more, what k_t v_t gives to the next state does so from now on.
    for first in range(0, tl.minimum(L, T - c * L), BLOCK_L):
        offs_l = first + tl.arange(0, BLOCK_L)
        offs_t = (c * L + offs_l).to(tl.int64)
        mask = (offs_t < T) & (offs_l < L)
        X_column = tl.load(X_column_ptr + bh * T + offs_t, mask=mask, other=0.0)
        to_h = tl.load(q_dq_ptr + bh * T + offs_t, mask=mask, other=0.0).to(tl.float64) - X_column.to(tl.float64)
        k_dk = tl.zeros((BLOCK_L,), dtype=tl.float32)
        for tile in range(TILES_K):
            k_dk += tl.load(k_dk_ptr + (tile * BH + bh) * T + offs_t, mask=mask, other=0.0)
        change = k_dk.to(tl.float64) - to_h
        df_bar = (df_bar_first + tl.cumsum(change, 0) - change).to(tl.float32)
        df_bar_first += tl.sum(change, axis=0)
        di = k_dk + X_column
        if di_rest_ptr is not None:
            di += tl.load(di_rest_ptr + bh * T + offs_t, mask=mask, other=0.0)
            df_bar += tl.load(df_bar_rest_ptr + bh * T + offs_t, mask=mask, other=0.0)

        f = tl.load(f_ptr + offs_t * stride_ft, mask=mask, other=0.0).to(tl.float32)
        sigmoid_minus_f = tl.exp(tl.minimum(-f, 0.0)) / (1.0 + tl.exp(-tl.abs(f)))
        df = tl.where(f == -float("inf"), 0.0, df_bar * sigmoid_minus_f)  # d log sigmoid(f) / df = sigmoid(-f)
        tl.store(di_ptr + offs_t * stride_it, di.to(di_ptr.dtype.element_ty), mask=mask)
        tl.store(df_ptr + offs_t * stride_dt, df.to(df_ptr.dtype.element_ty), mask=mask)


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


# The chunk size where none is asked for; half of it for small heads, whose states cost less traffic. On an H200,
# forward and backward take 5 % less time with half of it at 128/256 too, but twice as many states would be kept.
CHUNK_SIZE = 256


def default_chunk_size(DQK: int, DHV: int) -> int:
    return CHUNK_SIZE if DQK * DHV >= 128 * 256 else CHUNK_SIZE // 2


# What a program holds at once, kernel by kernel: steps (rows, columns), columns of q and k, columns of v, num_warps,
# num_stages. Chosen on an H200 at head dimensions 128 and 256, among what the compiler fits into registers.
TILES_BFLOAT16 = {
    "states": (64, 64, 64, 128, 4, 3),
    "h": (128, 64, 128, 256, 8, 2),
    "dq": (64, 64, 128, 256, 4, 1),
    "dstates": (64, 64, 64, 128, 4, 3),
    "dk": (64, 64, 128, 256, 4, 1),
    "dv": (64, 128, 128, 256, 8, 2),
}
# The same for heads that do not fit into one of those tiles.
TILES_WIDE = {
    "h": (128, 64, 128, 256, 8, 1),
    "dq": (64, 64, 128, 128, 4, 1),
    "dk": (64, 64, 128, 128, 4, 1),
    "dv": (64, 128, 128, 256, 8, 1),
}


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
    """Shapes and types of what the forward pass keeps: start, b, u, m_intra, S, C, n, m."""
    (B, NH, T, DQK), NC = q.shape, (q.shape[2] + L - 1) // L
    # The states go into the matrix unit again: they are stored as they will be multiplied.
    dtype_C = torch.bfloat16 if q.dtype == torch.bfloat16 and not INTERPRETED else torch.float32
    return [
        ((B, NH, T), torch.int32), ((B, NH, T), torch.float64), ((B, NH, T, 2), torch.float32),
        ((B, NH, T), torch.float32), ((B, NH, T), torch.float32),
        ((B, NH, NC + 1, DQK, v.shape[-1]), dtype_C), ((B, NH, NC + 1, DQK), torch.float32),
        ((B, NH, NC + 1), torch.float32),
    ]  # fmt: skip


# same as 03_chunkwise/mlstm_limit_chunk.py::contiguous_state
def contiguous_state(C: Tensor | None, n: Tensor | None, m: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in (C, n, m)]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None, L: int, assume_norm: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """h, the final state, and what the backward pass will need."""
    (B, NH, T, DQK), NC = q.shape, triton.cdiv(q.shape[2], L)
    h, state = torch.empty_like(v), contiguous_state(C_0, n_0, m_0)
    C_T = torch.empty(B, NH, DQK, v.shape[-1], dtype=torch.float32, device=q.device)
    saved = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in saved_shapes(q, v, L)]
    if h.numel() == 0:
        return h, *(_empty_state(q, v) if C_0 is None else [x.clone() for x in state]), *saved
    *gates, S, C, n, m = saved
    gates_kernel[(NC * B * NH,)](i, f, *gates, *i.stride(), *f.stride(), T, NC, NH, L, min(L, 256), num_warps=1)
    o = launch_options("states", q, v, L)
    tiles_k, tiles_v = tiles(o)
    states_kernel[(B * NH, tiles_k * tiles_v)](
        k, v, *gates, *state, C, n, m, C_T, *k.stride()[:3], *v.stride()[:3], T, NC, NH, L, **o
    )
    o = launch_options("h", q, v, L)
    h_kernel[(tiles(o)[1] * triton.cdiv(T, o["BLOCK_LQ"]) * B * NH,)](
        q, k, v, *gates, C, n, m, h, S,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *h.stride()[:3], T, NC, NH, L, DQK**-0.5, **o,
    )  # fmt: skip
    return h, C_T, n[:, :, -1].clone(), m[:, :, -1].clone(), *saved


def launch_backward(
    dh: Tensor, dC_T: Tensor | None, dn_T: Tensor | None, dm_T: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None, C_T: Tensor,
    start: Tensor, b: Tensor, u: Tensor, m_intra: Tensor, S: Tensor, C: Tensor, n: Tensor, m: Tensor,
    L: int, assume_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, di, df, dC_0, dn_0, dm_0."""
    (B, NH, T, _), NC, s = q.shape, triton.cdiv(q.shape[2], L), q.shape[-1] ** -0.5
    dq, dk, dv, di, df = (torch.empty_like(x) for x in (q, k, v, i, f))
    dC_0, dn_0, dm_0 = _empty_state(q, v)
    if dh.numel() == 0:
        dstate = (dC_0, dn_0, dm_0) if dC_T is None else (x.clone() for x in (dC_T, dn_T, dm_T))
        return dq, dk, dv, di, df, *dstate
    dh = dh if dh.stride(-1) == 1 else dh.contiguous()
    dstate, gates = contiguous_state(dC_T, dn_T, None), (start, b, u, m_intra)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    strides = [stride for x in (q, k, v, dh) for stride in x.stride()[:3]]
    w_row, delta, w_read, q_dq, X_column = empty(B, NH, T, 2), *(empty(B, NH, T) for _ in range(4))
    o = launch_options("dq", q, v, L)
    dq_kernel[(tiles(o)[0] * triton.cdiv(T, o["BLOCK_LQ"]) * B * NH,)](
        q, k, v, dh, *gates, S, C, n, m, dq, w_row, delta, w_read, q_dq, *strides, *dq.stride()[:3], T, NC, NH, L, s,
        ASSUME_NORM=assume_norm, **o,
    )  # fmt: skip
    o = launch_options("dstates", q, v, L)
    tiles_k, tiles_v = tiles(o)
    tiles_C = tiles_k * tiles_v
    dC, dn, carry = torch.empty_like(C), torch.empty_like(n), empty(tiles_C, B, NH, NC)
    dstates_kernel[(B * NH, tiles_C)](
        q, dh, start, b, m_intra, w_read, delta, C, n, m, *dstate[:2], dC, dn, carry, dC_0, dn_0,
        *q.stride()[:3], *dh.stride()[:3], T, NC, NH, L, **o,
    )  # fmt: skip
    o = launch_options("dk", q, v, L)
    k_dk = empty(tiles(o)[0], B, NH, T)
    dk_kernel[(tiles(o)[0] * triton.cdiv(T, o["BLOCK_LKV"]) * B * NH,)](
        q, k, v, dh, *gates, w_row, delta, dC, dn, m, dk, k_dk, X_column, *strides, *dk.stride()[:3], T, NC, NH, L, **o
    )
    o = launch_options("dv", q, v, L)
    dv_kernel[(tiles(o)[1] * triton.cdiv(T, o["BLOCK_LKV"]) * B * NH,)](
        q, k, dh, *gates, w_row, dC, m, dv, *strides[:6], *strides[9:], *dv.stride()[:3], T, NC, NH, L, **o
    )

    # m is a gauge: it has no gradient of its own, but <C'_0, dC'_0>, and the rest of m_T's if there is one.
    di_rest, df_bar_rest = None, None
    if C_0 is not None:
        dm_0 = (C_0 * dC_0).sum(dim=(-2, -1)) + (n_0 * dn_0).sum(dim=-1)
    if dC_T is not None:
        overlap_T = (C_T * dC_T).sum(dim=(-2, -1)) + (n[:, :, -1] * dn_T).sum(dim=-1)
        m_first = torch.zeros_like(dm_T) if m_0 is None else m_0
        di_rest, df_bar_rest, dm_0_rest = stabilizer_gradient(i.double(), f.double(), m_first, dm_T - overlap_T)
        di_rest, df_bar_rest, dm_0 = di_rest.float().contiguous(), df_bar_rest.float().contiguous(), dm_0 + dm_0_rest
    dgates_kernel[(NC * B * NH,)](
        f, q_dq, k_dk, X_column, carry, di_rest, df_bar_rest, di, df, *f.stride(), *di.stride(), *df.stride(),
        T, NC, NH, L, B * NH, k_dk.shape[0], tiles_C, min(L, 256), num_warps=1,
    )  # fmt: skip
    return dq, dk, dv, di, df, dC_0, dn_0, dm_0


# torch.compile sees each of the two as one operation that it need not look into.
forward_op = torch.library.custom_op("tfla::mlstm_tfla", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("tfla::mlstm_tfla_backward", launch_backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, i, f, C_0, n_0, m_0, L, assume_norm):
    saved = (q.new_empty(shape, dtype=dtype) for shape, dtype in saved_shapes(q, v, L))
    return torch.empty_like(v), *_empty_state(q, v), *saved


@backward_op.register_fake
def _(dh, dC_T, dn_T, dm_T, q, k, v, i, f, *_):
    return *(torch.empty_like(x) for x in (q, k, v, i, f)), *_empty_state(q, v)


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.L, ctx.assume_norm = inputs
    _, C_T, _, _, *saved = output
    ctx.save_for_backward(*tensors, C_T, *saved)
    ctx.set_materialize_grads(False)  # a state that nobody used has the gradient None, and needs no work


def backward(ctx, dh, dC_T, dn_T, dm_T, *_):
    q, k, v, i, f, C_0, *rest = ctx.saved_tensors
    dstate = [dC_T, dn_T, dm_T]
    if any(x is not None for x in dstate):
        dstate = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(_empty_state(q, v), dstate, strict=True)]
    dh = torch.zeros_like(v) if dh is None else dh
    gradients = backward_op(dh, *dstate, q, k, v, i, f, C_0, *rest, ctx.L, ctx.assume_norm)
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


def mlstm_tfla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    chunk_size: int | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    assume_norm: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM as Tiled Flash Linear Attention (paper sections 2 and 3), in Triton.

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, bfloat16 or float32. Any B >= 0, NH >= 1, T >= 0. The last
            dimension must be contiguous; the others may be strided, a transposed (B, T, NH, DQK) is not copied.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32, any strides. -inf is allowed in both:
            f = -inf forgets everything before the step, i = -inf writes nothing.
        chunk_size: steps in a chunk, L: any power of two >= 16. T need not be a multiple of it. For the backward pass
            one state per chunk is kept, DQK * DHV / L numbers a step and head. None: 256, or 128 for small heads.
        initial_state: (C, n, m), (B, NH, DQK, DHV), (B, NH, DQK), (B, NH), float32; None is the empty memory,
            C = 0, n = 0, m = 0.
        return_state: also return the state after the last step, in float32.
        assume_norm: leave the normalizer's gradient out, which saves a quarter of the time for dq. That is right only
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
    _check_triton(q, k, v)
    if chunk_size is None:
        chunk_size = default_chunk_size(q.shape[-1], v.shape[-1])
    elif type(chunk_size) is not int or chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be None or a power of two >= 16, got {chunk_size!r}")
    if not isinstance(assume_norm, bool):
        raise TypeError(f"assume_norm must be True or False, got {assume_norm!r}")
    C_0, n_0, m_0 = (None, None, None) if initial_state is None else initial_state
    h, C, n, m, *_ = forward_op(q, k, v, i, f, C_0, n_0, m_0, chunk_size, assume_norm)
    return (h, (C, n, m)) if return_state else h


# same as 02_parallel/mlstm_parallel.py::_empty_state
def _empty_state(q: Tensor, v: Tensor) -> State:
    """The memory before anything was written."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return tuple(torch.zeros(shape, dtype=dtype, device=q.device) for shape in _state_shapes(q, v))


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


# same as 03_chunkwise/mlstm_limit_chunk.py::_check_triton
def _check_triton(q, k, v) -> None:
    """What the Triton kernels ask for beyond _check_inputs."""
    if q.dtype == torch.float64:
        raise TypeError("q must be float16, bfloat16 or float32, got torch.float64")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"q must be on a GPU, got {q.device}; to run on the CPU, set the environment variable TRITON_INTERPRET=1 "
            "before Triton is imported, or use mlstm_chunkwise.py"
        )
