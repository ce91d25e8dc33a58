"""Stage 03 in Triton: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys

import properties
import pytest
import torch
from hypothesis import example, given

pytest.importorskip("triton", reason="Triton has no wheels for this system")

import mlstm_limit_chunk as stage
import mutants
from mlstm_chunkwise import mlstm_chunkwise
from mlstm_limit_chunk import mlstm_limit_chunk
from properties import DEVICE, INTERPRETED, TRITON_DTYPES
from tfla_lab.forms import run_torch
from tfla_lab.inputs import Inputs, random_inputs, random_state

ON_GPU = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: sizes that would take the interpreter hours")


@given(properties.cases(TRITON_DTYPES, max_T=150, max_D=40, chunk_sizes=(16, 32, 64, 128)))
@example({"B": 1, "NH": 1, "T": 1, "DQK": 1, "DHV": 1, "regime": "typical", "with_state": True, "dtype": torch.float32,
          "layout": "BHTD", "seed": 0, "chunk_size": 16})  # fmt: skip
@example({"B": 1, "NH": 2, "T": 129, "DQK": 33, "DHV": 17, "regime": "resets", "with_state": True,
          "dtype": torch.float32, "layout": "BTHD", "seed": 1, "chunk_size": 128})  # fmt: skip
def test_equals_the_recurrence(case):
    properties.compare_with_oracle(mlstm_limit_chunk, **case)


def in_float64(inputs, dh, state, dstate) -> dict:
    """The chunkwise form of the same numbers in float64."""
    wide = Inputs(*(x.double() for x in inputs))
    state, dstate = (tuple(x.double() for x in y) for y in (state, dstate))
    return run_torch(mlstm_chunkwise, wide, dh.double(), initial_state=state, dstate=dstate)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize(("DQK", "DHV"), [(96, 160), (160, 72)])
def test_equals_the_chunkwise_form_with_tiled_heads(chunk_size, DQK, DHV, dtype):
    """Head dimensions that need several tiles, none of them full, and at least two chunks."""
    inputs, dh, state, dstate = properties.make(1, 2, chunk_size + 33, DQK, DHV, dtype=dtype)
    expected = in_float64(inputs, dh, state, dstate)
    actual = run_torch(mlstm_limit_chunk, inputs, dh, initial_state=state, dstate=dstate, chunk_size=chunk_size)
    properties.compare_with(inputs, dh, expected, actual, dtype, state=state, dstate=dstate, chunk_size=chunk_size)


@ON_GPU
@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize("chunk_size", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("DQK", "DHV"), [(16, 16), (64, 64), (80, 112), (128, 128), (128, 256), (256, 512), (512, 512)]
)
@pytest.mark.parametrize("regime", ["typical", "initial", "shut"])
def test_equals_the_chunkwise_form_at_full_size(DQK, DHV, chunk_size, dtype, regime):
    """Every configuration that the launcher can choose, on the hardware: compilers have got some of them wrong."""
    inputs, dh, state, dstate = properties.make(4, 4, 1000, DQK, DHV, dtype=dtype, regime=regime)
    expected = in_float64(inputs, dh, state, dstate)
    actual = run_torch(mlstm_limit_chunk, inputs, dh, initial_state=state, dstate=dstate, chunk_size=chunk_size)
    if regime == "initial" and dtype == torch.bfloat16:
        # e^-m wins at nearly every step there, so dn_0 hangs on one or two steps, and on how C_0 rounds at those.
        del actual["dn_0"]
    properties.compare_with(inputs, dh, expected, actual, dtype, state=state, dstate=dstate, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
@pytest.mark.parametrize(
    "property_", [properties.splitting, properties.resets, properties.padding, properties.gauge, properties.linear_in_v,
                  properties.empty_sequences],
)  # fmt: skip
def test_properties(property_, dtype):
    property_(mlstm_limit_chunk, dtype, chunk_size=32)


@pytest.mark.parametrize("dtype", TRITON_DTYPES)
def test_finite_at_extremes(dtype):
    properties.finite_at_extremes(mlstm_limit_chunk, dtype, chunk_size=32)


def test_batch_and_heads_are_independent_to_the_bit():
    properties.batch_and_heads_are_independent(mlstm_limit_chunk, TRITON_DTYPES[-1], bitwise=True, chunk_size=32)


def test_causality():
    properties.causality(mlstm_limit_chunk, TRITON_DTYPES[-1], chunk_size=32)


def test_the_same_call_gives_the_same_bits():
    inputs, dh, state, dstate = properties.make(2, 2, 100, 24, 40, dtype=TRITON_DTYPES[-1])
    first, *others = (
        run_torch(mlstm_limit_chunk, inputs, dh, initial_state=state, dstate=dstate, chunk_size=32)
        for _ in range(3 if INTERPRETED else 20)
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("f_value", [-1e4, -torch.inf])
def test_digits_behind_one_shut_forget_gate(f_value):
    """One f of -1e4 among typical gates: a difference of float32 sums would be wrong by 1e-3 behind it."""
    inputs, dh, *_ = properties.make(1, 2, 120, 8, 8, dtype=torch.float32)
    inputs.f[:, :, 70] = f_value
    actual = run_torch(mlstm_limit_chunk, inputs, dh, chunk_size=128)
    properties.compare_with(inputs, dh, properties.oracle(inputs, dh), actual, torch.float32)


def test_views_are_not_copied():
    """(B, T, NH, D) tensors seen through a transpose, and slices of a larger tensor; h in the layout of v."""
    B, NH, T, D = 2, 3, 40, 8
    whole = torch.randn(B, T, NH, 3 * D + 2, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    q, k, v, gates = whole.transpose(1, 2).split([D, D, D, 2], dim=-1)
    i, f = gates[..., 0], gates[..., 1]
    assert not any(x.is_contiguous() for x in (q, k, v, i, f))
    for x in (q, k, v, i, f):
        x.contiguous = lambda *_, **__: pytest.fail("an input was copied")
    h = mlstm_limit_chunk(q, k, v, i, f, chunk_size=16)
    expected = mlstm_chunkwise(*(x.double() for x in (q, k, v, i, f)), chunk_size=16)
    torch.testing.assert_close(h.double(), expected, rtol=1e-4, atol=1e-5)
    v = torch.randn(B, T, NH, D, device=DEVICE).transpose(1, 2)
    assert mlstm_limit_chunk(q, k, v, i, f, chunk_size=16).stride() == v.stride()


def test_gradient_of_a_sum():
    """h.sum() sends back a gradient whose strides are all 0."""
    inputs, *_ = properties.make(1, 2, 40, 8, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    mlstm_limit_chunk(*leaves, chunk_size=16).sum().backward()
    expected = properties.oracle(inputs, torch.ones_like(inputs.v))
    properties.check({"dq": leaves[0].grad, "df": leaves[4].grad}, expected, verbose=False)


def test_only_the_state_is_used():
    inputs, dh, state, dstate = properties.make(1, 2, 40, 8, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    _, (C, _, _) = mlstm_limit_chunk(*leaves, initial_state=state, return_state=True, chunk_size=16)
    (C * dstate[0]).sum().backward()
    zero = [torch.zeros_like(x) for x in dstate[1:]]
    expected = properties.oracle(inputs, torch.zeros_like(dh), initial_state=state, dstate=(dstate[0], *zero))
    names = ("dk", "dv", "di", "df")
    properties.check({n: leaves[j].grad for j, n in enumerate(names, start=1)}, expected, verbose=False)


@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.float32])
def test_gates_in_either_dtype(gate_dtype):
    inputs, dh, *_ = properties.make(1, 2, 40, 8, 8, dtype=torch.float16)
    inputs = inputs._replace(i=inputs.i.to(gate_dtype), f=inputs.f.to(gate_dtype))
    actual = run_torch(mlstm_limit_chunk, inputs, dh, chunk_size=16)
    assert actual["di"].dtype == actual["df"].dtype == gate_dtype
    properties.compare_with(inputs, dh, properties.oracle(inputs, dh), actual, torch.float16)


@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(with_state):
    """PyTorch's own test of a registered operation: schema, fake kernel, autograd registration, tracing."""
    inputs, _, state, _ = properties.make(1, 2, 40, 8, 8, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(stage.forward_op, (*leaves, *(state if with_state else (None,) * 3), 16))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic):
    """One graph, no breaks, states and gradients included, and for other lengths too."""

    def model(q, k, v, i, f, state):
        h, final = mlstm_limit_chunk(q * 2, k, v, i, f, chunk_size=16, initial_state=state, return_state=True)
        return h.relu(), final

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (40, 56):
        inputs, dh, state, _ = properties.make(1, 2, T, 8, 8, dtype=torch.float32)
        results = []
        for function in (model, compiled):
            leaves = [x.clone().requires_grad_() for x in (*inputs, *state)]
            h, final = function(*leaves[:5], tuple(leaves[5:]))
            gradients = torch.autograd.grad([h, *final], leaves, [dh, *(torch.ones_like(x) for x in final)])
            results.append([h, *final, *gradients])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@ON_GPU
def test_offsets_beyond_2_to_the_31():
    """q, k, v of more than 2^31 elements: the last rows are as they are in a small tensor."""
    B, NH, T, D = 4, 2, 2**20 + 64, 256
    x = Inputs(*(torch.randn(B, NH, T, D, device=DEVICE, dtype=torch.bfloat16) for _ in "qkv"),
               *(torch.randn(B, NH, T, device=DEVICE) + shift for shift in (0, 3)))  # fmt: skip
    assert x.q.numel() > 2**31
    with torch.no_grad():
        h, final = mlstm_limit_chunk(*x, return_state=True)
        start = T - 2048
        _, state = mlstm_limit_chunk(*(y[-1:, -1:, :start] for y in x), return_state=True)
        h_end, final_end = mlstm_limit_chunk(*(y[-1:, -1:, start:] for y in x), initial_state=state, return_state=True)
    assert torch.equal(h[-1:, -1:, start:], h_end)
    assert all(torch.equal(y[-1:, -1:], z) for y, z in zip(final, final_end, strict=True))


@ON_GPU
def test_more_heads_than_a_grid_axis_may_have():
    """CUDA allows 65,535 programs along the second axis of a grid."""
    inputs, dh, state, dstate = properties.make(70_000, 1, 4, 8, 8, dtype=torch.float32)
    whole = run_torch(mlstm_limit_chunk, inputs, dh, initial_state=state, dstate=dstate, chunk_size=16)
    last = Inputs(*(x[-2:] for x in inputs)), dh[-2:]
    states = {"initial_state": [x[-2:] for x in state], "dstate": [x[-2:] for x in dstate]}
    for name, x in run_torch(mlstm_limit_chunk, *last, **states, chunk_size=16).items():
        assert torch.equal(whole[name][-2:], x), name


BAD = [
    (
        lambda x: {"q": x.q.double(), "k": x.k.double(), "v": x.v.double()},
        TypeError,
        "q must be float16, bfloat16 or float32",
    ),
    (lambda x: {"v": x.v.half()}, TypeError, "v must be torch.float32 to fit q, got torch.float16"),
    (lambda x: {"k": x.k[..., :2]}, ValueError, "k must have shape"),
    (lambda x: {"k": x.k.mT.contiguous().mT}, ValueError, "k must be contiguous in its last dimension, got strides"),
    (lambda x: {"chunk_size": 256}, ValueError, "chunk_size must be 16, 32, 64 or 128, got 256"),
    (lambda x: {"chunk_size": 24}, ValueError, "chunk_size must be 16, 32, 64 or 128, got 24"),
    (
        lambda x: {"initial_state": random_state(1, 2, 3, 4, dtype=torch.float64, device=DEVICE)},
        TypeError,
        "initial_state's C must be torch.float32 to fit q, got torch.float64",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_errors_name_the_argument(change, error, message):
    inputs = random_inputs(1, 2, 5, 3, 4, dtype=torch.float32, device=DEVICE)
    with pytest.raises(error, match=message):
        mlstm_limit_chunk(**(inputs._asdict() | change(inputs)))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    code = "import torch; from mlstm_limit_chunk import *; x = torch.ones(1, 1, 4, 4); g = x[..., 0]; "
    result = run_python(code + "mlstm_limit_chunk(x, x, x, g, g)", TRITON_INTERPRET="0")
    assert "ValueError: q must be on a GPU, got cpu; to run on the CPU, set the environment variable" in result.stderr


def test_without_triton_the_import_says_what_works():
    result = run_python("import sys; sys.modules['triton'] = None; import mlstm_limit_chunk")
    assert "ImportError: mlstm_limit_chunk.py needs Triton" in result.stderr
    assert "mlstm_chunkwise.py" in result.stderr


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_ahead_of_time(target):
    """Everything that the launchers can pick, for GPUs that are not here."""
    result = run_python(
        f"import sys; from tfla_lab.aot import main; sys.exit(main(['--target', '{target}', '--json']))",
        TRITON_INTERPRET="0",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout)
    assert {row["kernel"] for row in rows} == {name for name in vars(stage) if name.endswith("_kernel")}
    assert all(row["shared"] <= row["limit"] for row in rows)
    if target == "sm_90":
        # The tuned configuration keeps its tiles in registers. gates_kernel is left out: with one warp it spills, and
        # takes half the time nevertheless.
        tuned = [row for row in rows if row["configuration"] == "bfloat16 128/256 L=64"]
        assert len(tuned) >= 9
        assert all(row["stack"] <= 48 for row in tuned if row["kernel"] != "gates_kernel"), tuned


def suite(module) -> None:
    for regime in ("typical", "initial", "resets", "saturated"):
        properties.compare_with_oracle(
            module.mlstm_limit_chunk, 1, 1, 39, 20, 20, regime=regime, with_state=True, dtype=torch.float32,
            layout="BTHD", seed=0, chunk_size=16,
        )  # fmt: skip
    properties.nothing_but_padding(module.mlstm_limit_chunk, torch.float32, chunk_size=16)
    properties.batch_and_heads_are_independent(module.mlstm_limit_chunk, torch.float32, bitwise=True, chunk_size=32)
    properties.compare_with_oracle(  # heads of several tiles
        module.mlstm_limit_chunk, 1, 1, 40, 80, 80, regime="typical", with_state=True, dtype=torch.float32,
        layout="BHTD", seed=0, chunk_size=32,
    )  # fmt: skip


MUTANTS = [
    ("mask = (i >= j) & (j >= start[:, None])", "mask = j >= start[:, None]"),  # the causal mask
    ("mask = (i >= j) & (j >= start[None, :])", "mask = j >= start[None, :]"),
    ("mask = (i >= j) & (j >= start[:, None])", "mask = i >= j"),  # the mask of documents
    ("mask = (i >= j) & (j >= start[None, :])", "mask = i >= j"),
    ("log_w_state = tl.where(start < 0, b + m_state, -float(\"inf\"))", "log_w_state = b + m_state"),
    ("tl.where(offs_l >= start, g + tl.load(u_ptr + offs_gate) - m_next, -float(\"inf\"))",
     "g + tl.load(u_ptr + offs_gate) - m_next"),
    ("m = tl.where(m == -float(\"inf\"), 0.0, m)", "pass"),
    ("offs_t * stride_it, mask=mask, other=-float(\"inf\"))", "offs_t * stride_it, mask=mask, other=0.0)"),
    ("tl.load(ptr + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)",
     "tl.load(ptr + rows[:, None] * stride_row + cols[None, :])"),  # the boundary mask
    ("tl.where(reset, 0.0, f_bar)", "f_bar"),
    ("m = tl.maximum(log_w_state.to(tl.float32), m_intra)", "m = m_intra"),
    ("v, C * decay, input_precision=PRECISION)", "v, C, input_precision=PRECISION)"),
    ("n = n * decay + tl.sum(k, axis=0)", "n = n + tl.sum(k, axis=0)"),
    ("h_state * (s * w_state)[:, None]", "h_state * 0.0"),
    ("S = tl.sum(P, axis=1) + s * w_state * S_state\n    D", "S = tl.sum(P, axis=1)\n    D"),
    ("S = tl.sum(P, axis=1) + s * w_state * S_state\n    floor", "S = tl.sum(P, axis=1)\n    floor"),
    ("+ s * w_state * dh_state", ""),
    ("tl.where(tl.abs(S) > floor, tl.where(S > 0, -r, r) * dh_h, 0.0)", "S * 0.0"),  # the normalizer's gradient
    ("tl.where(S > 0, -r, r)", "-r"),
    ("dh, dC * decay, input_precision=PRECISION)", "dh, dC, input_precision=PRECISION)"),
    ("tl.sum(crossing, axis=1) + tl.sum(carry)", "tl.sum(crossing, axis=1)"),
    ("tl.where(offs_l[None, :] >= offs_l[:, None], (q_dq", "tl.where(offs_l[None, :] > offs_l[:, None], (q_dq"),
    ("(q_dq + X_row - X_column)[None, :], k_dk[None, :])", "(q_dq + X_row - X_column)[None, :], 0.0)"),
    ("dk = (dk + dn[None, :]) * w_end[:, None]", "dk = dk * w_end[:, None]"),
    ("dv * w_end[:, None]", "dv"),
    ("+ X_row - X_column", ""),
    ("m_first, dm_T - overlap_T)", "m_first, 0 * dm_T)"),
]  # fmt: skip


def test_the_suite_for_mutants_passes_without_one():
    suite(stage)


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    if "stride_row + cols[None, :], mask" in old and not INTERPRETED:
        pytest.skip("reads outside of the tensors: on a GPU that can end the whole process")
    mutants.assert_noticed(suite, mutants.load_mutant("03_chunkwise/mlstm_limit_chunk.py", old, new, tmp_path))
