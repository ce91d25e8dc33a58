"""Stage 03 in PyTorch against stages 01 and 02, against plain autograd, and by the properties that every form has."""

import mlstm_chunkwise as stage
import mutants
import properties
import pytest
import torch
from hypothesis import given
from mlstm_chunkwise import mlstm_chunkwise
from mlstm_parallel import mlstm_parallel
from tfla_lab.check import check
from tfla_lab.forms import run_torch
from tfla_lab.inputs import random_inputs


@given(properties.cases(properties.FLOATS))
def test_equals_the_recurrence(case):
    properties.compare_with_oracle(mlstm_chunkwise, **case)


@given(properties.cases([torch.float64], max_T=150))
def test_equals_the_parallel_form(case):
    chunk_size, regime = case.pop("chunk_size"), case["regime"]
    inputs, dh, state, dstate = properties.make(**case)
    dstate = None if regime in ("saturated", "fifty") else dstate  # ties: see compare_with_oracle
    expected = run_torch(mlstm_parallel, inputs, dh, initial_state=state, dstate=dstate)
    actual = run_torch(mlstm_chunkwise, inputs, dh, initial_state=state, dstate=dstate, chunk_size=chunk_size)
    properties.compare_with(
        inputs, dh, expected, actual, torch.float64, state=state, dstate=dstate, chunk_size=chunk_size
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    properties.compare_with_oracle(
        mlstm_chunkwise, 2, 2, 60, 16, 24, regime="typical", with_state=True, dtype=dtype, layout="BTHD", seed=0,
        chunk_size=16,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [-10.0, 0.0, 4.0])
def test_backward_equals_plain_autograd(bias):
    inputs, dh, state, dstate = properties.make(2, 2, 42, 6, 8)
    inputs = inputs._replace(i=inputs.i + bias)

    def plain(*x, initial_state, return_state):
        h, C, n, m, *_ = stage.forward_pass(*x, *initial_state, 16)
        return h, (C[:, :, -1], n[:, :, -1], m[..., -1])

    expected = run_torch(plain, inputs, dh, initial_state=state, dstate=dstate)
    actual = run_torch(mlstm_chunkwise, inputs, dh, initial_state=state, dstate=dstate, chunk_size=16)
    check(actual, expected, verbose=False)


def test_chunk_size_does_not_matter():
    inputs, dh, state, dstate = properties.make(2, 2, 300, 6, 8)
    results = [
        run_torch(mlstm_chunkwise, inputs, dh, initial_state=state, dstate=dstate, chunk_size=L)
        for L in (16, 32, 64, 128, 256, 512)
    ]
    for result in results[1:]:
        check(result, results[0], verbose=False, budgets={"m": 1e-10})


@pytest.mark.parametrize("dtype", properties.FLOATS)
@pytest.mark.parametrize(
    "property_", [properties.splitting, properties.resets, properties.padding, properties.gauge, properties.linear_in_v,
                  properties.finite_at_extremes, properties.empty_sequences],
)  # fmt: skip
def test_properties(property_, dtype):
    property_(mlstm_chunkwise, dtype, chunk_size=16)


def test_batch_and_heads_are_independent():
    properties.batch_and_heads_are_independent(mlstm_chunkwise, torch.float64, bitwise=False, chunk_size=16)


def test_causality():
    properties.causality(mlstm_chunkwise, torch.float64, chunk_size=16)


def test_h_has_the_memory_layout_of_v():
    inputs, *_ = properties.make(2, 3, 20, 6, 8, layout="BTHD")
    assert mlstm_chunkwise(*inputs).stride() == inputs.v.stride()


@pytest.mark.parametrize("chunk_size", [8, 48, 64.0, True, None])
def test_errors_name_the_chunk_size(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be a power of two >= 16, got"):
        mlstm_chunkwise(*random_inputs(1, 2, 5, 3, 4, dtype=torch.float32), chunk_size=chunk_size)


def suite(module) -> None:
    for regime in ("typical", "initial", "resets"):
        properties.compare_with_oracle(
            module.mlstm_chunkwise, 1, 2, 40, 5, 7, regime=regime, with_state=True, dtype=torch.float64, layout="BHTD",
            seed=0, chunk_size=16,
        )  # fmt: skip
    properties.nothing_but_padding(module.mlstm_chunkwise, torch.float64, chunk_size=16)
    properties.finite_at_extremes(module.mlstm_chunkwise, torch.float64, chunk_size=16)


MUTANTS = [
    ("torch.where(row >= column, log_D, -torch.inf)  #", "log_D  #"),  # the causal mask
    ("split_chunks(i, chunk_size, fill=-torch.inf)", "split_chunks(i, chunk_size)"),  # the boundary mask
    ("m_border.append(torch.where(m_c == -torch.inf, 0, m_c))", "m_border.append(m_c)"),
    ("m = torch.maximum(b + m_start, log_D.amax(dim=-1))", "m = log_D.amax(dim=-1)"),
    ("C_border.append(decay[..., c, None, None] * C_border[-1]", "C_border.append(C_border[-1]"),
    ("P @ v + s * w_state[..., None] * (q @ C)", "P @ v"),
    ("torch.where(normalizer_wins, -S.sign() * (dh * h).sum(dim=-1) / D, 0)", "torch.zeros_like(S)"),
    ("dC.append(decay[..., c, None, None] * dC[-1] +", "dC.append(dC[-1] +"),
    ("+ w_end[..., None] * (k @ dC)", ""),
    ("+ overlap[..., None]", ""),
    ("x.flip(-1).cumsum(dim=-1).flip(-1) + overlap", "x.cumsum(dim=-1) + overlap"),
    ("dm_T - overlap[..., -1])", "0 * dm_T)"),
]


def test_the_suite_for_mutants_passes_without_one():
    suite(stage)


@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    mutants.assert_noticed(suite, mutants.load_mutant("03_chunkwise/mlstm_chunkwise.py", old, new, tmp_path))
