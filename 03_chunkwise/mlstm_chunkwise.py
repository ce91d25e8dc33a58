"""Stage 03: the mLSTM chunk by chunk, forward and backward, in PyTorch.

The sequence is cut into chunks of L steps. Between chunks runs the recurrence of stage 01, on whole chunks: only
NC = T / L states are ever formed. Within a chunk works the parallel form of stage 02, whose initial state is the state
that the chunk starts from. So time and memory grow with T, and all work is matrix products
(TFLA, arXiv 2503.14376, section 2, chunkwise form):

    b_i = sum_{r<=i} log sigmoid(f_r)    within the chunk, g = b_L,    a_j = sum_{r>j} log sigmoid(f_r) + i_j
    m_c = max(g + m_{c-1}, max_j a_j)
    C_c = e^(g + m_{c-1} - m_c) C_{c-1} + (e^(a - m_c) * K)^T V         n_c likewise, V replaced by a column of ones
    m_i = max(b_i + m_{c-1}, max_{j<=i} log D_ij)                       log D as in stage 02, within the chunk
    P   = s Q K^T * e^(log D - m),    w_i = e^(b_i + m_{c-1} - m_i),    s = 1 / sqrt(d_qk)
    S   = P 1 + s w * (Q n_{c-1})
    H   = (P V + s w * (Q C_{c-1})) / max{ |S|, e^(-m) }                row by row

Every m depends on the gates alone: all of them are known before the first matrix product.

Glossary (name in code = symbol = shape; B batch, NH heads, T steps, L chunk size, NC chunks):
    q, k     queries, keys                (B, NH, T, DQK), inside (B, NH, NC, L, DQK)
    v, h     values, hidden states        (B, NH, T, DHV), inside (B, NH, NC, L, DHV)
    i, f     gate pre-activations         (B, NH, T),      inside (B, NH, NC, L)
    C, n, m  the state at a chunk's start (B, NH, NC, DQK, DHV), (B, NH, NC, DQK), (B, NH, NC)
    W, P     gate weights, weighted scores                 (B, NH, NC, L, L)
    w_state  w, weight of the chunk's first state          (B, NH, NC, L)
    w_end    e^(a - m_c), weight of step j in the next state   (B, NH, NC, L)
    decay    e^(g + m_{c-1} - m_c)                         (B, NH, NC)

New against stage 02: the loop over chunks, and the gradient of the state that runs through it backwards. Not included:
any care for the GPU (mlstm_limit_chunk.py beside this file).

Copy this file: it needs torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mlstm_chunkwise"]

State = tuple[Tensor, Tensor, Tensor]

# The floor e^(-m) of the denominator must stay a number that one can divide by, or a query of zeros would meet 0 / 0.
# So m is capped there, far beyond where the floor could still be seen in h.
M_CAP = {torch.float32: 60, torch.float64: 600}


def split_chunks(x: Tensor, chunk_size: int, fill: float = 0.0) -> Tensor:
    """(B, NH, T, ...) -> (B, NH, NC, L, ...); what the last chunk lacks is filled with `fill`."""
    missing = -x.shape[2] % chunk_size
    padding = x.new_full((*x.shape[:2], missing, *x.shape[3:]), fill)
    return torch.cat([x, padding], dim=2).unflatten(2, (-1, chunk_size))


def gate_weights(i: Tensor, f_bar: Tensor, m_0: Tensor) -> tuple[Tensor, ...]:
    """All stabilizers and weights, from the gates alone. i and f_bar are (B, NH, NC, L).

    Returns m (B, NH, NC, L), m_c at the NC + 1 chunk borders, W, w_state, w_end, decay as in the glossary.
    """
    NC, L = i.shape[-2:]
    row, column = torch.arange(L, device=i.device)[:, None], torch.arange(L, device=i.device)[None, :]
    log_D = torch.where(row > column, f_bar[..., :, None], 0).cumsum(dim=-2) + i[..., None, :]
    log_D = torch.where(row >= column, log_D, -torch.inf)  # (B, NH, NC, L, L)
    b = f_bar.cumsum(dim=-1)
    a = log_D[..., -1, :]  # the last row: the log-weight of step j at the end of the chunk

    m_border = [m_0]
    for c in range(NC):
        m_c = torch.maximum(b[..., c, -1] + m_border[-1], a[..., c, :].amax(dim=-1))
        m_border.append(torch.where(m_c == -torch.inf, 0, m_c))  # an empty memory: any m describes it
    m_border = torch.stack(m_border, dim=-1)  # (B, NH, NC + 1)
    m_start, m_end = m_border[..., :-1, None], m_border[..., 1:, None]

    m = torch.maximum(b + m_start, log_D.amax(dim=-1))
    m = torch.where(m == -torch.inf, 0, m)
    W, w_state = torch.exp(log_D - m[..., None]), torch.exp(b + m_start - m)
    w_end, decay = torch.exp(a - m_end), torch.exp(b[..., -1] + m_start[..., 0] - m_end[..., 0])
    return m, m_border, W, w_state, w_end, decay


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C_0: Tensor, n_0: Tensor, m_0: Tensor, chunk_size: int
) -> tuple[Tensor, ...]:
    """h (B, NH, T, DHV) and the state at all NC + 1 chunk borders, then what the backward pass needs again.

    That is h in chunks, W, w_state, w_end, decay, P, S, D. Plain differentiable PyTorch.
    """
    T, s = q.shape[2], q.shape[-1] ** -0.5
    # Steps past T neither forget (f_bar = 0) nor write (i = -inf): the state after them is the state after step T.
    f_bar, i = split_chunks(F.logsigmoid(f), chunk_size), split_chunks(i, chunk_size, fill=-torch.inf)
    q, k, v = (split_chunks(x, chunk_size) for x in (q, k, v))
    m, m_border, W, w_state, w_end, decay = gate_weights(i, f_bar, m_0)

    # Between chunks: the recurrence, one step a chunk.
    k_weighted = w_end[..., None] * k
    C_border, n_border = [C_0], [n_0]
    for c in range(q.shape[2]):
        C_border.append(decay[..., c, None, None] * C_border[-1] + k_weighted[:, :, c].mT @ v[:, :, c])
        n_border.append(decay[..., c, None] * n_border[-1] + k_weighted[:, :, c].sum(dim=-2))
    C_border, n_border = torch.stack(C_border, dim=2), torch.stack(n_border, dim=2)
    C, n = C_border[:, :, :-1], n_border[:, :, :-1]

    # Within chunks: the parallel form, all chunks at once.
    P = s * (q @ k.mT) * W
    numerator = P @ v + s * w_state[..., None] * (q @ C)
    S = P.sum(dim=-1) + s * w_state * (q @ n[..., None])[..., 0]
    D = torch.maximum(S.abs(), torch.exp(-m.clamp(max=M_CAP[m.dtype])))
    h = numerator / D[..., None]
    return h.flatten(2, 3)[:, :, :T], C_border, n_border, m_border, h, W, w_state, w_end, decay, P, S, D


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_size, q, k, v, i, f, C_0, n_0, m_0):
        compute = torch.promote_types(q.dtype, torch.float32)
        inputs = [x.to(compute) for x in (q, k, v, i, f)] + [C_0, n_0, m_0]
        h, C, n, m, *_ = forward_pass(*inputs, chunk_size)
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(q, k, v, i, f, C_0, n_0, m_0)
        h = torch.empty_like(v).copy_(h)  # in v's dtype and memory layout
        return h, C[:, :, -1].clone(), n[:, :, -1].clone(), m[..., -1].clone()

    @staticmethod
    def backward(ctx, dh, dC_T, dn_T, dm_T):
        """The exact gradient: stage 02's, with dC (the gradient of the state) handed from chunk to chunk, backwards."""
        L, compute = ctx.chunk_size, torch.promote_types(ctx.saved_tensors[0].dtype, torch.float32)
        dtypes = [x.dtype for x in ctx.saved_tensors]
        q, k, v, i, f, C_0, n_0, m_0 = (x.to(compute) for x in ctx.saved_tensors)
        _, C_border, n_border, _, h, W, w_state, w_end, decay, P, S, D = forward_pass(q, k, v, i, f, C_0, n_0, m_0, L)
        C, n = C_border[:, :, :-1], n_border[:, :, :-1]
        T, s = q.shape[2], q.shape[-1] ** -0.5
        q, k, v, dh = (split_chunks(x, L) for x in (q, k, v, dh.to(compute)))

        # h = numerator / D, D = max(|S|, e^(-m))
        g = dh / D[..., None]  # gradient of the numerator
        normalizer_wins = S.abs() >= D
        delta = torch.where(normalizer_wins, -S.sign() * (dh * h).sum(dim=-1) / D, 0)  # gradient of S

        # Between chunks, backwards. dC[c] is the gradient of the state at the end of chunk c.
        q_state = s * w_state[..., None] * q  # what multiplies C and n in h
        dC, dn = [dC_T], [dn_T]
        for c in reversed(range(q.shape[2])):
            dC.append(decay[..., c, None, None] * dC[-1] + q_state[:, :, c].mT @ g[:, :, c])
            dn.append(decay[..., c, None] * dn[-1] + (q_state * delta[..., None])[:, :, c].sum(dim=-2))
        dC_0, dn_0 = dC.pop(), dn.pop()
        dC, dn = torch.stack(dC[::-1], dim=2), torch.stack(dn[::-1], dim=2)

        # Within chunks, all at once.
        dP = (g @ v.mT + delta[..., None]) * W
        dq = s * (dP @ k) + s * w_state[..., None] * (g @ C.mT + delta[..., None] * n[..., None, :])
        dk = s * (dP.mT @ q) + w_end[..., None] * (v @ dC.mT + dn[..., None, :])
        dv = P.mT @ g + w_end[..., None] * (k @ dC)

        # Gates. The sum over r >= t of q . dq - k . dk ends at the chunk's border: all that is behind it is
        # <C'_c, dC'_c>, the product of the state there with its gradient. So no rounding error travels across chunks.
        overlap = (C_border[:, :, 1:] * dC).sum(dim=(-2, -1)) + (n_border[:, :, 1:] * dn).sum(dim=-1)  # (B, NH, NC)
        di = (k * dk).sum(dim=-1)
        x = (q * dq).sum(dim=-1) - di
        df_bar = x.flip(-1).cumsum(dim=-1).flip(-1) + overlap[..., None]
        dm_0 = (C_0 * dC_0).sum(dim=(-2, -1)) + (n_0 * dn_0).sum(dim=-1)
        dq, dk, dv, di, df_bar = (x.flatten(2, 3)[:, :, :T] for x in (dq, dk, dv, di, df_bar))

        di_rest, df_bar_rest, dm_0_rest = stabilizer_gradient(i, f, m_0, dm_T - overlap[..., -1])
        di, df_bar, dm_0 = di + di_rest, df_bar + df_bar_rest, dm_0 + dm_0_rest
        df = torch.where(f > -torch.inf, df_bar * torch.sigmoid(-f), 0)
        gradients = (dq, dk, dv, di, df, dC_0, dn_0, dm_0)
        return None, *(x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))


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


def mlstm_chunkwise(
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
    """The mLSTM in its chunkwise form (paper section 2, chunkwise form).

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, bfloat16, float32 or float64. Any B >= 0, NH >= 1, T >= 0.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32. -inf is allowed in both: f = -inf forgets
            everything before the step, i = -inf writes nothing.
        chunk_size: steps in a chunk, L: a power of two >= 16. T need not be a multiple of it.
        initial_state: (C, n, m), (B, NH, DQK, DHV), (B, NH, DQK), (B, NH); float32, or float64 where q is.
            None is the empty memory, C = 0, n = 0, m = 0.
        return_state: also return the state after the last step.

    Returns:
        h, (B, NH, T, DHV) in the dtype of v; with return_state the pair (h, (C, n, m)). Differentiable once in
        q, k, v, i, f and the initial state. Computed in the dtype of the inputs, 16-bit ones in float32.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state)
    if type(chunk_size) is not int or chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two >= 16, got {chunk_size!r}")
    state = _empty_state(q, v) if initial_state is None else tuple(initial_state)
    if q.shape[2] == 0:
        h = v.clone()  # no steps: empty, and the state as it was
    else:
        h, *state = _Chunkwise.apply(chunk_size, q, k, v, i, f, *state)
    return (h, tuple(state)) if return_state else h


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
