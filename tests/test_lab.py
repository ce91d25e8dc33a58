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
