"""Stage 02: the mLSTM for all time steps at once, forward and backward, in PyTorch.

Unrolling the recurrence of stage 01 gives the weight of step j in the output of step t: everything that was forgotten
between them, times the input gate of j. These weights form the gate matrix D, and with it the mLSTM looks like
attention (TFLA, arXiv 2503.14376, section 2, parallel form):

    log D_tj = sum_{r=j+1..t} log sigmoid(f_r) + i_j   for j <= t, else -inf
    m_t      = max_j log D_tj
    P        = s Q K^T * e^(log D - m),                s = 1 / sqrt(d_qk)
    H        = (P V) / max{ |P 1|, e^(-m) }            row by row

An initial state is one more column: its weight in step t is e^(F_t + m_0), with F_t = sum_{r<=t} log sigmoid(f_r).

Glossary (name in code = symbol = shape; B batch, NH heads, T steps):
    q, k      queries, keys               (B, NH, T, DQK)
    v, h      values, hidden states       (B, NH, T, DHV)
    i, f      gate pre-activations        (B, NH, T)
    C, n, m   the state                   (B, NH, DQK, DHV), (B, NH, DQK), (B, NH)
    W         e^(log D - m), gate weights (B, NH, T, T)
    w_state   weight of the initial state (B, NH, T)
    S         P 1 plus the state's part   (B, NH, T)      the normalizer's product n . s q of stage 01
    D         max{ |S|, e^(-m) }          (B, NH, T)

New against stage 01: no step waits for another; everything is a matrix product. The price: time and memory grow with
T^2 (stage 03 makes them grow with T). The backward pass is written by hand, exact through the normalizer and the
states.

Copy this file: it needs torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mlstm_parallel"]

State = tuple[Tensor, Tensor, Tensor]

# The floor e^(-m) of the denominator must stay a number that one can divide by, or a query of zeros would meet 0 / 0.
# So m is capped there, far beyond where the floor could still be seen in h.
M_CAP = {torch.float32: 60, torch.float64: 600}


def gate_matrix(i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the gate matrix, log D (B, NH, T, T), and F, the log-weight of the initial state (B, NH, T).

    The sum over r = j+1..t is taken as it stands. As a difference of two prefix sums, F_t - F_j, it would lose digits
    after a very negative log sigmoid(f_r), and be inf - inf = NaN after one that is -inf.
    """
    T = i.shape[-1]
    f_bar = F.logsigmoid(f)
    row, column = torch.arange(T, device=i.device)[:, None], torch.arange(T, device=i.device)[None, :]
    log_D = torch.where(row > column, f_bar[..., :, None], 0).cumsum(dim=-2) + i[..., None, :]
    return torch.where(row >= column, log_D, -torch.inf), f_bar.cumsum(dim=-1)


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C_0: Tensor, n_0: Tensor, m_0: Tensor
) -> tuple[Tensor, ...]:
    """h and the final state, then what the backward pass needs: W, w_state, P, S, D. Plain differentiable PyTorch."""
    s = q.shape[-1] ** -0.5
    log_D, F_state = gate_matrix(i, f)
    log_w_state = F_state + m_0[..., None]
    m = torch.maximum(log_w_state, log_D.amax(dim=-1))
    m = torch.where(m == -torch.inf, 0, m)  # forgot everything, wrote nothing: any m describes an empty memory
    W, w_state = torch.exp(log_D - m[..., None]), torch.exp(log_w_state - m)

    P = s * (q @ k.mT) * W  # (B, NH, T, T)
    numerator = P @ v + s * w_state[..., None] * (q @ C_0)
    S = P.sum(dim=-1) + s * w_state * (q @ n_0[..., None])[..., 0]
    D = torch.maximum(S.abs(), torch.exp(-m.clamp(max=M_CAP[m.dtype])))
    h = numerator / D[..., None]

    # The state after step T weighs step j as the last row of W does.
    k_weighted = W[..., -1, :, None] * k
    C = w_state[..., -1, None, None] * C_0 + k_weighted.mT @ v
    n = w_state[..., -1, None] * n_0 + k_weighted.sum(dim=-2)
    return h, C, n, m[..., -1], W, w_state, P, S, D


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, i, f, C_0, n_0, m_0):
        compute = torch.promote_types(q.dtype, torch.float32)
        inputs = [x.to(compute) for x in (q, k, v, i, f)] + [C_0, n_0, m_0]
        h, C, n, m, *_ = forward_pass(*inputs)
        ctx.save_for_backward(q, k, v, i, f, C_0, n_0, m_0)
        return torch.empty_like(v).copy_(h), C, n, m  # in v's dtype and memory layout

    @staticmethod
    def backward(ctx, dh, dC, dn, dm):
        """The exact gradient (derived in 02_parallel.ipynb).

        The normalizer is treated as one more value column of ones: V' = [V, 1], C' = [C, n], and the gradient of that
        column is delta. m is treated as a constant, because scaling C and n by e^(-c) and adding c to m changes nothing
        in h; only a loss that looks at the returned C, n and m themselves can tell, and gets the rest at the end.
        """
        compute = torch.promote_types(ctx.saved_tensors[0].dtype, torch.float32)
        dtypes = [x.dtype for x in ctx.saved_tensors]
        dh = dh.to(compute)
        q, k, v, i, f, C_0, n_0, m_0 = (x.to(compute) for x in ctx.saved_tensors)
        h, C, n, _, W, w_state, P, S, D = forward_pass(q, k, v, i, f, C_0, n_0, m_0)
        s = q.shape[-1] ** -0.5

        # h = numerator / D, D = max(|S|, e^(-m))
        g = dh / D[..., None]  # gradient of the numerator
        normalizer_wins = S.abs() >= D
        delta = torch.where(normalizer_wins, -S.sign() * (dh * h).sum(dim=-1) / D, 0)  # gradient of S

        dP = (g @ v.mT + delta[..., None]) * W  # (B, NH, T, T), gradient of s Q K^T
        w_end, w_state_end = W[..., -1, :, None], w_state[..., -1]  # weights of step j and of C_0 in the final C
        q_state = s * w_state[..., None] * q  # what multiplies C_0 and n_0 in h

        dq = s * (dP @ k) + s * w_state[..., None] * (g @ C_0.mT + delta[..., None] * n_0[..., None, :])
        dk = s * (dP.mT @ q) + w_end * (v @ dC.mT + dn[..., None, :])
        dv = P.mT @ g + w_end * (k @ dC)
        dC_0 = w_state_end[..., None, None] * dC + q_state.mT @ g
        dn_0 = w_state_end[..., None] * dn + (q_state * delta[..., None]).sum(dim=-2)

        # Every path from a gate to the loss goes through a weight, so its gradient is a sum of products already formed.
        state_overlap = (C * dC).sum(dim=(-2, -1)) + (n * dn).sum(dim=-1)  # <C'_T, dC'_T>
        di = (k * dk).sum(dim=-1)
        x = (q * dq).sum(dim=-1) - di
        df_bar = x.flip(-1).cumsum(dim=-1).flip(-1) + state_overlap[..., None]
        dm_0 = (C_0 * dC_0).sum(dim=(-2, -1)) + (n_0 * dn_0).sum(dim=-1)

        di_rest, df_bar_rest, dm_0_rest = stabilizer_gradient(i, f, m_0, dm - state_overlap)
        di, df_bar, dm_0 = di + di_rest, df_bar + df_bar_rest, dm_0 + dm_0_rest
        df = torch.where(f > -torch.inf, df_bar * torch.sigmoid(-f), 0)
        gradients = (dq, dk, dv, di, df, dC_0, dn_0, dm_0)
        return tuple(x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))


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


def mlstm_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """The mLSTM in its parallel, quadratic form (paper section 2, parallel form).

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, bfloat16, float32 or float64. Any B >= 0, NH >= 1, T >= 0.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32. -inf is allowed in both: f = -inf forgets
            everything before the step, i = -inf writes nothing.
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
    state = _empty_state(q, v) if initial_state is None else tuple(initial_state)
    if q.shape[2] == 0:
        h = v.clone()  # no steps: empty, and the state as it was
    else:
        h, *state = _Parallel.apply(q, k, v, i, f, *state)
    return (h, tuple(state)) if return_state else h


def _empty_state(q: Tensor, v: Tensor) -> State:
    """The memory before anything was written."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return tuple(torch.zeros(shape, dtype=dtype, device=q.device) for shape in _state_shapes(q, v))


def _state_shapes(q: Tensor, v: Tensor) -> list[tuple[int, ...]]:
    B, NH, _, DQK = q.shape
    return [(B, NH, DQK, v.shape[-1]), (B, NH, DQK), (B, NH)]


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
