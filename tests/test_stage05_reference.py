"""Stage 05, mlstmsig_reference.py: NumPy and PyTorch."""

import functools
import itertools

import mlstmsig_reference
import mutants
import numpy as np
import properties
import pytest
import torch
from hypothesis import given
from mlstm_chunkwise import mlstm_chunkwise
from mlstmsig_reference import (
    mlstmsig_chunkwise,
    mlstmsig_parallel,
    mlstmsig_recurrent,
    mlstmsig_recurrent_backward,
    mlstmsig_step,
)
from properties import DEVICE, FLOATS
from tfla_lab.check import relative_error
from tfla_lab.forms import GRADIENTS, oracle, run_torch
from tfla_lab.inputs import random_inputs

make = functools.partial(properties.make, cell="sig")


# ---------------------------------------------------------------------------------------------------------------------
# The recurrence, in NumPy
# ---------------------------------------------------------------------------------------------------------------------
def test_two_steps_by_hand():
    """d_qk = d_hv = 1, q = 1, gates at 0, so sigmoid = 1/2: C = 1/2 * 2 * 3 = 3, then 1/2 * 3 + 1/2 * 4 * 5 = 11.5."""
    k, v = (np.array(x, dtype=float).reshape(1, 1, 2, 1) for x in ((2, 4), (3, 5)))
    gates = np.zeros((1, 1, 2))
    h, (C,) = mlstmsig_recurrent(np.ones_like(k), k, v, gates, gates, return_state=True)
    assert h.ravel().tolist() == [3, 11.5]
    assert C.item() == 11.5
    # h_1 + h_2 = (3 i_1) 2 (1 + f_2) + i_2 20, with d sigmoid(0) = 1/4
    dq, dk, dv, di, df, (dC_0,) = mlstmsig_recurrent_backward(np.ones_like(v), np.ones_like(k), k, v, gates, gates)
    assert dq.ravel().tolist() == [3, 11.5]
    assert dk.ravel().tolist() == [2.25, 2.5]
    assert dv.ravel().tolist() == [1.5, 2]
    assert di.ravel().tolist() == [2.25, 5]
    assert df.ravel().tolist() == [0, 0.75]
    assert dC_0.item() == 0.5 + 0.25


@pytest.mark.parametrize("regime", ["typical", "initial", "forgetting"])
def test_gradient_by_finite_differences(regime):
    """Central differences in a random direction of every input, at all outputs together."""
    rng = np.random.default_rng(0)
    x = list(random_inputs(1, 2, 6, 3, 4, regime=regime))
    x.append(rng.normal(size=(1, 2, 3, 4)))
    dh, dC = rng.normal(size=x[2].shape), rng.normal(size=x[5].shape)

    def loss(*x):
        h, (C,) = mlstmsig_recurrent(*x[:5], initial_state=(x[5],), return_state=True)
        return (h * dh).sum() + (C * dC).sum()

    *gradients, (dC_0,) = mlstmsig_recurrent_backward(dh, *x[:5], initial_state=(x[5],), dstate=(dC,))
    for j, dx in enumerate((*gradients, dC_0)):
        direction = rng.normal(size=dx.shape)
        ahead, behind = ([*x[:j], x[j] + step * direction, *x[j + 1 :]] for step in (1e-5, -1e-5))
        assert (loss(*ahead) - loss(*behind)) / 2e-5 == pytest.approx((dx * direction).sum(), rel=1e-7, abs=1e-9), j


def test_steps_make_the_sequence():
    q, k, v, i, f = random_inputs(2, 2, 7, 3, 4, dtype=np.float32)
    h, (C,) = mlstmsig_recurrent(q, k, v, i, f, return_state=True)
    state = None
    for t in range(7):
        h_t, state = mlstmsig_step(*(x[:, :, t] for x in (q, k, v, i, f)), state)
        assert (h_t == h[:, :, t]).all()
    assert (state[0] == C).all()


def test_gates_at_the_ends_of_the_number_line():
    """sigmoid(-800) is no 0, -inf forgets and writes nothing, and the gradient of a gate there is exactly 0."""
    assert mlstmsig_reference.sigmoid(np.array([-700.0]))[0] == pytest.approx(np.exp(-700.0))
    inputs, dh, state, dstate = (x for x in make(1, 2, 20, 3, 4))
    inputs.i[:, :, 5], inputs.f[:, :, 9] = -torch.inf, -torch.inf
    result = oracle(inputs, dh, initial_state=state, dstate=dstate, cell="sig")
    assert all(np.isfinite(x).all() for x in result.values())
    assert (result["di"][:, :, 5] == 0).all()
    assert (result["df"][:, :, 9] == 0).all()
    assert (result["dC_0"] == 0).sum() == 0  # reaches h before the reset


# ---------------------------------------------------------------------------------------------------------------------
# Parallel and chunkwise, in PyTorch
# ---------------------------------------------------------------------------------------------------------------------
@given(properties.cases(FLOATS))
def test_parallel_equals_the_recurrence(case):
    properties.compare_with_oracle(mlstmsig_parallel, **(case | {"chunk_size": None}), cell="sig")


@given(properties.cases(FLOATS, max_T=150))
def test_chunkwise_equals_the_recurrence_and_the_parallel_form(case):
    properties.compare_with_oracle(mlstmsig_chunkwise, **case, cell="sig")
    L = case.pop("chunk_size")
    inputs, dh, state, dstate = make(**(case | {"dtype": torch.float64}))
    given_ = {"initial_state": state, "dstate": dstate}
    chunks, whole = (
        run_torch(mlstmsig_chunkwise, inputs, dh, chunk_size=L, **given_),
        run_torch(mlstmsig_parallel, inputs, dh, **given_),
    )
    properties.compare_with(inputs, dh, whole, chunks, torch.float64, state=state, dstate=dstate, cell="sig")


@pytest.mark.parametrize("form", [mlstmsig_parallel, mlstmsig_chunkwise])
@pytest.mark.parametrize(
    "property_", [properties.splitting, properties.resets, properties.padding, properties.linear_in_v,
                  properties.empty_sequences, properties.nothing_but_padding, properties.finite_at_extremes],
)  # fmt: skip
def test_properties_of_the_references(form, property_):
    property_(form, torch.float64, cell="sig")


@pytest.mark.parametrize("form", [mlstmsig_parallel, mlstmsig_chunkwise])
def test_gradcheck(form):
    inputs, _, state, _ = make(1, 1, 18, 2, 3)
    leaves = [x.requires_grad_() for x in (*inputs, *state)]

    def function(q, k, v, i, f, C_0):
        h, (C,) = form(q, k, v, i, f, initial_state=(C_0,), return_state=True)
        return h, C

    assert torch.autograd.gradcheck(function, leaves)


# ---------------------------------------------------------------------------------------------------------------------
# The other cell
# ---------------------------------------------------------------------------------------------------------------------
def test_the_exponential_cell_becomes_this_one_as_its_input_gates_close():
    """There e^-m wins the max, and sigmoid(i) = e^i (1 - e^i + ...): what is left between them falls as e^i."""
    distances = []
    for shift in (-5, -10, -15, -30):
        inputs, dh, *_ = make(1, 2, 60, 8, 12, with_state=False)
        inputs.i.mul_(0.1).add_(shift)
        exp, sig = run_torch(mlstm_chunkwise, inputs, dh), run_torch(mlstmsig_chunkwise, inputs, dh)
        distances.append(max(relative_error(exp[name], sig[name]) for name in ("h", *GRADIENTS)))
    assert distances[0] > 1e-3  # two cells
    for far, near in itertools.pairwise(distances[:3]):
        assert near == pytest.approx(far * np.exp(-5), rel=0.3)
    assert distances[3] < 1e-11


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------
BAD = [
    (lambda x: {"q": x.q[0]}, ValueError, r"q must have shape \(B, NH, T, D\)"),
    (lambda x: {"v": x.v.half()}, TypeError, "v must be (torch.)?float32 to fit q, got (torch.)?float16"),
    (lambda x: {"k": x.k[..., :2]}, ValueError, "k must have shape"),
    (lambda x: {"i": x.i[..., None]}, ValueError, "i must have shape"),
    (lambda x: {"f": 3.0}, TypeError, "f must be a torch.Tensor, got float"),
    (lambda x: {"q": x.q.int(), "k": x.k.int()}, TypeError, "q must be float16, bfloat16"),
    (lambda x: {"initial_state": x.q}, TypeError, r"initial_state must be a tuple \(C,\), got Tensor"),
    (lambda x: {"initial_state": (x.q,) * 3}, TypeError, r"initial_state must be a tuple \(C,\), got tuple"),
    (lambda x: {"initial_state": (x.q,)}, ValueError, "initial_state's C must have shape"),
]
BAD_CHUNKS = [(lambda x, L=L: {"chunk_size": L}, ValueError, f"a power of two >= 16, got {L}") for L in (8, 48, 64.0)]


@pytest.mark.parametrize(
    ("form", "change", "error", "message"),
    [(mlstmsig_parallel, *bad) for bad in BAD] + [(mlstmsig_chunkwise, *bad) for bad in BAD + BAD_CHUNKS],
)
def test_errors_name_the_argument(form, change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4, dtype=torch.float32, device=DEVICE)
    with pytest.raises(error, match=message):
        form(**(inputs._asdict() | change(inputs)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a numpy.ndarray, got list"),
        ({"k": np.zeros((1, 2, 5, 2))}, ValueError, "k must have shape"),
        ({"i": np.zeros((1, 2, 5), np.int64)}, TypeError, "i must be float32 or float64 to fit q, got int64"),
        ({"initial_state": (np.zeros((1, 2, 3, 4), np.float32),)}, TypeError, "initial_state's C must be float64"),
        ({"dstate": np.zeros(3)}, TypeError, r"dstate must be a tuple \(C,\), got ndarray"),
        ({"dh": np.zeros((1, 2, 5, 3))}, ValueError, "dh must have shape"),
    ],
)
def test_errors_of_the_recurrence_name_the_argument(change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4)
    with pytest.raises(error, match=message):
        mlstmsig_recurrent_backward(**({"dh": np.zeros_like(inputs.v)} | inputs._asdict() | change))


# ---------------------------------------------------------------------------------------------------------------------
# Mutants
# ---------------------------------------------------------------------------------------------------------------------
def suite_of_the_reference(module) -> None:
    for form, L in (("mlstmsig_parallel", None), ("mlstmsig_chunkwise", 16)):
        for regime in ("typical", "resets"):
            properties.compare_with_oracle(
                getattr(module, form), 1, 2, 40, 5, 7, regime=regime, with_state=True, dtype=torch.float64,
                layout="BHTD", seed=0, chunk_size=L, cell="sig",
            )  # fmt: skip


MUTANTS_OF_THE_REFERENCE = [
    ("torch.where(row >= column, log_W, -torch.inf)", "log_W"),
    ("torch.where(row > column, f_bar[..., :, None], 0)", "torch.where(row >= column, f_bar[..., :, None], 0)"),
    ("P @ v + s * w_state[..., None] * (q @ C), P", "P @ v, P"),
    ("+ (C_end * dC).sum(dim=(-2, -1))[..., None]", ""),
    ("di_bar * torch.sigmoid(-i)", "di_bar"),
    ("dv = P.mT @ dh + w_end * (k @ dC)", "dv = P.mT @ dh"),
    ("dC_0 = w_state[..., -1, None, None] * dC + s *", "dC_0 = s *"),
    ("dC.append(w_state[:, :, c, -1, None, None] * dC[-1] + added[:, :, c])", "dC.append(dC[-1] + added[:, :, c])"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS_OF_THE_REFERENCE)
def test_mutants_of_the_reference_are_noticed(old, new, tmp_path):
    module = mutants.load_mutant("05_mlstmsig/mlstmsig_reference.py", old, new, tmp_path)
    mutants.assert_noticed(suite_of_the_reference, module)
