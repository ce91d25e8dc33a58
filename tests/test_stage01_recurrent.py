"""Stage 01, the oracle of all others: held by finite differences and by numbers worked out by hand."""

import warnings

import hypothesis.strategies as st
import mlstm_recurrent as stage
import mutants
import numpy as np
import properties
import pytest
from hypothesis import example, given
from mlstm_recurrent import mlstm_recurrent, mlstm_recurrent_backward, mlstm_step
from tfla_lab.check import check, relative_error, same_gauge
from tfla_lab.inputs import REGIMES, Inputs, random_inputs, random_state

E = np.exp(1.0)


def one_head(values):
    """A list of T numbers as (1, 1, T, 1)."""
    return np.array(values, dtype=np.float64).reshape(1, 1, -1, 1)


def gates(values):
    return np.array(values, dtype=np.float64).reshape(1, 1, -1)


def test_hand_worked_example():
    """d_qk = d_hv = 1, so s = 1, and f = 0 halves the memory. i = 0, then i = log 4.

    Without the stabilizer, with C~ = e^m C:   step 1: C~ = 1 * 2 * 3 = 6,           n~ = 2
                                               step 2: C~ = 6 / 2 + 4 * 1 * 5 = 23,  n~ = 2 / 2 + 4 * 1 = 5
    q = 1:    h_1 = 6 / max(2, 1) = 3,         h_2 = 23 / max(5, 1) = 4.6
    q = 0.1:  h_1 = 0.6 / max(0.2, 1) = 0.6,   h_2 = 2.3 / max(0.5, 1) = 2.3
    q = -1:   h_1 = -6 / max(2, 1) = -3
    """
    k, v, i, f = one_head([2, 1]), one_head([3, 5]), gates([0, np.log(4)]), gates([0, 0])
    for q, expected in ((1, [3, 4.6]), (0.1, [0.6, 2.3]), (-1, [-3, -4.6])):
        h, (C, n, m) = mlstm_recurrent(one_head([q, q]), k, v, i, f, return_state=True)
        np.testing.assert_allclose(h[0, 0, :, 0], expected, rtol=1e-14)
    # m_1 = max(log(1/2) + 0, 0) = 0, m_2 = max(log(1/2) + 0, log 4) = log 4
    np.testing.assert_allclose([C.item(), n.item(), m.item()], [23 / 4, 5 / 4, np.log(4)], rtol=1e-14)


def test_hand_worked_gradient():
    """One step, d = 1, i = log 4, f = 0: h = 4 k v q / max(|4 k q|, 1).

    k = 1, v = 5, q = 1: h = v, so dv = 1 and all else 0.
    With q = 0.1: h = 4 k v q, so dq = 20, dk = 2, dv = 0.4, di = 2.
    f does nothing in the first step, because the memory is empty. The returned m is i, and does not depend on f.
    """
    for q, expected in ((1.0, [0, 0, 1, 0, 0]), (0.1, [20, 2, 0.4, 2, 0])):
        x = one_head([q]), one_head([1]), one_head([5]), gates([np.log(4)]), gates([0])
        *gradients, _ = mlstm_recurrent_backward(one_head([1]), *x)
        np.testing.assert_allclose([g.item() for g in gradients], expected, atol=1e-14)


def loss_and_gradients(inputs, state, dh, dstate):
    *gradients, dinitial = mlstm_recurrent_backward(dh, *inputs, initial_state=state, dstate=dstate)

    def loss(q, k, v, i, f, *state):
        h, final = mlstm_recurrent(q, k, v, i, f, initial_state=state, return_state=True)
        return (h * dh).sum() + sum((x * dx).sum() for x, dx in zip(final, dstate, strict=True))

    return loss, (*gradients, *dinitial)


@pytest.mark.parametrize("bias", [-12.0, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_finite_differences(bias, seed):
    """Every entry of every gradient, through h and through the returned C, n and m, in both branches of both maxima."""
    inputs = random_inputs(1, 2, 6, 3, 4, seed=seed)
    inputs = inputs._replace(i=inputs.i + bias)
    state, dstate = random_state(1, 2, 3, 4, seed=seed), random_state(1, 2, 3, 4, seed=seed + 10)
    dh = random_inputs(1, 2, 6, 3, 4, seed=seed + 20).v
    loss, gradients = loss_and_gradients(inputs, state, dh, dstate)
    arguments, step = [*inputs, *state], 1e-6
    for index, gradient in enumerate(gradients):
        numeric = np.empty_like(gradient)
        for place in np.ndindex(gradient.shape):
            values = []
            for sign in (1, -1):
                moved = arguments[index].copy()
                moved[place] += sign * step
                values.append(loss(*arguments[:index], moved, *arguments[index + 1 :]))
            numeric[place] = (values[0] - values[1]) / (2 * step)
        name = ("dq", "dk", "dv", "di", "df", "dC_0", "dn_0", "dm_0")[index]
        assert relative_error(gradient, numeric) < 2e-7 or np.abs(gradient - numeric).max() < 1e-7, name


def test_finite_differences_see_all_branches():
    """The cases above do take both branches of max(|S|, e^-m) and of max(f_bar + m, i), and both signs of S."""
    normalizer_wins, signs, old_wins = set(), set(), set()
    for bias in (-12.0, -2.0, 0.0, 3.0):
        for seed in range(3):
            q, k, v, i, f = random_inputs(1, 2, 6, 3, 4, seed=seed)
            i = i + bias
            state = random_state(1, 2, 3, 4, seed=seed)
            for t in range(6):
                m_prev = state[2]
                _, state = mlstm_step(q[:, :, t], k[:, :, t], v[:, :, t], i[:, :, t], f[:, :, t], state)
                S = np.einsum("bhk,bhk->bh", state[1], q[:, :, t]) / np.sqrt(3)
                normalizer_wins |= set((np.abs(S) > np.exp(-state[2])).ravel().tolist())
                signs |= set((S > 0).ravel().tolist())
                old_wins |= set((stage.log_sigmoid(f[:, :, t]) + m_prev > i[:, :, t]).ravel().tolist())
    assert normalizer_wins == signs == old_wins == {True, False}


def plain_definition(q, k, v, i, f):
    """The cell without any stabilizer, as xLSTM defines it: C = f C + exp(i) k v^T, h = C^T q / max(|n . q|, 1)."""
    B, NH, T, DQK = q.shape
    C, n, h = np.zeros((B, NH, DQK, v.shape[-1])), np.zeros((B, NH, DQK)), np.empty(v.shape)
    for t in range(T):
        forget, write = (1 / (1 + np.exp(-f[:, :, t])))[..., None], np.exp(i[:, :, t])[..., None]
        C = forget[..., None] * C + write[..., None] * k[:, :, t, :, None] * v[:, :, t, None, :]
        n = forget * n + write * k[:, :, t]
        S = (n * q[:, :, t]).sum(-1) / np.sqrt(DQK)
        h[:, :, t] = np.einsum("bhkv,bhk->bhv", C, q[:, :, t]) / np.sqrt(DQK) / np.maximum(np.abs(S), 1)[..., None]
    return h


@given(seed=st.integers(0, 2**31), T=st.integers(1, 30), regime=st.sampled_from(["typical", "initial", "forgetting"]))
@example(seed=0, T=1, regime="typical")
def test_equals_the_unstabilized_definition(seed, T, regime):
    inputs = random_inputs(2, 2, T, 5, 3, regime=regime, seed=seed)
    check({"h": mlstm_recurrent(*inputs)}, {"h": plain_definition(*inputs)}, verbose=False)


@given(
    seed=st.integers(0, 2**31), T=st.integers(1, 24), t=st.integers(0, 24), regime=st.sampled_from(list(REGIMES)),
    dtype=st.sampled_from([np.float64, np.float32]),
)  # fmt: skip
def test_splitting_with_the_state_passed_on(seed, T, t, regime, dtype):
    """One call and two calls do the same operations in the same order: equal to the bit, backward included."""
    t = min(t, T)
    inputs = random_inputs(1, 2, T, 4, 6, regime=regime, seed=seed, dtype=dtype)
    state, dstate = (random_state(1, 2, 4, 6, seed=seed + j, dtype=dtype) for j in (0, 1))
    dh = random_inputs(1, 2, T, 4, 6, seed=seed + 1, dtype=dtype).v
    first, second = Inputs(*(x[:, :, :t] for x in inputs)), Inputs(*(x[:, :, t:] for x in inputs))
    h, final = mlstm_recurrent(*inputs, initial_state=state, return_state=True)
    h_1, middle = mlstm_recurrent(*first, initial_state=state, return_state=True)
    h_2, final_2 = mlstm_recurrent(*second, initial_state=middle, return_state=True)
    whole = mlstm_recurrent_backward(dh, *inputs, initial_state=state, dstate=dstate)
    back_2 = mlstm_recurrent_backward(dh[:, :, t:], *second, initial_state=middle, dstate=dstate)
    back_1 = mlstm_recurrent_backward(dh[:, :, :t], *first, initial_state=state, dstate=back_2[5])
    np.testing.assert_array_equal(np.concatenate([h_1, h_2], axis=2), h)
    for x, y in zip(final, final_2, strict=True):
        np.testing.assert_array_equal(x, y)
    for x, x_1, x_2 in zip(whole[:5], back_1[:5], back_2[:5], strict=True):
        np.testing.assert_array_equal(np.concatenate([x_1, x_2], axis=2), x)
    for x, y in zip(whole[5], back_1[5], strict=True):
        np.testing.assert_array_equal(x, y)


def test_gauge():
    inputs, (C, n, m) = random_inputs(2, 2, 20, 5, 7), random_state(2, 2, 5, 7)
    c = 2.5
    h, final = mlstm_recurrent(*inputs, initial_state=(C, n, m), return_state=True)
    shifted = (C * np.exp(-c), n * np.exp(-c), m + c)
    h_shifted, final_shifted = mlstm_recurrent(*inputs, initial_state=shifted, return_state=True)
    check({"h": h_shifted}, {"h": h}, verbose=False)
    check(same_gauge(final_shifted, final[2]), same_gauge(final, final[2]), verbose=False)


def test_gradients_through_h_respect_the_gauge():
    """h does not change along the gauge, so nor does a loss of it: <C_0, dC_0> + <n_0, dn_0> = dm_0."""
    inputs, state = random_inputs(2, 2, 20, 5, 7), random_state(2, 2, 5, 7)
    dC, dn, dm = mlstm_recurrent_backward(inputs.v, *inputs, initial_state=state)[5]
    np.testing.assert_allclose((state[0] * dC).sum((-2, -1)) + (state[1] * dn).sum(-1), dm, rtol=1e-9, atol=1e-12)


def test_causality():
    inputs, other = random_inputs(1, 2, 20, 5, 7), random_inputs(1, 2, 20, 5, 7, seed=1)
    mixed = Inputs(*(np.concatenate([x[:, :, :12], y[:, :, 12:]], axis=2) for x, y in zip(inputs, other, strict=True)))
    np.testing.assert_array_equal(mlstm_recurrent(*inputs)[:, :, :12], mlstm_recurrent(*mixed)[:, :, :12])


def test_reset_forgets_everything_exactly():
    inputs = random_inputs(1, 2, 20, 5, 7, regime="hot")
    inputs.f[:, :, 8] = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = mlstm_recurrent(*inputs)
        gradients = mlstm_recurrent_backward(h, *inputs)
        alone = Inputs(*(x[:, :, 8:] for x in inputs))
        gradients_alone = mlstm_recurrent_backward(h[:, :, 8:], *alone)
    np.testing.assert_allclose(h[:, :, 8:], mlstm_recurrent(*alone), rtol=1e-13)
    assert (gradients[4][:, :, 8] == 0).all()
    for x, y in zip(gradients[:4], gradients_alone[:4], strict=True):
        np.testing.assert_allclose(x[:, :, 8:], y, rtol=1e-10, atol=1e-13)


def test_padding_writes_nothing():
    inputs = random_inputs(1, 2, 20, 5, 7)
    inputs.i[:, :, 10:], inputs.f[:, :, 10:] = -np.inf, np.inf
    _, state = mlstm_recurrent(*inputs, return_state=True)
    _, short = mlstm_recurrent(*(x[:, :, :10] for x in inputs), return_state=True)
    for x, y in zip(state, short, strict=True):
        np.testing.assert_array_equal(x, y)
    _, dk, dv, di, df, _ = mlstm_recurrent_backward(np.ones_like(inputs.v), *inputs, dstate=state)
    assert all((x[:, :, 10:] == 0).all() for x in (dk, dv, di, df))


def test_nothing_but_padding_leaves_an_empty_memory():
    inputs = random_inputs(1, 1, 5, 3, 4)
    inputs.i[:], inputs.f[:] = -np.inf, -np.inf
    h, (C, n, m) = mlstm_recurrent(*inputs, return_state=True)
    assert all((x == 0).all() for x in (h, C, n, m))
    assert all(
        np.isfinite(x).all() for x in mlstm_recurrent_backward(np.ones_like(h), *inputs, dstate=(C + 1, n, m))[:5]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_finite_at_extreme_gates(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value_i in (-1e4, -50.0, 50.0, 1e4):
            for value_f in (-1e4, -50.0, 50.0, 1e4):
                inputs = random_inputs(1, 1, 12, 3, 4, dtype=dtype)
                inputs.i[:], inputs.f[:] = value_i, value_f
                inputs.q[:, :, 3:5] = 0
                h, state = mlstm_recurrent(*inputs, return_state=True)
                assert all(np.isfinite(x).all() for x in (h, *state))
                if value_i < 0:  # h has a pole at n . q = 0 where e^-m is 0: no gradient is asked for there
                    gradients = mlstm_recurrent_backward(np.ones_like(h), *inputs, dstate=state)
                    assert all(np.isfinite(x).all() for x in (*gradients[:5], *gradients[5]))


@given(seed=st.integers(0, 2**31), regime=st.sampled_from(list(REGIMES)))
def test_float32_against_float64(seed, regime):
    inputs, state = random_inputs(1, 2, 40, 6, 5, regime=regime, seed=seed, dtype=np.float32), random_state(1, 2, 6, 5)
    state = tuple(x.astype(np.float32) for x in state)
    dh = random_inputs(1, 2, 40, 6, 5, seed=seed + 1, dtype=np.float32).v
    h, final = mlstm_recurrent(*inputs, initial_state=state, return_state=True)
    assert {x.dtype for x in (h, *final)} == {np.dtype(np.float32)}
    wide, wide_state = [x.astype(np.float64) for x in inputs], tuple(x.astype(np.float64) for x in state)
    h_wide, final_wide = mlstm_recurrent(*wide, initial_state=wide_state, return_state=True)
    names = ("dq", "dk", "dv", "di", "df")
    gradients = dict(zip(names, mlstm_recurrent_backward(dh, *inputs, initial_state=state), strict=False))
    expected = dict(
        zip(names, mlstm_recurrent_backward(dh.astype(np.float64), *wide, initial_state=wide_state), strict=False)
    )
    scales = properties.summands(inputs, dh, state)
    check({"h": h, **gradients}, {"h": h_wide, **expected}, scales=scales, verbose=False)
    in_one_gauge = [same_gauge(x, final_wide[2]) for x in (final, final_wide)]
    check(*in_one_gauge, dtype="float32", verbose=False)


def test_float16_is_computed_in_float32():
    inputs = random_inputs(1, 1, 20, 6, 5, dtype=np.float16)
    h, (C, _, _) = mlstm_recurrent(*inputs, return_state=True)
    assert (h.dtype, C.dtype, inputs.i.dtype) == (np.float16, np.float32, np.float32)
    check({"h": h}, {"h": mlstm_recurrent(*(x.astype(np.float64) for x in inputs))}, verbose=False)


def test_empty_sequences():
    inputs, state = random_inputs(2, 1, 0, 3, 4), random_state(2, 1, 3, 4)
    h, final = mlstm_recurrent(*inputs, initial_state=state, return_state=True)
    assert h.shape == (2, 1, 0, 4)
    assert final is state
    *_, dinitial = mlstm_recurrent_backward(h, *inputs, initial_state=state, dstate=state)
    assert all((x == y).all() for x, y in zip(dinitial, state, strict=True))
    assert mlstm_recurrent(*random_inputs(0, 1, 5, 3, 4)).shape == (0, 1, 5, 4)


def test_the_step_alone():
    q, k, v, i, f = (x[:, :, 0] for x in random_inputs(2, 3, 1, 4, 5))
    h, (C, n, m) = mlstm_step(q, k, v, i, f)
    assert (h.shape, C.shape, n.shape, m.shape) == ((2, 3, 5), (2, 3, 4, 5), (2, 3, 4), (2, 3))


BAD = [
    (lambda x: {"q": x.q.tolist()}, TypeError, "q must be a numpy.ndarray, got list"),
    (lambda x: {"q": x.q.astype(int)}, TypeError, "q must be float16, float32 or float64, got int64"),
    (lambda x: {"q": x.q[0]}, ValueError, r"q must have shape \(B, NH, T, D\)"),
    (lambda x: {"k": x.k[..., :2]}, ValueError, r"k must have shape \(1, 2, 5, 3\) to fit q and v, got \(1, 2, 5, 2\)"),
    (lambda x: {"v": x.v[:, :, :4]}, ValueError, "v must have shape"),
    (lambda x: {"v": x.v.astype(np.float32)}, TypeError, "v must be float64 to fit q, got float32"),
    (lambda x: {"i": x.i[..., None]}, ValueError, "i must have shape"),
    (lambda x: {"f": x.f.astype(np.float16)}, TypeError, "f must be float32 or float64 to fit q, got float16"),
    (lambda x: {"initial_state": random_state(1, 2, 3, 4)[:2]}, TypeError, "initial_state must be a tuple"),
    (lambda x: {"initial_state": random_state(1, 2, 4, 4)}, ValueError, "initial_state's C must have shape"),
    (
        lambda x: {"initial_state": random_state(1, 2, 3, 4, dtype=np.float32)},
        TypeError,
        "initial_state's C must be float64 to fit q, got float32",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_name_the_argument(change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4)
    with pytest.raises(error, match=message):
        mlstm_recurrent(**(inputs._asdict() | change(inputs)))


def test_backward_errors_name_the_argument():
    inputs = random_inputs(1, 2, 5, 3, 4)
    with pytest.raises(ValueError, match="dh must have shape"):
        mlstm_recurrent_backward(inputs.q, *inputs)
    with pytest.raises(ValueError, match="dstate's C must have shape"):
        mlstm_recurrent_backward(inputs.v, *inputs, dstate=random_state(1, 2, 4, 4))


def suite(module) -> None:
    """A short form of the tests above, for the mutants: hand-worked numbers, and derivatives in random directions."""
    k, v, i, f = one_head([2, 1]), one_head([3, 5]), gates([0, np.log(4)]), gates([0, 0])
    h = module.mlstm_recurrent(one_head([0.1, -1]), k, v, i, f)
    assert np.allclose(h[0, 0, :, 0], [0.6, -4.6])
    for bias in (-12.0, 0.0, 3.0):
        inputs, rng = random_inputs(1, 2, 8, 3, 4), np.random.default_rng(0)
        inputs = inputs._replace(i=inputs.i + bias)
        assert np.allclose(module.mlstm_recurrent(*inputs), plain_definition(*inputs))
        state, dstate = random_state(1, 2, 3, 4), random_state(1, 2, 3, 4, seed=1)
        dh = random_inputs(1, 2, 8, 3, 4, seed=2).v
        *gradients, dinitial = module.mlstm_recurrent_backward(dh, *inputs, initial_state=state, dstate=dstate)
        loss, _ = loss_and_gradients(inputs, state, dh, dstate)
        arguments = [*inputs, *state]
        for index, gradient in enumerate((*gradients, *dinitial)):
            direction = rng.normal(size=gradient.shape) * 1e-6
            up, down = (
                [*arguments[:index], arguments[index] + d, *arguments[index + 1 :]] for d in (direction, -direction)
            )
            numeric = loss(*up) - loss(*down)
            assert np.isclose(numeric, 2 * (gradient * direction).sum(), rtol=1e-4, atol=1e-12)
    inputs = random_inputs(1, 1, 6, 3, 4)
    inputs.i[:], inputs.f[:, :, 3] = -np.inf, -np.inf
    assert np.isfinite(module.mlstm_recurrent(*inputs)).all()


MUTANTS = [
    ("np.maximum(f_bar + m_prev, i)", "np.maximum(f_bar, i)"),
    ("m = np.where(m == -np.inf, 0, m).astype(dtype)", "m = m.astype(dtype)"),
    ("f_prime = np.exp(f_bar + m_prev - m)  #", "f_prime = np.exp(f_bar)  #"),
    ("n = f_prime[..., None] * n +", "n = n +"),
    ("h = numerator / D[..., None]\n    return", "h = numerator\n    return"),
    ("D = np.maximum(np.abs(S), denominator_floor(m))\n    h", "D = np.maximum(S, denominator_floor(m))\n    h"),
    ("-np.sign(S) * dh_h / D, 0)", "0, 0)"),
    ("-np.sign(S) * dh_h / D, 0)", "-dh_h / D, 0)"),
    ("dm = dm + np.where(normalizer_wins | (m >= M_CAP[m.dtype]), 0, dh_h)", "pass"),
    ("dm = dm - df_exponent - di_exponent", "pass"),
    ("df_bar = df_exponent + np.where(old_wins, dm, 0)", "df_bar = df_exponent"),
    ("di_exponent + np.where(new_wins, dm, 0)", "di_exponent"),
    ("np.exp(log_sigmoid(-f_t))", "np.exp(log_sigmoid(f_t))"),
    ("dC = dC + s * q_t", "dC = dC + q_t"),
]


def test_the_suite_for_mutants_passes_without_one():
    suite(stage)


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mutants.assert_noticed(suite, mutants.load_mutant("01_recurrent/mlstm_recurrent.py", old, new, tmp_path))
