"""What every form of the mLSTM must satisfy, written once and used by the tests of each stage.

`cell` says which mLSTM a form computes, "exp" (stages 01 to 04) or "sig" (stage 05): their states have other parts.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import hypothesis.strategies as st
import mlstm_parallel
import numpy as np
import pytest
import torch
from mlstmsig_reference import gate_weights
from tfla_lab import aot
from tfla_lab.check import TINIEST, budget, check, same_gauge, to_numpy
from tfla_lab.forms import CHUNKWISE, FORMS, STATE, oracle, run_torch
from tfla_lab.inputs import REGIMES, Inputs, random_inputs, random_state

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float64, torch.float32]
# Triton's interpreter computes nonsense with bfloat16, so that dtype needs a GPU.
TRITON_DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# Head dimensions (DQK, DHV) at which every configuration is run on a GPU.
HEAD_SHAPES = [(16, 16), (64, 64), (80, 112), (128, 128), (128, 256), (256, 512), (512, 512)]
ON_GPU = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: sizes that would take the interpreter hours")


@st.composite
def cases(draw, dtypes, *, max_T=80, max_D=24, regimes=tuple(REGIMES), chunk_sizes=(16, 32, 64)):
    """One drawn case: keyword arguments of compare_with_oracle. Arrays come from the seed.

    Gradients through h are differences (of v and h, say) that vanish where one step outweighs all others. In 16 bits
    what is left there is rounding error, and a budget for it would say nothing. So for these dtypes the cases are those
    where many steps and columns count, and no regime that leaves single steps.
    """
    dtype = draw(st.sampled_from(dtypes))
    rounded = dtype in (torch.float16, torch.bfloat16)
    regimes = ["typical", "padding"] if rounded else list(regimes)
    return {
        "B": draw(st.integers(1, 2)),
        "NH": draw(st.integers(1, 2)),
        "T": draw(st.integers(64 if rounded else 1, max_T)),
        "DQK": draw(st.integers(32 if rounded else 1, max(max_D, 48))),
        "DHV": draw(st.integers(32 if rounded else 1, max(max_D, 48))),
        "regime": draw(st.sampled_from(regimes)),
        "with_state": draw(st.booleans()),
        "dtype": dtype,
        "layout": draw(st.sampled_from(["BHTD", "BTHD"])),
        "seed": draw(st.integers(0, 2**31)),
        "chunk_size": draw(st.sampled_from(chunk_sizes)),
    }


def make(
    B, NH, T, DQK, DHV, *, regime="typical", with_state=True, dtype=torch.float64, layout="BHTD", seed=0, cell="exp"
):
    """inputs, dh, initial_state, dstate on the test device."""
    inputs = random_inputs(B, NH, T, DQK, DHV, regime=regime, seed=seed, dtype=dtype, device=DEVICE, layout=layout)
    dh = random_inputs(B, NH, T, DQK, DHV, seed=seed + 1, dtype=dtype, device=DEVICE, layout=layout).v
    if not with_state:
        return inputs, dh, None, None
    state, dstate = (random_state(B, NH, DQK, DHV, seed=seed + j, dtype=dtype, device=DEVICE) for j in (2, 3))
    if cell == "sig":
        return inputs, dh, state[:1], dstate[:1]
    if regime == "saturated":
        # -1e4 + m_0 must be a float32, or the returned m cannot say what the state is to more than 3 digits.
        state = (*state[:2], state[2].round())
    return inputs, dh, state, dstate


def summands(inputs: Inputs, dh, state=None, dstate=None, cell="exp") -> dict[str, float]:
    """The norms of the gradients when every term of their sums is taken by its absolute value.

    Terms may cancel: where one step outweighs all others, h is its v whatever q and k are, and dq, dk, di are exactly
    0. No arithmetic gets closer to 0 than it rounds the terms.
    """
    q, k, v, i, f = (torch.from_numpy(to_numpy(x)) for x in inputs)
    B, NH, _, DQK, DHV = *q.shape, v.shape[-1]
    shapes = (B, NH, DQK, DHV), (B, NH, DQK), (B, NH)
    zeros = [np.zeros(shape) for shape in shapes]
    # The cell "sig" is "exp" with other weights, and without n and m.
    state, dstate = ([*(x or ()), *zeros[len(x or ()) :]] for x in (state, dstate))
    C_0, n_0, m_0 = (torch.from_numpy(to_numpy(x)) for x in state)
    dC, dn, dm = (torch.from_numpy(to_numpy(x)).abs() for x in dstate)
    if cell == "exp":
        _, C, n, _, W, w_state, _, _, D = mlstm_parallel.forward_pass(q, k, v, i, f, C_0, n_0, m_0)
    else:
        (W, w_state), D, n = gate_weights(i, f), torch.ones_like(f), n_0
        C = w_state[..., -1, None, None] * C_0 + (W[..., -1, :, None] * k).mT @ v
    g, q, k, v, C_0 = torch.from_numpy(to_numpy(dh)).abs() / D[..., None], q.abs(), k.abs(), v.abs(), C_0.abs()
    s = DQK**-0.5
    dP = (g @ v.mT) * W
    dq = s * (dP @ k) + s * w_state[..., None] * (g @ C_0.mT)
    dk = s * (dP.mT @ q) + W[..., -1, :, None] * (v @ dC.mT + dn[..., None, :])
    dC_0 = s * (w_state[..., None] * q).mT @ g + w_state[..., -1, None, None] * dC
    dn_0 = w_state[..., -1, None] * dn
    q_dq, k_dk = (q * dq).sum(dim=-1), (k * dk).sum(dim=-1)
    end = dm + (C.abs() * dC).sum(dim=(-2, -1)) + (n.abs() * dn).sum(dim=-1)  # what m_T hands on
    start = (C_0 * dC_0).sum(dim=(-2, -1)) + (n_0.abs() * dn_0).sum(dim=-1)
    terms = {"dq": dq, "dk": dk, "dC_0": dC_0, "di": k_dk + end[..., None], "dm_0": start + end}
    return {name: float(x.norm()) for name, x in terms.items()} | {"df": float((q_dq + k_dk + end[..., None]).norm())}


def compare_with(
    inputs: Inputs, dh, reference: dict, actual: dict, dtype, *, state=None, dstate=None, chunk_size=None, cell="exp"
) -> None:
    """All outputs and gradients within the budgets of the dtype; the state in the reference's gauge."""
    name = str(dtype).removeprefix("torch.")
    rest = {key: value for key, value in actual.items() if key not in (*STATE["exp"], "dm_0")}
    scales = summands(inputs, dh, state, dstate, cell) if inputs.q.shape[2] <= 200 else {}
    check(rest, reference, dtype=name, scales=scales, chunk_size=chunk_size, verbose=False)
    if cell == "sig":
        check({"C": actual["C"]}, reference, dtype=name, verbose=False)
        return
    final = same_gauge((actual["C"], actual["n"], actual["m"]), reference["m"])
    expected_final = same_gauge((reference["C"], reference["n"], reference["m"]), reference["m"])
    check(final, expected_final, dtype=name, verbose=False)
    if "dm_0" in actual:
        # One number a head, and a sum of products of C_0 and dC_0, which cancel: measured against their norms.
        products = zip(state[:2], ("dC_0", "dn_0"), strict=True)
        size = sum(np.linalg.norm(to_numpy(x)) * np.linalg.norm(to_numpy(reference[key])) for x, key in products)
        size += (
            0
            if dstate is None
            else sum(np.linalg.norm(to_numpy(reference[x]) * to_numpy(dx)) for x, dx in zip("Cnm", dstate, strict=True))
        )
        error = np.linalg.norm(to_numpy(actual["dm_0"]) - to_numpy(reference["dm_0"]))
        allowed = budget("dm_0", name) * (np.linalg.norm(to_numpy(reference["dm_0"])) + size) + TINIEST[name]
        assert error <= allowed, f"dm_0 is off by {error}, {allowed} is allowed"


def compare_with_oracle(
    function, B, NH, T, DQK, DHV, *, regime, with_state, dtype, layout, seed, chunk_size=None, cell="exp"
):
    """A form against the recurrence in float64: h, five gradients, the state and its gradients."""
    inputs, dh, state, dstate = make(
        B, NH, T, DQK, DHV, regime=regime, with_state=with_state, dtype=dtype, layout=layout, seed=seed, cell=cell
    )
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    # At +-10^4 and +-50 several steps tie exactly for the largest weight. m_T has no gradient there, and a gradient of
    # the returned state by itself would ask for it.
    dstate = None if regime in ("saturated", "fifty") and cell == "exp" else dstate
    actual = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    reference = oracle(inputs, dh, initial_state=state, dstate=dstate, cell=cell)
    compare_with(inputs, dh, reference, actual, dtype, state=state, dstate=dstate, chunk_size=chunk_size, cell=cell)


def cut(inputs: Inputs, start: int | None, end: int | None) -> Inputs:
    return Inputs(*(x[:, :, start:end] for x in inputs))


def causality(function, dtype, T=70, t=40, heads=(12, 20), **options) -> None:
    """h up to step t does not change by a bit when everything after it changes, and gets no gradient from there."""
    inputs, *_ = make(1, 2, T, *heads, dtype=dtype)
    other, *_ = make(1, 2, T, *heads, dtype=dtype, seed=9, regime="hot")
    mixed = Inputs(*(torch.cat([x[:, :, :t], y[:, :, t:]], dim=2) for x, y in zip(inputs, other, strict=True)))
    h, h_mixed = function(*inputs, **options), function(*mixed, **options)
    assert torch.equal(h[:, :, :t], h_mixed[:, :, :t])
    assert not torch.equal(h[:, :, t:], h_mixed[:, :, t:])
    dh = torch.zeros_like(h)
    dh[:, :, :t] = 1
    gradients = run_torch(function, inputs, dh, **options)
    for name in ("dq", "dk", "dv", "di", "df"):
        assert (gradients[name][:, :, t:] == 0).all(), name
        assert (gradients[name][:, :, :t] != 0).any(), name


def splitting(function, dtype, T=90, t=37, regime="typical", cell="exp", heads=(12, 20), **options) -> None:
    """Two calls with the state passed on give what one call gives, gradients through the state included."""
    inputs, dh, state, dstate = make(2, 2, T, *heads, dtype=dtype, regime=regime, cell=cell)

    def in_two_parts(q, k, v, i, f, *, initial_state, return_state):
        x = Inputs(q, k, v, i, f)
        h_1, middle = function(*cut(x, None, t), initial_state=initial_state, return_state=True, **options)
        h_2, final = function(*cut(x, t, None), initial_state=middle, return_state=True, **options)
        return torch.cat([h_1, h_2], dim=2), final

    actual = run_torch(in_two_parts, inputs, dh, initial_state=state, dstate=dstate)
    reference = oracle(inputs, dh, initial_state=state, dstate=dstate, cell=cell)
    compare_with(inputs, dh, reference, actual, dtype, state=state, dstate=dstate, cell=cell)


def resets(function, dtype, lengths=(5, 28, 1, 41), cell="exp", heads=(12, 20), **options) -> None:
    """f = -inf at the first step of every document of a packed sequence: the same as a call for each document."""
    T = sum(lengths)
    inputs, dh, *_ = make(1, 2, T, *heads, dtype=dtype, cell=cell)
    starts = np.cumsum((0, *lengths[:-1]))
    inputs.f[:, :, starts] = -torch.inf
    packed = run_torch(function, inputs, dh, **options)
    assert (packed["df"][:, :, starts] == 0).all(), "the gradient of a gate at -inf must be exactly 0"
    parts = [
        oracle(cut(inputs, start, start + length), dh[:, :, start : start + length], cell=cell)
        for start, length in zip(starts, lengths, strict=True)
    ]
    names = ("h", "dq", "dk", "dv", "di", "df")
    joined = {name: np.concatenate([part[name] for part in parts], axis=2) for name in names}
    name = str(dtype).removeprefix("torch.")
    check({key: packed[key] for key in names}, joined, dtype=name, verbose=False)
    # Exactly: what came before a reset does not change a bit of what follows.
    start = int(starts[2])
    changed = Inputs(*(torch.cat([x[:, :, :start].flip(2), x[:, :, start:]], dim=2) for x in inputs))
    assert torch.equal(function(*inputs, **options)[:, :, start:], function(*changed, **options)[:, :, start:])


def padding(function, dtype, T=50, extra=27, cell="exp", heads=(12, 20), **options) -> None:
    """Steps with i = -inf and f = inf behind a sequence change neither its h nor its state, and get no gradient."""
    inputs, dh, state, dstate = make(1, 2, T + extra, *heads, dtype=dtype, cell=cell)
    inputs.i[:, :, T:], inputs.f[:, :, T:], dh[:, :, T:] = -torch.inf, torch.inf, 0
    padded = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    short = oracle(cut(inputs, None, T), dh[:, :, :T], initial_state=state, dstate=dstate, cell=cell)
    for name in ("dk", "dv", "di"):
        assert (padded[name][:, :, T:] == 0).all(), name
    per_step = ("h", "dq", "dk", "dv", "di", "df")
    padded = {name: x[:, :, :T] if name in per_step else x for name, x in padded.items()}
    compare_with(cut(inputs, None, T), dh[:, :, :T], short, padded, dtype, state=state, dstate=dstate, cell=cell)


def gauge(function, dtype, **options) -> None:
    """(C, n, m) and (C e^-c, n e^-c, m + c) are the same memory: h does not change."""
    inputs, _, (C, n, m), _ = make(2, 2, 50, 12, 20, dtype=dtype)
    c = 3.0
    shifted = (C * float(np.exp(-c)), n * float(np.exp(-c)), m + c)
    name = str(dtype).removeprefix("torch.")
    expected = to_numpy(function(*inputs, initial_state=(C, n, m), **options))
    check({"h": function(*inputs, initial_state=shifted, **options)}, {"h": expected}, dtype=name, verbose=False)


def linear_in_v(function, dtype, cell="exp", heads=(12, 20), **options) -> None:
    inputs, *_ = make(1, 2, 50, *heads, dtype=dtype, cell=cell)
    other = make(1, 2, 50, *heads, dtype=dtype, seed=5, cell=cell)[0].v
    name = str(dtype).removeprefix("torch.")
    # The sum is rounded to dtype before it goes in, so 2 v and v + v' with v' = v / 2 would hide nothing: use v, v'.
    total = (inputs.v.double() + other.double()).to(dtype)
    parts = [to_numpy(function(*inputs._replace(v=x), **options)) for x in (inputs.v, total - inputs.v)]
    check({"h": function(*inputs._replace(v=total), **options)}, {"h": sum(parts)}, dtype=name, verbose=False)


def batch_and_heads_are_independent(function, dtype, *, bitwise: bool, cell="exp", heads=(12, 20), **options) -> None:
    """Permuting batch entries and heads permutes the result; a row alone gives what it gives inside a batch."""
    inputs, dh, state, dstate = make(3, 2, 40, *heads, dtype=dtype, cell=cell)
    whole = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    turned = run_torch(
        function, Inputs(*(x.flip(0, 1) for x in inputs)), dh.flip(0, 1),
        initial_state=[x.flip(0, 1) for x in state], dstate=[x.flip(0, 1) for x in dstate], **options,
    )  # fmt: skip
    alone = run_torch(
        function, Inputs(*(x[1:2] for x in inputs)), dh[1:2],
        initial_state=[x[1:2] for x in state], dstate=[x[1:2] for x in dstate], **options,
    )  # fmt: skip
    for name, x in whole.items():
        if bitwise:
            assert torch.equal(turned[name].flip(0, 1), x), name
            assert torch.equal(alone[name], x[1:2]), name
        else:  # PyTorch's matrix products may add in another order when the batch has another size
            check({name: turned[name].flip(0, 1)}, {name: x}, verbose=False, budgets={name: 1e-12})
            check({name: alone[name]}, {name: x[1:2]}, verbose=False, budgets={name: 1e-12})


def empty_sequences(function, dtype, cell="exp", heads=(12, 20), **options) -> None:
    """T = 0 gives an empty h and the state as it was; B = 0 gives empty everything. Both have gradients."""
    inputs, dh, state, dstate = make(2, 2, 0, *heads, dtype=dtype, cell=cell)
    result = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    assert result["h"].shape == (2, 2, 0, heads[1])
    names = (*STATE[cell], *(f"d{part}_0" for part in STATE[cell]))
    for name, x in zip(names, (*state, *dstate), strict=True):
        assert torch.equal(result[name], x), name
    _, final = function(*inputs, return_state=True, **options)
    assert final[0].shape == (2, 2, *heads)
    assert len(final) == len(state)
    assert all((x == 0).all() for x in final)
    inputs, dh, state, dstate = make(0, 2, 30, *heads, dtype=dtype, cell=cell)
    result = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    assert result["h"].shape == (0, 2, 30, heads[1])
    assert result["dk"].shape == (0, 2, 30, heads[0])


def nothing_but_padding(function, dtype, cell="exp", **options) -> None:
    """All is forgotten and nothing written: h is 0, the memory is empty, nothing is NaN."""
    inputs, dh, state, dstate = make(1, 1, 40, 8, 8, dtype=dtype, cell=cell)
    inputs.i.fill_(-torch.inf), inputs.f.fill_(-torch.inf)
    result = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    assert (result["h"] == 0).all()
    memory = {"C": result["C"]}
    if cell == "exp":
        memory = same_gauge((result["C"], result["n"], result["m"]), torch.zeros_like(result["m"]))
    assert all((x == 0).all() for x in memory.values())
    for name, x in result.items():
        assert torch.isfinite(x).all(), name


def nan_in_a_gate_is_seen(function, dtype, T=70, t=40, heads=(12, 20), **options) -> None:
    """Nothing hides that a gate is not a number: h is none from there on, and as it was before."""
    for gate in (3, 4):
        inputs, *_ = make(1, 2, T, *heads, dtype=dtype)
        clean = function(*inputs, **options)
        inputs[gate][:, 1, t] = torch.nan
        h = function(*inputs, **options)
        assert torch.equal(h[:, :1], clean[:, :1])
        assert torch.equal(h[:, 1, :t], clean[:, 1, :t])
        assert h[:, 1, t:].isnan().all()


def finite_at_extremes(function, dtype, cell="exp", **options) -> None:
    """No NaN or inf, whatever the gates: +-1e4, queries and keys of zeros, a state with a huge or tiny m."""
    for value_i in (-1e4, -50.0, 50.0, 1e4):
        for value_f in (-1e4, -50.0, 50.0, 1e4):
            inputs, dh, state, dstate = make(1, 1, 40, 8, 8, dtype=dtype, cell=cell)
            inputs.i.fill_(value_i), inputs.f.fill_(value_f)
            inputs.q[:, :, 3:5], inputs.k[:, :, 7:9] = 0, 0
            for m_0 in (-1e4, 0.0, 1e4) if cell == "exp" else (0.0,):
                start = state if cell == "sig" else (state[0], state[1], torch.full_like(state[2], m_0))
                result = run_torch(function, inputs, dh, initial_state=start, dstate=dstate, **options)
                for name in ("h", *STATE[cell]):
                    assert torch.isfinite(result[name]).all(), (name, value_i, value_f, m_0)
                # h has a pole where n . s q = 0 and e^(-m) is 0 as well, so gradients at such steps are not asked for.
                if cell == "sig" or (value_i <= 0 and m_0 <= 0):
                    for name, x in result.items():
                        assert torch.isfinite(x).all(), (name, value_i, value_f, m_0)


# ---------------------------------------------------------------------------------------------------------------------
# What a Triton form must satisfy besides
# ---------------------------------------------------------------------------------------------------------------------
def compare_with_chunkwise(
    function, B, NH, T, DQK, DHV, *, dtype, regime="typical", with_state=True, chunk_size=None, leave_out=(),
    cell="exp", shift_f=0.0,
) -> None:  # fmt: skip
    """A form against stage 03's chunkwise form in float64 on the same numbers: sizes at which the oracle is slow."""
    inputs, dh, state, dstate = make(B, NH, T, DQK, DHV, dtype=dtype, regime=regime, with_state=with_state, cell=cell)
    inputs.f.add_(shift_f)
    wide = Inputs(*(x.double() for x in inputs))
    wide_state, wide_dstate = (y and tuple(x.double() for x in y) for y in (state, dstate))
    expected = run_torch(FORMS[CHUNKWISE[cell]].load(), wide, dh.double(), initial_state=wide_state, dstate=wide_dstate)
    options = {} if chunk_size is None else {"chunk_size": chunk_size}
    actual = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    actual = {name: x for name, x in actual.items() if name not in leave_out}
    compare_with(inputs, dh, expected, actual, dtype, state=state, dstate=dstate, chunk_size=chunk_size, cell=cell)


def the_same_call_gives_the_same_bits(function, dtype, cell="exp", sizes=(2, 2, 100, 24, 40), **options) -> None:
    inputs, dh, state, dstate = make(*sizes, dtype=dtype, cell=cell)
    first, *others = (
        run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
        for _ in range(3 if INTERPRETED else 20)
    )
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def digits_behind_one_shut_forget_gate(function, f_value, cell="exp", **options) -> None:
    """One very low f among typical gates: with -1e4, a difference of float32 sums would be wrong by 1e-3 behind it."""
    inputs, dh, *_ = make(1, 2, 120, 8, 8, dtype=torch.float32, cell=cell)
    inputs.f[:, :, 70] = f_value
    actual = run_torch(function, inputs, dh, **options)
    compare_with(inputs, dh, oracle(inputs, dh, cell=cell), actual, torch.float32, cell=cell)


def views_are_not_copied(function, cell="exp", **options) -> None:
    """(B, T, NH, D) tensors seen through a transpose, and slices of a larger tensor; h in the layout of v."""
    B, NH, T, D = 2, 3, 40, 8
    whole = torch.randn(B, T, NH, 3 * D + 2, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    q, k, v, gates = whole.transpose(1, 2).split([D, D, D, 2], dim=-1)
    i, f = gates[..., 0], gates[..., 1]
    assert not any(x.is_contiguous() for x in (q, k, v, i, f))
    for x in (q, k, v, i, f):
        x.contiguous = lambda *_, **__: pytest.fail("an input was copied")
    h = function(q, k, v, i, f, **options)
    expected = FORMS[CHUNKWISE[cell]].load()(*(x.double() for x in (q, k, v, i, f)), chunk_size=16)
    torch.testing.assert_close(h.double(), expected, rtol=1e-4, atol=1e-5)
    v = torch.randn(B, T, NH, D, device=DEVICE).transpose(1, 2)
    assert function(q, k, v, i, f, **options).stride() == v.stride()


def gradient_of_a_sum(function, cell="exp", dtype=torch.float32, **options) -> None:
    """h.sum() sends back a gradient whose strides are all 0."""
    inputs, *_ = make(1, 2, 40, 8, 8, dtype=dtype, cell=cell)
    leaves = [x.requires_grad_() for x in inputs]
    function(*leaves, **options).sum().backward()
    expected = oracle(inputs, torch.ones_like(inputs.v), cell=cell)
    name = str(dtype).removeprefix("torch.")
    check({"dq": leaves[0].grad, "df": leaves[4].grad}, expected, dtype=name, verbose=False)


def only_the_state_is_used(function, cell="exp", dtype=torch.float32, **options) -> None:
    inputs, dh, state, dstate = make(1, 2, 40, 8, 8, dtype=dtype, cell=cell)
    leaves = [x.requires_grad_() for x in inputs]
    _, final = function(*leaves, initial_state=state, return_state=True, **options)
    (final[0] * dstate[0]).sum().backward()
    zero = [torch.zeros_like(x) for x in dstate[1:]]
    expected = oracle(inputs, torch.zeros_like(dh), initial_state=state, dstate=(dstate[0], *zero), cell=cell)
    gradients = {n: leaves[j].grad for j, n in enumerate(("dk", "dv", "di", "df"), start=1)}
    check(gradients, expected, dtype=str(dtype).removeprefix("torch."), verbose=False)


def gates_in_either_dtype(function, gate_dtype, cell="exp", dtype=torch.float16, **options) -> None:
    inputs, dh, *_ = make(1, 2, 40, 8, 8, dtype=dtype, cell=cell)
    inputs = inputs._replace(i=inputs.i.to(gate_dtype), f=inputs.f.to(gate_dtype))
    actual = run_torch(function, inputs, dh, **options)
    assert actual["di"].dtype == actual["df"].dtype == gate_dtype
    compare_with(inputs, dh, oracle(inputs, dh, cell=cell), actual, dtype, cell=cell)


def one_graph(function, dynamic, cell="exp", dtype=torch.float32, **options) -> None:
    """torch.compile: no breaks, states and gradients included, and for other lengths too."""
    torch.compiler.reset()  # what other tests compiled of the function below counts towards a limit

    def model(q, k, v, i, f, state):
        h, final = function(q * 2, k, v, i, f, initial_state=state, return_state=True, **options)
        return h.relu(), final

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (40, 56):
        inputs, dh, state, _ = make(1, 2, T, 8, 8, dtype=dtype, cell=cell)
        results = []
        for form in (model, compiled):
            leaves = [x.clone().requires_grad_() for x in (*inputs, *state)]
            h, final = form(*leaves[:5], tuple(leaves[5:]))
            gradients = torch.autograd.grad([h, *final], leaves, [dh, *(torch.ones_like(x) for x in final)])
            results.append([h, *final, *gradients])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def offsets_beyond_2_to_the_31(function) -> None:
    """q, k, v of more than 2^31 elements: the last rows are as they are in a small tensor."""
    B, NH, T, D = 4, 2, 2**20 + 64, 256
    x = Inputs(*(torch.randn(B, NH, T, D, device=DEVICE, dtype=torch.bfloat16) for _ in "qkv"),
               *(torch.randn(B, NH, T, device=DEVICE) + shift for shift in (0, 3)))  # fmt: skip
    assert x.q.numel() > 2**31
    with torch.no_grad():
        h, final = function(*x, return_state=True)
        start = T - 64 - 2048  # a chunk's border, or the bits would differ
        _, state = function(*(y[-1:, -1:, :start] for y in x), return_state=True)
        h_end, final_end = function(*(y[-1:, -1:, start:] for y in x), initial_state=state, return_state=True)
    assert torch.equal(h[-1:, -1:, start:], h_end)
    assert all(torch.equal(y[-1:, -1:], z) for y, z in zip(final, final_end, strict=True))


def more_heads_than_a_grid_axis_may_have(function, cell="exp", dtype=torch.float32, **options) -> None:
    """CUDA allows 65,535 programs along the second axis of a grid."""
    inputs, dh, state, dstate = make(70_000, 1, 4, 8, 8, dtype=dtype, cell=cell)
    whole = run_torch(function, inputs, dh, initial_state=state, dstate=dstate, **options)
    last = Inputs(*(x[-2:] for x in inputs)), dh[-2:]
    states = {"initial_state": [x[-2:] for x in state], "dstate": [x[-2:] for x in dstate]}
    for name, x in run_torch(function, *last, **states, **options).items():
        assert torch.equal(whole[name][-2:], x), name


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def compile_ahead_of_time(target: str, record: str, *files: str, witness: str = "float16") -> list[dict]:
    """The rows of tfla_lab.aot for a target. All kernels must compile, and fit into the target's shared memory.

    What shared/results has recorded of the very same sources and Triton is not compiled again, for that takes many
    minutes; but for one dtype on sm_90, which must come out as recorded.
    """
    recorded = json.loads((ROOT / "shared/results" / record).read_text())
    rows = [row for row in recorded["rows"] if row["target"] == target]
    same_triton = recorded["triton"] == metadata.version("triton")
    if same_triton:
        same = recorded["sources"] == {file: aot.digest(file) for file in files}
        assert same, f"{record} is of other sources: make it anew, see tfla_lab/aot.py"
    if not same_triton or target == "sm_90":
        arguments = ["--target", target, "--json", *(part for file in files for part in ("--file", file))]
        arguments += ["--dtype", witness] if same_triton else []
        code = f"import sys; from tfla_lab.aot import main; sys.exit(main({arguments}))"
        result = run_python(code, TRITON_INTERPRET="0")
        assert result.returncode == 0, result.stdout + result.stderr
        compiled = json.loads(result.stdout)["rows"]
        assert compiled, "nothing was compiled"
        if same_triton:
            assert compiled == [row for row in rows if row["configuration"].startswith(witness + " ")]
        else:
            rows = compiled
    assert not any(row["error"] for row in rows)
    assert all(row["shared"] <= row["limit"] for row in rows)
    return rows
