"""Stage 03 on the GPU: the chunkwise mLSTM in Triton, forward and backward, one program for a whole chunk.

The equations are those of mlstm_chunkwise.py beside this file (TFLA, arXiv 2503.14376, section 2). Between chunks the
state is handed on; within a chunk everything is matrix products:

    C_c = e^(g + m_{c-1} - m_c) C_{c-1} + (e^(a - m_c) * K)^T V
    H   = (P V + s w * (Q C_{c-1})) / max{ |S|, e^(-m) },   P = s Q K^T * W,   S = P 1 + s w * (Q n_{c-1})

so there is one kernel that walks over the chunks and writes the state at every border (states_kernel), and one that
turns all chunks into outputs at once (h_kernel). The backward pass has the same two halves: dstates_kernel walks
backwards, then dq_, dk_ and dv_kernel work on all chunks at once. "Limit chunk": a program holds the L x L matrix of
its chunk on chip, so L is at most 128. Stage 04 lifts this limit.

Glossary (name in code = symbol = shape; L steps in a chunk, NC chunks, rows i and columns j of a chunk):
    start    where in the chunk step i's document begins; -1: before it  (B*NH, NC*L)  int32
    b        sum_{r<=i} log sigmoid(f_r) since then, or since the chunk began   (B*NH, NC*L)  float64
    u        i_j - b_j, so that log D_ij = b_i + u_j and a_j = g + u_j   (B*NH, NC*L)  float64
    m_intra  max_{start<=j<=i} log D_ij                                  (B*NH, NC*L)
    g        b at the chunk's last step
    C, n, m  the state at the chunk borders 0..NC             (B*NH, NC+1, DQK, DHV), (B*NH, NC+1, DQK), (B*NH, NC+1)
    W        e^(b_i + u_j - m_i), gate weights                (L, L)
    w_state  e^(b_i + m_{c-1} - m_i), weight of the chunk's first state   (L)
    w_end    e^(a_j - m_c), weight of step j in the next state            (L)
    S, r     normalizer product n . s q (L), and 1 / max{|S|, e^(-m)}     (B*NH, T)
    delta    gradient of S                                                (B*NH, T)
    carry    e^(g + m_{c-1} - m_c) <C'_{c-1}, dC'_c>, row by row          (tiles of DHV, B*NH, NC, DQK)
    X        dP * scores, gradient of log D                               (L, L)

Precision: the gates' sums are float64, because a difference b_i - b_j of float32 sums loses its digits behind one very
closed forget gate. bfloat16 inputs are multiplied in bfloat16, float16 ones as TF32 (float16's digits, but the range
that products with gate weights need), float32 ones as three TF32 products. All sums are float32.

New against mlstm_chunkwise.py: tiles, masks, strides. Not included: chunks larger than 128 (stage 04).

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
        "mlstm_limit_chunk.py needs Triton, which comes with PyTorch on Linux. "
        "mlstm_chunkwise.py in 03_chunkwise computes the same without it."
    ) from error

__all__ = ["mlstm_limit_chunk"]

State = tuple[Tensor, Tensor, Tensor]

# Triton's interpreter (TRITON_INTERPRET=1, for machines without a GPU) cannot multiply bfloat16.
INTERPRETED = triton.knobs.runtime.interpret
# A forget gate below this, f = -inf above all, begins a new document. Its sum starts anew, and the masks keep the old
# document out: exactly, where inf - inf would be NaN.
LOG_FORGOTTEN = tl.constexpr(-1e7)
# The floor e^(-m) of the denominator must stay a number that one can divide by, or a query of zeros would meet 0 / 0.
# So m is capped there, far beyond where the floor could still be seen in h.
M_CAP = tl.constexpr(60.0)


# ---------------------------------------------------------------------------------------------------------------------
# Small pieces that several kernels share
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def load_tile(ptr, rows, cols, stride_row, n_rows, n_cols):
    """The tile x[rows, cols] of a matrix with n_rows x n_cols entries; 0 outside of it."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return tl.load(ptr + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, x, rows, cols, stride_row, n_rows, n_cols):
    """x[rows, cols] = the tile x, rounded to what ptr points to; nothing is written outside of the matrix."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(ptr + rows[:, None] * stride_row + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_of_program(N_TILES, NC):
    """Programs are numbered tile first, then chunk, then head: neighbours share a chunk's q, k, v in the L2 cache."""
    program = tl.program_id(0)
    return program % N_TILES, (program // N_TILES) % NC, (program // N_TILES // NC).to(tl.int64)


@triton.jit
def operand(x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """x as the matrix unit takes it. For TF32 it is rounded to 10 bits here; the hardware would cut the others off."""
    if PRECISION == "tf32":
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(DOT)


@triton.jit
def head(ptr, bh, NH, stride_b, stride_h):
    """Where head bh = b * NH + h of a (B, NH, ...) tensor begins."""
    return ptr + bh // NH * stride_b + bh % NH * stride_h


@triton.jit
def load_row_gates(start_ptr, b_ptr, m_intra_ptr, m_state, offs_gate):
    """Of a chunk's rows: start, m, b - m and w_state, where the chunk's first state has the stabilizer m_state."""
    start, b, m_intra = tl.load(start_ptr + offs_gate), tl.load(b_ptr + offs_gate), tl.load(m_intra_ptr + offs_gate)
    log_w_state = tl.where(start < 0, b + m_state, -float("inf"))
    m = tl.maximum(log_w_state.to(tl.float32), m_intra)
    m = tl.where(m == -float("inf"), 0.0, m)  # forgot everything, wrote nothing: any m describes an empty memory
    return start, m, b - m, tl.exp((log_w_state - m).to(tl.float32))


@triton.jit
def load_end_gates(start_ptr, b_ptr, u_ptr, m_state, m_next, offs_gate, offs_last, offs_l):
    """decay and w_end: the weights of the chunk's first state and of its steps in the next state."""
    start, g = tl.load(start_ptr + offs_last), tl.load(b_ptr + offs_last)
    decay = tl.where(start < 0, tl.exp((g + m_state - m_next).to(tl.float32)), 0.0)
    log_w_end = tl.where(offs_l >= start, g + tl.load(u_ptr + offs_gate) - m_next, -float("inf"))
    return decay, tl.exp(log_w_end.to(tl.float32))


@triton.jit
def gate_weights(start, b_m, u, L: tl.constexpr):
    """W_ij = e^(b_i + u_j - m_i) for start_i <= j <= i, else 0. The exponent is masked: elsewhere it may be huge."""
    i, j = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    mask = (i >= j) & (j >= start[:, None])
    return tl.exp(tl.where(mask, (b_m[:, None] + u[None, :]).to(tl.float32), -float("inf")))


@triton.jit
def gate_weights_transposed(start, b_m, u, L: tl.constexpr):
    """W^T, with steps j as rows and i as columns."""
    j, i = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    mask = (i >= j) & (j >= start[None, :])
    return tl.exp(tl.where(mask, (u[:, None] + b_m[None, :]).to(tl.float32), -float("inf")))


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def gates_kernel(
    i_ptr, f_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr,
    stride_ib, stride_ih, stride_it, stride_fb, stride_fh, stride_ft,
    T, NC, NH, L: tl.constexpr,
):  # fmt: skip
    """start, b, u and m_intra of one chunk, from its L gates. Grid: NC * B * NH.

    Steps past T neither forget (log sigmoid(f) = 0) nor write (i = -inf).
    """
    _, c, bh = chunk_of_program(1, NC)
    offs_l = tl.arange(0, L)
    offs_t = (c * L + offs_l).to(tl.int64)
    mask = offs_t < T
    i = tl.load(head(i_ptr, bh, NH, stride_ib, stride_ih) + offs_t * stride_it, mask=mask, other=-float("inf"))
    f = tl.load(head(f_ptr, bh, NH, stride_fb, stride_fh) + offs_t * stride_ft, mask=mask, other=float("inf"))
    i, f = i.to(tl.float64), f.to(tl.float64)

    f_bar = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f)))  # in float64 nothing visible is lost in 1 + e^-|f|
    reset = f_bar < LOG_FORGOTTEN
    row, column = offs_l[:, None], offs_l[None, :]
    start = tl.max(tl.where((row >= column) & reset[None, :], column, -1), axis=1)  # the last reset up to each step
    mask = (row >= column) & (column >= start[:, None])  # (L, L)
    b = tl.sum(tl.where(mask, tl.where(reset, 0.0, f_bar)[None, :], 0.0), axis=1)
    u = i - b
    m_intra = tl.max(tl.where(mask, b[:, None] + u[None, :], -float("inf")), axis=1).to(tl.float32)

    offs_gate = (bh * NC + c) * L + offs_l
    tl.store(start_ptr + offs_gate, start)
    tl.store(b_ptr + offs_gate, b)
    tl.store(u_ptr + offs_gate, u)
    tl.store(m_intra_ptr + offs_gate, m_intra)


@triton.jit
def states_kernel(
    k_ptr, v_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, C_0_ptr, n_0_ptr, m_0_ptr, C_ptr, n_ptr, m_ptr, C_T_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    T, NC, NH,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state at every chunk border. A program owns one tile of C and walks with it over the chunks in order.

    C (DQK x DHV)        grid: B * NH, tiles of C
    +---+---+---+---+    loop: c = 0 .. NC-1
    |   | x |   |   |      store C, n, m of border c
    +---+---+---+---+      C <- decay * C + (w_end * K)^T V
    |   |   |   |   |    store border NC, and C once more in float32: the final state
    +---+---+---+---+    The first column of tiles takes care of n, the first tile of m.
    """
    bh = tl.program_id(0).to(tl.int64)
    tile_k, tile_v = tl.program_id(1) // tl.cdiv(DHV, BLOCK_DHV), tl.program_id(1) % tl.cdiv(DHV, BLOCK_DHV)
    offs_l = tl.arange(0, L)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    k_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh)
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

        offs_chunk = (bh * NC + c) * L
        _, m_next, _, _ = load_row_gates(start_ptr, b_ptr, m_intra_ptr, m, offs_chunk + L - 1)  # the last row's m
        decay, w_end = load_end_gates(
            start_ptr, b_ptr, u_ptr, m, m_next, offs_chunk + offs_l, offs_chunk + L - 1, offs_l
        )  # fmt: skip

        offs_t = (c * L + offs_l).to(tl.int64)
        k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(tl.float32) * w_end[:, None]  # (L, BLOCK_DQK)
        v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        C = tl.dot(tl.trans(operand(k, DOT, PRECISION)), v, C * decay, input_precision=PRECISION)
        n = n * decay + tl.sum(k, axis=0)
        m = m_next

    store_tile(C_ptr, C, offs_k, offs_v, DHV, DQK, DHV)
    store_tile(C_T_ptr, C, offs_k, offs_v, DHV, DQK, DHV)
    if tile_v == 0:
        tl.store(n_ptr + offs_k, n, mask=offs_k < DQK)
        if tile_k == 0:
            tl.store(m_ptr, m)


@triton.jit
def h_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, C_ptr, n_ptr, m_ptr, h_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_hb, stride_hh, stride_ht,
    T, NC, NH, s,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h of one chunk, for one tile of its columns. Grid: (tiles of DHV) * NC * B * NH.

    P (L x L)         V (L x DHV)      loop over DQK: scores += Q K^T, h_state += Q C, S_state += Q n
    +---------+       +---+---+        then P = s * scores * W, h = P V + s * w_state * h_state
    | x       |       |   | x |
    | x x     |   @   |   | x |        The whole P lives in registers: this is what limits the chunk.
    | x x x   |       |   | x |
    +---------+       +---+---+
    """
    tile_v, c, bh = chunk_of_program(tl.cdiv(DHV, BLOCK_DHV), NC)
    offs_l = tl.arange(0, L)
    offs_v = tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    offs_t = (c * L + offs_l).to(tl.int64)
    offs_gate, border = (bh * NC + c) * L + offs_l, bh * (NC + 1) + c
    q_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh)
    k_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh)
    h_ptr = head(h_ptr, bh, NH, stride_hb, stride_hh)

    scores = tl.zeros((L, L), dtype=tl.float32)
    h_state = tl.zeros((L, BLOCK_DHV), dtype=tl.float32)
    S_state = tl.zeros((L,), dtype=tl.float32)
    for first in range(0, DQK, BLOCK_DQK):
        offs_k = first + tl.arange(0, BLOCK_DQK)
        q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK)  # (L, BLOCK_DQK)
        k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(DOT)  # (L, BLOCK_DQK)
        C = load_tile(C_ptr + border * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
        n = tl.load(n_ptr + border * DQK + offs_k, mask=offs_k < DQK, other=0.0)
        scores = tl.dot(q.to(DOT), tl.trans(k), scores, input_precision=PRECISION)
        h_state = tl.dot(q.to(DOT), operand(C, DOT, PRECISION), h_state, input_precision=PRECISION)
        S_state += tl.sum(q.to(tl.float32) * n[None, :], axis=1)

    start, m, b_m, w_state = load_row_gates(start_ptr, b_ptr, m_intra_ptr, tl.load(m_ptr + border), offs_gate)
    P = s * scores * gate_weights(start, b_m, tl.load(u_ptr + offs_gate), L)  # (L, L)
    S = tl.sum(P, axis=1) + s * w_state * S_state
    D = tl.maximum(tl.abs(S), tl.exp(-tl.minimum(m, M_CAP)))

    v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
    h = tl.dot(operand(P, DOT, PRECISION), v, h_state * (s * w_state)[:, None], input_precision=PRECISION) / D[:, None]
    store_tile(h_ptr, h, offs_t, offs_v, stride_ht, T, DHV)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------
@triton.jit
def delta_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, C_ptr, n_ptr, m_ptr,
    r_ptr, delta_ptr, X_row_ptr, X_column_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    T, NC, NH, s,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one number a row says about a chunk: r = 1 / D, delta, and the sums of X by row and by column.

    Grid: NC * B * NH. Loops: over DQK for the scores, then over DHV for dP = dH V^T and for dH . (Q C).

    delta = -[|S| wins the max] sign(S) (dh . h) / D is the gradient through the normalizer. dh . h is formed anew in
    float32; from the h that was returned, rounded to 16 bits, delta would be wrong in its third digit.
    X = dP * scores is the gradient of log D. Its row sums are what the pairs (i, j) of this chunk add to q . dq, its
    column sums what they add to k . dk. Taken from dq and dk, for which dP is rounded, they would not cancel as they
    should in df.
    """
    _, c, bh = chunk_of_program(1, NC)
    offs_l = tl.arange(0, L)
    offs_t = (c * L + offs_l).to(tl.int64)
    offs_gate, border = (bh * NC + c) * L + offs_l, bh * (NC + 1) + c
    q_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh)
    k_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh)
    dh_ptr = head(dh_ptr, bh, NH, stride_gb, stride_gh)

    scores = tl.zeros((L, L), dtype=tl.float32)
    S_state = tl.zeros((L,), dtype=tl.float32)
    for first in range(0, DQK, BLOCK_DQK):
        offs_k = first + tl.arange(0, BLOCK_DQK)
        q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK)  # (L, BLOCK_DQK)
        k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(DOT)  # (L, BLOCK_DQK)
        n = tl.load(n_ptr + border * DQK + offs_k, mask=offs_k < DQK, other=0.0)
        scores = tl.dot(q.to(DOT), tl.trans(k), scores, input_precision=PRECISION)
        S_state += tl.sum(q.to(tl.float32) * n[None, :], axis=1)

    dP = tl.zeros((L, L), dtype=tl.float32)
    dh_state = tl.zeros((L,), dtype=tl.float32)
    for first_v in range(0, DHV, BLOCK_DHV):
        offs_v = first_v + tl.arange(0, BLOCK_DHV)
        h_state = tl.zeros((L, BLOCK_DHV), dtype=tl.float32)
        for first in range(0, DQK, BLOCK_DQK):
            offs_k = first + tl.arange(0, BLOCK_DQK)
            q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(DOT)
            C = load_tile(C_ptr + border * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
            h_state = tl.dot(q, operand(C, DOT, PRECISION), h_state, input_precision=PRECISION)
        dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV)  # (L, BLOCK_DHV)
        v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        dP = tl.dot(dh.to(DOT), tl.trans(v), dP, input_precision=PRECISION)
        dh_state += tl.sum(dh.to(tl.float32) * h_state, axis=1)

    start, m, b_m, w_state = load_row_gates(start_ptr, b_ptr, m_intra_ptr, tl.load(m_ptr + border), offs_gate)
    W = gate_weights(start, b_m, tl.load(u_ptr + offs_gate), L)
    P = s * scores * W  # (L, L)
    S = tl.sum(P, axis=1) + s * w_state * S_state
    floor = tl.exp(-tl.minimum(m, M_CAP))
    r = 1.0 / tl.maximum(tl.abs(S), floor)
    dh_h = r * (tl.sum(P * dP, axis=1) + s * w_state * dh_state)
    delta = tl.where(tl.abs(S) > floor, tl.where(S > 0, -r, r) * dh_h, 0.0)
    X = (dP * r[:, None] + delta[:, None]) * P  # (L, L)

    mask = offs_t < T
    tl.store(r_ptr + bh * T + offs_t, r, mask=mask)
    tl.store(delta_ptr + bh * T + offs_t, delta, mask=mask)
    tl.store(X_row_ptr + bh * T + offs_t, tl.sum(X, axis=1), mask=mask)
    tl.store(X_column_ptr + bh * T + offs_t, tl.sum(X, axis=0), mask=mask)


@triton.jit
def dstates_kernel(
    q_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, r_ptr, delta_ptr, C_ptr, n_ptr, m_ptr, dC_T_ptr, dn_T_ptr,
    dC_ptr, dn_ptr, carry_ptr, dC_0_ptr, dn_0_ptr,
    stride_qb, stride_qh, stride_qt, stride_gb, stride_gh, stride_gt,
    T, NC, NH, s,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state at every chunk border: states_kernel run backwards.

    dC (DQK x DHV)       grid: B * NH, tiles of dC
    +---+---+---+---+    loop: c = NC-1 .. 0
    |   | x |   |   |      store dC, dn of border c+1, and the tile's part of carry
    +---+---+---+---+      dC <- decay * dC + (s * w_state * r * Q)^T dH
    |   |   |   |   |    store border 0: the gradient of the initial state
    +---+---+---+---+    The first column of tiles takes care of dn.
    """
    bh = tl.program_id(0).to(tl.int64)
    tile_k, tile_v = tl.program_id(1) // tl.cdiv(DHV, BLOCK_DHV), tl.program_id(1) % tl.cdiv(DHV, BLOCK_DHV)
    offs_l = tl.arange(0, L)
    offs_k, offs_v = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK), tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    q_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh)
    dh_ptr = head(dh_ptr, bh, NH, stride_gb, stride_gh)
    # Borders are walked backwards: dC, dn from border NC on, C, n from the one before it.
    border = bh * (NC + 1) + NC
    dC_ptr, dn_ptr = dC_ptr + border * DQK * DHV, dn_ptr + border * DQK
    C_ptr, n_ptr = C_ptr + (border - 1) * DQK * DHV, n_ptr + (border - 1) * DQK
    carry_ptr += ((tile_v * tl.num_programs(0) + bh) * NC + NC - 1) * DQK

    if dC_T_ptr is None:
        dC = tl.zeros((BLOCK_DQK, BLOCK_DHV), dtype=tl.float32)
        dn = tl.zeros((BLOCK_DQK,), dtype=tl.float32)
    else:
        dC = load_tile(dC_T_ptr + bh * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)
        dn = tl.load(dn_T_ptr + bh * DQK + offs_k, mask=offs_k < DQK, other=0.0)

    m_next = tl.load(m_ptr + border)
    for step in range(NC):
        c = NC - 1 - step
        store_tile(dC_ptr, dC, offs_k, offs_v, DHV, DQK, DHV)
        if tile_v == 0:
            tl.store(dn_ptr + offs_k, dn, mask=offs_k < DQK)

        m_state, offs_chunk = tl.load(m_ptr + bh * (NC + 1) + c), (bh * NC + c) * L
        decay, _ = load_end_gates(
            start_ptr, b_ptr, u_ptr, m_state, m_next, offs_chunk + offs_l, offs_chunk + L - 1, offs_l
        )  # fmt: skip
        C = load_tile(C_ptr, offs_k, offs_v, DHV, DQK, DHV).to(tl.float32)
        n = tl.load(n_ptr + offs_k, mask=offs_k < DQK, other=0.0)
        carry = decay * (tl.sum(C * dC, axis=1) + tl.where(tile_v == 0, n * dn, 0.0))  # (BLOCK_DQK,)
        tl.store(carry_ptr + offs_k, carry, mask=offs_k < DQK)
        C_ptr, dC_ptr, n_ptr, dn_ptr = C_ptr - DQK * DHV, dC_ptr - DQK * DHV, n_ptr - DQK, dn_ptr - DQK
        carry_ptr -= DQK

        _, _, _, w_state = load_row_gates(start_ptr, b_ptr, m_intra_ptr, m_state, offs_chunk + offs_l)
        offs_t = (c * L + offs_l).to(tl.int64)
        r = tl.load(r_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
        delta = tl.load(delta_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
        q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(tl.float32) * (s * w_state)[:, None]
        dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        dC = tl.dot(tl.trans(operand(q * r[:, None], DOT, PRECISION)), dh, dC * decay, input_precision=PRECISION)
        dn = dn * decay + tl.sum(q * delta[:, None], axis=0)
        m_next = m_state

    store_tile(dC_0_ptr + bh * DQK * DHV, dC, offs_k, offs_v, DHV, DQK, DHV)
    if tile_v == 0:
        tl.store(dn_0_ptr + bh * DQK + offs_k, dn, mask=offs_k < DQK)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, r_ptr, delta_ptr, C_ptr, n_ptr, m_ptr,
    dq_ptr, q_dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, s,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one chunk, for one tile of its columns, and the state's part of q . dq. Grid: (tiles of DQK) * NC * B * NH.

    dP (L x L)        K (L x DQK)      loop over DHV: dP += dH V^T, dq += dH C^T
    +---------+       +---+---+        then dP = (r * dP + delta) * W,
    | x       |       |   | x |        dq = s * (dP K + w_state * (r * dq + delta * n))
    | x x     |   @   |   | x |
    | x x x   |       |   | x |        r scales rows, so it waits until the products are done: dH goes into
    +---------+       +---+---+        them as it came, unrounded.
    """
    tile_k, c, bh = chunk_of_program(tl.cdiv(DQK, BLOCK_DQK), NC)
    offs_l = tl.arange(0, L)
    offs_k = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
    offs_t = (c * L + offs_l).to(tl.int64)
    offs_gate, border = (bh * NC + c) * L + offs_l, bh * (NC + 1) + c
    q_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh)
    k_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh)
    dh_ptr = head(dh_ptr, bh, NH, stride_gb, stride_gh)
    dq_ptr = head(dq_ptr, bh, NH, stride_db, stride_dh)

    dP = tl.zeros((L, L), dtype=tl.float32)
    dq = tl.zeros((L, BLOCK_DQK), dtype=tl.float32)
    for first in range(0, DHV, BLOCK_DHV):
        offs_v = first + tl.arange(0, BLOCK_DHV)
        dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        C = load_tile(C_ptr + border * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)  # (BLOCK_DQK, BLOCK_DHV)
        dP = tl.dot(dh, tl.trans(v), dP, input_precision=PRECISION)
        dq = tl.dot(dh, tl.trans(operand(C, DOT, PRECISION)), dq, input_precision=PRECISION)

    start, _, b_m, w_state = load_row_gates(start_ptr, b_ptr, m_intra_ptr, tl.load(m_ptr + border), offs_gate)
    r = tl.load(r_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
    delta = tl.load(delta_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
    n = tl.load(n_ptr + border * DQK + offs_k, mask=offs_k < DQK, other=0.0)
    dP = (dP * r[:, None] + delta[:, None]) * (s * gate_weights(start, b_m, tl.load(u_ptr + offs_gate), L))  # (L, L)

    q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(tl.float32)  # (L, BLOCK_DQK)
    k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(DOT)  # (L, BLOCK_DQK)
    dq = (dq * r[:, None] + delta[:, None] * n[None, :]) * (s * w_state)[:, None]
    q_dq = tl.sum(q * dq, axis=1)
    dq = tl.dot(operand(dP, DOT, PRECISION), k, dq, input_precision=PRECISION)
    store_tile(dq_ptr, dq, offs_t, offs_k, stride_dt, T, DQK)
    BH = tl.num_programs(0) // tl.cdiv(DQK, BLOCK_DQK) // NC
    tl.store(q_dq_ptr + (tile_k.to(tl.int64) * BH + bh) * T + offs_t, q_dq, mask=offs_t < T)


@triton.jit
def dk_kernel(
    q_ptr, k_ptr, v_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, r_ptr, delta_ptr, dC_ptr, dn_ptr, m_ptr,
    dk_ptr, k_dk_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, s,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of one chunk, for one tile of its columns, and the state's part of k . dk. Grid: (tiles of DQK) * NC * B * NH.

    dP^T (L x L)      Q (L x DQK)      loop over DHV: dP^T += V dH^T, dk += V dC^T
    +---------+       +---+---+        then dP^T = (r * dP^T + delta) * W^T,
    | x x x   |       |   | x |        dk = s * dP^T Q + w_end * (dk + dn)
    |   x x   |   @   |   | x |
    |     x   |       |   | x |        dP^T is formed as it is used, not by turning dP round: some versions
    +---------+       +---+---+        of Triton get that wrong on Hopper.
    """
    tile_k, c, bh = chunk_of_program(tl.cdiv(DQK, BLOCK_DQK), NC)
    offs_l = tl.arange(0, L)
    offs_k = tile_k * BLOCK_DQK + tl.arange(0, BLOCK_DQK)
    offs_t = (c * L + offs_l).to(tl.int64)
    offs_gate, border = (bh * NC + c) * L + offs_l, bh * (NC + 1) + c
    q_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh)
    k_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh)
    v_ptr = head(v_ptr, bh, NH, stride_vb, stride_vh)
    dh_ptr = head(dh_ptr, bh, NH, stride_gb, stride_gh)
    dk_ptr = head(dk_ptr, bh, NH, stride_db, stride_dh)

    dP_T = tl.zeros((L, L), dtype=tl.float32)
    dk = tl.zeros((L, BLOCK_DQK), dtype=tl.float32)
    for first in range(0, DHV, BLOCK_DHV):
        offs_v = first + tl.arange(0, BLOCK_DHV)
        dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        v = load_tile(v_ptr, offs_t, offs_v, stride_vt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
        dC = load_tile(dC_ptr + (border + 1) * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)
        dP_T = tl.dot(v, tl.trans(dh), dP_T, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(operand(dC, DOT, PRECISION)), dk, input_precision=PRECISION)

    m_state, m_next, u = tl.load(m_ptr + border), tl.load(m_ptr + border + 1), tl.load(u_ptr + offs_gate)
    start, _, b_m, _ = load_row_gates(start_ptr, b_ptr, m_intra_ptr, m_state, offs_gate)
    last = (bh * NC + c) * L + L - 1
    _, w_end = load_end_gates(start_ptr, b_ptr, u_ptr, m_state, m_next, offs_gate, last, offs_l)
    r = tl.load(r_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
    delta = tl.load(delta_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
    dn = tl.load(dn_ptr + (border + 1) * DQK + offs_k, mask=offs_k < DQK, other=0.0)
    dP_T = (dP_T * r[None, :] + delta[None, :]) * (s * gate_weights_transposed(start, b_m, u, L))  # (L, L)

    q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(DOT)  # (L, BLOCK_DQK)
    k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(tl.float32)
    dk = (dk + dn[None, :]) * w_end[:, None]
    k_dk = tl.sum(k * dk, axis=1)
    dk = tl.dot(operand(dP_T, DOT, PRECISION), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr, dk, offs_t, offs_k, stride_dt, T, DQK)
    BH = tl.num_programs(0) // tl.cdiv(DQK, BLOCK_DQK) // NC
    tl.store(k_dk_ptr + (tile_k.to(tl.int64) * BH + bh) * T + offs_t, k_dk, mask=offs_t < T)


@triton.jit
def dv_kernel(
    q_ptr, k_ptr, dh_ptr, start_ptr, b_ptr, u_ptr, m_intra_ptr, r_ptr, dC_ptr, m_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
    T, NC, NH, s,
    DQK: tl.constexpr, DHV: tl.constexpr, L: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one chunk, for one tile of its columns. Grid: (tiles of DHV) * NC * B * NH.

    P^T (L x L)       dH (L x DHV)     loop over DQK: P^T += K Q^T, dv += K dC
    +---------+       +---+---+        then P^T = s * r * P^T * W^T, dv = P^T dH + w_end * dv
    | x x x   |       |   | x |
    |   x x   |   @   |   | x |
    |     x   |       |   | x |
    +---------+       +---+---+
    """
    tile_v, c, bh = chunk_of_program(tl.cdiv(DHV, BLOCK_DHV), NC)
    offs_l = tl.arange(0, L)
    offs_v = tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)
    offs_t = (c * L + offs_l).to(tl.int64)
    offs_gate, border = (bh * NC + c) * L + offs_l, bh * (NC + 1) + c
    q_ptr = head(q_ptr, bh, NH, stride_qb, stride_qh)
    k_ptr = head(k_ptr, bh, NH, stride_kb, stride_kh)
    dh_ptr = head(dh_ptr, bh, NH, stride_gb, stride_gh)
    dv_ptr = head(dv_ptr, bh, NH, stride_db, stride_dh)

    P_T = tl.zeros((L, L), dtype=tl.float32)
    dv = tl.zeros((L, BLOCK_DHV), dtype=tl.float32)
    for first in range(0, DQK, BLOCK_DQK):
        offs_k = first + tl.arange(0, BLOCK_DQK)
        q = load_tile(q_ptr, offs_t, offs_k, stride_qt, T, DQK).to(DOT)  # (L, BLOCK_DQK)
        k = load_tile(k_ptr, offs_t, offs_k, stride_kt, T, DQK).to(DOT)  # (L, BLOCK_DQK)
        dC = load_tile(dC_ptr + (border + 1) * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)
        P_T = tl.dot(k, tl.trans(q), P_T, input_precision=PRECISION)
        dv = tl.dot(k, operand(dC, DOT, PRECISION), dv, input_precision=PRECISION)

    m_state, m_next, u = tl.load(m_ptr + border), tl.load(m_ptr + border + 1), tl.load(u_ptr + offs_gate)
    start, _, b_m, _ = load_row_gates(start_ptr, b_ptr, m_intra_ptr, m_state, offs_gate)
    last = (bh * NC + c) * L + L - 1
    _, w_end = load_end_gates(start_ptr, b_ptr, u_ptr, m_state, m_next, offs_gate, last, offs_l)
    r = tl.load(r_ptr + bh * T + offs_t, mask=offs_t < T, other=0.0)
    P_T = P_T * gate_weights_transposed(start, b_m, u, L) * (s * r)[None, :]  # (L, L)

    dh = load_tile(dh_ptr, offs_t, offs_v, stride_gt, T, DHV).to(DOT)  # (L, BLOCK_DHV)
    dv = tl.dot(operand(P_T, DOT, PRECISION), dh, dv * w_end[:, None], input_precision=PRECISION)
    store_tile(dv_ptr, dv, offs_t, offs_v, stride_dt, T, DHV)


@triton.jit
def dgates_kernel(
    f_ptr, q_dq_ptr, k_dk_ptr, X_row_ptr, X_column_ptr, carry_ptr, di_rest_ptr, df_bar_rest_ptr, di_ptr, df_ptr,
    stride_fb, stride_fh, stride_ft, stride_ib, stride_ih, stride_it, stride_db, stride_dh, stride_dt,
    T, NC, NH, TILES_DQ, TILES_DK, TILES_C, DQK: tl.constexpr, BLOCK_DQK: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """di and df of one chunk. Grid: NC * B * NH.

    di is k . dk. f_t weakens everything that crosses step t, so df_bar_t is the sum over all that does:
      state before the chunk -> h_r, r >= t     sum over r >= t of the state's part of q . dq
      k_j v_j, j < t -> h_r, r >= t             sum over r >= t of X's row sums - column sums
      k_j v_j, j < t -> state after the chunk   sum over j < t of the state's part of k . dk
      state before -> state after               carry
    As one sum over all later steps, of q . dq - k . dk, it would be a small difference of large numbers in long
    sequences. The parts that the tiles left are added up here, always in the same order.
    """
    _, c, bh = chunk_of_program(1, NC)
    BH = tl.num_programs(0) // NC
    offs_l = tl.arange(0, L)
    offs_t = (c * L + offs_l).to(tl.int64)
    mask = offs_t < T

    X_column = tl.load(X_column_ptr + bh * T + offs_t, mask=mask, other=0.0)
    X_row = tl.load(X_row_ptr + bh * T + offs_t, mask=mask, other=0.0)
    q_dq, k_dk = tl.zeros((L,), dtype=tl.float32), tl.zeros((L,), dtype=tl.float32)
    for tile in range(TILES_DQ):
        q_dq += tl.load(q_dq_ptr + (tile * BH + bh) * T + offs_t, mask=mask, other=0.0)
    for tile in range(TILES_DK):
        k_dk += tl.load(k_dk_ptr + (tile * BH + bh) * T + offs_t, mask=mask, other=0.0)
    offs_k = tl.arange(0, BLOCK_DQK)
    carry = tl.zeros((BLOCK_DQK,), dtype=tl.float32)
    for tile in range(TILES_C):
        carry += tl.load(carry_ptr + ((tile * BH + bh) * NC + c) * DQK + offs_k, mask=offs_k < DQK, other=0.0)

    crossing = tl.where(offs_l[None, :] >= offs_l[:, None], (q_dq + X_row - X_column)[None, :], k_dk[None, :])  # (L, L)
    df_bar, di = tl.sum(crossing, axis=1) + tl.sum(carry), k_dk + X_column
    if di_rest_ptr is not None:
        di += tl.load(di_rest_ptr + bh * T + offs_t, mask=mask, other=0.0)
        df_bar += tl.load(df_bar_rest_ptr + bh * T + offs_t, mask=mask, other=0.0)

    f = tl.load(head(f_ptr, bh, NH, stride_fb, stride_fh) + offs_t * stride_ft, mask=mask, other=0.0)
    f = f.to(tl.float32)
    sigmoid_minus_f = tl.exp(tl.minimum(-f, 0.0)) / (1.0 + tl.exp(-tl.abs(f)))
    df = tl.where(f == -float("inf"), 0.0, df_bar * sigmoid_minus_f)  # d log sigmoid(f) / df = sigmoid(-f)
    di_ptr = head(di_ptr, bh, NH, stride_ib, stride_ih)
    df_ptr = head(df_ptr, bh, NH, stride_db, stride_dh)
    tl.store(di_ptr + offs_t * stride_it, di.to(di_ptr.dtype.element_ty), mask=mask)
    tl.store(df_ptr + offs_t * stride_dt, df.to(df_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------
def describe_gpu(device: torch.device) -> tuple[bool, int]:
    """Whether it is an AMD GPU, and the bytes of on-chip (shared) memory that one program may use there."""
    if INTERPRETED:
        return False, 232448  # the interpreter has no limit: run what an H100 would run
    hip = torch.version.hip is not None
    return hip, 65536 if hip else torch.cuda.get_device_properties(device).shared_memory_per_block_optin


# What a program holds at once, kernel by kernel: BLOCK_DQK, BLOCK_DHV, num_warps, num_stages; chosen on an H200 at
# L = 64 and head dimensions 128 and 256, among what the compiler fits into registers.
TILES_BFLOAT16 = {
    "states": (64, 128, 4, 3),
    "h": (64, 128, 8, 1),
    "delta": (128, 64, 8, 2),
    "dstates": (32, 128, 4, 2),
    "dq": (128, 64, 4, 1),
    "dk": (128, 64, 4, 1),
    "dv": (64, 128, 8, 1),
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
    if bfloat16 and L <= 64 and shared_memory > 150_000:
        block_k, block_v, num_warps, num_stages = TILES_BFLOAT16[kernel]
    else:
        # Three TF32 products instead of one keep three times as much in registers.
        block_k = block_v = 64 if shared_memory > 150_000 and (precision != "tf32x3" or L <= 32) else 32
        num_warps, num_stages = 8 if L == 128 else 4, 1
    # In bfloat16 on Hopper, Triton 3.6 lets dq_kernel read past the end of shared memory when BLOCK_DQK is 16.
    smallest = 64 if bfloat16 else 16
    return {
        "DQK": DQK, "DHV": DHV, "L": L,
        "BLOCK_DQK": min(block_k, max(smallest, triton.next_power_of_2(DQK))),
        "BLOCK_DHV": min(block_v, max(smallest, triton.next_power_of_2(DHV))),
        "DOT": tl.bfloat16 if bfloat16 else tl.float32, "PRECISION": precision,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def tiles(o: dict) -> tuple[int, int]:
    """How many tiles the head dimensions are cut into."""
    return triton.cdiv(o["DQK"], o["BLOCK_DQK"]), triton.cdiv(o["DHV"], o["BLOCK_DHV"])


def run_states(k, v, i, f, state, L: int) -> tuple[Tensor, ...]:
    """gates_kernel and states_kernel: (start, b, u, m_intra); C, n, m at all borders; the final C in float32."""
    (B, NH, T, DQK), DHV, NC = k.shape, v.shape[-1], triton.cdiv(k.shape[2], L)
    o = launch_options("states", k, v, L)
    start = torch.empty(B * NH, NC * L, dtype=torch.int32, device=k.device)
    b, u = torch.empty(2, B * NH, NC * L, dtype=torch.float64, device=k.device)
    m_intra, n, m, C_T = (
        torch.empty(shape, dtype=torch.float32, device=k.device)
        for shape in ((B * NH, NC * L), (B, NH, NC + 1, DQK), (B, NH, NC + 1), (B, NH, DQK, DHV))
    )
    # The states go into the matrix unit again: they are stored as they will be multiplied.
    dtype_C = torch.bfloat16 if o["DOT"] == tl.bfloat16 else torch.float32
    C = torch.empty(B, NH, NC + 1, DQK, DHV, dtype=dtype_C, device=k.device)
    gates = (start, b, u, m_intra)
    gates_kernel[(NC * B * NH,)](i, f, *gates, *i.stride(), *f.stride(), T, NC, NH, L, num_warps=1 if L <= 64 else 8)
    tiles_k, tiles_v = tiles(o)
    states_kernel[(B * NH, tiles_k * tiles_v)](
        k, v, *gates, *state, C, n, m, C_T, *k.stride()[:3], *v.stride()[:3], T, NC, NH, **o
    )
    return gates, C, n, m, C_T


def contiguous_state(C: Tensor | None, n: Tensor | None, m: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in (C, n, m)]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h and the final state."""
    B, NH, T, _ = q.shape
    h = torch.empty_like(v)
    state = contiguous_state(C_0, n_0, m_0)
    if h.numel() == 0:
        C_T, n_T, m_T = _empty_state(q, v) if C_0 is None else [x.clone() for x in state]
        return h, C_T, n_T, m_T
    gates, C, n, m, C_T = run_states(k, v, i, f, state, chunk_size)
    o, NC = launch_options("h", q, v, chunk_size), triton.cdiv(T, chunk_size)
    h_kernel[(tiles(o)[1] * NC * B * NH,)](
        q, k, v, *gates, C, n, m, h,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *h.stride()[:3], T, NC, NH, q.shape[-1] ** -0.5, **o,
    )  # fmt: skip
    return h, C_T, n[:, :, -1].clone(), m[:, :, -1].clone()


def launch_backward(
    dh: Tensor, dC_T: Tensor | None, dn_T: Tensor | None, dm_T: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor,
    C_0: Tensor | None, n_0: Tensor | None, m_0: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, di, df, dC_0, dn_0, dm_0, from the inputs alone: to keep the states would cost a GiB and more."""
    B, NH, T, DQK = q.shape
    dq, dk, dv, di, df = (torch.empty_like(x) for x in (q, k, v, i, f))
    dC_0, dn_0, dm_0 = _empty_state(q, v)
    if dh.numel() == 0:
        dstate = (dC_0, dn_0, dm_0) if dC_T is None else (x.clone() for x in (dC_T, dn_T, dm_T))
        return dq, dk, dv, di, df, *dstate
    NC, s = triton.cdiv(T, chunk_size), q.shape[-1] ** -0.5
    dh = dh if dh.stride(-1) == 1 else dh.contiguous()
    state, dstate = contiguous_state(C_0, n_0, m_0), contiguous_state(dC_T, dn_T, None)
    gates, C, n, m, C_T = run_states(k, v, i, f, state, chunk_size)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    strides_q, strides_k, strides_v, strides_dh = (x.stride()[:3] for x in (q, k, v, dh))
    sizes = (T, NC, NH, s)
    r, delta, X_row, X_column = (empty(B, NH, T) for _ in range(4))
    delta_kernel[(NC * B * NH,)](
        q, k, v, dh, *gates, C, n, m, r, delta, X_row, X_column,
        *strides_q, *strides_k, *strides_v, *strides_dh, *sizes, **launch_options("delta", q, v, chunk_size),
    )  # fmt: skip
    o = launch_options("dstates", q, v, chunk_size)
    tiles_k, tiles_v = tiles(o)
    dC, dn, carry = torch.empty_like(C), torch.empty_like(n), empty(tiles_v, B, NH, NC, DQK)
    dstates_kernel[(B * NH, tiles_k * tiles_v)](
        q, dh, *gates, r, delta, C, n, m, *dstate[:2], dC, dn, carry, dC_0, dn_0,
        *strides_q, *strides_dh, *sizes, **o,
    )  # fmt: skip
    o = launch_options("dq", q, v, chunk_size)
    q_dq = empty(tiles(o)[0], B, NH, T)
    dq_kernel[(tiles(o)[0] * NC * B * NH,)](
        q, k, v, dh, *gates, r, delta, C, n, m, dq, q_dq,
        *strides_q, *strides_k, *strides_v, *strides_dh, *dq.stride()[:3], *sizes, **o,
    )  # fmt: skip
    o = launch_options("dk", q, v, chunk_size)
    k_dk = empty(tiles(o)[0], B, NH, T)
    dk_kernel[(tiles(o)[0] * NC * B * NH,)](
        q, k, v, dh, *gates, r, delta, dC, dn, m, dk, k_dk,
        *strides_q, *strides_k, *strides_v, *strides_dh, *dk.stride()[:3], *sizes, **o,
    )  # fmt: skip
    o = launch_options("dv", q, v, chunk_size)
    dv_kernel[(tiles(o)[1] * NC * B * NH,)](
        q, k, dh, *gates, r, dC, m, dv, *strides_q, *strides_k, *strides_dh, *dv.stride()[:3], *sizes, **o
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
        f, q_dq, k_dk, X_row, X_column, carry, di_rest, df_bar_rest, di, df, *f.stride(), *di.stride(), *df.stride(),
        T, NC, NH, q_dq.shape[0], k_dk.shape[0], tiles_v, DQK, triton.next_power_of_2(DQK), chunk_size,
        num_warps=1 if chunk_size <= 64 else 4,
    )  # fmt: skip
    return dq, dk, dv, di, df, dC_0, dn_0, dm_0


# torch.compile sees each of the two as one operation that it need not look into.
forward_op = torch.library.custom_op("tfla::mlstm_limit_chunk", launch_forward, mutates_args=())
backward_op = torch.library.custom_op("tfla::mlstm_limit_chunk_backward", launch_backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, i, f, C_0, n_0, m_0, chunk_size):
    return torch.empty_like(v), *_empty_state(q, v)


@backward_op.register_fake
def _(dh, dC_T, dn_T, dm_T, q, k, v, i, f, C_0, n_0, m_0, chunk_size):
    return *(torch.empty_like(x) for x in (q, k, v, i, f)), *_empty_state(q, v)


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # a state that nobody used has the gradient None, and needs no work


def backward(ctx, dh, dC_T, dn_T, dm_T):
    q, k, v, i, f, C_0, n_0, m_0 = ctx.saved_tensors
    dstate = [dC_T, dn_T, dm_T]
    if any(x is not None for x in dstate):
        dstate = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(_empty_state(q, v), dstate, strict=True)]
    dh = torch.zeros_like(v) if dh is None else dh
    gradients = backward_op(dh, *dstate, q, k, v, i, f, C_0, n_0, m_0, ctx.chunk_size)
    return *gradients[:5], *(gradients[5:] if C_0 is not None else (None, None, None)), None


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


def mlstm_limit_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM in its chunkwise form (paper section 2), in Triton, one program a chunk.

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, bfloat16 or float32. Any B >= 0, NH >= 1, T >= 0. The last
            dimension must be contiguous; the others may be strided, a transposed (B, T, NH, DQK) is not copied.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32, any strides. -inf is allowed in both:
            f = -inf forgets everything before the step, i = -inf writes nothing.
        chunk_size: steps in a chunk, L: 16, 32, 64 or 128. T need not be a multiple of it.
        initial_state: (C, n, m), (B, NH, DQK, DHV), (B, NH, DQK), (B, NH), float32; None is the empty memory,
            C = 0, n = 0, m = 0.
        return_state: also return the state after the last step, in float32.

    Returns:
        h, (B, NH, T, DHV) in the dtype and memory layout of v; with return_state the pair (h, (C, n, m)).
        Differentiable once in q, k, v, i, f and the initial state, exactly, and deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state)
    _check_triton(q, k, v)
    if chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"chunk_size must be 16, 32, 64 or 128, got {chunk_size!r}")
    C_0, n_0, m_0 = (None, None, None) if initial_state is None else initial_state
    h, C, n, m = forward_op(q, k, v, i, f, C_0, n_0, m_0, chunk_size)
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
