"""The exercises of notebook 05: their checks, and wrong answers that the checks must reject."""

from collections.abc import Callable

import numpy as np
import torch

from tfla_lab.check import CheckFailed, relative_error, to_numpy
from tfla_lab.exercise import exercise, require


def _sigmoid(x):
    return np.exp(np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))))


def _same(x, y, allowed: float = 1e-4) -> bool:
    return relative_error(x, y) <= allowed


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 1: the gates' gradients of one step
# ---------------------------------------------------------------------------------------------------------------------
def _pair(answer, case: str) -> tuple[float, float]:
    require(
        isinstance(answer, (tuple, list, np.ndarray)) and len(answer) == 2,
        f"{case}: gate_gradients must return the pair (di, df), got {answer!r}",
    )
    numbers = []
    for name, x in zip(("di", "df"), answer, strict=True):
        x = to_numpy(x)
        require(x.size == 1, f"{case}: {name} must be one number, got shape {x.shape}")
        require(bool(np.isfinite(x).all()), f"{case}: {name} is {float(x.ravel()[0])}. Did an exp overflow?")
        numbers.append(float(x.ravel()[0]))
    return numbers[0], numbers[1]


@exercise(1)
def check_1(gate_gradients: Callable) -> None:
    """gate_gradients(C, dC, k, v, i, f) -> (di, df) of one step of one head.

    C (DQK, DHV) is the state before the step, dC the gradient of the state after it; k (DQK,), v (DHV,); i, f numbers.
    """
    for seed, (i, f) in enumerate([(0.3, 2.0), (-4.0, 5.0), (3.0, -1.0), (0.0, 0.0), (800.0, 800.0), (-800.0, -800.0)]):
        case = f"i = {i:g}, f = {f:g}"
        rng = np.random.default_rng(seed)
        C, dC = rng.normal(size=(2, 4, 3))
        k, v = rng.normal(size=4), rng.normal(size=3)
        gates = torch.tensor([i, f], dtype=torch.float64, requires_grad=True)
        C_next = torch.sigmoid(gates[1]) * torch.from_numpy(C)
        C_next = C_next + torch.sigmoid(gates[0]) * torch.outer(torch.from_numpy(k), torch.from_numpy(v))
        C_next.backward(torch.from_numpy(dC))
        expected = gates.grad.tolist()
        try:
            answer = gate_gradients(C.copy(), dC.copy(), k.copy(), v.copy(), i, f)
        except OverflowError as error:
            raise CheckFailed(
                f"{case}: an exp overflowed ({error}). How does the stage file write its sigmoid?"
            ) from None
        di, df = _pair(answer, case)
        written, kept = k @ dC @ v, np.sum(C * dC)
        w_i, w_f = _sigmoid(i), _sigmoid(f)
        known = {
            "di": (di, expected[0], {
                "this is the gradient of log sigmoid(i). From there to i it is one more factor": w_i * written,
                "this is the gradient of the weight sigmoid(i) itself, not of i": written,
                "e^i is its own derivative, sigmoid(i) is not": np.exp(min(i, 700.0)) * written,
                "a factor belongs to the input gate's own argument: sigmoid(-i), not sigmoid(-f)":
                    w_i * _sigmoid(-f) * written,
                "the input gate writes k v^T; what it keeps of C is the forget gate's": w_i * _sigmoid(-i) * kept,
                "the sign is wrong": -expected[0],
            }),
            "df": (df, expected[1], {
                "this is the gradient of log sigmoid(f). From there to f it is one more factor": w_f * kept,
                "this is the gradient of the weight sigmoid(f) itself, not of f": kept,
                "f weakens the state BEFORE the step; this is the product with the state after it":
                    w_f * _sigmoid(-f) * np.sum(C_next.detach().numpy() * dC),
                "this product is with the state after the step, and a factor is missing":
                    w_f * np.sum(C_next.detach().numpy() * dC),
                "the sign is wrong": -expected[1],
            }),
        }  # fmt: skip
        for name, (x, y, mistakes) in known.items():
            if abs(x - y) <= 1e-4 * abs(y) + 1e-12:
                continue
            hint = next((text for text, z in mistakes.items() if abs(x - z) <= 1e-4 * abs(z) and z != 0), "")
            raise CheckFailed(f"{case}: {name} is {x:.6g} and should be {y:.6g}. {hint}")


def _gate_gradients(C, dC, k, v, i, f, *, slope_i=None, slope_f=None, state=None):
    w_i, w_f = _sigmoid(i), _sigmoid(f)
    slope_i = w_i * _sigmoid(-i) if slope_i is None else slope_i
    slope_f = w_f * _sigmoid(-f) if slope_f is None else slope_f
    return slope_i * (k @ dC @ v), slope_f * np.sum((C if state is None else state) * dC)


def wrong_1_log_gradient(C, dC, k, v, i, f):
    """Stops at the gradients of log sigmoid."""
    return _gate_gradients(C, dC, k, v, i, f, slope_i=_sigmoid(i), slope_f=_sigmoid(f))


def wrong_1_exponential_gate(C, dC, k, v, i, f):
    """The exponential gate's derivative for the input gate, where e^i still is a number."""
    return _gate_gradients(C, dC, k, v, i, f, slope_i=np.exp(np.minimum(i, 700)))


def wrong_1_state_after(C, dC, k, v, i, f):
    """Pairs the forget gate with the state after the step."""
    return _gate_gradients(C, dC, k, v, i, f, state=_sigmoid(f) * C + _sigmoid(i) * np.outer(k, v))


def wrong_1_derivative_at_weight(C, dC, k, v, i, f):
    """Takes the sigmoid twice: sigmoid(w) (1 - sigmoid(w)) with w = sigmoid(i)."""
    twice = _sigmoid(_sigmoid(i))
    return _gate_gradients(C, dC, k, v, i, f, slope_i=twice * (1 - twice))


def wrong_1_overflow(C, dC, k, v, i, f):
    """e^x / (1 + e^x)^2, which is inf / inf for large gates."""
    e_i, e_f = np.exp(np.float64(i)), np.exp(np.float64(f))
    return _gate_gradients(C, dC, k, v, i, f, slope_i=e_i / (1 + e_i) ** 2, slope_f=e_f / (1 + e_f) ** 2)


def wrong_1_swapped(C, dC, k, v, i, f):
    """(df, di)."""
    return _gate_gradients(C, dC, k, v, i, f)[::-1]


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 2: mLSTMsig through a kernel for simple gated linear attention
# ---------------------------------------------------------------------------------------------------------------------
class _SimpleGLA:
    """o_t = C_t^T (s q_t), C_t = e^(g_t) C_{t-1} + k_t v_t^T; counts its calls and looks at its arguments."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, g):
        self.calls += 1
        q, k, v, g = (to_numpy(x) for x in (q, k, v, g))
        T = len(g) if g.ndim else 0
        require(
            g.shape == (T,) and q.shape[:1] == k.shape[:1] == v.shape[:1] == (T,) and q.shape == k.shape,
            f"simple_gla wants q, k (T, DQK), v (T, DHV), g (T,), got {q.shape}, {k.shape}, {v.shape}, {g.shape}",
        )
        require(not np.isnan(g).any(), "simple_gla got a g that is NaN")
        require(
            bool((g <= 0).all()),
            "simple_gla got a g above 0: e^g is what is kept of the state at each step, and that is at most 1. "
            "Which function of f is the LOGARITHM of what is kept?",
        )
        C, o = np.zeros((k.shape[1], v.shape[1])), np.empty_like(v)
        for t in range(T):
            C = np.exp(g[t]) * C + np.outer(k[t], v[t])
            o[t] = C.T @ (q[t] * k.shape[1] ** -0.5)
        return o


@exercise(2)
def check_2(sig_through_gla: Callable) -> None:
    """sig_through_gla(simple_gla, q, k, v, i, f) -> h of one head: q, k (T, DQK), v (T, DHV), i, f (T,)."""
    from mlstmsig_reference import mlstmsig_recurrent

    cases = [(7, 4, 3, 0.0, 2.0), (12, 3, 5, 3.0, -1.0), (5, 2, 2, -6.0, 4.0)]
    for seed, (T, DQK, DHV, i_mean, f_mean) in enumerate(cases):
        case = f"T = {T}, d_qk = {DQK}, i near {i_mean:g}, f near {f_mean:g}"
        rng = np.random.default_rng(seed)
        q, k, v = rng.normal(size=(T, DQK)), rng.normal(size=(T, DQK)), rng.normal(size=(T, DHV))
        i, f = rng.normal(i_mean, 1, T), rng.normal(f_mean, 1, T)
        expected = mlstmsig_recurrent(*(x[None, None] for x in (q, k, v, i, f)))[0, 0]
        kernel = _SimpleGLA()
        answer = sig_through_gla(kernel, q.copy(), k.copy(), v.copy(), i.copy(), f.copy())
        require(answer is not None, f"{case}: nothing was returned. Is the return missing?")
        require(kernel.calls > 0, f"{case}: simple_gla was not called. The task is to use it, not to write it anew.")
        h = to_numpy(answer)
        require(h.shape == v.shape, f"{case}: h must have shape {v.shape}, got {h.shape}")
        require(bool(np.isfinite(h).all()), f"{case}: h is not finite")
        if _same(h, expected):
            continue
        w, g = _sigmoid(i)[:, None], np.log(_sigmoid(f))
        known = {  # mistake: the arguments of simple_gla
            "the input gate is missing": (q, k, v, g),
            "the weights are e^i: that is the other mLSTM's gate": (q, k, v * np.exp(i)[:, None], g),
            "the input gate is in it twice: k and v enter as a product": (q, k * w, v * w, g),
            "the input gate belongs to the step that writes (k or v), not to the one that reads (q)": (q * w, k, v, g),
            "simple_gla already scales q with 1 / sqrt(d_qk)": (q * DQK**-0.5, k, v * w, g),
            "g is a running sum; simple_gla wants what each single step keeps": (q, k, v * w, np.cumsum(g)),
            "what is kept is sigmoid(f), and g is its logarithm, not its negative": (q, k, v * w, -_sigmoid(f)),
            "e^g is what is forgotten instead of what is kept": (q, k, v * w, np.log(_sigmoid(-f))),
        }
        hint = next((text for text, arguments in known.items() if _same(h, _SimpleGLA()(*arguments), 1e-6)), "")
        error = relative_error(h, expected)
        raise CheckFailed(f"{case}: h is off, ||h - h_sig|| / ||h_sig|| = {error:.2g}. {hint}")


def _through_gla(simple_gla, q, k, v, i, f, *, w=None, g=None, q_scale=1.0, k_scale=1.0):
    w = _sigmoid(i) if w is None else w
    return simple_gla(q * q_scale, k * k_scale, v * w[:, None], np.log(_sigmoid(f)) if g is None else g)


def wrong_2_exponential_gate(simple_gla, q, k, v, i, f):
    """e^i, the gate of the other mLSTM."""
    return _through_gla(simple_gla, q, k, v, i, f, w=np.exp(i))


def wrong_2_pre_activation(simple_gla, q, k, v, i, f):
    """f itself as the log decay."""
    return _through_gla(simple_gla, q, k, v, i, f, g=f)


def wrong_2_weight_as_logarithm(simple_gla, q, k, v, i, f):
    """sigmoid(f) where its logarithm belongs."""
    return _through_gla(simple_gla, q, k, v, i, f, g=_sigmoid(f))


def wrong_2_both_scaled(simple_gla, q, k, v, i, f):
    """k and v both weighted."""
    return _through_gla(simple_gla, q, k, v, i, f, k_scale=_sigmoid(i)[:, None])


def wrong_2_reader_scaled(simple_gla, q, k, v, i, f):
    """The reader's query weighted instead of what is written."""
    return _through_gla(simple_gla, q, k, v, i, f, w=np.ones_like(i), q_scale=_sigmoid(i)[:, None])


def wrong_2_scaled_twice(simple_gla, q, k, v, i, f):
    """1 / sqrt(d_qk) once more."""
    return _through_gla(simple_gla, q, k, v, i, f, q_scale=q.shape[1] ** -0.5)


def wrong_2_running_sum(simple_gla, q, k, v, i, f):
    """The running sum of the log decay, as the chunkwise form has it."""
    return _through_gla(simple_gla, q, k, v, i, f, g=np.cumsum(np.log(_sigmoid(f))))


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 3: the input gate from which on a head is heard
# ---------------------------------------------------------------------------------------------------------------------
def _bias(eps, f, G, *, forget=2, root=True, log=False, gain_power=2):
    """The input gate at which the gain behind the norm is G; the options are the mistakes."""
    share = G**gain_power / (1 - G**gain_power)
    w = eps * share * (1 - _sigmoid(f) ** forget)
    w = w**0.5 if root else w
    return np.log(w) if log else np.log(w) - np.log1p(-w)


@exercise(3)
def check_3(opening_bias: Callable) -> None:
    """opening_bias(eps, f, G) -> i: the constant input gate at which the gain behind RMSNorm is G."""
    from tfla_lab.transfer import gain

    for eps, f, G in ((1e-6, 3.0, 0.6), (1e-2, 3.0, 0.5), (1e-6, 0.0, 0.9), (1e-8, 5.0, 0.2), (0.1, -2.0, 0.5)):
        case = f"eps = {eps:g}, f = {f:g}, G = {G:g}"
        expected = float(_bias(eps, f, G))
        answer = opening_bias(eps, f, G)
        try:
            i = float(answer)
        except (TypeError, ValueError):
            raise CheckFailed(f"{case}: opening_bias must return a number, got {answer!r}") from None
        require(np.isfinite(i), f"{case}: the bias must be a finite number, got {i}")
        if abs(i - expected) <= 0.02:
            continue
        known = {
            "eps is compared with the mean SQUARE of h, which has sigmoid(i)^2 in it. Is a root missing?":
                _bias(eps, f, G, root=False),
            "the sum of the squares of the weights is a geometric series in sigmoid(f)^2": _bias(eps, f, G, forget=1),
            "this is the logarithm of the weight; the weight is sigmoid(i), and no longer e^i when it is not small":
                _bias(eps, f, G, log=True),
            "this is where the mean square equals eps: there G is 1 / sqrt(2), whatever was asked for":
                _bias(eps, f, 0.5**0.5),
            "G is the square root of mean square / (mean square + eps): square it first":
                _bias(eps, f, G, gain_power=1),
            "the sign is wrong": -expected,
        }  # fmt: skip
        hint = next((text for text, y in known.items() if abs(i - y) <= 0.02), "")
        measured = gain("sig", float(np.clip(i, -100, 100)), f, eps=eps)
        raise CheckFailed(f"{case}: at an input gate of {i:.3f} the gain is measured as {measured:.2f}. {hint}")


def wrong_3_no_root(eps, f, G):
    """Takes sigmoid(i) for its square."""
    return _bias(eps, f, G, root=False)


def wrong_3_sum_of_weights(eps, f, G):
    """Adds up weights where squares of weights add up."""
    return _bias(eps, f, G, forget=1)


def wrong_3_exponential_gate(eps, f, G):
    """log instead of the inverse of the sigmoid."""
    return _bias(eps, f, G, log=True)


def wrong_3_ignores_gain(eps, f, G):
    """Where the mean square equals eps."""
    return _bias(eps, f, 0.5**0.5)


def wrong_3_gain_not_squared(eps, f, G):
    """G / (1 - G)."""
    return _bias(eps, f, G, gain_power=1)


def wrong_3_one_step_of_memory(eps, f, G):
    """Forgets that earlier steps add to h."""
    return _bias(eps, -30.0, G)


WRONG_ANSWERS: dict[int, list[Callable]] = {
    1: [
        wrong_1_log_gradient, wrong_1_exponential_gate, wrong_1_state_after, wrong_1_derivative_at_weight,
        wrong_1_overflow, wrong_1_swapped,
    ],
    2: [
        wrong_2_exponential_gate, wrong_2_pre_activation, wrong_2_weight_as_logarithm, wrong_2_both_scaled,
        wrong_2_reader_scaled, wrong_2_scaled_twice, wrong_2_running_sum,
    ],
    3: [
        wrong_3_no_root, wrong_3_sum_of_weights, wrong_3_exponential_gate, wrong_3_ignores_gain,
        wrong_3_gain_not_squared, wrong_3_one_step_of_memory,
    ],
}  # fmt: skip
