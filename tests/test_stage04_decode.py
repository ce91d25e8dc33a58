"""Stage 04, mlstm_decode.py: one step at a time gives what mlstm_tfla and the recurrence give at once."""

import properties
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton has no wheels for this system")

import mlstm_decode as stage
import mutants
from mlstm_decode import mlstm_decode_step
from mlstm_recurrent import mlstm_step
from mlstm_tfla import mlstm_tfla
from properties import DEVICE, TRITON_DTYPES, run_python
from tfla_lab.check import check, relative_error, same_gauge, to_numpy
from tfla_lab.inputs import REGIMES, Inputs


def step_by_step(step, inputs: Inputs, state):
    """h of all steps, (B, NH, T, DHV), and the last state."""
    h = []
    for t in range(inputs.q.shape[2]):
        h_t, state = step(*(x[:, :, t] for x in inputs), state)
        h.append(h_t)
    return torch.stack(h, dim=2), state


def compare_with_recurrence(step, B, NH, T, DQK, DHV, *, dtype, regime="typical", with_state=True, seed=0) -> None:
    inputs, dh, state, _ = properties.make(
        B, NH, T, DQK, DHV, dtype=dtype, regime=regime, with_state=with_state, seed=seed
    )
    h, final = step_by_step(step, inputs, state)
    assert h.dtype == dtype
    assert all(x.dtype == torch.float32 for x in final)
    expected = properties.oracle(inputs, dh, initial_state=state)
    name = str(dtype).removeprefix("torch.")
    check({"h": h}, expected, dtype=name, verbose=False)
    # The state is never rounded to the inputs' dtype: float32's budget, whatever that is.
    reference = same_gauge((expected["C"], expected["n"], expected["m"]), expected["m"])
    check(same_gauge(final, expected["m"]), reference, dtype="float32", verbose=False)


@given(dtype=st.sampled_from(TRITON_DTYPES), regime=st.sampled_from(list(REGIMES)), with_state=st.booleans(),
       B=st.integers(1, 2), NH=st.integers(1, 2), DQK=st.integers(1, 40), DHV=st.integers(1, 40), T=st.integers(1, 12),
       seed=st.integers(0, 2**31))  # fmt: skip
def test_equals_the_recurrence(dtype, regime, with_state, B, NH, DQK, DHV, T, seed):
    compare_with_recurrence(
        mlstm_decode_step, B, NH, T, DQK, DHV, dtype=dtype, regime=regime, with_state=with_state, seed=seed
    )


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("DQK", "DHV"), [(128, 256), (192, 96), (512, 512)])
def test_heads_of_several_tiles(DQK, DHV, dtype):
    compare_with_recurrence(mlstm_decode_step, 1, 2, 3, DQK, DHV, dtype=dtype)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_prefill_and_decode_give_what_one_pass_gives(dtype):
    """A prompt of any length with mlstm_tfla, then step by step."""
    B, NH, T, prompt = 2, 2, 75, 67
    inputs, *_ = properties.make(B, NH, T, 32, 40, dtype=dtype)
    whole, final = mlstm_tfla(*inputs, return_state=True, chunk_size=32)
    _, state = mlstm_tfla(*properties.cut(inputs, None, prompt), return_state=True, chunk_size=32)
    h, state = step_by_step(mlstm_decode_step, properties.cut(inputs, prompt, None), state)
    name = str(dtype).removeprefix("torch.")
    check({"h": h}, {"h": to_numpy(whole[:, :, prompt:])}, dtype=name, verbose=False, budgets={"h": 2 * BUDGET[name]})
    assert relative_error(state[0], final[0]) < 2 * BUDGET[name]


# Two computations, each within its budget of the truth.
BUDGET = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}


def test_the_given_state_is_left_as_it_is():
    inputs, _, state, _ = properties.make(1, 2, 1, 8, 8, dtype=torch.float32)
    before = [x.clone() for x in state]
    step_by_step(mlstm_decode_step, inputs, state)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_views_are_not_copied():
    """One step of (B, T, NH, D) tensors, as a generating model has them."""
    whole = torch.randn(2, 3, 4, 26, device=DEVICE)
    q, k, v, gates = whole[:, 1].split([8, 8, 8, 2], dim=-1)
    for x in (q, k, v, gates):
        x.contiguous = lambda *_, **__: pytest.fail("an input was copied")
    h, (C, n, m) = mlstm_decode_step(q, k, v, gates[..., 0], gates[..., 1])
    expected, state = mlstm_step(*(to_numpy(x) for x in (q, k, v, gates[..., 0], gates[..., 1])))
    check({"h": h}, {"h": expected}, verbose=False)
    check(same_gauge((C, n, m), state[2]), {"C": state[0], "n": state[1]}, dtype="float32", verbose=False)


def test_a_reset_is_exact():
    """f = -inf: not a bit of the old state is left, even if it was not finite."""
    inputs, _, state, _ = properties.make(1, 2, 1, 8, 8, dtype=torch.float32)
    inputs.f.fill_(-torch.inf)
    fresh = step_by_step(mlstm_decode_step, inputs, None)
    broken = tuple(torch.full_like(x, value) for x, value in zip(state, (torch.nan, torch.inf, 3.0), strict=True))
    after = step_by_step(mlstm_decode_step, inputs, broken)
    assert torch.equal(fresh[0], after[0])
    assert all(torch.equal(x, y) for x, y in zip(fresh[1], after[1], strict=True))


def test_no_sequences():
    x = torch.zeros(0, 2, 8, device=DEVICE)
    h, (C, n, m) = mlstm_decode_step(x, x, x, x[..., 0], x[..., 0])
    assert (h.shape, C.shape, n.shape, m.shape) == ((0, 2, 8), (0, 2, 8, 8), (0, 2, 8), (0, 2))


def finite_at_extremes(step, dtype) -> None:
    for value_i in (-1e4, 0.0, 1e4):
        for value_f in (-1e4, 0.0, 1e4):
            for m_0 in (-1e4, 0.0, 1e4, -torch.inf):
                inputs, _, (C, n, m), _ = properties.make(1, 1, 2, 8, 8, dtype=dtype)
                inputs.i.fill_(value_i), inputs.f.fill_(value_f)
                inputs.q[:, :, 0] = 0
                if m_0 == -torch.inf:
                    C, n = torch.zeros_like(C), torch.zeros_like(n)
                h, state = step_by_step(step, inputs, (C, n, torch.full_like(m, m_0)))
                assert all(torch.isfinite(x).all() for x in (h, *state)), (value_i, value_f, m_0)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_finite_at_extremes(dtype):
    finite_at_extremes(mlstm_decode_step, dtype)


def test_opcheck():
    inputs, _, state, _ = properties.make(1, 2, 1, 8, 8, dtype=torch.float32)
    step = [x[:, :, 0] for x in inputs]
    torch.library.opcheck(stage.step_op, (*step, *state), test_utils=("test_schema", "test_faketensor"))


def test_torch_compile():
    inputs, _, state, _ = properties.make(1, 2, 1, 8, 8, dtype=torch.float32)
    step = [x[:, :, 0] for x in inputs]
    compiled = torch.compile(mlstm_decode_step, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*step, state)[1], mlstm_decode_step(*step, state)[1], strict=True):
        assert torch.equal(x, y)


def test_a_backward_pass_is_refused():
    inputs, _, state, _ = properties.make(1, 2, 1, 8, 8, dtype=torch.float32)
    h, _ = mlstm_decode_step(*(x[:, :, 0].requires_grad_() for x in inputs), state)
    with pytest.raises((RuntimeError, NotImplementedError)):
        h.sum().backward()


BAD = [
    ("q", lambda x: x[0], ValueError, r"q must have shape \(B, NH, D\)"),
    ("k", lambda x: x[..., :2], ValueError, "k must have shape"),
    ("v", lambda x: x.half(), TypeError, "v must be torch.float32 to fit q, got torch.float16"),
    ("i", lambda x: x[..., None], ValueError, "i must have shape"),
    ("f", lambda x: 3.0, TypeError, "f must be a torch.Tensor, got float"),
    ("state", lambda x: x[0], TypeError, "state must be a tuple"),
    ("state", lambda x: (x[0].double(), *x[1:]), TypeError, "state's C must be torch.float32 to fit q"),
    ("state", lambda x: (x[0], x[1][..., :1], x[2]), ValueError, "state's n must have shape"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_errors_name_the_argument(name, change, error, message):
    inputs, _, state, _ = properties.make(1, 2, 1, 8, 8, dtype=torch.float32)
    arguments = {key: x[:, :, 0] for key, x in inputs._asdict().items()} | {"state": state}
    with pytest.raises(error, match=message):
        mlstm_decode_step(**(arguments | {name: change(arguments[name])}))


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    code = "import torch; from mlstm_decode import *; x = torch.ones(1, 1, 4); g = x[..., 0]; "
    result = run_python(code + "mlstm_decode_step(x, x, x, g, g)", TRITON_INTERPRET="0")
    assert "ValueError: q must be on a GPU, got cpu; to run on the CPU, set the environment variable" in result.stderr


def suite(module) -> None:
    for regime in ("typical", "hot", "resets", "padding"):
        compare_with_recurrence(module.mlstm_decode_step, 1, 2, 6, 20, 12, dtype=torch.float32, regime=regime)
    compare_with_recurrence(module.mlstm_decode_step, 1, 1, 2, 200, 100, dtype=torch.float32)
    finite_at_extremes(module.mlstm_decode_step, torch.float32)


MUTANTS = [
    ("tl.where(keep, C * w_f, 0.0)", "C"),
    ("tl.where(keep, n * w_f, 0.0)", "n"),
    ("tl.where(keep, f_bar + m, -float(\"inf\"))", "-float(\"inf\")"),
    ("w_i * k)[:, None] * v[None, :]", "k)[:, None] * v[None, :]"),
    ("S += tl.sum(q * n, axis=0)", "S = tl.sum(q * n, axis=0)"),
    ("tl.maximum(tl.abs(S), tl.exp(-tl.minimum(m_next, M_CAP)))", "tl.abs(S)"),
    ("tl.maximum(tl.abs(S), tl.exp(-tl.minimum(m_next, M_CAP)))", "tl.maximum(tl.abs(S), 1.0)"),
    (".to(tl.float32) * s", ".to(tl.float32)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    mutants.assert_noticed(suite, mutants.load_mutant("04_tfla_triton/mlstm_decode.py", old, new, tmp_path))
