"""The exercises of stage 02: their checks, and wrong answers that the checks must reject.

Every check takes the reader's function, prints one line if it is right and raises CheckFailed with a hint if it is not.
A function that still raises NotImplementedError is reported as not solved yet, so that the notebook runs to its end.

Besides, what the notebook uses: the stage's own source in pieces, two pictures, and a count of bytes.
"""

import inspect
import math
import textwrap
import weakref
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from mlstm_parallel import forward_pass
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfla_lab import plot
from tfla_lab.check import CheckFailed, relative_error
from tfla_lab.exercise import exercise, require
from tfla_lab.forms import oracle
from tfla_lab.inputs import random_inputs, random_state


def require_tensors(result, names: tuple[str, ...], shapes: list[tuple[int, ...]], function: str) -> None:
    """The answer must be a tuple of tensors with these names and shapes."""
    fine = isinstance(result, tuple) and len(result) == len(names) and all(isinstance(x, Tensor) for x in result)
    require(fine, f"{function} must return a tuple of {len(names)} tensors ({', '.join(names)})")
    for name, x, shape in zip(names, result, shapes, strict=True):
        require(tuple(x.shape) == shape, f"{name} must have shape {shape}, got {tuple(x.shape)}")


# ---------------------------------------------------------------------------------------------------------------------
# 1. log_weights(i, f, m_0)
# ---------------------------------------------------------------------------------------------------------------------
@exercise(1)
def check_1(log_weights: Callable) -> None:
    """log_weights(i, f, m_0) -> (T, T + 1): column 0 for the initial state, column j for step j, -inf for j > t."""

    def entry(t: int, j: int) -> str:
        return f"row t = {t}, column j = {j}" if j else f"row t = {t}, the column of the initial state"

    # Every sum has terms of its own size only, so that a wrong one shows up.
    by_hand = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(4.0)
    g = torch.Generator().manual_seed(0)

    def gates(T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        i, f = torch.randn(2, T, generator=g, dtype=dtype)
        return i, f + 3, torch.randn((), generator=g, dtype=dtype)

    cases = {"three tokens": by_hand}
    cases["random gates, T = 20"] = gates(20, torch.float64)
    cases["one token"] = gates(1, torch.float64)
    i, f, m_0 = gates(12, torch.float64)
    f[4] = -800.0
    i[4:] = -torch.inf
    cases["f = -800 at t = 5, and nothing is written from there on"] = i, f, m_0
    i, f, m_0 = gates(40, torch.float32)
    f[7] = -1e4
    cases["float32, f = -10^4 at t = 8"] = i, f, m_0
    i, f, m_0 = gates(12, torch.float64)
    f[[3, 8]] = -torch.inf
    i[5] = -torch.inf
    cases["f = -inf at t = 4 and t = 9, i = -inf at t = 6"] = i, f, m_0

    for case, (i, f, m_0) in cases.items():
        T = len(i)
        result = log_weights(i.clone(), f.clone(), m_0.clone())
        require(isinstance(result, Tensor), f"log_weights must return a torch.Tensor, got {type(result).__name__}")
        require(
            tuple(result.shape) == (T, T + 1),
            f"log_weights must return the shape (T, T + 1) = {(T, T + 1)}, got {tuple(result.shape)}",
        )
        f_bar, start = F.logsigmoid(f.double()), torch.cat([m_0.double()[None], i.double()])
        for t in range(1, T + 1):
            for j in range(T + 1):
                actual = result[t - 1, j].double().item()
                expected = (f_bar[j:t].sum() + start[j]).item() if j <= t else -torch.inf
                message = f"{case}: {entry(t, j)} is {actual:.6g}, expected {expected:.6g}. "
                require(actual == actual, message + "Infinite minus infinite is not a number: which difference is it?")
                if expected == -torch.inf:
                    hint = "No step reads what is written later." if j > t else "All was forgotten, or none written."
                    require(actual == expected, message + hint)
                    continue
                hint = "From which step on is what was written at step j forgotten: does its own forget gate touch it?"
                if case.startswith("float32"):
                    hint = "The digits are lost in a difference of two large numbers. Can you do without it?"
                if j == 0:
                    hint = "The initial state has the log-weight m_0 before the first step, and every gate touches it."
                if case.startswith("f = -800") and actual == -torch.inf:
                    hint = "log(sigmoid(-800)) is -800, not -inf: there is torch.nn.functional.logsigmoid."
                if abs(actual - math.exp(expected)) < 1e-5:
                    hint = "That is the weight. Asked for is its logarithm."
                digits = 2e-6 if i.dtype == torch.float32 else 1e-11 if i.dtype == torch.float64 else 1e-6
                require(abs(actual - expected) <= digits * max(1.0, abs(expected)), message + hint)


def _sums(i: Tensor, f: Tensor, m_0: Tensor, first: int = 1, last: int = 1, log_sigmoid: Callable = F.logsigmoid):
    """The right answer, for first = last = 1; otherwise the sum over r = j+first .. t+last-1."""
    T, f_bar, start = len(i), log_sigmoid(f), torch.cat([m_0[None], i])
    out = torch.full((T, T + 1), -torch.inf, dtype=i.dtype)
    for t in range(1, T + 1):
        for j in range(t + 1):
            out[t - 1, j] = f_bar[max(0, j + first - 1) : max(0, t + last - 1)].sum() + start[j]
    return out


def wrong_1_own_gate(i, f, m_0):
    """The sum from r = j: what is written at step j is not forgotten by the gate of step j."""
    return _sums(i, f, m_0, first=0)


def wrong_1_one_late(i, f, m_0):
    """The sum from r = j + 2: one gate too few."""
    return _sums(i, f, m_0, first=2)


def wrong_1_ends_early(i, f, m_0):
    """The sum up to r = t - 1: step t forgets before it reads."""
    return _sums(i, f, m_0, last=0)


def wrong_1_i_of_the_row(i, f, m_0):
    """The input gate of the step that reads, in place of that of the step that was written."""
    out = _sums(i, f, m_0)
    out[:, 1:] += i[:, None] - i[None, :]
    return torch.where(out == out, out, -torch.inf)


def wrong_1_prefix_sums(i, f, m_0):
    """F_t - F_j loses digits after f = -10^4, and is NaN after f = -inf."""
    F_ = torch.cat([torch.zeros(1, dtype=i.dtype), F.logsigmoid(f).cumsum(0)])
    out = F_[1:, None] - F_[None, :] + torch.cat([m_0[None], i])
    later = torch.arange(len(i) + 1)[None, :] > torch.arange(1, len(i) + 1)[:, None]
    return out.masked_fill(later, -torch.inf)


def wrong_1_prefix_sums_patched(i, f, m_0):
    """The NaN swept away afterwards; the digits stay lost, and some weights with them."""
    out = wrong_1_prefix_sums(i, f, m_0)
    return torch.where(torch.isnan(out), -torch.inf, out)


def wrong_1_no_mask(i, f, m_0):
    """Above the diagonal stands the weight i_j: step t reads what is written later."""
    out, T = _sums(i, f, m_0), len(i)
    return torch.where(torch.ones(T, T + 1, dtype=torch.bool).tril(1), out, torch.cat([m_0[None], i]))


def wrong_1_mask_of_zeros(i, f, m_0):
    """0 is a mask for weights; for their logarithms it is the weight 1."""
    out, T = _sums(i, f, m_0), len(i)
    return torch.where(torch.ones(T, T + 1, dtype=torch.bool).tril(1), out, 0)


def wrong_1_mask_too_much(i, f, m_0):
    """j < t only: step t does read what it writes itself."""
    out, T = _sums(i, f, m_0), len(i)
    return torch.where(torch.ones(T, T + 1, dtype=torch.bool).tril(0), out, -torch.inf)


def wrong_1_no_log_sigmoid(i, f, m_0):
    """Sums the pre-activations themselves."""
    return _sums(i, f, m_0, log_sigmoid=lambda x: x)


def wrong_1_log_of_sigmoid(i, f, m_0):
    """log(sigmoid(f)) is -inf at f = -800, and all that was written before is gone."""
    return _sums(i, f, m_0, log_sigmoid=lambda x: torch.log(torch.sigmoid(x)))


def wrong_1_weights(i, f, m_0):
    """The weights, not their logarithms."""
    return _sums(i, f, m_0).exp()


def wrong_1_no_m_0(i, f, m_0):
    """The state's column is F_t alone: its own log-weight m_0 is missing."""
    return _sums(i, f, torch.zeros_like(m_0))


def wrong_1_state_one_late(i, f, m_0):
    """The first step's forget gate does not touch the initial state."""
    out = _sums(i, f, m_0)
    out[:, 0] = torch.cat([torch.zeros(1, dtype=i.dtype), F.logsigmoid(f)[1:]]).cumsum(0) + m_0
    return out


def wrong_1_transposed(i, f, m_0):
    """Rows and columns exchanged."""
    out = _sums(i, f, m_0)
    return torch.cat([out[:, :1], out[:, 1:].mT], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# 2. backward_qkv(dh, q, k, v, W, h, S, D)
# ---------------------------------------------------------------------------------------------------------------------
@exercise(2)
def check_2(backward_qkv: Callable) -> None:
    """backward_qkv(dh, q, k, v, W, h, S, D) -> (dq, dk, dv) for one head without initial state."""
    T, DQK, DHV = 12, 3, 5
    for regime, remark in (
        ("typical", "some rows are divided by |S|, others by the floor e^(-m)"),
        ("hot", "every row is divided by |S|"),
        ("initial", "every row is divided by the floor e^(-m)"),
    ):
        x = random_inputs(1, 1, T, DQK, DHV, regime=regime, seed=3, dtype=torch.float64)
        zero = [torch.zeros(1, 1, *shape, dtype=torch.float64) for shape in ((DQK, DHV), (DQK,), ())]
        h, _, _, _, W, _, _, S, D = forward_pass(*x, *zero)
        dh = torch.randn(h.shape, generator=torch.Generator().manual_seed(3), dtype=h.dtype)
        result = backward_qkv(*(y[0, 0].clone() for y in (dh, x.q, x.k, x.v, W, h, S, D)))
        require_tensors(result, ("dq", "dk", "dv"), [(T, DQK), (T, DQK), (T, DHV)], "backward_qkv")
        expected = oracle(x, dh)
        errors = {
            name: relative_error(y, expected[name][0, 0]) for name, y in zip(("dq", "dk", "dv"), result, strict=True)
        }
        if max(errors.values()) < 1e-10:
            continue
        table = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        if errors["dv"] > 1e-10:
            hint = "dv = P^T (gradient of the numerator). Is it divided by D, and does P hold W and s?"
        elif errors["dq"] < 1e-10:
            hint = "dq is right. For dk, the roles of q and k are exchanged: which sum is over the steps that read?"
        elif regime == "initial":
            hint = "Here the denominator does not depend on q or k, so its gradient must not be there."
        else:
            hint = (
                "dP is the gradient of s Q K^T. Does it hold W, and delta with the right sign, as often as it should?"
            )
        raise CheckFailed(f"regime {regime!r} ({remark}): relative errors {table}. {hint}")


def _qkv(dh, q, k, v, W, h, S, D, *, sign=-1.0, power=1, switch=True, of_S=torch.sign, delta=True):
    """The right answer, or one with a changed delta."""
    s, g = q.shape[-1] ** -0.5, dh / D[:, None]
    d = sign * of_S(S) * (dh * h).sum(-1) / D**power
    d = torch.where(S.abs() >= D, d, 0) if switch else d
    P, dP = s * (q @ k.mT) * W, (g @ v.mT + (d[:, None] if delta else 0)) * W
    return s * dP @ k, s * dP.mT @ q, P.mT @ g


def wrong_2_no_delta(dh, q, k, v, W, h, S, D):
    """The normalizer treated as a constant."""
    return _qkv(dh, q, k, v, W, h, S, D, delta=False)


def wrong_2_always_delta(dh, q, k, v, W, h, S, D):
    """Where the floor wins, the denominator does not depend on S."""
    return _qkv(dh, q, k, v, W, h, S, D, switch=False)


def wrong_2_sign_of_delta(dh, q, k, v, W, h, S, D):
    """h falls when its denominator grows."""
    return _qkv(dh, q, k, v, W, h, S, D, sign=1.0)


def wrong_2_sign_of_S(dh, q, k, v, W, h, S, D):
    """d|S| / dS is sign(S), and S is negative in many rows."""
    return _qkv(dh, q, k, v, W, h, S, D, of_S=torch.ones_like)


def wrong_2_delta_once_more(dh, q, k, v, W, h, S, D):
    """-(dh . numerator) / D^2 is -(dh . h) / D; here D divides once more."""
    return _qkv(dh, q, k, v, W, h, S, D, power=2)


def wrong_2_delta_undivided(dh, q, k, v, W, h, S, D):
    """One division by D is missing."""
    return _qkv(dh, q, k, v, W, h, S, D, power=0)


def wrong_2_no_gates(dh, q, k, v, W, h, S, D):
    """W is forgotten in dP: that is the gradient of P, not of the scores."""
    dq, dk, _ = _qkv(dh, q, k, v, torch.ones_like(W).tril(), h, S, D)
    return dq, dk, _qkv(dh, q, k, v, W, h, S, D)[2]


def wrong_2_no_s(dh, q, k, v, W, h, S, D):
    """The scores are s q.k, so dq and dk have the s too."""
    s = q.shape[-1] ** -0.5
    dq, dk, dv = _qkv(dh, q, k, v, W, h, S, D)
    return dq / s, dk / s, dv


def wrong_2_s_missing_in_dv(dh, q, k, v, W, h, S, D):
    """P holds the s."""
    s = q.shape[-1] ** -0.5
    dq, dk, dv = _qkv(dh, q, k, v, W, h, S, D)
    return dq, dk, dv / s


def wrong_2_dh_undivided(dh, q, k, v, W, h, S, D):
    """The gradient of the numerator is dh / D, not dh."""
    return _qkv(dh * D[:, None], q, k, v, W, h, S, D, power=2)


def wrong_2_not_transposed(dh, q, k, v, W, h, S, D):
    """dk sums over the steps that read, the rows of dP."""
    s, g = q.shape[-1] ** -0.5, dh / D[:, None]
    dq, _, dv = _qkv(dh, q, k, v, W, h, S, D)
    d = torch.where(S.abs() >= D, -S.sign() * (dh * h).sum(-1) / D, 0)
    return dq, s * ((g @ v.mT + d[:, None]) * W) @ q, dv


def wrong_2_delta_of_the_column(dh, q, k, v, W, h, S, D):
    """delta belongs to the step that reads: it is added along the rows, not along the columns."""
    s, g = q.shape[-1] ** -0.5, dh / D[:, None]
    d = torch.where(S.abs() >= D, -S.sign() * (dh * h).sum(-1) / D, 0)
    dP = (g @ v.mT + d[None, :]) * W
    return s * dP @ k, s * dP.mT @ q, _qkv(dh, q, k, v, W, h, S, D)[2]


# ---------------------------------------------------------------------------------------------------------------------
# 3. gate_gradients(q, k, dq, dk, f, overlap)
# ---------------------------------------------------------------------------------------------------------------------
@exercise(3)
def check_3(gate_gradients: Callable) -> None:
    """gate_gradients(q, k, dq, dk, f, overlap) -> (di, df, dm_0) for one head, with initial and final state."""
    T, DQK, DHV = 10, 4, 3
    for seed, with_state in ((0, False), (1, True), (2, True)):
        x = random_inputs(1, 1, T, DQK, DHV, seed=seed)
        initial_state = random_state(1, 1, DQK, DHV, seed=seed) if with_state else None
        final = oracle(x, x.v, initial_state=initial_state)
        dC, dn, dm = random_state(1, 1, DQK, DHV, seed=seed + 100)
        if not with_state:
            dC, dn = 0 * dC, 0 * dn
        # What respects the gauge of (C, n, m), as all that is computed from the state by an mLSTM does, gives this dm.
        overlap = (final["C"] * dC).sum() + (final["n"] * dn).sum()
        expected = oracle(x, x.v[..., ::-1] + 1, initial_state=initial_state, dstate=(dC, dn, dm * 0 + overlap))
        arguments = (x.q, x.k, expected["dq"], expected["dk"], x.f)
        result = gate_gradients(
            *(torch.tensor(y[0, 0]) for y in arguments), torch.tensor(float(overlap), dtype=torch.float64)
        )
        names = ("di", "df", "dm_0")
        require_tensors(result, names, [(T,), (T,), ()], "gate_gradients")
        for name, y in zip(names, result, strict=True):
            if name == "dm_0" and not with_state:
                fine = abs(y.item()) < 1e-10 * (1 + abs(overlap))
            else:
                fine = relative_error(y, expected[name][0, 0]) < 1e-9
            if fine:
                continue
            wanted = torch.tensor(expected[name][0, 0])
            case = "with an initial and a final state" if with_state else "without initial and final state, overlap = 0"
            message = f"{case}: {name} is {_short(y)}, expected {_short(wanted)}. "
            hint = {
                "di": "Column j of the table: the sum of all gradients of log-weights that hold i_j.",
                "df": "Rows from t on, minus columns from t on; then the step from f_bar to f.",
                "dm_0": "m_0 stands in the whole column of the state. Which f_bar stands there, and nowhere else?",
            }[name]
            if name == "df" and with_state:
                hint += " The row of the final state is below all others: it belongs to every one of these sums."
            raise CheckFailed(message + hint)


def _short(x: Tensor) -> str:
    x = x.detach().double().flatten()
    return "[" + ", ".join(f"{y:.4g}" for y in x[:4].tolist()) + (", ..." if len(x) > 4 else "") + "]"


def _gates(q, k, dq, dk, f, overlap, *, rows=1.0, columns=-1.0, state=1.0, suffix=True, slope=None):
    """The right answer, or one with a changed sum."""
    di = (k * dk).sum(-1)
    x = rows * (q * dq).sum(-1) + columns * di
    df_bar = (x.flip(0).cumsum(0).flip(0) if suffix else x.cumsum(0)) + state * overlap
    return di, df_bar * (torch.sigmoid(-f) if slope is None else slope(f)), df_bar[0]


def wrong_3_prefix(q, k, dq, dk, f, overlap):
    """A prefix sum: a gate changes what is read from its step on, not before."""
    return _gates(q, k, dq, dk, f, overlap, suffix=False)


def wrong_3_sign(q, k, dq, dk, f, overlap):
    """Columns minus rows."""
    return _gates(q, k, dq, dk, f, overlap, rows=-1.0, columns=1.0)


def wrong_3_rows_only(q, k, dq, dk, f, overlap):
    """The rows hold also what was written from step t on, which the gate does not touch."""
    return _gates(q, k, dq, dk, f, overlap, columns=0.0)


def wrong_3_plus(q, k, dq, dk, f, overlap):
    """Rows plus columns."""
    return _gates(q, k, dq, dk, f, overlap, columns=1.0)


def wrong_3_no_final_state(q, k, dq, dk, f, overlap):
    """The row of the final state is missing."""
    return _gates(q, k, dq, dk, f, overlap, state=0.0)


def wrong_3_final_state_at_the_end(q, k, dq, dk, f, overlap):
    """The final state is below all rows, so all gates get its term, not the last one only."""
    di, df, dm_0 = _gates(q, k, dq, dk, f, overlap, state=0.0)
    return di, torch.cat([df[:-1], df[-1:] + overlap * torch.sigmoid(-f[-1:])]), dm_0


def wrong_3_without_its_own_row(q, k, dq, dk, f, overlap):
    """The sum over r > t in place of r >= t."""
    di, df, _ = _gates(q, k, dq, dk, f, overlap)
    df_bar = torch.cat([(df / torch.sigmoid(-f))[1:], overlap[None]])
    return di, df_bar * torch.sigmoid(-f), df_bar[0]


def wrong_3_no_slope(q, k, dq, dk, f, overlap):
    """This is the gradient of log sigmoid(f), not yet of f."""
    return _gates(q, k, dq, dk, f, overlap, slope=torch.ones_like)


def wrong_3_slope_of_f(q, k, dq, dk, f, overlap):
    """The slope of log sigmoid at f is sigmoid(-f), not sigmoid(f)."""
    return _gates(q, k, dq, dk, f, overlap, slope=torch.sigmoid)


def wrong_3_slope_of_sigmoid(q, k, dq, dk, f, overlap):
    """The slope of sigmoid, not that of its logarithm."""
    return _gates(q, k, dq, dk, f, overlap, slope=lambda f: torch.sigmoid(f) * torch.sigmoid(-f))


def wrong_3_di_of_rows(q, k, dq, dk, f, overlap):
    """The input gate of step j stands in column j, not in row j."""
    _, df, dm_0 = _gates(q, k, dq, dk, f, overlap)
    return (q * dq).sum(-1), df, dm_0


def wrong_3_dm_0_zero(q, k, dq, dk, f, overlap):
    """m_0 is a gauge only together with C_0 and n_0: alone it scales them, and that does change h."""
    di, df, dm_0 = _gates(q, k, dq, dk, f, overlap)
    return di, df, 0 * dm_0


def wrong_3_dm_0_with_slope(q, k, dq, dk, f, overlap):
    """m_0 is no forget gate: the factor sigmoid(-f) does not belong to it."""
    di, df, _ = _gates(q, k, dq, dk, f, overlap)
    return di, df, df[0]


def wrong_3_dm_0_final(q, k, dq, dk, f, overlap):
    """<C'_T, dC'_T> belongs to the final state; m_0 gets <C'_0, dC'_0>."""
    di, df, _ = _gates(q, k, dq, dk, f, overlap)
    return di, df, overlap


WRONG_ANSWERS = {
    1: [
        wrong_1_own_gate,
        wrong_1_one_late,
        wrong_1_ends_early,
        wrong_1_i_of_the_row,
        wrong_1_prefix_sums,
        wrong_1_prefix_sums_patched,
        wrong_1_no_mask,
        wrong_1_mask_of_zeros,
        wrong_1_mask_too_much,
        wrong_1_no_log_sigmoid,
        wrong_1_log_of_sigmoid,
        wrong_1_weights,
        wrong_1_no_m_0,
        wrong_1_state_one_late,
        wrong_1_transposed,
    ],
    2: [
        wrong_2_no_delta,
        wrong_2_always_delta,
        wrong_2_sign_of_delta,
        wrong_2_sign_of_S,
        wrong_2_delta_once_more,
        wrong_2_delta_undivided,
        wrong_2_no_gates,
        wrong_2_no_s,
        wrong_2_s_missing_in_dv,
        wrong_2_dh_undivided,
        wrong_2_not_transposed,
        wrong_2_delta_of_the_column,
    ],
    3: [
        wrong_3_prefix,
        wrong_3_sign,
        wrong_3_rows_only,
        wrong_3_plus,
        wrong_3_no_final_state,
        wrong_3_final_state_at_the_end,
        wrong_3_without_its_own_row,
        wrong_3_no_slope,
        wrong_3_slope_of_f,
        wrong_3_slope_of_sigmoid,
        wrong_3_di_of_rows,
        wrong_3_dm_0_zero,
        wrong_3_dm_0_with_slope,
        wrong_3_dm_0_final,
    ],
}


# ---------------------------------------------------------------------------------------------------------------------
# What the notebook uses
# ---------------------------------------------------------------------------------------------------------------------
def show_source(function: Callable, first: str | None = None, last: str | None = None) -> None:
    """Displays the source of a function, from the line that contains `first` to the next one that contains `last`.

    Raises:
        ValueError: if there is no such line.
    """
    from IPython.display import Markdown, display

    lines = inspect.getsource(function).splitlines()
    start = 0 if first is None else _line_with(first, lines, 0)
    stop = len(lines) - 1 if last is None else _line_with(last, lines, start)
    display(Markdown("```python\n" + textwrap.dedent("\n".join(lines[start : stop + 1])) + "\n```"))


def _line_with(text: str, lines: list[str], start: int) -> int:
    for number, line in enumerate(lines[start:], start):
        if text in line:
            return number
    raise ValueError(f"no line with {text!r}")


def signed_weights(weights: Tensor, *, ax: Axes, title: str, tokens: bytes) -> None:
    """plot.gate_matrix for weights of both signs: light is 0; a dot marks what is negative, also in black and white."""
    plot.gate_matrix(weights, ax=ax, title=title, tokens=tokens)
    image, limit = ax.images[0], weights.abs().max().item()
    image.set_cmap("PuOr_r")
    image.set_clim(-limit, limit)
    image.colorbar.set_label("weight (dot: negative)")
    t, j = np.nonzero(weights.numpy() < 0)
    ax.plot(j, t, "o", color="black", markersize=1.8)


def draw_rectangle(T: int, r: int) -> None:
    """The table E of the notebook's section 8: the entries that hold the forget gate of step r, and how they are found.

    Column 0 is the initial state, the row below the last step is the returned state.
    """
    steps = [str(t) for t in range(1, T + 1)]
    _, axes = plt.subplots(1, 2, figsize=(8.6, 4.4), layout="constrained")
    for ax, subtract in zip(axes, (False, True), strict=True):
        for t in range(1, T + 2):
            for j in range(min(t, T) + 1):
                late = j >= r
                inside = t >= r and (subtract or not late)
                style = {"facecolor": plot.SKY if inside else plot.PALE, "hatch": "////" if inside and late else None}
                ax.add_patch(Rectangle((j, t), 1, 1, edgecolor="white", linewidth=1.5, **style))
                if inside:
                    sign = "+ −" if late else "+"
                    ax.text(j + 0.5, t + 0.5, sign, ha="center", va="center", fontsize=13)
        ax.set(xlim=(0, T + 1), ylim=(T + 2, 1), aspect="equal", xlabel="written: column j")
        ax.set_xticks(np.arange(T + 1) + 0.5, ["$C_0$", *steps])
        ax.set_yticks(np.arange(1, T + 2) + 0.5, [*steps, f"$C_{T}$"])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    axes[0].set(ylabel="read: row t", title=f"entries of $E$ that hold the gate $\\bar{{f}}_{r}$")
    axes[1].set(title=f"rows from {r} on (+), minus columns from {r} on (−)")


class _Bytes(TorchDispatchMode):
    """Sees the result of every operation of PyTorch, and when its memory is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage) -> None:
        if storage._cdata in self.seen:  # a view, or an operation in place
            return
        self.seen.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.let_go, storage._cdata, storage.nbytes())

    def let_go(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.live -= nbytes


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made while run() works hold at a time, forward and backward.

    Counted are the results of all operations of PyTorch, until nobody needs them any more. What an operation allocates
    inside itself is not seen.
    """
    with _Bytes() as counter:
        result = run()
        del result
    return counter.peak
