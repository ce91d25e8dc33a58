"""Stage 04's mlstm_hopper.py.

There is no interpreter for Gluon: its kernels run on a Hopper GPU or not at all. Without one, they are compiled, and
the checks of arguments and the passes over the gates are tested.
"""

from types import SimpleNamespace

import hopper
import properties
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon", reason="no Triton here, or one without Gluon")

import mlstm_hopper as stage
import mutants
from hopper import BFLOAT16, ON_HOPPER
from mlstm_hopper import mlstm_hopper
from mlstm_tfla import mlstm_tfla
from properties import DEVICE, INTERPRETED
from tfla_lab.check import check, relative_error, same_gauge
from tfla_lab.forms import GRADIENTS, STATE, oracle, run_torch
from tfla_lab.inputs import REGIMES


def make(*sizes, dtype=BFLOAT16, **options):
    return properties.make(*sizes, dtype=dtype, **options)


# Heads that fill their tiles and heads that do not. With less than 32 columns, what is left of the differences that the
# normalizer's gradient consists of says nothing in 16 bits (see properties.cases).
HEADS = [(48, 64), (64, 64), (72, 104), (128, 128), (128, 256), (64, 256), (128, 40)]
HEADS += [(256, 512), (200, 264), (256, 40), (64, 512), (128, 512), (256, 128)]  # wide ones


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the references
# ---------------------------------------------------------------------------------------------------------------------
@ON_HOPPER
@pytest.mark.parametrize("T", [1, 64, 1100, 3000])
@pytest.mark.parametrize(("DQK", "DHV"), HEADS)
@pytest.mark.parametrize("regime", ["typical", "initial", "shut", "resets"])
def test_equals_the_chunkwise_form(DQK, DHV, regime, T):
    """One tile, many tiles, several stored states; the last tile full or cut; documents that end anywhere."""
    if T == 1:
        T = 64  # a single step: h is its v, and gradients through it vanish
    properties.compare_with_chunkwise(mlstm_hopper, 2, 4, T, DQK, DHV, dtype=BFLOAT16, regime=regime)


@ON_HOPPER
@pytest.mark.parametrize(("DQK", "DHV"), [(64, 64), (128, 256), (256, 512)])
@pytest.mark.parametrize("shift_f", [-6, 5])
def test_short_and_long_memory(DQK, DHV, shift_f):
    """Where df is made of one tile alone, and where nearly all passes through hundreds of them."""
    properties.compare_with_chunkwise(mlstm_hopper, 2, 4, 3000, DQK, DHV, dtype=BFLOAT16, shift_f=shift_f)


@ON_HOPPER
def test_thousands_of_steps_that_remember():
    """Among so many steps are some where |S| is just above its floor, and their gradients are the largest of all."""
    properties.compare_with_chunkwise(mlstm_hopper, 2, 8, 8192, 128, 64, dtype=BFLOAT16, shift_f=3, with_state=False)


@ON_HOPPER
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("T", "DQK", "DHV"), [(1024, 64, 64), (8192, 128, 256), (5000, 72, 104), (4096, 256, 512)])
def test_few_sequences_are_cut_into_spans(T, DQK, DHV, with_state):
    tiles = -(-T // stage.BLOCK)
    assert stage.span_of(torch.empty(1, 2, T, DQK, device=DEVICE), tiles, 1) < tiles
    properties.compare_with_chunkwise(mlstm_hopper, 1, 2, T, DQK, DHV, dtype=BFLOAT16, with_state=with_state)


@ON_HOPPER
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("regime", ["typical", "resets", "padding"])
@pytest.mark.parametrize(("DQK", "DHV"), [(64, 64), (72, 104), (128, 256), (256, 512)])
def test_many_sequences_are_walked_whole(DQK, DHV, regime, with_state):
    """Here the walks find n and dn themselves, from the states at the ends of the sequences on."""
    B, NH, T = 2, 70, 1100
    tiles = -(-T // stage.BLOCK)
    assert stage.span_of(torch.empty(B, NH, T, DQK, device=DEVICE), tiles, 1) == tiles
    properties.compare_with_chunkwise(
        mlstm_hopper, B, NH, T, DQK, DHV, dtype=BFLOAT16, regime=regime, with_state=with_state
    )


@ON_HOPPER
def test_a_decay_above_1():
    """m has the digits of float32: after an enormous gate, decays are off by its rounding, h and dv are not.

    Behind such a gate, h is v of its step with the sign of q . k, which is far from 0 here: next to it h is rounding.
    """
    inputs, dh, *_ = make(2, 70, 192, 64, 64, with_state=False)
    for x in (inputs.q, inputs.k):
        x.abs_()
    sign = torch.ones(140, device=DEVICE, dtype=torch.float64).view(2, 70, 1, 1)
    sign[:, ::2] = -1
    inputs.q.mul_(sign)
    inputs.i[..., 0] = 2e7
    actual = run_torch(mlstm_hopper, inputs, dh)
    h, dv = (sign * inputs.v[..., :1, :]).expand(dh.shape), torch.zeros(dh.shape, dtype=torch.float64, device=DEVICE)
    dv[..., 0, :] = (sign * dh).sum(dim=-2)
    assert relative_error(actual["h"], h) < properties.budget("h", "bfloat16")
    assert relative_error(actual["dv"], dv) < properties.budget("dv", "bfloat16")


@ON_HOPPER
def test_the_normalizer_gradient_left_out():
    """With a norm behind it, the gradients that assume_norm gives are the exact ones."""
    inputs, dh, *_ = make(1, 2, 300, 64, 64, with_state=False)

    def normalized(*x, **options):
        h = mlstm_hopper(*x, **options).float()
        return h * torch.rsqrt((h * h).mean(dim=-1, keepdim=True) + 1e-12)

    gradients = []
    for assume_norm in (False, True):
        leaves = [x.detach().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad(normalized(*leaves, assume_norm=assume_norm), leaves, dh.float()))
    for name, exact, other in zip(GRADIENTS, *gradients, strict=True):
        assert relative_error(other, exact) < 4 * properties.budget(name, "bfloat16"), name
    plain = [
        torch.autograd.grad(mlstm_hopper(*leaves, assume_norm=assume_norm), leaves, dh) for assume_norm in (False, True)
    ]
    assert relative_error(plain[1][0], plain[0][0]) > 0.1, "without a norm it makes a difference"


@ON_HOPPER
@settings(max_examples=40)
@given(
    properties.cases([BFLOAT16], max_T=300), st.sampled_from([32, 48, 64, 96, 128]), st.sampled_from([32, 40, 128, 256])
)
def test_equals_the_recurrence(case, DQK, DHV):
    properties.compare_with_oracle(mlstm_hopper, **(case | {"DQK": DQK, "DHV": DHV, "chunk_size": None}))


@ON_HOPPER
def test_equals_its_portable_twin():
    """At full size, each no further from the other than its budget allows it to be from the truth."""
    inputs, dh, state, dstate = make(2, 16, 4096, 128, 256)
    own, portable = (
        run_torch(form, inputs, dh, initial_state=state, dstate=dstate) for form in (mlstm_hopper, mlstm_tfla)
    )
    for name in ("h", *GRADIENTS, "dC_0", "C"):
        assert relative_error(own[name], portable[name]) < 2 * properties.budget(name, "bfloat16"), name


# ---------------------------------------------------------------------------------------------------------------------
# The passes over the gates, in Triton: also without a GPU
# ---------------------------------------------------------------------------------------------------------------------
def in_tiles(x, NT):
    """(B, NH, T, ...) as (B, NH, NT, BLOCK, ...), with zeros past T."""
    rest = NT * stage.BLOCK - x.shape[2]
    x = torch.cat([x, x.new_zeros(*x.shape[:2], rest, *x.shape[3:])], dim=2)
    return x.unflatten(2, (NT, stage.BLOCK)).double()


def unpack(rows, B, NH, NT):
    """The tiles Wr, and the rows from w_read on."""
    w_row, w_row_rest, u, u_rest, bounds, *others = rows.view(B, NH, NT, 8, stage.BLOCK).double().unbind(3)
    step = torch.arange(stage.BLOCK, device=rows.device)
    causal = step[:, None] >= step
    forward = causal & (step >= (bounds // 128 - 1)[..., :, None])
    backward = causal & (step[:, None] < (bounds % 128)[..., None, :])
    inside = u > -1e29  # past T, both masks say nothing
    assert torch.equal(forward & inside[..., None, :], backward & inside[..., None, :])
    exponent = (w_row + w_row_rest)[..., :, None] + (u + u_rest)[..., None, :]
    return torch.where(forward, exponent, -torch.inf).exp2(), *others


def compare_tiles(expected, actual, T) -> None:
    """All sums of float32 products: no further apart than 1e-4 of the largest."""
    for name, x in expected.items():
        if name not in ("P", "delta"):
            x = x.flatten(2, 3)[:, :, :T]
        torch.testing.assert_close(actual[name].double(), x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def tiles_of_wide_heads(inputs, dh, n, dn, rows, new_rows, C_dh, v_dC):
    """What the kernels for the tiles of wide heads make of the walks' products, which come to them in two parts."""
    (q, k, v, *_), (B, NH, T, DQK), BLOCK = inputs, inputs.q.shape, stage.BLOCK
    NT, BH, sizes = C_dh.shape[2], B * NH, {"BLOCK": BLOCK, "PART": 16}
    C_dh, v_dC = (torch.stack([0.25 * y, 0.75 * y]).float() for y in (C_dh, v_dC))
    P, S, q_dq, k_dk_tile, k_dk_state = (q.new_full((B, NH, x), torch.nan) for x in (NT * BLOCK * BLOCK, T, T, T, T))
    dq, dk = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan)
    q_, k_, v_, dh_, dq_, dk_ = (x.stride()[:3] for x in (q, k, v, dh, dq, dk))
    stage.scores_tile_kernel[(NT * BH,)](q, k, n, rows, P, S, *q_, *k_, T, NT, NH, DQK, **sizes)
    shape = (T, NT, NH, C_dh.stride(0), DQK, v.shape[-1], 2)
    stage.dq_tile_kernel[(NT * BH,)](
        dh, k, v, q, C_dh, n, new_rows, dq, q_dq, *dh_, *k_, *v_, *q_, *dq_, *shape, **sizes
    )
    stage.dk_tile_kernel[(NT * BH,)](
        v, q, dh, k, v_dC, dn, new_rows, dk, k_dk_tile, k_dk_state, *v_, *q_, *dh_, *k_, *dk_, *shape, **sizes
    )
    delta = new_rows.view(B, NH, NT, 8, BLOCK)[:, :, :, 7]
    found = {"P": P.view(B, NH, -1, BLOCK), "S": S, "q_dq": q_dq, "delta": delta, "dq": dq, "dk": dk}
    return found | {"k_dk_tile": k_dk_tile, "k_dk_state": k_dk_state}


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("regime", list(REGIMES))
def test_passes_around_the_walks(regime, with_state):
    """All plain Triton kernels, with the four walks written in PyTorch, in float64, between them."""
    B, NH, T, DQK, DHV, BLOCK = 1, 2, 1100, 8, 8, stage.BLOCK
    NT, BH = -(-T // BLOCK), B * NH
    inputs, dh, state, dstate = properties.make(
        B, NH, T, DQK, DHV, regime=regime, dtype=torch.float32, with_state=with_state
    )
    dstate = None if regime in ("saturated", "fifty") else dstate  # m_T has no gradient where weights tie
    reference = oracle(inputs, dh, initial_state=state, dstate=dstate)
    C_0, n_0, m_0 = state or (None,) * 3
    dC_T, dn_T, dm_T = dstate or (None,) * 3
    i, f, k = inputs.i, inputs.f, inputs.k

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=DEVICE).fill_(torch.nan)

    # forward
    g, a, m = empty(B, NH, NT, dtype=torch.float64), empty(B, NH, NT, dtype=torch.float64), empty(B, NH, NT + 1)
    x, n, decay, rows = empty(B, NH, NT, DQK), empty(B, NH, NT + 1, DQK), empty(B, NH, NT), empty(BH * NT * 8, BLOCK)
    gates = (*i.stride(), *f.stride())
    stage.summary_kernel[(-(-NT // 4) * BH,)](i, f, g, a, *gates, T, NT, NH, BLOCK, 4)
    stage.stabilizers_kernel[(BH,)](g, a, m_0, m, NT, 4)
    stage.rows_kernel[(-(-NT // 4) * BH,)](i, f, m, rows, decay, *gates, T, NT, NH, DQK**-0.5, BLOCK, 4)
    stage.sums_kernel[(NT * BH,)](k, rows, x, *k.stride()[:3], T, NT, NH, DQK, False, BLOCK, 8)
    stage.vectors_kernel[(BH,)](x, decay, n_0, n, NT, DQK, False, 4, 8)
    q, k, v, dh_ = (in_tiles(y, NT) for y in (*inputs[:3], dh))
    W, w_read, w_end, floor = unpack(rows, B, NH, NT)
    C = [torch.zeros(B, NH, DQK, DHV, dtype=torch.float64, device=DEVICE) if C_0 is None else C_0.double()]
    for c in range(NT):
        C.append(decay[:, :, c, None, None] * C[c] + (w_end[:, :, c, :, None] * k[:, :, c]).mT @ v[:, :, c])
    C = torch.stack(C, dim=2)
    S = ((q @ k.mT) * W).sum(-1) + w_read * (q @ n[:, :, :-1, :, None].double())[..., 0]
    D = torch.maximum(S.abs(), floor)
    h = (((q @ k.mT) * W) @ v + w_read[..., None] * (q @ C[:, :, :-1])) / D[..., None]

    # backward
    S_, new_rows = S.flatten(2)[:, :, :T].float().contiguous(), empty(BH * NT * 8, BLOCK)
    stage.rows_backward_kernel[(-(-NT // 4) * BH,)](rows, S_, new_rows, T, NT, True, BLOCK, 4)
    assert (unpack(new_rows, B, NH, NT)[-1] == 0).all()  # with assume_norm
    stage.rows_backward_kernel[(-(-NT // 4) * BH,)](rows, S_, new_rows, T, NT, False, BLOCK, 4)
    Wr, w_read, *_, sign = unpack(new_rows, B, NH, NT)
    C_dh = dh_ @ C[:, :, :-1].mT
    tile_part = ((q @ k.mT) * (dh_ @ v.mT) * Wr).sum(-1)
    dh_h = tile_part + w_read * (q * C_dh).sum(-1)
    delta = sign * dh_h
    new_rows.view(B, NH, NT, 8, BLOCK)[:, :, :, 7] = delta
    stage.sums_kernel[(NT * BH,)](inputs.q, new_rows, x, *inputs.q.stride()[:3], T, NT, NH, DQK, True, BLOCK, 8)
    dn = torch.empty_like(n)
    stage.vectors_kernel[(BH,)](x, decay, dn_T, dn, NT, DQK, True, 4, 8)
    dC = [torch.zeros_like(C[:, :, 0]) if dC_T is None else dC_T.double()]
    for c in reversed(range(NT)):
        dC.insert(0, decay[:, :, c, None, None] * dC[0] + (w_read[:, :, c, :, None] * q[:, :, c]).mT @ dh_[:, :, c])
    dC = torch.stack(dC, dim=2)
    dP = (dh_ @ v.mT + delta[..., None]) * Wr
    dq = dP @ k + w_read[..., None] * (C_dh + delta[..., None] * n[:, :, :-1, None].double())
    dk_state = w_end[..., None] * (v @ dC[:, :, 1:].mT + dn[:, :, 1:, None].double())
    dk = dP.mT @ q + dk_state
    dv = ((q @ k.mT) * Wr).mT @ dh_ + w_end[..., None] * (k @ dC[:, :, 1:])
    q_dq = torch.where(sign == 0, dh_h, 0)
    tiles = {"P": ((q @ k.mT) * W / D[..., None]).flatten(2, 3), "S": S, "q_dq": q_dq, "delta": delta, "dq": dq}
    tiles |= {"dk": dk, "k_dk_tile": (k * (dk - dk_state)).sum(-1), "k_dk_state": (k * dk_state).sum(-1)}
    new_rows.view(B, NH, NT, 8, BLOCK)[:, :, :, 7] = sign
    # A GPU's products of float32 are those of TF32; in bfloat16 all tests of wide heads have them. The other regimes
    # differ in the rows, which are compared in any case, and take minutes.
    if INTERPRETED and regime in ("typical", "resets", "shut", "padding"):
        compare_tiles(tiles, tiles_of_wide_heads(inputs, dh, n, dn, rows, new_rows, C_dh, v @ dC[:, :, 1:].mT), T)
    torch.testing.assert_close((q * dq).sum(-1), q_dq, rtol=1e-4, atol=1e-4 * dh_h.abs().max().item())
    sums = [q_dq, (k * (dk - dk_state)).sum(-1), (k * dk_state).sum(-1)]
    sums = [y.flatten(2)[None, :, :, :T].float().contiguous() for y in sums]
    borders = [*range(0, NT, stage.BORDER), NT]
    carry = (C * dC).sum((-2, -1))[:, :, borders][None].float().contiguous()
    if dC_T is None:
        carry[..., -1] = 0
    di_rest, df_bar_rest = None, None
    if dC_T is not None:
        overlap = (C[:, :, -1] * dC_T).sum((-2, -1)) + (n[:, :, -1] * dn_T).sum(-1)
        m_first = torch.zeros_like(dm_T) if m_0 is None else m_0
        di_rest, df_bar_rest, _ = stage.stabilizer_gradient(i.double(), f.double(), m_first, dm_T - overlap)
        di_rest, df_bar_rest = di_rest.float().contiguous(), df_bar_rest.float().contiguous()
    di, df = torch.empty_like(i), torch.empty_like(f)
    stage.dgates_kernel[((len(borders) - 1) * BH,)](
        f, decay, n, dn, *sums, carry, di_rest, df_bar_rest, di, df, *f.stride(), *di.stride(), *df.stride(),
        T, NT, NH, BH, DQK, 1, 1, stage.BORDER, BLOCK, 8,
    )  # fmt: skip
    actual = {name: y.flatten(2, 3)[:, :, :T].float() for name, y in zip(
        ("h", "dq", "dk", "dv"), (h, dq, dk, dv), strict=True)} | {"di": di, "df": df}  # fmt: skip
    actual |= {"C": C[:, :, -1], "n": n[:, :, -1], "m": m[:, :, -1]}
    if regime in ("fifty", "saturated"):  # single steps outweigh all others: what is left of the gates' gradients is 0
        del actual["di"], actual["df"]
    # df: of a decay that is not far above 2^-12, some is left out (see dgates_kernel): up to 1e-3 of what crosses.
    rest = {name: actual[name] for name in actual if name not in STATE["exp"]}
    scales = properties.summands(inputs, dh, state, dstate)
    check(rest, reference, dtype="float32", budgets={"df": 1e-3}, scales=scales, verbose=False)
    final = same_gauge((actual["C"], actual["n"], actual["m"]), reference["m"])
    check(
        final,
        same_gauge((reference["C"], reference["n"], reference["m"]), reference["m"]),
        dtype="float32",
        verbose=False,
    )


@pytest.mark.parametrize("BACKWARD", [False, True])
@pytest.mark.parametrize("with_state", [True, False])
def test_starts_of_spans_from_pieces(BACKWARD, with_state):
    hopper.starts_of_spans_from_pieces(stage, BACKWARD, with_state)


@ON_HOPPER
@pytest.mark.parametrize("BACKWARD", [False, True])
@pytest.mark.parametrize(("DQK", "DHV"), [(64, 64), (128, 256), (200, 264), (256, 512)])
def test_starts_of_spans(DQK, DHV, BACKWARD):
    hopper.starts_of_spans(stage, DQK, DHV, BACKWARD)


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------
@ON_HOPPER
@pytest.mark.parametrize(
    ("property_", "options"),
    [
        (properties.splitting, {"T": 200, "t": 101}),
        (properties.resets, {"lengths": (5, 28, 1, 41, 64, 130)}),
        (properties.padding, {"T": 150}),
        (properties.linear_in_v, {}),
        (properties.empty_sequences, {}),
    ],
)
def test_properties(property_, options):
    property_(mlstm_hopper, BFLOAT16, heads=(32, 40), **options)


@ON_HOPPER
def test_finite():
    properties.finite_at_extremes(mlstm_hopper, BFLOAT16)
    properties.nothing_but_padding(mlstm_hopper, BFLOAT16)


@ON_HOPPER
def test_batch_and_heads_are_independent_to_the_bit():
    properties.batch_and_heads_are_independent(mlstm_hopper, BFLOAT16, bitwise=True, heads=(32, 40))


@ON_HOPPER
def test_causality():
    properties.causality(mlstm_hopper, BFLOAT16, T=170, t=90, heads=(32, 40))


@ON_HOPPER
def test_nan_in_a_gate_is_seen():
    properties.nan_in_a_gate_is_seen(mlstm_hopper, BFLOAT16, T=170, t=90, heads=(32, 40))


@ON_HOPPER
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 16, 100, 128, 256), (2, 16, 4096, 128, 256), (2, 8, 2048, 256, 512),
        (2, 70, 1100, 128, 256), (2, 70, 1100, 64, 64),  # whole sequences: the walks find n and dn
    ],
)  # fmt: skip
def test_twenty_runs_give_the_same_bits(sizes):
    """Warps that wait for each other would show here if one did not wait long enough."""
    properties.the_same_call_gives_the_same_bits(mlstm_hopper, BFLOAT16, sizes=sizes)


@ON_HOPPER
def test_backward_in_a_thread_of_its_own():
    inputs, dh, *_ = make(1, 2, 300, 64, 64, with_state=False)
    _, C, _, _, *saved = stage.launch_forward(*inputs, None, None, None, False, False)
    hopper.in_a_thread_of_its_own(
        lambda: stage.launch_backward(dh, None, None, None, *inputs, None, None, None, C, *saved, False)
    )


@ON_HOPPER
def test_a_neighbour_that_is_not_a_number():
    hopper.a_neighbour_that_is_not_a_number(mlstm_hopper)


@ON_HOPPER
def test_views_are_not_copied():
    hopper.views_are_not_copied(mlstm_hopper)


@ON_HOPPER
@pytest.mark.parametrize("property_", [properties.gradient_of_a_sum, properties.only_the_state_is_used])
def test_autograd(property_):
    property_(mlstm_hopper, dtype=BFLOAT16)


@ON_HOPPER
@pytest.mark.parametrize("gate_dtype", [BFLOAT16, torch.float32])
def test_gates_in_either_dtype(gate_dtype):
    properties.gates_in_either_dtype(mlstm_hopper, gate_dtype, dtype=BFLOAT16)


@ON_HOPPER
@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(with_state):
    """PyTorch's own test of a registered operation: schema, fake kernel, autograd registration, tracing."""
    inputs, _, state, _ = make(1, 2, 40, 8, 8)
    parts = state if with_state else (None,) * 3
    torch.library.opcheck(stage.forward_op, (*(x.requires_grad_() for x in inputs), *parts, False, with_state))


def test_what_stands_in_place_of_a_state_has_no_gradient(monkeypatch):
    """Autograd may send one back for it, as opcheck does; the kernels would read it as a state."""
    asked = []
    monkeypatch.setattr(
        stage, "backward_op", lambda dh, dC_T, dn_T, dm_T, *_: asked.append((dC_T, dn_T, dm_T)) or [dh] * 8
    )
    (q, k, v, i, f), dh, state, _ = make(1, 1, 8, 8, 8)
    for return_state in (False, True):
        saved = (q, k, v, i, f, None, None, None, *(dh,) * 7)
        ctx = SimpleNamespace(saved_tensors=saved, assume_norm=False, return_state=return_state)
        stage.backward(ctx, dh, *(state if return_state else [torch.zeros(0)] * 3))
    assert asked[0] == (None, None, None)
    assert all(torch.equal(x, y) for x, y in zip(asked[1], state, strict=True))


@ON_HOPPER
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(dynamic):
    properties.one_graph(mlstm_hopper, dynamic, dtype=BFLOAT16)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traces_into_one_graph(dynamic):
    hopper.traces_into_one_graph(mlstm_hopper, dynamic)


@ON_HOPPER
def test_offsets_beyond_2_to_the_31():
    properties.offsets_beyond_2_to_the_31(lambda q, k, *x, **o: mlstm_hopper(q[..., :128], k[..., :128], *x, **o))


@ON_HOPPER
def test_more_heads_than_a_grid_axis_may_have():
    properties.more_heads_than_a_grid_axis_may_have(mlstm_hopper, dtype=BFLOAT16)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("change", "error", "message"), hopper.BAD)
def test_errors_name_the_argument(change, error, message):
    hopper.error_names_the_argument(mlstm_hopper, change, error, message)


def test_too_many_steps_are_named():
    hopper.too_many_steps_are_named(mlstm_hopper)


@ON_HOPPER
def test_an_odd_address_is_named():
    hopper.odd_address_is_named(mlstm_hopper)


def test_another_device_is_named():
    x = torch.ones(1, 1, 8, 8, dtype=BFLOAT16)
    with pytest.raises(ValueError, match=r"q must be on a Hopper GPU \(H100, H200\), got cpu; mlstm_tfla.py runs"):
        mlstm_hopper(x, x, x, x[..., 0], x[..., 0])


def test_without_triton_the_import_says_what_works():
    code = "import sys; sys.modules['triton'] = None; import mlstm_chunkwise; import mlstm_hopper"
    assert "ImportError: mlstm_hopper.py needs Triton 3.6" in properties.run_python(code).stderr


# ---------------------------------------------------------------------------------------------------------------------
# Compiled, with or without a GPU
# ---------------------------------------------------------------------------------------------------------------------
def test_compiles_ahead_of_time():
    """What the launchers pick for narrow heads, all of it, and most of it for wide ones."""
    rows = properties.compile_ahead_of_time("sm_90", "stage04_hopper_aot.json", "mlstm_hopper", witness="bfloat16")
    assert {row["kernel"] for row in rows} == {name for name in vars(stage) if name.endswith("_kernel")}
    # Where as much of C is kept as there are registers, a few numbers of a tile go by way of the stack.
    most = {name: max(row["stack"] for row in rows if row["kernel"] == name) for name in {r["kernel"] for r in rows}}
    allowed = {"dq_kernel": 160, "state_times_keys_kernel": 48, "walk_kernel": 48}
    assert all(stack <= allowed.get(name, 0) for name, stack in most.items()), most


# ---------------------------------------------------------------------------------------------------------------------
# Mutants
# ---------------------------------------------------------------------------------------------------------------------
def suite(module) -> None:
    for regime, shift_f in (("typical", 0), ("resets", 0), ("typical", 5)):
        properties.compare_with_chunkwise(
            module.mlstm_hopper, 1, 2, 1100, 72, 104, dtype=BFLOAT16, regime=regime, shift_f=shift_f
        )
    # So many that no sequence is cut into spans: the walks find n and dn.
    properties.compare_with_chunkwise(module.mlstm_hopper, 1, 140, 300, 72, 104, dtype=BFLOAT16)


def suite_of_wide_heads(module) -> None:
    for regime, shift_f in (("typical", 0), ("resets", 0), ("typical", 5)):
        properties.compare_with_chunkwise(
            module.mlstm_hopper, 1, 2, 2200, 136, 264, dtype=BFLOAT16, regime=regime, shift_f=shift_f
        )


MUTANTS = [
    # causality and documents
    ("mask = (column <= row) & (column >= (bounds >> 7) - 1)", "mask = column >= (bounds >> 7) - 1"),
    ("mask = (column <= row) & (column >= (bounds >> 7) - 1)", "mask = column <= row"),
    ("mask = (column >= row) & (column < (bounds & 127))", "mask = column < (bounds & 127)"),
    ("mask = (column >= row) & (column < (bounds & 127))", "mask = column >= row"),
    ("log_w_state = tl.where(start < 0, b + m_first, -float(\"inf\"))", "log_w_state = b + m_first"),
    ("w_end = tl.where(offs_l >= start_last, tl.exp((g + u - m_last).to(tl.float32)), 0.0)",
     "w_end = tl.exp((g + u - m_last).to(tl.float32))"),
    ("tl.where(tl.max(start, axis=1) < 0, g, -float(\"inf\"))", "g"),
    # weights, normalizer
    ("exponent + rest, -float", "exponent, -float"),
    ("read = read * buffer(smem.r", "read = read + 0.0 * buffer(smem.r"),
    ("P = P * r[:, None]", "P = P"),
    ("S = gl.convert_layout(gl.sum(q_n, axis=1), vector)", "S = 0.0 * gl.convert_layout(gl.sum(q_n, axis=1), vector)"),
    ("n = n * decay + gl.sum(total, axis=0)", "n = n + gl.sum(total, axis=0)"),
    ("decay = next_decay(walk, number, BACKWARD)\n            gl.store(border, n,",
     "decay = gl.load(walk.decay_ptr + tile)\n            gl.store(border, n,"),
    ("n = gl.load(border, mask=mask, other=0.0)", "n += gl.load(border, mask=mask, other=0.0)"),
    ("buffer(smem.P, number).permute((1, 0)), y * read,", "buffer(smem.P, number).permute((1, 0)), y,"),
    ("(warpgroup_mma_wait(1, deps=[y]) + dn) * read", "warpgroup_mma_wait(1, deps=[y]) * read"),
    # the normalizer's gradient
    ("y = y + n * smem.delta.load(vector)[None, :]", "y = y + 0.0 * n * smem.delta.load(vector)[None, :]"),
    ("warpgroup_mma_wait(0, deps=[dP]) + rows.index(7)", "warpgroup_mma_wait(0, deps=[dP]) + 0.0 * rows.index(7)"),
    ("dP + delta[:, None] * Wr", "dP + 0.0 * delta[:, None] * Wr"),
    ("dh_h += read * q_y", "dh_h += 0.0 * read * q_y"),
    ("q_y += smem.q_y.index(1).load(vector)", "q_y += 0.0 * smem.q_y.index(1).load(vector)"),
    ("tl.where(S > 0, -1.0, 1.0)", "-1.0"),
    ("w = tl.load(rows_ptr + 5 * BLOCK) * tl.load(rows_ptr + 7 * BLOCK)", "w = 0.0 * tl.load(rows_ptr + 7 * BLOCK)"),
    ("weight = weight * rows.index(7)", "weight = weight + 0.0 * rows.index(7)"),
    # states, and one tile's decay where the next one's belongs
    ("decay = next_decay(walk, number, False)", "decay = gl.load(walk.decay_ptr + tile)"),
    ("C = C * decay\n        decay = next_decay(walk, number, BACKWARD)",
     "C = C * decay\n        decay = gl.load(walk.decay_ptr + tile)"),
    ("k_dk_tile, k_dk_state, decay, ends, T,", "k_dk_tile, k_dk_state, decay, None, T,"),
    # gradients of the gates
    ("gl.sum(gl.sum(C_then * C, axis=1), axis=0)", "gl.sum(gl.sum(C_then * 0.0, axis=1), axis=0)"),
    ("carry[0, ..., -1] = overlap", "carry[0, ..., -1] = 0.0 * overlap"),
    ("gl.where(sign == 0.0, dh_h, 0.0)", "dh_h"),
    ("to_h = tl.load(q_dq_ptr", "to_h = 0.0 * tl.load(q_dq_ptr"),
    ("to_state += tl.load", "to_state += 0.0 * tl.load"),
    ("before, after = before + tl.load(carry),", "before, after = before,"),
]  # fmt: skip


MUTANTS_OF_WIDE_HEADS = [
    # the walk
    ("(x.slice(half * 32, 32), rows.index(WRITE)", "(x.slice(half * 32, 32), rows.index(READ)"),
    ("decay = next_decay(walk, number, BACKWARD)\n        if y_desc is not None:",
     "decay = gl.load(walk.decay_ptr + tile)\n        if y_desc is not None:"),
    ("y = y * rows.index(READ).load(gl.SliceLayout(0, layout))[None, :]", "y = y * 1.0"),
    ("P = P if BACKWARD else P.permute((1, 0))", "P = P.permute((1, 0))"),
    ("overlap += gl.load(border)", "overlap += 0.0 * gl.load(border)"),
    ("((tile + 1) // BORDER - 1) * SIZE", "0 * SIZE"),
    ("weights_ptr + bh * spans + span) != 0.0", "weights_ptr + bh * spans + span) == 0.0"),
    ("y_ptr += (tile_c * BH + bh) * NT * DQK * BLOCK", "y_ptr += bh * NT * DQK * BLOCK"),
    # the tiles
    ("y += tl.load(y_ptr + part * stride_part", "y += 0.0 * tl.load(y_ptr + part * stride_part"),
    ("mask = (j <= i) & (j >= (bounds >> 7) - 1)", "mask = j >= (bounds >> 7) - 1"),
    ("mask = (j <= i) & (j >= (bounds >> 7) - 1)", "mask = j <= i"),
    ("mask = (j >= i) & (j < (bounds & 127))", "mask = j < (bounds & 127)"),
    ("mask = (j >= i) & (j < (bounds & 127))", "mask = j >= i"),
    ("dh_h = tl.sum(scores * dP, axis=1) + read * q_y", "dh_h = tl.sum(scores * dP, axis=1)"),
    ("P = (delta[:, None] * Wr + dP)", "P = (0.0 * delta[:, None] * Wr + dP)"),
    ("PARTS, PART) + delta[:, None] * n", "PARTS, PART) + 0.0 * delta[:, None] * n"),
    ("P = (dP + delta[None, :])", "P = (dP + 0.0 * delta[None, :])"),
    ("PARTS, PART) + dn) * read", "PARTS, PART) + 0.0 * dn) * read"),
    ("tl.store(P_ptr, (P * r[:, None])", "tl.store(P_ptr, (P * 1.0)"),
]  # fmt: skip


@ON_HOPPER
@pytest.mark.parametrize(("old", "new"), MUTANTS_OF_WIDE_HEADS)
def test_mutants_of_wide_heads_are_noticed(old, new, tmp_path):
    mutants.assert_noticed(
        suite_of_wide_heads, mutants.load_mutant("04_tfla_triton/mlstm_hopper.py", old, new, tmp_path)
    )


@ON_HOPPER
@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_mutants_are_noticed(old, new, tmp_path):
    mutants.assert_noticed(suite, mutants.load_mutant("04_tfla_triton/mlstm_hopper.py", old, new, tmp_path))
