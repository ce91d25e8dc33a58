"""Stage 04, mlstm_tfla.py: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import properties
import pytest
import torch
from hypothesis import example, given, settings

pytest.importorskip("triton", reason="Triton has no wheels for this system")

import mlstm_tfla as stage
import mutants
from mlstm_chunkwise import mlstm_chunkwise
from mlstm_tfla import mlstm_tfla
from properties import DEVICE, INTERPRETED, ON_GPU, TRITON_DTYPES, run_python
from tfla_lab.check import CheckFailed, check, relative_error
from tfla_lab.forms import run_torch
from tfla_lab.inputs import random_inputs


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the stages before
# ---------------------------------------------------------------------------------------------------------------------
@settings(max_examples=10 if INTERPRETED else 60)  # a case takes seconds in the interpreter
@given(properties.cases(TRITON_DTYPES, max_T=150, max_D=40, chunk_sizes=(16, 32, 64, 128, 1024)))
@example({"B": 1, "NH": 1, "T": 1, "DQK": 1, "DHV": 1, "regime": "typical", "with_state": True, "dtype": torch.float32,
          "layout": "BHTD", "seed": 0, "chunk_size": 16})  # fmt: skip
@example({"B": 1, "NH": 2, "T": 129, "DQK": 33, "DHV": 17, "regime": "resets", "with_state": True,
          "dtype": torch.float32, "layout": "BTHD", "seed": 1, "chunk_size": 128})  # fmt: skip
def test_equals_the_recurrence(case):
    properties.compare_with_oracle(mlstm_tfla, **case)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(("DQK", "DHV", "chunk_size"), [(96, 160, 64), (160, 72, 32), (40, 24, 256)])
def test_equals_the_chunkwise_form_in_tiles(DQK, DHV, chunk_size, dtype):
    """Heads of several tiles, none of them full; chunks of several tiles; at least two chunks, the last one cut."""
    properties.compare_with_chunkwise(mlstm_tfla, 1, 1, chunk_size + 75, DQK, DHV, dtype=dtype, chunk_size=chunk_size)


@ON_GPU
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("DQK", "DHV"), properties.HEAD_SHAPES)
@pytest.mark.parametrize("regime", ["typical", "initial", "shut"])
def test_equals_the_chunkwise_form_at_full_size(DQK, DHV, chunk_size, dtype, regime):
    """Every configuration that the launcher can choose, on the hardware: compilers have got some of them wrong."""
    # e^-m wins at nearly every step of "initial", so dn_0 hangs on one or two, and on how C_0 rounds at those.
    leave_out = ("dn_0",) if regime == "initial" and dtype == torch.bfloat16 else ()
    T = max(1000, 2 * chunk_size + 100)
    properties.compare_with_chunkwise(
        mlstm_tfla, 2, 4, T, DQK, DHV, dtype=dtype, regime=regime, chunk_size=chunk_size, leave_out=leave_out
    )


def test_the_chunk_size_changes_nothing():
    """Also where a chunk has more steps than the sequence."""
    inputs, dh, state, dstate = properties.make(1, 1, 100, 24, 40, dtype=torch.float32)
    results = [
        run_torch(mlstm_tfla, inputs, dh, initial_state=state, dstate=dstate, chunk_size=L)
        for L in (32, 128, 4096, 2**20)
    ]
    for result in results[1:]:
        properties.compare_with(inputs, dh, results[0], result, torch.float32, state=state, dstate=dstate)
    assert all(torch.equal(results[-1][name], results[-2][name]) for name in results[0])  # one chunk is one chunk


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    "property_", [properties.splitting, properties.resets, properties.padding, properties.gauge, properties.linear_in_v,
                  properties.empty_sequences],
)  # fmt: skip
def test_properties(property_, dtype):
    property_(mlstm_tfla, dtype, chunk_size=64)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_finite_at_extremes(dtype):
    properties.finite_at_extremes(mlstm_tfla, dtype, chunk_size=64)


def test_nothing_but_padding():
    properties.nothing_but_padding(mlstm_tfla, TRITON_DTYPES[-1], chunk_size=64)


def test_batch_and_heads_are_independent_to_the_bit():
    properties.batch_and_heads_are_independent(mlstm_tfla, TRITON_DTYPES[-1], bitwise=True, chunk_size=64)


def test_causality():
    properties.causality(mlstm_tfla, TRITON_DTYPES[-1], chunk_size=64)


def test_nan_in_a_gate_is_seen():
    properties.nan_in_a_gate_is_seen(mlstm_tfla, TRITON_DTYPES[-1], chunk_size=64)


def test_the_same_call_gives_the_same_bits():
    properties.the_same_call_gives_the_same_bits(mlstm_tfla, TRITON_DTYPES[-1], chunk_size=64)


@ON_GPU
@pytest.mark.parametrize("chunk_size", [64, 256, 1024])
def test_twenty_runs_at_full_size_give_the_same_bits(chunk_size):
    inputs, dh, state, dstate = properties.make(2, 8, 4096, 128, 256, dtype=torch.bfloat16)
    options = {"initial_state": state, "dstate": dstate, "chunk_size": chunk_size}
    first = run_torch(mlstm_tfla, inputs, dh, **options)
    for _ in range(19):
        other = run_torch(mlstm_tfla, inputs, dh, **options)
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("f_value", [-1e4, -1e6, -torch.inf])
def test_digits_behind_one_shut_forget_gate(f_value):
    properties.digits_behind_one_shut_forget_gate(mlstm_tfla, f_value, chunk_size=128)


@pytest.mark.parametrize(
    "property_", [properties.views_are_not_copied, properties.gradient_of_a_sum, properties.only_the_state_is_used]
)
def test_autograd_and_views(property_):
    property_(mlstm_tfla, chunk_size=32)


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.float32])
def test_gates_in_either_dtype(gate_dtype):
    properties.gates_in_either_dtype(mlstm_tfla, gate_dtype, chunk_size=32)


@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(with_state):
    """PyTorch's own test of a registered operation: schema, fake kernel, autograd registration, tracing."""
    inputs, _, state, _ = properties.make(1, 2, 40, 8, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(stage.forward_op, (*leaves, *(state if with_state else (None,) * 3), 32, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic):
    properties.one_graph(mlstm_tfla, dynamic, chunk_size=32)


def test_autocast_leaves_the_gates_alone():
    """Under autocast, linear layers give 16-bit q, k, v. Gates in float32 stay float32, and so do their gradients."""
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(1, 2, 70, 32, device=DEVICE, generator=generator)
    weights = torch.randn(3, 32, 32, device=DEVICE, generator=generator) / 32**0.5
    weights.requires_grad_()
    i, f = (torch.randn(1, 2, 70, device=DEVICE, generator=generator).requires_grad_() for _ in "if")
    with torch.autocast(DEVICE, dtype=dtype):
        q, k, v = (x @ weight for weight in weights)
        h = mlstm_tfla(q, k, v, i, f + 3, chunk_size=32)
    assert q.dtype == h.dtype == dtype
    h.float().square().sum().backward()
    assert i.grad.dtype == f.grad.dtype == weights.grad.dtype == torch.float32
    with torch.no_grad():
        wide = mlstm_chunkwise(q.double(), k.double(), v.double(), i.double(), f.double() + 3)
    check({"h": h}, {"h": wide}, verbose=False)


@ON_GPU
def test_offsets_beyond_2_to_the_31():
    properties.offsets_beyond_2_to_the_31(lambda *x, **options: mlstm_tfla(*x, chunk_size=64, **options))


@ON_GPU
def test_more_heads_than_a_grid_axis_may_have():
    properties.more_heads_than_a_grid_axis_may_have(mlstm_tfla, chunk_size=16)


@ON_GPU
def test_a_million_steps():
    """One sequence, two heads, forward and backward; its end against a sequence that begins 4096 steps before."""
    inputs, dh, *_ = properties.make(1, 2, 2**20, 128, 256, dtype=torch.bfloat16, with_state=False)
    result = run_torch(mlstm_tfla, inputs, dh)
    assert all(torch.isfinite(x).all() for x in result.values())
    # regime "typical" forgets e^-0.05 a step and more: nothing is left after 2048
    end = run_torch(mlstm_tfla, properties.cut(inputs, -4096, None), dh[:, :, -4096:])
    for name in ("h", "dq", "dk", "dv", "di", "df"):
        error = relative_error(result[name][:, :, -2048:], end[name][:, :, -2048:])
        assert error < 1e-2, (name, error)


# ---------------------------------------------------------------------------------------------------------------------
# assume_norm
# ---------------------------------------------------------------------------------------------------------------------
def normalized(form):
    """A form with an RMSNorm without eps over each head behind it."""

    def function(*x, **options):
        h, state = form(*x, **options)
        return h * h.square().mean(dim=-1, keepdim=True).rsqrt(), state

    return function


@pytest.mark.parametrize("regime", ["typical", "hot"])
def test_assume_norm_is_right_with_a_norm_after_it(regime):
    inputs, dh, *_ = properties.make(1, 2, 70, 16, 24, dtype=torch.float32, regime=regime, with_state=False)
    expected = run_torch(normalized(mlstm_chunkwise), [x.double() for x in inputs], dh.double())
    actual = run_torch(normalized(mlstm_tfla), inputs, dh, chunk_size=32, assume_norm=True)
    scales = properties.summands(inputs, dh)
    check({name: actual[name] for name in ("h", "dq", "dk", "dv", "di", "df")}, expected, scales=scales, verbose=False)


def test_assume_norm_is_wrong_without_one():
    inputs, dh, *_ = properties.make(1, 2, 70, 16, 24, dtype=torch.float32, regime="hot", with_state=False)
    expected = properties.oracle(inputs, dh)
    actual = run_torch(mlstm_tfla, inputs, dh, chunk_size=32, assume_norm=True)
    check({name: actual[name] for name in ("h", "dv")}, expected, verbose=False)  # the normalizer is no part of dv
    for name in ("dq", "dk", "di", "df"):
        assert relative_error(actual[name], expected[name]) > 0.1, name
        with pytest.raises(CheckFailed):
            check({name: actual[name]}, expected, verbose=False)


def test_assume_norm_drops_nothing_where_the_floor_wins():
    """i ~ N(-10, 1), as a model begins its training: the normalizer is e^-m at nearly every step, whatever reads h."""
    inputs, dh, *_ = properties.make(1, 2, 70, 16, 24, dtype=torch.float32, regime="initial", with_state=False)
    actual = run_torch(mlstm_tfla, inputs, dh, chunk_size=32, assume_norm=True)
    expected = properties.oracle(inputs, dh)
    check({name: actual[name] for name in ("h", "dq", "dk", "dv", "di", "df")}, expected, verbose=False)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------
BAD = [
    (
        lambda x: {"q": x.q.double(), "k": x.k.double(), "v": x.v.double()},
        TypeError,
        "q must be float16, bfloat16 or float32",
    ),
    (lambda x: {"v": x.v.half()}, TypeError, "v must be torch.float32 to fit q, got torch.float16"),
    (lambda x: {"k": x.k.mT.contiguous().mT}, ValueError, "k must be contiguous in its last dimension, got strides"),
    (lambda x: {"chunk_size": 8}, ValueError, "chunk_size must be None or a power of two >= 16, got 8"),
    (lambda x: {"chunk_size": 48}, ValueError, "chunk_size must be None or a power of two >= 16, got 48"),
    (lambda x: {"chunk_size": 64.0}, ValueError, "chunk_size must be None or a power of two >= 16, got 64.0"),
    (lambda x: {"assume_norm": None}, TypeError, "assume_norm must be True or False, got None"),
    (lambda x: {"initial_state": x.q}, TypeError, "initial_state must be a tuple"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_name_the_argument(change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4, dtype=torch.float32, device=DEVICE)
    with pytest.raises(error, match=message):
        mlstm_tfla(**(inputs._asdict() | change(inputs)))


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    code = "import torch; from mlstm_tfla import *; x = torch.ones(1, 1, 4, 4); g = x[..., 0]; "
    result = run_python(code + "mlstm_tfla(x, x, x, g, g)", TRITON_INTERPRET="0")
    assert "ValueError: q must be on a GPU, got cpu; to run on the CPU, set the environment variable" in result.stderr


@pytest.mark.parametrize("file", ["mlstm_tfla", "mlstm_decode"])
def test_without_triton_the_import_says_what_works(file):
    result = run_python(f"import sys; sys.modules['triton'] = None; import {file}")
    assert f"ImportError: {file}.py needs Triton" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(target):
    """Everything that the launchers can pick, with the registers and the shared memory that the README's table says."""
    rows = properties.compile_ahead_of_time(target, "stage04_aot.json", "mlstm_tfla", "mlstm_decode")
    kernels = {name for name in vars(stage) if name.endswith("_kernel")} | {"decode_kernel"}
    assert {row["kernel"] for row in rows} == kernels
    if target == "sm_90":  # the tuned configuration keeps its tiles in registers
        tuned = [row for row in rows if row["configuration"] == "bfloat16 128/256 L=256"]
        assert all(row["stack"] <= 48 for row in tuned), tuned


# ---------------------------------------------------------------------------------------------------------------------
# Mutants
# ---------------------------------------------------------------------------------------------------------------------
def suite(module) -> None:
    for regime in ("typical", "initial", "resets", "saturated"):
        properties.compare_with_oracle(
            module.mlstm_tfla, 1, 1, 103, 20, 20, regime=regime, with_state=True, dtype=torch.float32,
            layout="BTHD", seed=0, chunk_size=64,
        )  # fmt: skip
    properties.compare_with_oracle(  # gates of several tiles, which are of 256 steps
        module.mlstm_tfla, 1, 1, 264, 8, 8, regime="typical", with_state=True, dtype=torch.float32,
        layout="BHTD", seed=0, chunk_size=512,
    )  # fmt: skip
    properties.nothing_but_padding(module.mlstm_tfla, torch.float32, chunk_size=64)
    properties.batch_and_heads_are_independent(module.mlstm_tfla, torch.float32, bitwise=True, chunk_size=64)
    properties.digits_behind_one_shut_forget_gate(module.mlstm_tfla, -1e4, chunk_size=128)
    properties.compare_with_oracle(  # heads of several tiles
        module.mlstm_tfla, 1, 1, 40, 80, 80, regime="typical", with_state=True, dtype=torch.float32,
        layout="BHTD", seed=0, chunk_size=64,
    )  # fmt: skip


MUTANTS = [
    ("mask = (offs_i[:, None] >= offs_j[None, :]) & (offs_j[None, :] >= start[:, None])",  # the causal mask
     "mask = offs_j[None, :] >= start[:, None]"),
    ("mask = (offs_i[None, :] >= offs_j[:, None]) & (offs_j[:, None] >= start[None, :])",
     "mask = offs_j[:, None] >= start[None, :]"),
    ("mask = (offs_i[:, None] >= offs_j[None, :]) & (offs_j[None, :] >= start[:, None])",  # the mask of documents
     "mask = offs_i[:, None] >= offs_j[None, :]"),
    ("mask = (offs_i[None, :] >= offs_j[:, None]) & (offs_j[:, None] >= start[None, :])",
     "mask = offs_i[None, :] >= offs_j[:, None]"),
    ("log_w_state = tl.where(start < 0, b + m_state, -float(\"inf\"))", "log_w_state = b + m_state"),
    ("log_decay = tl.where(start < 0, g + m_state, -float(\"inf\"))", "log_decay = g + m_state"),
    ("tl.where(offs_j >= start, (g_m + u) + (g_m_rest + u_rest), -float(\"inf\"))", "(g_m + u) + (g_m_rest + u_rest)"),
    ("tl.load(ptr + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)",  # the boundary mask
     "tl.load(ptr + rows[:, None] * stride_row + cols[None, :])"),
    ("return high, (x - high).to(tl.float32)", "return high, (x - x).to(tl.float32)"),  # the digits behind the first
    ("tl.where(start_2 >= 0, u_max_2, tl.maximum(u_max_1, u_max_2))", "tl.maximum(u_max_1, u_max_2)"),
    ("tl.where(reset, 0.0, f_bar)", "f_bar"),
    ("b = b_before + tl.cumsum", "b = tl.cumsum"),
    ("C, n = C * decay, n * decay", "C, n = C, n * decay"),
    ("C, n = C * decay, n * decay", "C, n = C * decay, n"),
    ("h, S = h * (s * w_state)[:, None], S * (s * w_state)", "h, S = h * 0.0, S * (s * w_state)"),  # between chunks
    ("h, S = h * (s * w_state)[:, None], S * (s * w_state)", "h, S = h * (s * w_state)[:, None], S * 0.0"),
    ("S += tl.sum(P, axis=1)", "S = tl.sum(P, axis=1)"),  # the tiles before the diagonal
    ("dh_h += tl.sum(scores * dP, axis=1)", "dh_h = tl.sum(scores * dP, axis=1)"),
    ("delta = tl.where(tl.abs(S) > floor, tl.where(S > 0, -dh_h, dh_h), 0.0)",  # the normalizer's gradient
     "pass"),
    ("tl.where(S > 0, -dh_h, dh_h)", "-dh_h"),
    ("q_dq = tl.where(tl.abs(S) > floor, 0.0, dh_h)", "q_dq = dh_h"),
    ("dq += (delta * w_read)[:, None] * n[None, :]", "pass"),
    ("dC, dn = dC * decay, dn * decay", "dC, dn = dC, dn * decay"),
    ("dn += tl.sum(q * delta[:, None], axis=0)", "pass"),
    ("decay * tl.sum(carry, axis=0)", "tl.sum(carry, axis=0)"),
    ("dk = (dk + dn[None, :]) * end_weights(start_end, g_m, u, u_rest, offs_j)[:, None]",
     "dk = dk * end_weights(start_end, g_m, u, u_rest, offs_j)[:, None]"),
    ("dP_T = (dP_T + delta[None, :]) * W_T", "dP_T = dP_T * W_T"),
    ("dv *= end_weights(start_end, g_m, u, u_rest, offs_j)[:, None]", "pass"),
    ("df_bar_first += tl.load(carry_ptr", "df_bar_first += 0.0 * tl.load(carry_ptr"),
    ("change = k_dk.to(tl.float64) - to_h", "change = -to_h"),  # the gates' suffix sum
    ("tl.cumsum(change, 0) - change)", "tl.cumsum(change, 0))"),
    ("to_h -= tl.load(X_column_ptr", "to_h -= 0.0 * tl.load(X_column_ptr"),
    ("m_first, dm_T - overlap_T)", "m_first, 0 * dm_T)"),  # <C_T, dC_T>
]  # fmt: skip


def test_the_suite_for_mutants_passes_without_one():
    suite(stage)


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    if "stride_row + cols[None, :], mask" in old and not INTERPRETED:
        pytest.skip("reads outside of the tensors: on a GPU that can end the whole process")
    mutants.assert_noticed(suite, mutants.load_mutant("04_tfla_triton/mlstm_tfla.py", old, new, tmp_path))
