"""The lab's own check and inputs: what must fail fails, what must be refused is refused."""

import numpy as np
import pytest
import torch
from tfla_lab.check import CheckFailed, check, same_gauge
from tfla_lab.inputs import REGIMES, random_inputs, random_state, read_text, text_inputs

ONES = np.ones((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (np.where(ONES.cumsum().reshape(ONES.shape) == 7, np.nan, ONES), "1 not finite"),
        (np.where(ONES.cumsum().reshape(ONES.shape) == 7, np.inf, ONES), "1 not finite"),
        (ONES[..., :3], "shape"),
        (ONES + 1e-9, "1.0e-09"),
    ],
)
def test_check_rejects(actual, message):
    with pytest.raises(CheckFailed, match=message):
        check({"h": actual}, {"h": ONES}, verbose=False)


def test_check_accepts_within_the_budget_and_names_the_worst_step(capsys):
    actual = torch.ones(1, 2, 3, 4)
    actual[0, 1, 2, 3] += 1e-5
    check({"h": actual}, {"h": ONES}, chunk_size=2)
    assert "(0, 1, 2) in chunk 1" in capsys.readouterr().out
    check({"h": ONES[:, :, :0]}, {"h": ONES[:, :, :0]}, verbose=False)


def test_same_gauge():
    C, n, m = random_state(1, 2, 3, 4)
    moved = same_gauge((C * np.exp(-2), n * np.exp(-2), m + 2), m)
    np.testing.assert_allclose(moved["C"], C)
    np.testing.assert_allclose(moved["n"], n)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_same_seed_gives_the_same_numbers_everywhere(regime):
    arrays = random_inputs(2, 3, 5, 4, 6, regime=regime, seed=1)
    tensors = random_inputs(2, 3, 5, 4, 6, regime=regime, seed=1, dtype=torch.float64, layout="BTHD")
    for x, y in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(x, y.numpy())
    assert tensors.q.transpose(1, 2).is_contiguous()
    assert random_inputs(1, 1, 5, 4, 6, dtype=torch.bfloat16).f.dtype == torch.float32


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="regime must be one of"):
        random_inputs(1, 1, 5, 4, 6, regime="unknown")
    with pytest.raises(ValueError, match="layout must be"):
        random_inputs(1, 1, 5, 4, 6, layout="TBHD")
    with pytest.raises(ValueError, match="cannot read the text"):
        read_text(5, tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_bytes(b"abc")
    with pytest.raises(ValueError, match="has 3 bytes, but 5 are needed"):
        read_text(5, tmp_path / "short.txt")
    with pytest.raises(ValueError, match="multiple of B = 2"):
        text_inputs(b"abc", B=2)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs made from text
# ---------------------------------------------------------------------------------------------------------------------
TEXT = b"def add(a, b):\n    return a + b  # a sum\n\n"  # 42 bytes


@pytest.mark.parametrize("sizes", [{}, {"B": 2, "NH": 3, "DQK": 24, "DHV": 40}, {"B": 3, "NH": 1, "DQK": 1, "DHV": 1}])
def test_a_text_gives_the_sizes_asked_for(sizes):
    B, NH, DQK, DHV = ({"B": 1, "NH": 4, "DQK": 32, "DHV": 64} | sizes).values()
    T = len(TEXT) // B
    x = text_inputs(TEXT, **sizes)
    shapes = [(B, NH, T, DQK), (B, NH, T, DQK), (B, NH, T, DHV), (B, NH, T), (B, NH, T)]
    assert [y.shape for y in x] == shapes
    tensors = text_inputs(TEXT, **sizes, dtype=torch.bfloat16)
    assert [tuple(y.shape) for y in tensors] == shapes
    assert [y.dtype for y in tensors] == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert all(np.isfinite(y).all() for y in x)


def test_smaller_sizes_are_parts_of_the_trained_layer():
    layer, part = text_inputs(TEXT), text_inputs(TEXT, NH=2, DQK=24, DHV=40)
    for whole, y, size in zip(layer, part, (24, 24, 40, None, None), strict=True):
        heads = whole[:, [0, 3]]  # the first and the last
        np.testing.assert_array_equal(y, heads if size is None else heads[..., :size])
    np.testing.assert_array_equal(text_inputs(TEXT, NH=1).f, layer.f[:, :1])
    # They remember for different times, in this order.
    assert (np.diff(layer.f.mean(axis=(0, 2))) > 0).all()


def test_batch_entries_are_consecutive_pieces_of_the_text():
    batch = text_inputs(TEXT, B=3)
    for number in range(3):
        piece = text_inputs(TEXT[14 * number : 14 * (number + 1)])
        for x, y in zip(batch, piece, strict=True):
            np.testing.assert_allclose(x[number], y[0], rtol=1e-10, atol=1e-12)
    assert not np.allclose(batch.q[0], batch.q[1])


def test_a_text_is_read_from_left_to_right():
    whole, changed = text_inputs(TEXT), text_inputs(TEXT[:30] + b"?" + TEXT[31:])
    for x, y in zip(whole, changed, strict=True):
        np.testing.assert_allclose(x[:, :, :30], y[:, :, :30], rtol=1e-10, atol=1e-12)
        assert not np.allclose(x[:, :, 30:], y[:, :, 30:])


@pytest.mark.parametrize(("name", "most"), [("NH", 4), ("DQK", 32), ("DHV", 64)])
def test_more_than_the_trained_layer_has_is_refused(name, most):
    assert text_inputs(TEXT, **{name: most}).q.size
    for size in (0, most + 1):
        with pytest.raises(ValueError, match=f"^{name} must be 1 to {most}, .*got {size}$"):
            text_inputs(TEXT, **{name: size})
