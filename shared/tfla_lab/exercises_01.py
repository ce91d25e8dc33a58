"""The checks behind the exercises of stage 01's notebook, and answers that they must reject.

Every check takes the reader's function, prints one line if it is right and raises CheckFailed with a hint if it is not.
A function that still raises NotImplementedError is reported as not solved yet, so that the notebook runs to its end.
"""

from collections.abc import Callable

import numpy as np
from mlstm_recurrent import mlstm_recurrent

from tfla_lab.check import CheckFailed, relative_error, same_gauge
from tfla_lab.exercise import exercise, require
from tfla_lab.inputs import random_inputs


# ---------------------------------------------------------------------------------------------------------------------
# 1. log_sigmoid(x)
# ---------------------------------------------------------------------------------------------------------------------
@exercise(1)
def check_1(answer: Callable) -> None:
    """log_sigmoid(x), elementwise: right to the last digits in float32 and float64, for every x, infinite ones too."""
    # Far out the function is its asymptote; the rest was computed with 30 digits.
    expected = {
        -10000.0: -10000.0,
        -800.0: -800.0,
        -100.0: -100.0,
        -20.0: -20.000000002061153620314381,
        -1.0: -1.3132616875182228340489954949678556,
        0.0: -0.69314718055994530941723212145817657,
        1.0: -0.31326168751822283404899549496785564,
        20.0: -2.0611536203143807032389827948e-9,
        60.0: -8.7565107626965203384887328007e-27,
        100.0: -3.7200759760208359629596958038631e-44,
    }
    for dtype, digits in ((np.float64, 1e-14), (np.float32, 1e-6)):
        x, y = (np.array(list(column), dtype) for column in (expected, expected.values()))
        result = answer(x.copy())
        require(
            isinstance(result, np.ndarray) and result.shape == x.shape,
            f"log_sigmoid must return an array of shape {x.shape}",
        )
        require(result.dtype == x.dtype, f"log_sigmoid must keep the dtype: got {result.dtype} for {x.dtype}")
        for x_j, actual, wanted in zip(x, result, y, strict=True):
            # Float32 has no number near e^-100 with all its digits; there a few units of the smallest number are fine.
            right = abs(actual - wanted) <= digits * abs(wanted) + 4 * np.finfo(dtype).smallest_subnormal
            where = f"log_sigmoid({x_j:g}) in {x.dtype} is {actual:.12g}, expected {wanted:.12g}"
            if not right and x_j < -1:
                hint = "For negative x, which exponential of x stays small?"
            else:
                hint = "For large x, is 1 + e^(-x) still different from 1? NumPy has a function for that."
            require(bool(right), f"{where}. {hint}")
    ends = answer(np.array([-np.inf, np.inf]))
    require(ends[0] == -np.inf and ends[1] == 0, f"log_sigmoid(-inf, inf) is {ends}, expected -inf and 0")


def _log_of_sigmoid(x):
    """As it is written in books: e^(-x) overflows below -88, and the result is -inf."""
    return np.log(1 / (1 + np.exp(-x)))


def _one_sided(x):
    """log1p saves the large x, but e^(-x) still overflows for very negative x."""
    return -np.log1p(np.exp(-x))


def _other_side(x):
    """Right for negative x; for large ones inf - inf."""
    return x - np.log1p(np.exp(x))


def _with_eps(x):
    """An eps inside the logarithm: no -inf any more, but every x below -14 gives the same."""
    return np.log(1 / (1 + np.exp(-x)) + x.dtype.type(1e-6))


def _clipped(x):
    """Clipping x avoids the overflow, and with it every forget gate below -80."""
    return -np.log1p(np.exp(-np.clip(x, -80, 80)))


def _without_log1p(x):
    """1 + e^(-x) is 1 in floating point once x > 16 (float32): the result 0 has lost all its digits."""
    return np.minimum(x, 0) - np.log(1 + np.exp(-np.abs(x)))


def _asymptote(x):
    """min(x, 0) is right far out only; at 0 it is off by log 2."""
    return np.minimum(x, 0)


def _wrong_sign(x):
    """This is softplus(x) = -log_sigmoid(-x)."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


# ---------------------------------------------------------------------------------------------------------------------
# 2. join(first, second, g)
# ---------------------------------------------------------------------------------------------------------------------
@exercise(2)
def check_2(answer: Callable) -> None:
    """join(first, second, g): the state after two pieces of a sequence, from the states of each read on its own."""
    T, DQK, DHV = 12, 3, 2
    for first, second, shift_1, shift_2 in (
        ("typical", "typical", 0, 0),
        ("forgetting", "typical", 0, 0),
        ("typical", "initial", 0, 0),
        ("resets", "resets", 0, 0),
        ("typical", "typical", 800, 0),
        ("typical", "typical", 0, 800),
        ("typical", "typical", 800, 800),
    ):
        a = random_inputs(1, 1, T, DQK, DHV, regime=first, seed=1)
        b = random_inputs(1, 1, T, DQK, DHV, regime=second, seed=2)
        a, b = a._replace(i=a.i + shift_1), b._replace(i=b.i + shift_2)
        both = [np.concatenate(pair, axis=2) for pair in zip(a, b, strict=True)]
        _, (C, n, m) = mlstm_recurrent(*both, return_state=True)
        pieces = [tuple(x[0, 0] for x in mlstm_recurrent(*x, return_state=True)[1]) for x in (a, b)]
        g = np.sum(np.minimum(b.f, 0) - np.log1p(np.exp(-np.abs(b.f))))

        result = answer(*(tuple(x.copy() for x in piece) for piece in pieces), g)
        case = f"first piece: {first}, i + {shift_1}; second piece: {second}, i + {shift_2}; g = {g:.4g}: "
        require(isinstance(result, tuple) and len(result) == 3, "join must return a tuple (C, n, m)")
        C_joined, n_joined, m_joined = (np.asarray(x, np.float64) for x in result)
        shapes = (C_joined.shape, n_joined.shape, m_joined.shape)
        require(
            shapes == ((DQK, DHV), (DQK,), ()),
            f"{case}C, n, m must have shapes {(DQK, DHV)}, {(DQK,)}, (), got {shapes}",
        )
        finite = all(np.isfinite(x).all() for x in (C_joined, n_joined, m_joined))
        require(finite, f"{case}the joined state is not finite. Is every exponent that you take e^ of at most 0?")
        joined = same_gauge((C_joined[None, None], n_joined[None, None], m_joined[None, None]), m)
        for name, expected in (("C", C), ("n", n)):
            error = relative_error(joined[name], expected)
            hint = "How much of the first piece is left after the second? Are both in the same gauge when you add them?"
            require(
                error < 1e-10, f"{case}{name} has a relative error of {error:.1e}, compared in the same gauge. {hint}"
            )


def _just_added(first, second, g):
    """Adds numbers that are in different gauges, and forgets nothing."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    return C_1 + C_2, n_1 + n_2, np.maximum(m_1, m_2)


def _g_missing(first, second, g):
    """The first piece must decay while the second is read."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = np.maximum(m_1, m_2)
    a, b = np.exp(m_1 - m), np.exp(m_2 - m)
    return a * C_1 + b * C_2, a * n_1 + b * n_2, m


def _g_on_the_wrong_piece(first, second, g):
    """It is the older piece that decays."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = np.maximum(m_1, g + m_2)
    a, b = np.exp(m_1 - m), np.exp(g + m_2 - m)
    return a * C_1 + b * C_2, a * n_1 + b * n_2, m


def _g_not_in_the_weight(first, second, g):
    """m knows of g, but the weight of the first piece does not."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = np.maximum(g + m_1, m_2)
    a, b = np.exp(m_1 - m), np.exp(m_2 - m)
    return a * C_1 + b * C_2, a * n_1 + b * n_2, m


def _no_stabilizer(first, second, g):
    """Right on paper: both pieces in the gauge m = 0. With hot gates e^m overflows."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    a, b = np.exp(g + m_1), np.exp(m_2)
    return a * C_1 + b * C_2, a * n_1 + b * n_2, np.float64(0)


def _gauge_of_the_second(first, second, g):
    """Right on paper; overflows when the first piece is much hotter than the second."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    a = np.exp(g + m_1 - m_2)
    return a * C_1 + C_2, a * n_1 + n_2, m_2


def _gauge_of_the_first(first, second, g):
    """Right on paper; overflows when the second piece is much hotter than the first, or g = -inf."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = g + m_1
    b = np.exp(m_2 - m)
    return C_1 + b * C_2, n_1 + b * n_2, m


def _sign_of_m(first, second, g):
    """e^(m - m_2) where e^(m_2 - m) belongs."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = np.maximum(g + m_1, m_2)
    a, b = np.exp(m - g - m_1), np.exp(m - m_2)
    return a * C_1 + b * C_2, a * n_1 + b * n_2, m


def _n_not_scaled(first, second, g):
    """n lives in the same gauge as C."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = np.maximum(g + m_1, m_2)
    return np.exp(g + m_1 - m) * C_1 + np.exp(m_2 - m) * C_2, n_1 + n_2, m


def _m_added(first, second, g):
    """Log-weights of sums are not sums of log-weights."""
    (C_1, n_1, m_1), (C_2, n_2, m_2) = first, second
    m = g + m_1 + m_2
    a, b = np.exp(g + m_1 - m), np.exp(m_2 - m)
    return a * C_1 + b * C_2, a * n_1 + b * n_2, np.maximum(g + m_1, m_2)


# ---------------------------------------------------------------------------------------------------------------------
# 3. smooth_backward(dh, N, S, m)
# ---------------------------------------------------------------------------------------------------------------------
def smooth_h(N: np.ndarray, S: float, m: float) -> np.ndarray:
    """The variant of exercise 3: h = N / D with D = sqrt(S^2 + e^(-2 m)) in place of max(|S|, e^(-m))."""
    return N / np.hypot(S, np.exp(-m))


@exercise(3)
def check_3(answer: Callable) -> None:
    """smooth_backward(dh, N, S, m) -> (dN, dS, dm) for h = N / sqrt(S^2 + e^(-2 m)), against finite differences."""
    rng, step = np.random.default_rng(3), 1e-5
    for S, m in ((0.0, 0.0), (2.0, 0.0), (-2.0, 0.0), (0.3, -1.0), (-0.3, -1.0), (0.7, 1.5), (-0.1, 3.0)):
        N, dh = rng.normal(size=(2, 3))
        differences = [
            [dh @ (smooth_h(N + e, S, m) - smooth_h(N - e, S, m)) / (2 * step) for e in step * np.eye(3)],
            dh @ (smooth_h(N, S + step, m) - smooth_h(N, S - step, m)) / (2 * step),
            dh @ (smooth_h(N, S, m + step) - smooth_h(N, S, m - step)) / (2 * step),
        ]
        result = answer(dh.copy(), N.copy(), S, m)
        require(isinstance(result, tuple) and len(result) == 3, "smooth_backward must return a tuple (dN, dS, dm)")
        for name, actual, expected in zip(("dN", "dS", "dm"), result, differences, strict=True):
            actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
            require(actual.shape == expected.shape, f"{name} must have shape {expected.shape}, got {actual.shape}")
            scale = np.abs(expected).max() + 1e-3
            if np.abs(actual - expected).max() <= 1e-6 * scale:
                continue
            message = f"S = {S:g}, m = {m:g}: {name} is {actual}, but finite differences give {np.round(expected, 6)}."
            if np.abs(actual + expected).max() <= 1e-6 * scale:
                message += " The size is right, the sign is not."
            elif not actual.any():
                message += " D depends on S and on m, so both get a gradient."
            raise CheckFailed(message)


def _denominator_is_constant(dh, N, S, m):
    """The normalizer's gradient left out, as some published kernels do."""
    return dh / np.hypot(S, np.exp(-m)), 0.0, 0.0


def _sign_of_dD(dh, N, S, m):
    """h = N / D falls when D grows: the minus is missing."""
    D = np.hypot(S, np.exp(-m))
    dD = dh @ N / D**2
    return dh / D, dD * S / D, -dD * np.exp(-2 * m) / D


def _branches_of_the_max(dh, N, S, m):
    """The gradient of max(|S|, e^(-m)), which is another function."""
    D = np.hypot(S, np.exp(-m))
    dD = -(dh @ N) / D**2
    return dh / D, dD * np.sign(S) * (abs(S) > np.exp(-m)), -dD * np.exp(-m) * (abs(S) <= np.exp(-m))


def _sign_of_S_only(dh, N, S, m):
    """The slope of sqrt(S^2 + ...) is S / D; it is sign(S) only far out."""
    D = np.hypot(S, np.exp(-m))
    dD = -(dh @ N) / D**2
    return dh / D, dD * np.sign(S), -dD * np.exp(-2 * m) / D


def _root_forgotten(dh, N, S, m):
    """The gradient of D^2, not of D."""
    D = np.hypot(S, np.exp(-m))
    dD = -(dh @ N) / D**2
    return dh / D, dD * 2 * S, -dD * 2 * np.exp(-2 * m)


def _one_division_missing(dh, N, S, m):
    """d(1 / D) = -1 / D^2, not -1 / D."""
    D = np.hypot(S, np.exp(-m))
    dD = -(dh @ N) / D
    return dh / D, dD * S / D, -dD * np.exp(-2 * m) / D


def _dm_missing(dh, N, S, m):
    """m is a gauge only together with N and S: alone it does change h."""
    D = np.hypot(S, np.exp(-m))
    return dh / D, -(dh @ N) / D**3 * S, 0.0


def _sign_of_dm(dh, N, S, m):
    """e^(-2 m) falls when m grows: one more minus."""
    D = np.hypot(S, np.exp(-m))
    dD = -(dh @ N) / D**2
    return dh / D, dD * S / D, dD * np.exp(-2 * m) / D


def _dN_without_D(dh, N, S, m):
    """h = N / D, so dN has the D too."""
    D = np.hypot(S, np.exp(-m))
    dD = -(dh @ N) / D**2
    return dh, dD * S / D, -dD * np.exp(-2 * m) / D


WRONG_ANSWERS = {
    1: [
        _log_of_sigmoid,
        _one_sided,
        _other_side,
        _with_eps,
        _clipped,
        _without_log1p,
        _asymptote,
        _wrong_sign,
    ],
    2: [
        _just_added,
        _g_missing,
        _g_on_the_wrong_piece,
        _g_not_in_the_weight,
        _no_stabilizer,
        _gauge_of_the_second,
        _gauge_of_the_first,
        _sign_of_m,
        _n_not_scaled,
        _m_added,
    ],
    3: [
        _denominator_is_constant,
        _sign_of_dD,
        _branches_of_the_max,
        _sign_of_S_only,
        _root_forgotten,
        _one_division_missing,
        _dm_missing,
        _sign_of_dm,
        _dN_without_D,
    ],
}
