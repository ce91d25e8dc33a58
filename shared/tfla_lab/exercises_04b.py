"""The exercises of notebook 04b: their checks, and wrong answers that the checks must reject."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from tfla_lab.check import CheckFailed, check, dtype_name, to_numpy
from tfla_lab.exercise import exercise


class Chunk(NamedTuple):
    """A chunk in the middle of a sequence of one head, and what the backward kernels know about it. NumPy, float64."""

    q: np.ndarray  # (L, DQK)
    k: np.ndarray  # (L, DQK)
    v: np.ndarray  # (L, DHV)
    dh: np.ndarray  # (L, DHV)
    W: np.ndarray  # (L, L) e^(b_i + u_j - m_i), 0 above the diagonal
    w_state: np.ndarray  # (L,)
    w_end: np.ndarray  # (L,)
    decay: float
    S: np.ndarray  # (L,)
    r: np.ndarray  # (L,) 1 / D
    m: np.ndarray  # (L,)
    delta: np.ndarray  # (L,)
    C: np.ndarray  # (DQK, DHV) the state before the chunk
    n: np.ndarray  # (DQK,)
    dC: np.ndarray  # (DQK, DHV) the gradient of the state behind the chunk
    dn: np.ndarray  # (DQK,)
    dq: np.ndarray  # (L, DQK) stage 01's gradients of the whole sequence, cut out
    dk: np.ndarray  # (L, DQK)
    df_bar: np.ndarray  # (L,) of log sigmoid(f)


def middle_chunk(L: int, DQK: int = 4, DHV: int = 3, *, i_mean: float = 0.0, seed: int = 0) -> Chunk:
    """Steps 5 .. 5 + L of a sequence that begins with a random state and goes on for 5 steps more.

    The states and all gradients come from stage 01, which knows of no chunks.
    """
    from mlstm_recurrent import log_sigmoid, mlstm_recurrent, mlstm_recurrent_backward

    rng = np.random.default_rng(seed)
    before, T = 5, L + 10
    q, k = rng.normal(size=(2, T, DQK))
    v, dh = rng.normal(size=(2, T, DHV))
    i, f = rng.normal(i_mean, 1, T), rng.normal(2, 1, T)

    def steps(first: int, last: int) -> list[np.ndarray]:
        return [x[None, None, first:last] for x in (q, k, v, i, f)]

    start = rng.normal(size=(1, 1, DQK, DHV)), rng.normal(size=(1, 1, DQK)), np.zeros((1, 1))
    state = mlstm_recurrent(*steps(0, before), initial_state=start, return_state=True)[1]
    h, end = mlstm_recurrent(*steps(before, before + L), initial_state=state, return_state=True)
    # The gradient of the state at a border is that of the initial state of everything behind it.
    rest = mlstm_recurrent_backward(dh[None, None, before + L :], *steps(before + L, T), initial_state=end)
    dC, dn, _ = rest[5]
    all_of_it = mlstm_recurrent_backward(dh[None, None], *steps(0, T), initial_state=start)

    own = slice(before, before + L)
    q, k, v, dh, i, f = (x[own] for x in (q, k, v, dh, i, f))
    f_bar = log_sigmoid(f)
    b, (C, n, m_state) = np.cumsum(f_bar), (x[0, 0] for x in state)
    log_D = np.where(np.tri(L, dtype=bool), b[:, None] - b[None, :] + i[None, :], -np.inf)
    m = np.maximum(b + m_state, log_D.max(axis=1))
    W, w_state = np.exp(log_D - m[:, None]), np.exp(b + m_state - m)
    s = DQK**-0.5
    S = (s * q @ k.T * W).sum(axis=1) + s * w_state * (q @ n)
    r = 1 / np.maximum(np.abs(S), np.exp(-m))
    delta = np.where(np.abs(S) > np.exp(-m), -np.sign(S) * (dh * h[0, 0]).sum(axis=1), 0.0)
    dq, dk, df = (all_of_it[x][0, 0, own] for x in (0, 1, 4))
    return Chunk(
        q, k, v, dh, W, w_state, W[-1], float(w_state[-1]), S, r, m, delta, C, n, dC[0, 0], dn[0, 0], dq, dk,
        df * (1 + np.exp(f)),
    )  # fmt: skip


def _array(x, shape: tuple[int, ...], name: str, case: str) -> np.ndarray:
    """What was returned, as float64; raises where it has another shape or is not finite."""
    if x is None:
        raise CheckFailed(f"{case}: nothing was returned. Is the return missing?")
    y = to_numpy(x)
    if y.shape != shape:
        raise CheckFailed(f"{case}: {name} must have shape {shape}, got {y.shape}")
    return y


def _compare(name: str, actual, expected: np.ndarray, message: str) -> None:
    allowed = 1e-4 if dtype_name(actual) == "float32" else 1e-9
    try:
        check({name: to_numpy(actual)}, {name: expected}, budgets={name: allowed}, verbose=False)
    except CheckFailed as error:
        raise CheckFailed(f"{message}{error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 1: delta
# ---------------------------------------------------------------------------------------------------------------------
@exercise(1)
def check_1(delta: Callable) -> None:
    """delta(dh, h, S, m) -> (T,): D times the gradient of S, for dh, h (T, DHV) and S, m (T,)."""
    rng = np.random.default_rng(0)
    for m_mean in (0.0, -3.0, 3.0, 900.0, -900.0):
        case = f"m near {m_mean:g}"
        T = 12
        numerator, dh = rng.normal(size=(2, T, 5))
        m = m_mean + (rng.normal(size=T) if abs(m_mean) < 100 else np.zeros(T))
        size = np.where(np.arange(T) % 4 < 2, 3.0, 0.3) * rng.uniform(0.8, 1.2, T)
        S = np.where(np.arange(T) % 2, 1, -1) * size * np.exp(np.clip(-m, -5, 5))
        # The truth, from autograd: it knows only h = numerator / max{|S|, e^-m}.
        leaf = torch.from_numpy(S).requires_grad_()
        D = torch.maximum(leaf.abs(), torch.exp(-torch.from_numpy(m)))
        h = torch.from_numpy(numerator) / D[:, None]
        dS = torch.autograd.grad(h, leaf, torch.from_numpy(dh))[0]
        h, D = h.detach().numpy(), D.detach().numpy()
        wins = np.abs(S) > np.exp(-m)
        expected = np.where(wins, np.where(wins, D, 0) * dS.numpy(), 0.0)
        answer = delta(dh.copy(), h.copy(), S.copy(), m.copy())
        y = _array(answer, (T,), "delta", case)

        def same(x, rows, y=y):
            return np.allclose(y[rows], x[rows], rtol=1e-4, atol=1e-9)

        floor = ~wins
        if not np.isfinite(y).all():
            raise CheckFailed(f"{case}: delta is not finite in row {int(np.argmin(np.isfinite(y)))}.")
        if floor.any() and not same(np.zeros(T), floor):
            raise CheckFailed(
                f"{case}: in the rows where the floor e^-m is the denominator, S does not matter, so delta must be 0. "
                f"It is {y[floor][np.argmax(np.abs(y[floor]))]:.3g} in one of them. Compare |S| with e^-m, not with m."
            )
        if wins.any():
            for factor, meaning in (
                (-np.ones(T), "the sign is wrong: a larger denominator makes h smaller"),
                (np.sign(S), "the sign is wrong where S < 0: there |S| falls while S grows"),
                (-np.sign(S), "the sign is wrong where S > 0"),
                (1 / D, "this is the gradient of S. The kernels want D times as much"),
                (1 / D**2, "this is divided by D twice: h has been divided by D already, and the kernels want D dS"),
                (np.zeros(T), "delta is 0 where |S| is the denominator. It must be 0 in the other rows"),
            ):
                if not same(expected, wins) and same(expected * factor, wins):
                    raise CheckFailed(f"{case}: {meaning}.")
        _compare("delta", answer, expected, f"{case}: delta is off in the rows where |S| is the denominator.")


def _dh_h(dh, h):
    return (dh * h).sum(axis=-1)


def wrong_1_no_indicator(dh, h, S, m):
    """Also where the floor is the denominator, on which S has no influence."""
    return -np.sign(S) * _dh_h(dh, h)


def wrong_1_no_sign(dh, h, S, m):
    """As if S were always positive: the gradient of |S|."""
    return np.where(np.abs(S) > np.exp(-m), -_dh_h(dh, h), 0.0)


def wrong_1_plus(dh, h, S, m):
    """The minus of the quotient rule is missing."""
    return np.where(np.abs(S) > np.exp(-m), np.sign(S) * _dh_h(dh, h), 0.0)


def wrong_1_gradient_of_S(dh, h, S, m):
    """The delta of stage 02, which is the gradient of S."""
    D = np.maximum(np.abs(S), np.exp(-m))
    return np.where(np.abs(S) > np.exp(-m), -np.sign(S) * _dh_h(dh, h) / D, 0.0)


def wrong_1_divided_twice(dh, h, S, m):
    """The quotient rule's D^2 below h, which has been divided by D before."""
    D = np.maximum(np.abs(S), np.exp(-m))
    return np.where(np.abs(S) > np.exp(-m), -np.sign(S) * _dh_h(dh, h) / D**2, 0.0)


def wrong_1_floor_always(dh, h, S, m):
    """Multiplies by the floor where the denominator is |S|."""
    return np.where(np.abs(S) > np.exp(-m), -_dh_h(dh, h) * np.exp(-m) / S, 0.0)


def wrong_1_m_for_the_floor(dh, h, S, m):
    """Compares |S| with m, not with e^-m."""
    return np.where(np.abs(S) > m, -np.sign(S) * _dh_h(dh, h), 0.0)


def wrong_1_sign_of_m(dh, h, S, m):
    """Compares |S| with e^m."""
    return np.where(np.abs(S) > np.exp(m), -np.sign(S) * _dh_h(dh, h), 0.0)


def wrong_1_floor_one(dh, h, S, m):
    """Compares |S| with 1: right only in the gauge m = 0."""
    return np.where(np.abs(S) > 1, -np.sign(S) * _dh_h(dh, h), 0.0)


def wrong_1_other_rows(dh, h, S, m):
    """The indicator the wrong way round."""
    return np.where(np.abs(S) > np.exp(-m), 0.0, -np.sign(S) * _dh_h(dh, h))


def wrong_1_signed_S(dh, h, S, m):
    """Compares S itself, so rows with a negative S never count."""
    return np.where(np.exp(-m) < S, -_dh_h(dh, h), 0.0)


def wrong_1_zero(dh, h, S, m):
    """assume_norm."""
    return np.zeros_like(S)


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 2: dk of a tile
# ---------------------------------------------------------------------------------------------------------------------
@exercise(2)
def check_2(dk_tile: Callable) -> None:
    """dk_tile(tile, block, q, v, dh, W, r, delta, w_end, dC, dn) -> (block, DQK), tiles counted from 0."""
    for L, block, DQK, i_mean in ((4, 4, 4, 0.0), (8, 2, 4, 0.0), (12, 4, 3, -2.0), (6, 1, 5, 1.0)):
        x = middle_chunk(L, DQK, i_mean=i_mean, seed=L)
        number = np.arange(L) // block
        W = np.where(number[:, None] >= number[None, :], x.W, np.nan)
        given = (x.q, x.v, x.dh, W, x.r, x.delta, x.w_end, x.dC, x.dn)
        for tile in range(L // block):
            case = f"L = {L}, tiles of {block} steps, tile {tile}"
            answer = dk_tile(tile, block, *(y.copy() for y in given))
            y = _array(answer, (block, DQK), "dk", case)
            expected, message = x.dk[tile * block : (tile + 1) * block], "dk is off"
            if not np.isfinite(y).all():
                raise CheckFailed(
                    f"{case}: dk is not finite. W is NaN in the tiles above the diagonal, which no program computes. "
                    "The loop over the tiles of rows must begin at the diagonal."
                )
            for mistake, meaning in (
                (_dk(tile, block, *given, last=tile + 1), "only the tile on the diagonal is in the sum"),
                (_dk(tile, block, *given, first=tile + 1), "the tile on the diagonal is missing in the sum"),
                (_dk(tile, block, *given[:5], 0 * x.delta, *given[6:]), "delta is missing"),
                (_dk(tile, block, *given[:8], 0 * x.dn), "the state's dn is missing: n holds this key, too"),
                (_dk(tile, block, *given[:6], 0 * x.w_end, *given[7:]), "the part of the next state is missing"),
                (_dk(tile, block, *given[:6], x.w_end**0, *given[7:]), "the part of the next state lacks w_end"),
                (_dk(tile, block, *given, s=1.0), "the factor s is missing: the weights are Wr = s r W"),
                (_dk(tile, block, *given[:4], x.r**0, *given[5:]), "r is missing: the weights are Wr = s r W"),
                (_dk(tile, block, *given[:4], x.r**0, *given[5:], s=1.0), "the weights are Wr = s r W, not W"),
            ):
                if np.allclose(y, mistake, rtol=1e-4, atol=1e-9) and not np.allclose(mistake, expected):
                    message = meaning
            _compare("dk", answer, expected, f"{case}: {message}.")


def _dk(tile, block, q, v, dh, W, r, delta, w_end, dC, dn, *, first=None, last=None, s=None) -> np.ndarray:
    """dk of a tile, with wrong pieces for wrong answers; first, last: the tiles of rows that are visited."""
    own = slice(tile * block, (tile + 1) * block)
    s = q.shape[1] ** -0.5 if s is None else s
    first, last = tile if first is None else first, len(q) // block if last is None else last
    dk = w_end[own, None] * (v[own] @ dC.T + dn)
    for other in range(first, last):
        rows = slice(other * block, (other + 1) * block)
        dP = (dh[rows] @ v[own].T + delta[rows, None]) * (s * r[rows, None] * W[rows, own])
        dk = dk + dP.T @ q[rows]
    return dk


def wrong_2_up_to_the_diagonal(tile, block, *given):
    """The rows of h and dq: from the chunk's first tile up to the diagonal. No such row reads these keys."""
    return _dk(tile, block, *given, first=0, last=tile + 1)


def wrong_2_all_rows(tile, block, *given):
    """All tiles of rows: those above the diagonal were never computed."""
    return _dk(tile, block, *given, first=0)


def wrong_2_diagonal_only(tile, block, *given):
    """Only the tile on the diagonal."""
    return _dk(tile, block, *given, last=tile + 1)


def wrong_2_behind_the_diagonal(tile, block, *given):
    """Begins one tile late."""
    return _dk(tile, block, *given, first=tile + 1)


def wrong_2_no_delta(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """assume_norm."""
    return _dk(tile, block, q, v, dh, W, r, 0 * delta, w_end, dC, dn)


def wrong_2_delta_of_the_column(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """delta of the step that was written; it belongs to the step that reads."""
    own = slice(tile * block, (tile + 1) * block)
    dk = _dk(tile, block, q, v, dh, W, r, 0 * delta, w_end, dC, dn)
    for other in range(tile, len(q) // block):
        rows = slice(other * block, (other + 1) * block)
        dk = dk + (delta[None, own] * (q.shape[1] ** -0.5 * r[rows, None] * W[rows, own])).T @ q[rows]
    return dk


def wrong_2_no_dn(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """The next state's n is forgotten."""
    return _dk(tile, block, q, v, dh, W, r, delta, w_end, dC, 0 * dn)


def wrong_2_no_state(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """Only the readers within the chunk."""
    return _dk(tile, block, q, v, dh, W, r, delta, 0 * w_end, dC, dn)


def wrong_2_state_unweighted(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """The part of the next state without w_end."""
    return _dk(tile, block, q, v, dh, W, r, delta, w_end**0, dC, dn)


def wrong_2_W(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """W in the place of Wr."""
    return _dk(tile, block, q, v, dh, W, r**0, delta, w_end, dC, dn, s=1.0)


def wrong_2_no_r(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """s W in the place of s r W."""
    return _dk(tile, block, q, v, dh, W, r**0, delta, w_end, dC, dn)


def wrong_2_no_s(tile, block, *given):
    """r W in the place of s r W."""
    return _dk(tile, block, *given, s=1.0)


def wrong_2_r_of_the_column(tile, block, q, v, dh, W, r, delta, w_end, dC, dn):
    """r of the step that was written."""
    own = slice(tile * block, (tile + 1) * block)
    scaled = W.copy()
    scaled[:, own] = W[:, own] * r[None, own]
    return _dk(tile, block, q, v, dh, scaled, r**0, delta, w_end, dC, dn)


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 3: the forget gates of a chunk
# ---------------------------------------------------------------------------------------------------------------------
@exercise(3)
def check_3(forget_gates: Callable) -> None:
    """forget_gates(q_dq, X_column, k_dk, carry) -> (L,): df_bar of every step of a chunk."""
    for L, i_mean in ((6, 0.0), (1, 0.0), (2, 0.0), (16, 1.0), (6, -4.0)):
        case = f"L = {L}"
        x = middle_chunk(L, i_mean=i_mean, seed=L)
        q_dq, X_column, k_dk, carry = crossings(x)
        answer = forget_gates(q_dq.copy(), X_column.copy(), k_dk.copy(), carry)
        y = _array(answer, (L,), "df_bar", case)
        message = "df_bar is off. Ask of each of the four kinds of paths whether it crosses step t"
        for mistake, meaning in (
            (x.df_bar - carry, "the carry is missing: the state before the chunk reaches the one behind it"),
            (wrong_3_one_late(q_dq, X_column, k_dk, carry), "h_t itself is missing: f_t weakens what h_t reads"),
            (
                wrong_3_k_dk_of_its_own(q_dq, X_column, k_dk, carry),
                "k_t v_t is written after f_t has acted",
            ),
            (wrong_3_prefix(q_dq, X_column, k_dk, carry), "q . dq and X belong to the steps from t on, not up to t"),
            (
                wrong_3_no_X(q_dq, X_column, k_dk, carry),
                "X_column is missing",
            ),
        ):
            if np.allclose(y, mistake, rtol=1e-4, atol=1e-9) and not np.allclose(mistake, x.df_bar):
                message = meaning
        _compare("df_bar", answer, x.df_bar, f"{case}: {message}.")


def crossings(x: Chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """q_dq, X_column, k_dk (the state's part alone) and carry of a chunk, as the kernels leave them."""
    s = x.q.shape[1] ** -0.5
    X = (x.dh @ x.v.T + x.delta[:, None]) * (s * x.r[:, None] * x.W) * (x.q @ x.k.T)
    k_dk = x.w_end * (x.k * (x.v @ x.dC.T + x.dn)).sum(axis=1)
    return (x.q * x.dq).sum(axis=1), X.sum(axis=0), k_dk, x.decay * float((x.C * x.dC).sum() + x.n @ x.dn)


def _suffix(x: np.ndarray) -> np.ndarray:
    return np.cumsum(x[::-1])[::-1]


def wrong_3_one_late(q_dq, X_column, k_dk, carry):
    """The sum over r > t: total minus inclusive prefix."""
    to_h = q_dq - X_column
    return carry + to_h.sum() - np.cumsum(to_h) + np.cumsum(k_dk) - k_dk


def wrong_3_no_carry(q_dq, X_column, k_dk, carry):
    """Only what begins or ends in the chunk."""
    return _suffix(q_dq - X_column) + np.cumsum(k_dk) - k_dk


def wrong_3_k_dk_of_its_own(q_dq, X_column, k_dk, carry):
    """k_dk summed over j <= t."""
    return carry + _suffix(q_dq - X_column) + np.cumsum(k_dk)


def wrong_3_prefix(q_dq, X_column, k_dk, carry):
    """The sum over r <= t in place of the one over r >= t."""
    return carry + np.cumsum(q_dq - X_column) + np.cumsum(k_dk) - k_dk


def wrong_3_no_X(q_dq, X_column, k_dk, carry):
    """All that reaches h_t and later, also what was written after f_t."""
    return carry + _suffix(q_dq) + np.cumsum(k_dk) - k_dk


def wrong_3_from_behind(q_dq, X_column, k_dk, carry):
    """The sum of stage 03, with the carry in the place of the whole border term."""
    return carry + _suffix(q_dq - X_column - k_dk)


def wrong_3_k_dk_behind(q_dq, X_column, k_dk, carry):
    """k_dk summed over j >= t: what has not been written yet."""
    return carry + _suffix(q_dq - X_column) + _suffix(k_dk)


def wrong_3_no_k_dk(q_dq, X_column, k_dk, carry):
    """What the chunk's steps give to the next state is forgotten."""
    return carry + _suffix(q_dq - X_column)


def wrong_3_sign(q_dq, X_column, k_dk, carry):
    """Rows subtracted, columns added."""
    return carry - _suffix(q_dq - X_column) + np.cumsum(k_dk) - k_dk


def wrong_3_carry_once(q_dq, X_column, k_dk, carry):
    """The carry added to the last step alone."""
    y = _suffix(q_dq - X_column) + np.cumsum(k_dk) - k_dk
    y[-1] += carry
    return y


WRONG_ANSWERS: dict[int, list[Callable]] = {
    1: [
        wrong_1_no_indicator, wrong_1_no_sign, wrong_1_plus, wrong_1_gradient_of_S, wrong_1_divided_twice,
        wrong_1_floor_always, wrong_1_m_for_the_floor, wrong_1_sign_of_m, wrong_1_floor_one, wrong_1_other_rows,
        wrong_1_signed_S, wrong_1_zero,
    ],
    2: [
        wrong_2_up_to_the_diagonal, wrong_2_all_rows, wrong_2_diagonal_only, wrong_2_behind_the_diagonal,
        wrong_2_no_delta, wrong_2_delta_of_the_column, wrong_2_no_dn, wrong_2_no_state, wrong_2_state_unweighted,
        wrong_2_W, wrong_2_no_r, wrong_2_no_s, wrong_2_r_of_the_column,
    ],
    3: [
        wrong_3_one_late, wrong_3_no_carry, wrong_3_k_dk_of_its_own, wrong_3_prefix, wrong_3_no_X, wrong_3_from_behind,
        wrong_3_k_dk_behind, wrong_3_no_k_dk, wrong_3_sign, wrong_3_carry_once,
    ],
}  # fmt: skip
