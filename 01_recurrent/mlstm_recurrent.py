"""Stage 01: the mLSTM one step at a time, forward and backward, in NumPy.

The mLSTM is a recurrent cell whose memory is a matrix. At every step it forgets a little (forget gate f), writes one
key-value pair (input gate i) and reads with a query (xLSTM, arXiv 2405.04517; TFLA, arXiv 2503.14376, section 2):

    f_bar_t = log sigmoid(f_t)
    m_t = max(f_bar_t + m_{t-1}, i_t)                       stabilizer: the largest log-weight so far
    C_t = e^(f_bar_t + m_{t-1} - m_t) C_{t-1} + e^(i_t - m_t) k_t v_t^T
    n_t = e^(f_bar_t + m_{t-1} - m_t) n_{t-1} + e^(i_t - m_t) k_t
    h_t = C_t^T (s q_t) / max{ |n_t . s q_t|, e^(-m_t) },   s = 1 / sqrt(d_qk)

Glossary (name in code = symbol = shape; B batch, NH heads, T steps):
    q, k     queries, keys                (B, NH, T, DQK)
    v, h     values, hidden states        (B, NH, T, DHV)
    i, f     gate pre-activations         (B, NH, T)
    C, n, m  memory, normalizer, stabilizer: the state   (B, NH, DQK, DHV), (B, NH, DQK), (B, NH)

The state starts at C = 0, n = 0, m = 0. f = -inf forgets everything before the step (a document boundary) and i = -inf
writes nothing (padding). A memory that nothing was ever written to, or of which all is forgotten, has m = 0.

This file is the yardstick of all later stages: in float64, nothing is faster to trust. It is also the slowest form; T
steps must wait for each other (stage 02 is free of that). Not included: any speed.

Copy this file: it needs numpy.
"""

import numpy as np

__all__ = ["mlstm_recurrent", "mlstm_recurrent_backward", "mlstm_step"]

State = tuple[np.ndarray, np.ndarray, np.ndarray]


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """log(sigmoid(x)) without overflow: log(sigmoid(-800)) is -800, where log(1 / (1 + e^800)) would be -inf."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


# The floor e^(-m) of the denominator must stay a number that one can divide by, or a query of zeros would meet 0 / 0.
# So m is capped there, far beyond where the floor could still be seen in h.
M_CAP = {np.dtype(np.float32): 60, np.dtype(np.float64): 600}


def denominator_floor(m: np.ndarray) -> np.ndarray:
    """e^(-m), the floor under |n . s q|. Far below m = 0 it is inf, and h becomes 0, as it should be."""
    with np.errstate(over="ignore"):
        return np.exp(-np.minimum(m, M_CAP[m.dtype]))


def mlstm_step(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, i: np.ndarray, f: np.ndarray, state: State | None = None
) -> tuple[np.ndarray, State]:
    """One step of the mLSTM.

    Args:
        q, k: query and key, (B, NH, DQK); float16, float32 or float64.
        v: value, (B, NH, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH), the dtype of q or float32.
        state: (C, n, m) with shapes (B, NH, DQK, DHV), (B, NH, DQK), (B, NH); float32, or float64 where q is.
            None is the empty memory, C = 0, n = 0, m = 0.

    Returns:
        h: (B, NH, DHV) in the dtype of v, and the new state.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, state, time=False)
    dtype = np.result_type(q.dtype, np.float32)
    C, n, m_prev = _empty_state(q, v) if state is None else state
    q, k, v, i, f = (x.astype(dtype) for x in (q, k, v, i, f))
    s = dtype.type(q.shape[-1] ** -0.5)

    f_bar = log_sigmoid(f)
    m = np.maximum(f_bar + m_prev, i)
    m = np.where(m == -np.inf, 0, m).astype(dtype)  # forgot everything, wrote nothing: any m describes C = 0
    f_prime = np.exp(f_bar + m_prev - m)  # (B, NH), the forget and input gates with m taken out: both are <= 1
    i_prime = np.exp(i - m)

    C = f_prime[..., None, None] * C + i_prime[..., None, None] * k[..., :, None] * v[..., None, :]
    n = f_prime[..., None] * n + i_prime[..., None] * k
    numerator = np.einsum("bhkv,bhk->bhv", C, s * q)
    S = np.einsum("bhk,bhk->bh", n, s * q)
    D = np.maximum(np.abs(S), denominator_floor(m))
    h = numerator / D[..., None]
    return h, (C, n, m)


def mlstm_recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    i: np.ndarray,
    f: np.ndarray,
    *,
    initial_state: State | None = None,
    return_state: bool = False,
) -> np.ndarray | tuple[np.ndarray, State]:
    """The mLSTM over a sequence, one step after the other (paper section 2, recurrent form).

    Args:
        q, k: queries and keys, (B, NH, T, DQK); float16, float32 or float64. Any B >= 0, NH >= 1, T >= 0.
        v: values, (B, NH, T, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH, T), the dtype of q or float32. -inf is allowed in both.
        initial_state: (C, n, m) as in mlstm_step; None is the empty memory.
        return_state: also return the state after the last step.

    Returns:
        h, (B, NH, T, DHV) in the dtype of v; with return_state the pair (h, (C, n, m)).
        Computed in the dtype of the inputs, float16 in float32.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state, time=True)
    state = _empty_state(q, v) if initial_state is None else initial_state
    h = np.empty(v.shape, v.dtype)
    for t in range(q.shape[2]):
        h[:, :, t], state = mlstm_step(q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t], f[:, :, t], state)
    return (h, state) if return_state else h


def mlstm_recurrent_backward(
    dh: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    i: np.ndarray,
    f: np.ndarray,
    *,
    initial_state: State | None = None,
    dstate: State | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, State]:
    """Backpropagation through time for mlstm_recurrent, every line of the step differentiated by hand.

    m is differentiated too, max and all. (For a loss that sees only h this changes nothing: m is a gauge, see the
    notebook. For one that looks at the returned C, n or m themselves it does.)

    Args:
        dh: gradient of h, (B, NH, T, DHV).
        q, k, v, i, f, initial_state: as given to mlstm_recurrent.
        dstate: gradient of the returned state, (dC, dn, dm); None is zero.

    Returns:
        (dq, dk, dv, di, df, (dC_0, dn_0, dm_0)): each in the shape and dtype of what it is the gradient of. Where two
        arguments of a max are equal the older memory gets the gradient. The gradient of a gate at -inf is exactly 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_inputs(q, k, v, i, f, initial_state, time=True)
    _check_array("dh", dh, v.shape, (v.dtype,))
    if dstate is not None:
        _check_state("dstate", dstate, q, v)
    dtype = np.result_type(q.dtype, np.float32)
    T, s = q.shape[2], dtype.type(q.shape[-1] ** -0.5)
    states = [_empty_state(q, v) if initial_state is None else initial_state]  # states[t] is what step t starts from
    for t in range(T):
        step = (q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t], f[:, :, t])
        states.append(mlstm_step(*step, states[-1])[1])

    dC, dn, dm = (np.zeros_like(x) for x in states[-1]) if dstate is None else (x.copy() for x in dstate)
    dq, dk, dv, di, df = (np.empty_like(x) for x in (q, k, v, i, f))
    for t in reversed(range(T)):
        q_t, k_t, v_t, i_t, f_t, dh_t = (x[:, :, t].astype(dtype) for x in (q, k, v, i, f, dh))
        (C_prev, n_prev, m_prev), (C, n, m) = states[t], states[t + 1]

        # Once more the values of step t that its derivatives need.
        f_bar = log_sigmoid(f_t)
        f_prime, i_prime = np.exp(f_bar + m_prev - m), np.exp(i_t - m)
        floor = denominator_floor(m)
        S = np.einsum("bhk,bhk->bh", n, s * q_t)
        D = np.maximum(np.abs(S), floor)
        h_t = np.einsum("bhkv,bhk->bhv", C, s * q_t) / D[..., None]

        # h = numerator / D, so dD = -(dh . h) / D
        dnumerator = dh_t / D[..., None]
        dh_h = np.einsum("bhv,bhv->bh", dh_t, h_t)
        # D = max(|S|, e^(-m)): the larger one gets the gradient. There D = e^(-m), so dm = -e^(-m) dD = dh . h
        normalizer_wins = np.abs(S) > floor
        dS = np.where(normalizer_wins, -np.sign(S) * dh_h / D, 0)
        dm = dm + np.where(normalizer_wins | (m >= M_CAP[m.dtype]), 0, dh_h)
        # numerator = C^T s q,  S = n . s q
        dq[:, :, t] = s * (np.einsum("bhkv,bhv->bhk", C, dnumerator) + n * dS[..., None])
        dC = dC + s * q_t[..., :, None] * dnumerator[..., None, :]
        dn = dn + s * q_t * dS[..., None]
        # C = f' C_prev + i' k v^T,  n = f' n_prev + i' k
        df_prime = np.einsum("bhkv,bhkv->bh", dC, C_prev) + np.einsum("bhk,bhk->bh", dn, n_prev)
        dC_v = np.einsum("bhkv,bhv->bhk", dC, v_t)
        di_prime = np.einsum("bhk,bhk->bh", k_t, dC_v + dn)
        dk[:, :, t] = i_prime[..., None] * (dC_v + dn)
        dv[:, :, t] = i_prime[..., None] * np.einsum("bhkv,bhk->bhv", dC, k_t)
        dC, dn = f_prime[..., None, None] * dC, f_prime[..., None] * dn
        # f' = e^(f_bar + m_prev - m),  i' = e^(i - m)
        df_exponent, di_exponent = df_prime * f_prime, di_prime * i_prime
        dm = dm - df_exponent - di_exponent
        # m = max(f_bar + m_prev, i); where both are -inf, m is the constant 0
        m_old = f_bar + m_prev
        old_wins, new_wins = (m_old >= i_t) & (m_old > -np.inf), m_old < i_t
        df_bar = df_exponent + np.where(old_wins, dm, 0)
        di[:, :, t] = di_exponent + np.where(new_wins, dm, 0)
        df[:, :, t] = df_bar * np.exp(log_sigmoid(-f_t))  # d log sigmoid(f) / df = sigmoid(-f)
        dm = df_bar
    return dq, dk, dv, di, df, (dC, dn, dm)


def _empty_state(q: np.ndarray, v: np.ndarray) -> State:
    """The memory before anything was written."""
    (B, NH), DQK, DHV = q.shape[:2], q.shape[-1], v.shape[-1]
    dtype = np.result_type(q.dtype, np.float32)
    return np.zeros((B, NH, DQK, DHV), dtype), np.zeros((B, NH, DQK), dtype), np.zeros((B, NH), dtype)


def _check_inputs(q, k, v, i, f, state, *, time: bool) -> None:
    """Raises an error that names the argument, what it was and what it must be."""
    layout = "(B, NH, T, D)" if time else "(B, NH, D)"
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} must be a numpy.ndarray, got {type(x).__name__}")
        if x.ndim != (4 if time else 3) or x.shape[1] < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape {layout} with NH >= 1 and D >= 1, got {x.shape}")
    if q.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"q must be float16, float32 or float64, got {q.dtype}")
    _check_array("k", k, q.shape, (q.dtype,))
    _check_array("v", v, (*q.shape[:-1], v.shape[-1]), (q.dtype,))
    for name, x in (("i", i), ("f", f)):
        _check_array(name, x, q.shape[:-1], (q.dtype, np.dtype(np.float32)))
    if state is not None:
        _check_state("initial_state" if time else "state", state, q, v)


def _check_state(name: str, state, q: np.ndarray, v: np.ndarray) -> None:
    if not isinstance(state, (tuple, list)) or len(state) != 3:
        raise TypeError(f"{name} must be a tuple (C, n, m), got {type(state).__name__}")
    for part, x, expected in zip("Cnm", state, _empty_state(q, v), strict=True):
        _check_array(f"{name}'s {part}", x, expected.shape, (expected.dtype,))


def _check_array(name: str, x, shape: tuple[int, ...], dtypes) -> None:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be a numpy.ndarray, got {type(x).__name__}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape} to fit q and v, got {x.shape}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(sorted({str(d) for d in dtypes}))} to fit q, got {x.dtype}")
