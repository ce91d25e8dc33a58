"""Stage 02 against stage 01, against plain autograd, and by the properties that every form has."""

import mlstm_parallel as stage
import mutants
import properties
import pytest
import torch
from hypothesis import example, given
from mlstm_parallel import mlstm_parallel
from tfla_lab.check import check
from tfla_lab.forms import run_torch
from tfla_lab.inputs import random_inputs, random_state


@given(properties.cases(properties.FLOATS))
@example({"B": 2, "NH": 2, "T": 1, "DQK": 1, "DHV": 1, "regime": "typical", "with_state": True, "dtype": torch.float64,
          "layout": "BHTD", "seed": 0, "chunk_size": 16})  # fmt: skip
def test_equals_the_recurrence(case):
    case.pop("chunk_size")
    properties.compare_with_oracle(mlstm_parallel, **case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    properties.compare_with_oracle(
        mlstm_parallel, 2, 2, 60, 16, 24, regime="typical", with_state=True, dtype=dtype, layout="BTHD", seed=0
    )


@pytest.mark.parametrize("bias", [-10.0, 0.0, 4.0])
def test_backward_equals_plain_autograd(bias):
    """The hand-written backward against PyTorch's own derivative of forward_pass, the max of m_T included."""
    inputs, dh, state, dstate = properties.make(2, 2, 30, 6, 8)
    inputs = inputs._replace(i=inputs.i + bias)

    def plain(*x, initial_state, return_state):
        h, C, n, m, *_ = stage.forward_pass(*x, *initial_state)
        return h, (C, n, m)

    expected = run_torch(plain, inputs, dh, initial_state=state, dstate=dstate)
    actual = run_torch(mlstm_parallel, inputs, dh, initial_state=state, dstate=dstate)
    check(actual, expected, verbose=False)


def test_gradcheck():
    inputs, _, state, _ = properties.make(1, 1, 5, 2, 3)
    leaves = [x.requires_grad_() for x in (*inputs, *state)]

    def function(*x):
        h, final = mlstm_parallel(*x[:5], initial_state=x[5:], return_state=True)
        return h, *final

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", properties.FLOATS)
@pytest.mark.parametrize(
    "property_", [properties.splitting, properties.resets, properties.padding, properties.gauge, properties.linear_in_v,
                  properties.finite_at_extremes, properties.empty_sequences],
)  # fmt: skip
def test_properties(property_, dtype):
    property_(mlstm_parallel, dtype)


def test_batch_and_heads_are_independent():
    properties.batch_and_heads_are_independent(mlstm_parallel, torch.float64, bitwise=False)


def test_causality():
    properties.causality(mlstm_parallel, torch.float64)


def test_h_has_the_memory_layout_of_v():
    inputs, *_ = properties.make(2, 3, 20, 6, 8, layout="BTHD")
    assert mlstm_parallel(*inputs).stride() == inputs.v.stride()


def test_the_gate_matrix_of_four_steps():
    """f = log(p / (1 - p)) forgets by p; i = log of what is written. By hand: D_tj = i_j * product of p after j."""
    p, written = torch.tensor([0.9, 0.5, 0.25, 0.8], dtype=torch.float64), torch.tensor([1.0, 2.0, 4.0, 3.0]).double()
    log_D, F = stage.gate_matrix(written.log(), torch.log(p / (1 - p)))
    expected = torch.tensor([[1, 0, 0, 0], [0.5, 2, 0, 0], [0.125, 0.5, 4, 0], [0.1, 0.4, 3.2, 3]]).double()
    torch.testing.assert_close(log_D.exp(), expected)
    torch.testing.assert_close(F.exp(), torch.tensor([0.9, 0.45, 0.1125, 0.09]).double())


BAD = [
    (lambda x: {"q": x.q.numpy()}, TypeError, "q must be a torch.Tensor, got ndarray"),
    (lambda x: {"q": x.q.int()}, TypeError, "q must be float16, bfloat16, float32 or float64, got torch.int32"),
    (lambda x: {"q": x.q[0]}, ValueError, r"q must have shape \(B, NH, T, D\)"),
    (lambda x: {"k": x.k[..., :2]}, ValueError, r"k must have shape \(1, 2, 5, 3\) to fit q and v, got \(1, 2, 5, 2\)"),
    (lambda x: {"v": x.v[:, :, :4]}, ValueError, "v must have shape"),
    (lambda x: {"v": x.v.half()}, TypeError, "v must be torch.float32 to fit q, got torch.float16"),
    (lambda x: {"i": x.i[..., None]}, ValueError, "i must have shape"),
    (lambda x: {"f": x.f.double()}, TypeError, "f must be torch.float32 to fit q, got torch.float64"),
    (lambda x: {"k": x.k.to("meta")}, ValueError, "k must be on the device of q"),
    (lambda x: {"initial_state": (x.q, x.k)}, TypeError, "initial_state must be a tuple"),
    (
        lambda x: {"initial_state": random_state(1, 2, 4, 4, dtype=torch.float32, device=properties.DEVICE)},
        ValueError,
        "initial_state's C must have shape",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_name_the_argument(change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4, dtype=torch.float32, device=properties.DEVICE)
    if "numpy" in message or "ndarray" in message:
        inputs = inputs._replace(q=inputs.q.cpu())
    with pytest.raises(error, match=message):
        mlstm_parallel(**(inputs._asdict() | change(inputs)))


def suite(module) -> None:
    for regime in ("typical", "initial", "resets"):
        properties.compare_with_oracle(
            module.mlstm_parallel,
            1,
            2,
            20,
            5,
            7,
            regime=regime,
            with_state=True,
            dtype=torch.float64,
            layout="BHTD",
            seed=0,
        )
    properties.nothing_but_padding(module.mlstm_parallel, torch.float64)
    properties.finite_at_extremes(module.mlstm_parallel, torch.float64)


MUTANTS = [
    ("torch.where(row >= column, log_D, -torch.inf)", "log_D"),  # the causal mask
    ("torch.where(row > column, f_bar", "torch.where(row >= column, f_bar"),
    ("m = torch.maximum(log_w_state, log_D.amax(dim=-1))", "m = log_D.amax(dim=-1)"),
    ("    m = torch.where(m == -torch.inf, 0, m)", "    m = m + 0"),
    ("P @ v + s * w_state[..., None] * (q @ C_0)", "P @ v"),
    ("torch.exp(-m.clamp(max=M_CAP[m.dtype]))", "torch.ones_like(m)"),
    ("torch.where(normalizer_wins, -S.sign() * (dh * h).sum(dim=-1) / D, 0)", "torch.zeros_like(S)"),
    ("torch.where(normalizer_wins, -S.sign()", "torch.where(normalizer_wins, -1"),
    ("+ w_end * (k @ dC)", ""),
    ("x.flip(-1).cumsum(dim=-1).flip(-1) + state_overlap[..., None]", "x.flip(-1).cumsum(dim=-1).flip(-1)"),
    ("x.flip(-1).cumsum(dim=-1).flip(-1) + state_overlap[..., None]", "x.cumsum(dim=-1) + state_overlap[..., None]"),
    ("stabilizer_gradient(i, f, m_0, dm - state_overlap)", "stabilizer_gradient(i, f, m_0, 0 * dm)"),
    ("torch.where(f > -torch.inf, df_bar * torch.sigmoid(-f), 0)", "df_bar * torch.sigmoid(f)"),
]


def test_the_suite_for_mutants_passes_without_one():
    suite(stage)


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    mutants.assert_noticed(suite, mutants.load_mutant("02_parallel/mlstm_parallel.py", old, new, tmp_path))
