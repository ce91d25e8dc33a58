"""Stage 05, mlstmsig_tfla.py: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import functools

import properties
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings

pytest.importorskip("triton", reason="Triton has no wheels for this system")

import mlstmsig_tfla as stage
import mutants
from mlstm_tfla import mlstm_tfla
from mlstmsig_reference import mlstmsig_chunkwise, mlstmsig_recurrent, mlstmsig_step
from mlstmsig_tfla import mlstmsig_decode_step, mlstmsig_tfla
from properties import DEVICE, INTERPRETED, ON_GPU, TRITON_DTYPES, run_python
from test_stage05_reference import BAD, BAD_CHUNKS
from tfla_lab.check import check, relative_error, to_numpy
from tfla_lab.forms import GRADIENTS, oracle, run_torch
from tfla_lab.inputs import random_inputs

make = functools.partial(properties.make, cell="sig")


# ---------------------------------------------------------------------------------------------------------------------
# Two other cells that it must agree with
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_the_kernels_of_both_cells_agree_where_input_gates_are_closed(dtype):
    inputs, dh, *_ = make(1, 2, 70, 32, 40, with_state=False, dtype=dtype)
    inputs.i.sub_(20)
    exp, sig = (run_torch(form, inputs, dh, chunk_size=32) for form in (mlstm_tfla, mlstmsig_tfla))
    # Each may be off by its budget.
    name = str(dtype).removeprefix("torch.")
    budgets = {x: 2 * properties.budget(x, name) for x in ("h", *GRADIENTS)}
    check({x: sig[x] for x in budgets}, {x: to_numpy(exp[x]) for x in budgets}, budgets=budgets, verbose=False)


def simple_gated_linear_attention(q, k, v, f):
    """h_t = sum_{j<=t} prod_{r=j+1..t} sigmoid(f_r) (s q_t . k_j) v_j."""
    b = F.logsigmoid(f).cumsum(dim=-1)
    weights = (b[..., :, None] - b[..., None, :]).exp().tril()
    return (q @ k.mT * q.shape[-1] ** -0.5 * weights) @ v


@pytest.mark.parametrize(("form", "dtype"), [(mlstmsig_chunkwise, torch.float64), (mlstmsig_tfla, torch.float32)])
def test_simple_gated_linear_attention_of_scaled_values(form, dtype):
    inputs, dh, *_ = make(2, 2, 75, 12, 20, with_state=False)

    def scaled(q, k, v, i, f, **_):
        return simple_gated_linear_attention(q, k, v * torch.sigmoid(i)[..., None], f), ()

    expected = run_torch(scaled, inputs, dh)
    actual = run_torch(form, [x.to(dtype) for x in inputs], dh.to(dtype), chunk_size=32)
    check({x: actual[x] for x in ("h", *GRADIENTS)}, expected, verbose=False)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels: equal to the references
# ---------------------------------------------------------------------------------------------------------------------
@settings(max_examples=6 if INTERPRETED else 60)  # a case takes seconds in the interpreter
@given(properties.cases(TRITON_DTYPES, max_T=150, max_D=40, chunk_sizes=(16, 32, 64, 128, 1024)))
@example({"B": 1, "NH": 1, "T": 1, "DQK": 1, "DHV": 1, "regime": "typical", "with_state": True, "dtype": torch.float32,
          "layout": "BHTD", "seed": 0, "chunk_size": 16})  # fmt: skip
@example({"B": 1, "NH": 2, "T": 129, "DQK": 33, "DHV": 17, "regime": "resets", "with_state": True,
          "dtype": torch.float32, "layout": "BTHD", "seed": 1, "chunk_size": 128})  # fmt: skip
def test_kernels_equal_the_recurrence(case):
    properties.compare_with_oracle(mlstmsig_tfla, **case, cell="sig")


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("DQK", "DHV", "chunk_size"), [(96, 160, 64), (160, 72, 32), (40, 24, 256)])
def test_kernels_equal_the_chunkwise_form_in_tiles(DQK, DHV, chunk_size, dtype):
    """Heads of several tiles, none of them full; chunks of several tiles; at least two chunks, the last one cut."""
    properties.compare_with_chunkwise(
        mlstmsig_tfla, 1, 1, chunk_size + 75, DQK, DHV, dtype=dtype, chunk_size=chunk_size, cell="sig"
    )


@ON_GPU
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("DQK", "DHV"), properties.HEAD_SHAPES)
@pytest.mark.parametrize("regime", ["typical", "initial", "shut"])
def test_kernels_equal_the_chunkwise_form_at_full_size(DQK, DHV, chunk_size, dtype, regime):
    """Every configuration that the launcher can choose, on the hardware: compilers have got some of them wrong."""
    T = max(1000, 2 * chunk_size + 100)
    properties.compare_with_chunkwise(
        mlstmsig_tfla, 2, 4, T, DQK, DHV, dtype=dtype, regime=regime, chunk_size=chunk_size, cell="sig"
    )


def test_the_chunk_size_changes_nothing():
    """Also where a chunk has more steps than the sequence."""
    inputs, dh, state, dstate = make(1, 1, 100, 24, 40, dtype=torch.float32)
    results = [
        run_torch(mlstmsig_tfla, inputs, dh, initial_state=state, dstate=dstate, chunk_size=L)
        for L in (32, 128, 4096, 2**20)
    ]
    for result in results[1:]:
        properties.compare_with(inputs, dh, results[0], result, torch.float32, state=state, dstate=dstate, cell="sig")
    assert all(torch.equal(results[-1][name], results[-2][name]) for name in results[0])  # one chunk is one chunk


# ---------------------------------------------------------------------------------------------------------------------
# The kernels: properties
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    "property_", [properties.splitting, properties.resets, properties.padding, properties.linear_in_v,
                  properties.empty_sequences, properties.finite_at_extremes],
)  # fmt: skip
def test_properties(property_, dtype):
    property_(mlstmsig_tfla, dtype, chunk_size=64, cell="sig")


def test_nothing_but_padding():
    properties.nothing_but_padding(mlstmsig_tfla, TRITON_DTYPES[-1], chunk_size=64, cell="sig")


def test_batch_and_heads_are_independent_to_the_bit():
    properties.batch_and_heads_are_independent(
        mlstmsig_tfla, TRITON_DTYPES[-1], bitwise=True, chunk_size=64, cell="sig"
    )


def test_causality():
    properties.causality(mlstmsig_tfla, TRITON_DTYPES[-1], chunk_size=64)


def test_nan_in_a_gate_is_seen():
    properties.nan_in_a_gate_is_seen(mlstmsig_tfla, TRITON_DTYPES[-1], chunk_size=64)


def test_the_same_call_gives_the_same_bits():
    properties.the_same_call_gives_the_same_bits(mlstmsig_tfla, TRITON_DTYPES[-1], chunk_size=64, cell="sig")


@ON_GPU
@pytest.mark.parametrize("chunk_size", [64, 256, 1024])
def test_twenty_runs_at_full_size_give_the_same_bits(chunk_size):
    inputs, dh, state, dstate = make(2, 8, 4096, 128, 256, dtype=torch.bfloat16)
    options = {"initial_state": state, "dstate": dstate, "chunk_size": chunk_size}
    first = run_torch(mlstmsig_tfla, inputs, dh, **options)
    for _ in range(19):
        other = run_torch(mlstmsig_tfla, inputs, dh, **options)
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_digits_over_many_chunks():
    """A state that hardly decays, handed on 128 times: an error in decay would be there 128 times, the same way."""
    inputs, dh, state, _ = make(1, 1, 128 * 16, 3, 8, dtype=torch.float32)
    inputs.i.fill_(-torch.inf), inputs.f.fill_(20)
    with torch.no_grad():
        h, (C,) = mlstmsig_tfla(*inputs, initial_state=state, return_state=True, chunk_size=16)
    expected = oracle(inputs, dh, initial_state=state, cell="sig")
    check({"h": h, "C": C}, expected, verbose=False)


@pytest.mark.parametrize("f_value", [-1e4, -1e6, -torch.inf])
def test_digits_behind_one_shut_forget_gate(f_value):
    properties.digits_behind_one_shut_forget_gate(mlstmsig_tfla, f_value, chunk_size=128, cell="sig")


@pytest.mark.parametrize(
    "property_", [properties.views_are_not_copied, properties.gradient_of_a_sum, properties.only_the_state_is_used]
)
def test_autograd_and_views(property_):
    property_(mlstmsig_tfla, chunk_size=32, cell="sig")


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.float32])
def test_gates_in_either_dtype(gate_dtype):
    properties.gates_in_either_dtype(mlstmsig_tfla, gate_dtype, chunk_size=32, cell="sig")


@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(with_state):
    """PyTorch's own test of a registered operation: schema, fake kernel, autograd registration, tracing."""
    inputs, _, state, _ = make(1, 2, 40, 8, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(stage.forward_op, (*leaves, state[0] if with_state else None, 32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic):
    properties.one_graph(mlstmsig_tfla, dynamic, chunk_size=32, cell="sig")


@ON_GPU
def test_offsets_beyond_2_to_the_31():
    properties.offsets_beyond_2_to_the_31(lambda *x, **options: mlstmsig_tfla(*x, chunk_size=64, **options))


@ON_GPU
def test_more_heads_than_a_grid_axis_may_have():
    properties.more_heads_than_a_grid_axis_may_have(mlstmsig_tfla, chunk_size=16, cell="sig")


@ON_GPU
def test_a_million_steps():
    """One sequence, two heads, forward and backward; its end against a sequence that begins 4096 steps before."""
    inputs, dh, *_ = make(1, 2, 2**20, 128, 256, dtype=torch.bfloat16, with_state=False)
    result = run_torch(mlstmsig_tfla, inputs, dh)
    assert all(torch.isfinite(x).all() for x in result.values())
    # regime "typical" forgets e^-0.05 a step and more: nothing is left after 2048
    end = run_torch(mlstmsig_tfla, properties.cut(inputs, -4096, None), dh[:, :, -4096:])
    for name in ("h", *GRADIENTS):
        error = relative_error(result[name][:, :, -2048:], end[name][:, :, -2048:])
        assert error < 1e-2, (name, error)


# ---------------------------------------------------------------------------------------------------------------------
# The decode step
# ---------------------------------------------------------------------------------------------------------------------
def step_by_step(step, inputs, state):
    h = []
    for t in range(inputs.q.shape[2]):
        h_t, state = step(*(x[:, :, t] for x in inputs), state)
        h.append(h_t)
    return torch.stack(h, dim=2), state


def compare_decode(step, B, NH, T, DQK, DHV, *, dtype, regime="typical", with_state=True, seed=0) -> None:
    inputs, _, state, _ = make(B, NH, T, DQK, DHV, regime=regime, with_state=with_state, dtype=dtype, seed=seed)
    expected, (C,) = mlstmsig_recurrent(
        *(to_numpy(x) for x in inputs), initial_state=state and (to_numpy(state[0]),), return_state=True
    )
    h, final = step_by_step(step, inputs, state)
    check({"h": h}, {"h": expected}, verbose=False)
    check({"C": final[0]}, {"C": C}, verbose=False)  # float32, whatever the inputs are


@settings(max_examples=10 if INTERPRETED else 60)
@given(properties.cases(TRITON_DTYPES, max_T=80))
def test_decode_equals_the_recurrence(case):
    sizes = {key: case[key] for key in ("B", "NH", "DQK", "DHV", "dtype", "regime", "with_state", "seed")}
    compare_decode(mlstmsig_decode_step, T=1 + case["T"] % 12, **sizes)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("DQK", "DHV"), [(128, 256), (192, 96), (512, 512)])
def test_decode_of_heads_of_several_tiles(DQK, DHV, dtype):
    compare_decode(mlstmsig_decode_step, 1, 2, 3, DQK, DHV, dtype=dtype)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_prefill_and_decode_give_what_one_pass_gives(dtype):
    inputs, *_ = make(2, 2, 75, 32, 40, dtype=dtype)
    whole, (C_end,) = mlstmsig_tfla(*inputs, return_state=True, chunk_size=32)
    _, state = mlstmsig_tfla(*properties.cut(inputs, None, 67), return_state=True, chunk_size=32)
    h, (C,) = step_by_step(mlstmsig_decode_step, properties.cut(inputs, 67, None), state)
    # Two computations, each within its budget of the truth.
    twice = 2 * properties.budget("h", str(dtype).removeprefix("torch."))
    check({"h": h}, {"h": to_numpy(whole[:, :, 67:])}, verbose=False, budgets={"h": twice})
    assert relative_error(C, C_end) < twice


def test_a_reset_of_decode_is_exact():
    """f = -inf: not a bit of the old state is left, even if it was not finite. And the given state stays as it is."""
    inputs, _, (C,), _ = make(1, 2, 1, 8, 8, dtype=torch.float32)
    before = C.clone()
    step_by_step(mlstmsig_decode_step, inputs, (C,))
    assert torch.equal(C, before)
    inputs.f.fill_(-torch.inf)
    fresh, after = (step_by_step(mlstmsig_decode_step, inputs, x) for x in (None, (torch.full_like(C, torch.nan),)))
    assert torch.equal(fresh[0], after[0])
    assert torch.equal(fresh[1][0], after[1][0])


def test_decode_of_views_and_of_nothing():
    """One step of (B, T, NH, D) tensors, as a generating model has them; and no sequences at all."""
    whole = torch.randn(2, 3, 4, 26, device=DEVICE)
    q, k, v, gates = whole[:, 1].split([8, 8, 8, 2], dim=-1)
    x = (q, k, v, gates[..., 0], gates[..., 1])
    for y in x:
        y.contiguous = lambda *_, **__: pytest.fail("an input was copied")
    h, (C,) = mlstmsig_decode_step(*x)
    expected, state = mlstmsig_step(*(to_numpy(y) for y in x))
    check({"h": h, "C": C}, {"h": expected, "C": state[0]}, verbose=False)
    h, (C,) = mlstmsig_decode_step(*(y[:0] for y in x))
    assert (h.shape, C.shape) == ((0, 4, 8), (0, 4, 8, 8))


def test_decode_as_an_operation():
    inputs, _, state, _ = make(1, 2, 1, 8, 8, dtype=torch.float32)
    step = [x[:, :, 0] for x in inputs]
    torch.library.opcheck(stage.step_op, (*step, *state), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(mlstmsig_decode_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*step, state)[1][0], mlstmsig_decode_step(*step, state)[1][0])
    h, _ = mlstmsig_decode_step(*(x.requires_grad_() for x in step), state)
    with pytest.raises((RuntimeError, NotImplementedError)):
        h.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------
BAD_TRITON = [
    (lambda x: x._replace(q=x.q.double(), k=x.k.double(), v=x.v.double())._asdict(), TypeError, "q must be float16"),
    (lambda x: {"k": x.k.mT.contiguous().mT}, ValueError, "k must be contiguous in its last dimension, got strides"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_CHUNKS + BAD_TRITON)
def test_errors_name_the_argument(change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4, dtype=torch.float32, device=DEVICE)
    with pytest.raises(error, match=message):
        mlstmsig_tfla(**(inputs._asdict() | change(inputs)))


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda x: x[0], ValueError, r"q must have shape \(B, NH, D\)"),
        ("v", lambda x: x.half(), TypeError, "v must be torch.float32 to fit q, got torch.float16"),
        ("state", lambda x: x[0], TypeError, r"state must be a tuple \(C,\), got Tensor"),
        ("state", lambda x: (x[0].double(),), TypeError, "state's C must be torch.float32 to fit q"),
    ],
)
def test_errors_of_decode_name_the_argument(name, change, error, message):
    inputs, _, state, _ = make(1, 2, 1, 8, 8, dtype=torch.float32)
    arguments = {key: x[:, :, 0] for key, x in inputs._asdict().items()} | {"state": state}
    with pytest.raises(error, match=message):
        mlstmsig_decode_step(**(arguments | {name: change(arguments[name])}))


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    code = "import torch; from mlstmsig_tfla import *; x = torch.ones(1, 1, 4, 4); g = x[..., 0]; "
    result = run_python(code + "mlstmsig_tfla(x, x, x, g, g)", TRITON_INTERPRET="0")
    assert "ValueError: q must be on a GPU, got cpu; to run on the CPU, set the environment variable" in result.stderr


def test_without_triton_the_import_says_what_works():
    result = run_python("import sys; sys.modules['triton'] = None; import mlstmsig_reference; import mlstmsig_tfla")
    assert "ImportError: mlstmsig_tfla.py needs Triton" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(target):
    """Everything that the launchers can pick, with the registers and the shared memory that the README's table says."""
    rows = properties.compile_ahead_of_time(target, "stage05_aot.json", "mlstmsig_tfla")
    assert {row["kernel"] for row in rows} == {name for name in vars(stage) if name.endswith("_kernel")}
    if target == "sm_90":  # the tuned configuration keeps its tiles in registers
        tuned = [row for row in rows if row["configuration"] == "bfloat16 128/256 L=256"]
        assert all(row["stack"] <= 48 for row in tuned), tuned


# ---------------------------------------------------------------------------------------------------------------------
# Mutants
# ---------------------------------------------------------------------------------------------------------------------
def suite(module) -> None:
    function = module.mlstmsig_tfla
    for regime in ("typical", "resets"):
        properties.compare_with_oracle(
            function, 1, 1, 103, 20, 20, regime=regime, with_state=True, dtype=torch.float32, layout="BTHD", seed=0,
            chunk_size=64, cell="sig",
        )  # fmt: skip
    properties.compare_with_chunkwise(function, 1, 1, 75, 96, 72, dtype=torch.float32, chunk_size=64, cell="sig")
    for regime in ("typical", "resets"):
        compare_decode(module.mlstmsig_decode_step, 1, 2, 4, 20, 12, dtype=torch.float32, regime=regime)


MUTANTS = [
    # causality and documents
    ("mask = (offs_i[:, None] >= offs_j[None, :]) & (offs_j[None, :] >= start[:, None])",
     "mask = offs_j[None, :] >= start[:, None]"),
    ("mask = (offs_i[:, None] >= offs_j[None, :]) & (offs_j[None, :] >= start[:, None])",
     "mask = offs_i[:, None] >= offs_j[None, :]"),
    ("mask = (offs_i[None, :] >= offs_j[:, None]) & (offs_j[:, None] >= start[None, :])",
     "mask = offs_i[None, :] >= offs_j[:, None]"),
    ("tl.exp(tl.where(offs_j >= start, (g + u) + (g_rest + u_rest), -float(\"inf\")))",
     "tl.exp((g + u) + (g_rest + u_rest))"),
    # weights
    ("store_two_parts(u_ptr, log_sigmoid(i) - b,", "store_two_parts(u_ptr, i - b,"),
    ("store_two_parts(w_row_ptr, log_s + b,", "store_two_parts(w_row_ptr, b,"),
    ("        C = C * decay\n", "        C = C\n"),
    ("        dC = dC * decay\n", "        dC = dC\n"),
    ("    h = h * w_read[:, None]\n", ""),
    ("    dq = dq * w_read[:, None]\n", ""),
    # gradients of the gates
    ("decay * tl.sum(tl.sum(C * dC, axis=1), axis=0)", "0.0 * decay"),
    ("(di_bar * sigmoid_minus(i))", "di_bar"),
    ("df_bar * sigmoid_minus(f))", "df_bar)"),
    ("change += k_dk.to(tl.float64) - (", "change -= ("),
    ("            di_bar += k_dk + X_column", "            di_bar += X_column"),
    ("X_column = tl.sum(k * dk, axis=1) - k_dk", "X_column = tl.sum(k * dk, axis=1)"),
    # states in and out
    ("        dC = load_tile(dC_T_ptr + bh * DQK * DHV, offs_k, offs_v, DHV, DQK, DHV)",
     "        dC = tl.zeros((BLOCK_DQK, BLOCK_DHV), dtype=tl.float32)"),
    # the decode step
    ("tl.where(keep, C * w_f, 0.0) + (w_i * k)", "C + (w_i * k)"),
    ("w_i, w_f = sigmoid_minus(-i), sigmoid_minus(-f)", "w_i, w_f = tl.exp(i), sigmoid_minus(-f)"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    mutants.assert_noticed(suite, mutants.load_mutant("05_mlstmsig/mlstmsig_tfla.py", old, new, tmp_path))
