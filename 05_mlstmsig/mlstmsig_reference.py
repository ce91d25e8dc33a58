"""Stage 05: the mLSTM with a sigmoid input gate in all its forms, before any kernel: NumPy and PyTorch.

mLSTMsig replaces the exponential input gate by a sigmoid (TFLA, arXiv 2503.14376, section 4). Both gates are then at
most 1: nothing can overflow, so no stabilizer m is needed, and the paper's cell has no normalizer n either. Left are

    C_t = sigmoid(f_t) C_{t-1} + sigmoid(i_t) k_t v_t^T
    h_t = C_t^T (s q_t),     s = 1 / sqrt(d_qk)

The other forms follow as in stages 02 and 03. With f_bar = log sigmoid(f), i_bar = log sigmoid(i):

    parallel    H = (s Q K^T * W) V,      W_tj = e^(sum_{r=j+1..t} f_bar_r + i_bar_j) for j <= t, else 0
                An initial state adds s w_state * (Q C_0), w_state_t = e^(sum_{r<=t} f_bar_r).
    chunkwise   C_c = w_state_L C_{c-1} + (w_end * K)^T V between chunks; within them, the parallel form.

Glossary (name in code = symbol = shape; B batch, NH heads, T steps, L chunk size, NC chunks):
    q, k     queries, keys                (B, NH, T, DQK)
    v, h     values, hidden states        (B, NH, T, DHV)
    i, f     gate pre-activations         (B, NH, T)
    C        memory: all of the state     (B, NH, DQK, DHV); functions take and give the tuple (C,)
    W, P     gate weights, weighted scores                 (B, NH, T, T) or (B, NH, NC, L, L)
    w_state  weight of the state that a sequence or chunk starts from   (B, NH, T) or (B, NH, NC, L)
    w_end    weight of step j in the state at the end, W's last row     like w_state

The gradients are written by hand: stages 01 to 03 without the normalizer's part, and with
d log sigmoid(i) / di = sigmoid(-i) for the input gate. Not included: any care for the GPU (mlstmsig_tfla.py).

Copy this file: it needs numpy and torch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "mlstmsig_chunkwise",
    "mlstmsig_parallel",
    "mlstmsig_recurrent",
    "mlstmsig_recurrent_backward",
    "mlstmsig_step",
]


# ---------------------------------------------------------------------------------------------------------------------
# One step at a time, in NumPy
# ---------------------------------------------------------------------------------------------------------------------
# same as 01_recurrent/mlstm_recurrent.py::log_sigmoid
def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """log(sigmoid(x)) without overflow: log(sigmoid(-800)) is -800, where log(1 / (1 + e^800)) would be -inf."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow, and with all its digits where it is small."""
    return np.exp(log_sigmoid(x))


def mlstmsig_step(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, i: np.ndarray, f: np.ndarray, state: tuple[np.ndarray] | None = None
) -> tuple[np.ndarray, tuple[np.ndarray]]:
    """One step of the mLSTMsig (paper section 4).

    Args:
        q, k: query and key, (B, NH, DQK); float16, float32 or float64.
        v: value, (B, NH, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH), the dtype of q or float32. -inf is allowed in both.
        state: (C,) with shape (B, NH, DQK, DHV); float32, or float64 where q is. None is the empty memory, C = 0.

    Returns:
        h: (B, NH, DHV) in the dtype of v, and the new state.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(np.ndarray, q, k, v, i, f, ("state", state), time=False)
    dtype = np.result_type(q.dtype, np.float32)
    (C,) = (np.zeros((*q.shape, v.shape[-1]), dtype),) if state is None else state
    out, (q, k, v, i, f) = v.dtype, (x.astype(dtype) for x in (q, k, v, i, f))
    s = dtype.type(q.shape[-1] ** -0.5)
    C = sigmoid(f)[..., None, None] * C + sigmoid(i)[..., None, None] * k[..., :, None] * v[..., None, :]
    return np.einsum("bhkv,bhk->bhv", C, s * q).astype(out), (C,)


def mlstmsig_recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    i: np.ndarray,
    f: np.ndarray,
    *,
    initial_state: tuple[np.ndarray] | None = None,
    return_state: bool = False,
) -> np.ndarray | tuple[np.ndarray, tuple[np.ndarray]]:
    """The mLSTMsig over a sequence, one step after the other (paper section 4).

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, float32 or float64. Any B >= 0, NH >= 1, T >= 0.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32. -inf is allowed in both.
        initial_state: (C,) as in mlstmsig_step; None is the empty memory.
        return_state: also return the state after the last step.

    Returns:
        h, (B, NH, T, DHV) in the dtype of v; with return_state the pair (h, (C,)).
        Computed in the dtype of the inputs, float16 in float32.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(np.ndarray, q, k, v, i, f, ("initial_state", initial_state))
    state, h = initial_state, np.empty(v.shape, v.dtype)
    if state is None:
        state = (np.zeros((*q.shape[:2], q.shape[-1], v.shape[-1]), np.result_type(q.dtype, np.float32)),)
    for t in range(q.shape[2]):
        h[:, :, t], state = mlstmsig_step(q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t], f[:, :, t], state)
    return (h, tuple(state)) if return_state else h


def mlstmsig_recurrent_backward(
    dh: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    i: np.ndarray,
    f: np.ndarray,
    *,
    initial_state: tuple[np.ndarray] | None = None,
    dstate: tuple[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray]]:
    """Backpropagation through time for mlstmsig_recurrent, every line of the step differentiated by hand.

    Args:
        dh: gradient of h, (B, NH, T, DHV), the dtype of v.
        q, k, v, i, f, initial_state: as given to mlstmsig_recurrent.
        dstate: gradient of the returned state, (dC,); None is zero.

    Returns:
        (dq, dk, dv, di, df, (dC_0,)): each in the shape and dtype of what it is the gradient of. The gradient of a gate
        at -inf is exactly 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(np.ndarray, q, k, v, i, f, ("initial_state", initial_state), ("dstate", dstate), dh=dh)
    dtype = np.result_type(q.dtype, np.float32)
    T, s = q.shape[2], dtype.type(q.shape[-1] ** -0.5)
    empty = np.zeros((*q.shape[:2], q.shape[-1], v.shape[-1]), dtype)
    states = [empty if initial_state is None else initial_state[0]]  # states[t] is what step t starts from
    for t in range(T):
        step = (q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t], f[:, :, t])
        states.append(mlstmsig_step(*step, (states[-1],))[1][0])

    dC = empty if dstate is None else dstate[0].copy()
    dq, dk, dv, di, df = (np.empty_like(x) for x in (q, k, v, i, f))
    for t in reversed(range(T)):
        q_t, k_t, v_t, i_t, f_t, dh_t = (x[:, :, t].astype(dtype) for x in (q, k, v, i, f, dh))
        w_i, w_f = sigmoid(i_t), sigmoid(f_t)
        # h = C^T s q
        dq[:, :, t] = s * np.einsum("bhkv,bhv->bhk", states[t + 1], dh_t)
        dC = dC + s * q_t[..., :, None] * dh_t[..., None, :]
        # C = w_f C_prev + w_i k v^T
        dC_v = np.einsum("bhkv,bhv->bhk", dC, v_t)
        dk[:, :, t] = w_i[..., None] * dC_v
        dv[:, :, t] = w_i[..., None] * np.einsum("bhkv,bhk->bhv", dC, k_t)
        # d sigmoid(x) / dx = sigmoid(x) sigmoid(-x)
        di[:, :, t] = np.einsum("bhk,bhk->bh", k_t, dC_v) * w_i * sigmoid(-i_t)
        df[:, :, t] = np.einsum("bhkv,bhkv->bh", dC, states[t]) * w_f * sigmoid(-f_t)
        dC = w_f[..., None, None] * dC
    return dq, dk, dv, di, df, (dC,)


# ---------------------------------------------------------------------------------------------------------------------
# All steps at once, in PyTorch
# ---------------------------------------------------------------------------------------------------------------------
def gate_weights(i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """W (..., T, T) and w_state (..., T). The sums are taken as they stand, for the reason that stage 02 gives."""
    T, f_bar = i.shape[-1], F.logsigmoid(f)
    row, column = torch.arange(T, device=i.device)[:, None], torch.arange(T, device=i.device)[None, :]
    log_W = torch.where(row > column, f_bar[..., :, None], 0).cumsum(dim=-2) + F.logsigmoid(i)[..., None, :]
    return torch.exp(torch.where(row >= column, log_W, -torch.inf)), torch.exp(f_bar.cumsum(dim=-1))


def within(q: Tensor, k: Tensor, v: Tensor, W: Tensor, w_state: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """h (..., T, DHV) of a stretch of steps that starts from the state C (..., DQK, DHV); and P (..., T, T)."""
    s = q.shape[-1] ** -0.5
    P = s * (q @ k.mT) * W
    return P @ v + s * w_state[..., None] * (q @ C), P


def within_backward(
    dh: Tensor, dC: Tensor, q: Tensor, k: Tensor, v: Tensor, W: Tensor, w_state: Tensor, C: Tensor, C_end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, di_bar, df_bar of the same stretch, where dC is the gradient of C_end, the state at its end."""
    s, w_end = q.shape[-1] ** -0.5, W[..., -1, :, None]
    _, P = within(q, k, v, W, w_state, C)
    dP = (dh @ v.mT) * W  # gradient of s Q K^T
    dq = s * (dP @ k) + s * w_state[..., None] * (dh @ C.mT)
    dk = s * (dP.mT @ q) + w_end * (v @ dC.mT)
    dv = P.mT @ dh + w_end * (k @ dC)
    # Every path from a gate to the loss goes through a weight, so its gradient is a sum of products already formed.
    di_bar = (k * dk).sum(dim=-1)
    x = (q * dq).sum(dim=-1) - di_bar
    df_bar = x.flip(-1).cumsum(dim=-1).flip(-1) + (C_end * dC).sum(dim=(-2, -1))[..., None]
    return dq, dk, dv, di_bar, df_bar


def gates_backward(i: Tensor, f: Tensor, di_bar: Tensor, df_bar: Tensor) -> tuple[Tensor, Tensor]:
    """From gradients of log sigmoid to those of its argument; exactly 0 at -inf."""
    di = torch.where(i > -torch.inf, di_bar * torch.sigmoid(-i), 0)
    return di, torch.where(f > -torch.inf, df_bar * torch.sigmoid(-f), 0)


class _Parallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, i, f, C_0):
        ctx.save_for_backward(q, k, v, i, f, C_0)
        out = torch.empty_like(v)  # in v's dtype and memory layout
        q, k, v, i, f = (x.to(C_0.dtype) for x in (q, k, v, i, f))
        W, w_state = gate_weights(i, f)
        h, _ = within(q, k, v, W, w_state, C_0)
        # The state after step T weighs step j as the last row of W does.
        C = w_state[..., -1, None, None] * C_0 + (W[..., -1, :, None] * k).mT @ v
        return out.copy_(h), C

    @staticmethod
    def backward(ctx, dh, dC):
        dtypes = [x.dtype for x in ctx.saved_tensors]
        *_, C_0 = ctx.saved_tensors
        dh, q, k, v, i, f = (x.to(C_0.dtype) for x in (dh, *ctx.saved_tensors[:5]))
        s, (W, w_state) = q.shape[-1] ** -0.5, gate_weights(i, f)
        C = w_state[..., -1, None, None] * C_0 + (W[..., -1, :, None] * k).mT @ v
        dq, dk, dv, di_bar, df_bar = within_backward(dh, dC, q, k, v, W, w_state, C_0, C)
        dC_0 = w_state[..., -1, None, None] * dC + s * (w_state[..., None] * q).mT @ dh
        gradients = (dq, dk, dv, *gates_backward(i, f, di_bar, df_bar), dC_0)
        return tuple(x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))


def mlstmsig_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: tuple[Tensor] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor]]:
    """The mLSTMsig in its parallel, quadratic form (paper section 4).

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, bfloat16, float32 or float64. Any B >= 0, NH >= 1, T >= 0.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32. -inf is allowed in both: f = -inf forgets
            everything before the step, i = -inf writes nothing.
        initial_state: (C,), (B, NH, DQK, DHV); float32, or float64 where q is. None is the empty memory, C = 0.
        return_state: also return the state after the last step.

    Returns:
        h, (B, NH, T, DHV) in the dtype of v; with return_state the pair (h, (C,)). Differentiable once in q, k, v, i, f
        and the initial state. Computed in the dtype of the inputs, 16-bit ones in float32.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(Tensor, q, k, v, i, f, ("initial_state", initial_state))
    (C,) = _empty_state(q, v) if initial_state is None else initial_state
    if q.shape[2] == 0:
        h = v.clone()  # no steps: empty, and the state as it was
    else:
        h, C = _Parallel.apply(q, k, v, i, f, C)
    return (h, (C,)) if return_state else h


# ---------------------------------------------------------------------------------------------------------------------
# Chunk by chunk, in PyTorch
# ---------------------------------------------------------------------------------------------------------------------
# same as 03_chunkwise/mlstm_chunkwise.py::split_chunks
def split_chunks(x: Tensor, chunk_size: int, fill: float = 0.0) -> Tensor:
    """(B, NH, T, ...) -> (B, NH, NC, L, ...); what the last chunk lacks is filled with `fill`."""
    missing = -x.shape[2] % chunk_size
    padding = x.new_full((*x.shape[:2], missing, *x.shape[3:]), fill)
    return torch.cat([x, padding], dim=2).unflatten(2, (-1, chunk_size))


def split_and_weigh(q, k, v, i, f, C_0, chunk_size: int) -> tuple[Tensor, ...]:
    """q, k, v in chunks, W, w_state, and C at all NC + 1 chunk borders (B, NH, NC + 1, DQK, DHV)."""
    # Steps past T neither forget nor write: the state after them is the state after step T.
    W, w_state = gate_weights(split_chunks(i, chunk_size, -torch.inf), split_chunks(f, chunk_size, torch.inf))
    q, k, v = (split_chunks(x, chunk_size) for x in (q, k, v))
    added = (W[..., -1, :, None] * k).mT @ v  # what each chunk adds to the state: (B, NH, NC, DQK, DHV)
    C = [C_0]
    for c in range(q.shape[2]):  # the recurrence, one step a chunk
        C.append(w_state[:, :, c, -1, None, None] * C[-1] + added[:, :, c])
    return q, k, v, W, w_state, torch.stack(C, dim=2)


class _Chunkwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunk_size, q, k, v, i, f, C_0):
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(q, k, v, i, f, C_0)
        inputs = [x.to(C_0.dtype) for x in (q, k, v, i, f)]
        *chunks, C = split_and_weigh(*inputs, C_0, chunk_size)
        h, _ = within(*chunks, C[:, :, :-1])
        h = h.flatten(2, 3)[:, :, : q.shape[2]]
        return torch.empty_like(v).copy_(h), C[:, :, -1].clone()  # in v's dtype and memory layout

    @staticmethod
    def backward(ctx, dh, dC_T):
        """within_backward for all chunks at once, after dC was handed from chunk to chunk, backwards."""
        dtypes, (*_, C_0) = [x.dtype for x in ctx.saved_tensors], ctx.saved_tensors
        dh, *inputs = (x.to(C_0.dtype) for x in (dh, *ctx.saved_tensors[:5]))
        T, (_, _, _, i, f) = dh.shape[2], inputs
        q, k, v, W, w_state, C = split_and_weigh(*inputs, C_0, ctx.chunk_size)
        dh = split_chunks(dh, ctx.chunk_size)
        added = q.shape[-1] ** -0.5 * (w_state[..., None] * q).mT @ dh
        dC = [dC_T]  # dC[c] will be the gradient of the state at the end of chunk c
        for c in reversed(range(q.shape[2])):
            dC.append(w_state[:, :, c, -1, None, None] * dC[-1] + added[:, :, c])
        dC_0, dC = dC[-1], torch.stack(dC[-2::-1], dim=2)
        gradients = within_backward(dh, dC, q, k, v, W, w_state, C[:, :, :-1], C[:, :, 1:])
        dq, dk, dv, di_bar, df_bar = (x.flatten(2, 3)[:, :, :T] for x in gradients)
        gradients = (dq, dk, dv, *gates_backward(i, f, di_bar, df_bar), dC_0)
        return None, *(x.to(dtype) for x, dtype in zip(gradients, dtypes, strict=True))


def mlstmsig_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    chunk_size: int = 64,
    initial_state: tuple[Tensor] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor]]:
    """The mLSTMsig in its chunkwise form (paper section 4).

    Args:
        q, k, v, i, f, initial_state, return_state: as in mlstmsig_parallel.
        chunk_size: steps in a chunk, L: a power of two >= 16. T need not be a multiple of it.

    Returns:
        As mlstmsig_parallel.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(Tensor, q, k, v, i, f, ("initial_state", initial_state))
    if type(chunk_size) is not int or chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two >= 16, got {chunk_size!r}")
    (C,) = _empty_state(q, v) if initial_state is None else initial_state
    if q.shape[2] == 0:
        h = v.clone()  # no steps: empty, and the state as it was
    else:
        h, C = _Chunkwise.apply(chunk_size, q, k, v, i, f, C)
    return (h, (C,)) if return_state else h


def _empty_state(q: Tensor, v: Tensor) -> tuple[Tensor]:
    """The memory before anything was written."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype, device=q.device),)


def _check_inputs(kind, q, k, v, i, f, *states, time: bool = True, dh=None) -> None:
    """Raises an error that names the argument, what it was and what it must be. kind: numpy.ndarray or torch.Tensor."""
    library, full_name = (np, "numpy.ndarray") if kind is np.ndarray else (torch, "torch.Tensor")
    half = (library.float16, *((torch.bfloat16,) if library is torch else ()))
    layout = "(B, NH, T, D)" if time else "(B, NH, D)"
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, kind):
            raise TypeError(f"{name} must be a {full_name}, got {type(x).__name__}")
        if x.ndim != (4 if time else 3) or x.shape[1] < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape {layout} with NH >= 1 and D >= 1, got {tuple(x.shape)}")
    allowed = (*half, library.float32, library.float64)
    if q.dtype not in allowed:
        names = [str(dtype if library is torch else np.dtype(dtype)).removeprefix("torch.") for dtype in allowed]
        raise TypeError(f"q must be {', '.join(names[:-1])} or {names[-1]}, got {q.dtype}")
    float32 = torch.float32 if library is torch else np.dtype(np.float32)
    expected = [("k", k, q.shape, (q.dtype,)), ("v", v, (*q.shape[:-1], v.shape[-1]), (q.dtype,))]
    expected += [(name, x, q.shape[:-1], (q.dtype, float32)) for name, x in (("i", i), ("f", f))]
    expected += [] if dh is None else [("dh", dh, v.shape, (v.dtype,))]
    for name, state in states:
        if state is None:
            continue
        if not isinstance(state, (tuple, list)) or len(state) != 1:
            raise TypeError(f"{name} must be a tuple (C,), got {type(state).__name__}")
        dtype = q.dtype if q.dtype == library.float64 else float32
        expected.append((f"{name}'s C", state[0], (*q.shape[:2], q.shape[-1], v.shape[-1]), (dtype,)))
    for name, x, shape, dtypes in expected:
        if not isinstance(x, kind):
            raise TypeError(f"{name} must be a {full_name}, got {type(x).__name__}")
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit q and v, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(sorted({str(d) for d in dtypes}))} to fit q, got {x.dtype}")
        if kind is Tensor and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
