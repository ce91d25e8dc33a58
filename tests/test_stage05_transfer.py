"""Stage 05, the transfer behaviour: the gains that the TFLA paper reports, measured on the cells of this repository.

The paper's numbers are read from its figures, to two digits. Over seeds, our gains after the norm spread by +- 0.01.
"""

import numpy as np
import pytest
from tfla_lab import transfer
from tfla_lab.transfer import FORMS, gain, gain_map, gain_of, hidden_states, predicted_rms

# At f = 3, after RMSNorm with eps = 1e-6: input gate -> gain
PAPER_AFTER_NORM = {-12: 0.02, -10: 0.14, -8: 0.72, -5: 0.99, -2: 1.00, 0: 1.00, 8: 1.00}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("i", "paper"), PAPER_AFTER_NORM.items())
def test_gain_after_the_norm_is_that_of_the_paper(form, i, paper):
    for seed in range(3):
        assert gain(form, i, 3, eps=1e-6, seed=seed) == pytest.approx(paper, abs=0.025)


@pytest.mark.parametrize("i", [-12, -10, -8, -5, -2, 0])
def test_exp_and_sig_are_nearly_the_same_after_the_norm(i):
    assert gain("exp", i, 3, eps=1e-6) == pytest.approx(gain("sig", i, 3, eps=1e-6), abs=0.005)


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_eps_moves_the_transition(form):
    """eps = 1e-2: closed below -5, open from -2 on."""
    gains = [gain(form, i, 3, eps=1e-2) for i in (-8, -5, -2, 0)]
    assert gains[0] < 0.03
    assert 0.15 < gains[1] < 0.3
    assert gains[2] > 0.93
    assert gains[3] > 0.97


def test_before_the_norm_sig_grows_to_15():
    """In the open corner of the map: a memory that forgets nothing gives h ~ sqrt(t), on average 2/3 sqrt(T)."""
    for seed in range(3):
        measured = gain("sig", 8, 12, seed=seed)
        assert measured == pytest.approx(15, abs=0.6)
        assert measured == pytest.approx(2 / 3 * 512**0.5, rel=0.05)
    gains = [gain("sig", 8, f) for f in (-5, 0, 3, 6, 12)]
    assert gains == sorted(gains)


def test_before_the_norm_exp_saturates():
    """Where the input gates are open, h does not depend on them, and its scale not on the memory.

    The paper's map shows about 5 there. That is a mean of quotients whose denominator n . q comes close to 0: over
    seeds it lies between 5 and 11, while the median over the steps stays at 1.4 to 1.5.
    """
    G = {(i, f): gain("exp", i, f) for i in (4, 8) for f in (6, 12)}
    assert G[4, 12] == pytest.approx(G[8, 12], rel=0.01)
    corner = [gain("exp", 8, 12, seed=seed) for seed in range(8)]
    assert 4.5 < np.median(corner) < 7.5
    assert all(4 < x < 15 for x in corner)
    for f in (0, 3, 6, 12):
        h, v = (x.abs().amax(dim=-1).median().item() for x in hidden_states("exp", 8, f))
        assert 1.0 < h / v < 1.8


@pytest.mark.parametrize("f", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("i", [-12.0, -5.0, 0.0, 5.0])
def test_predicted_rms_is_that_of_sig(i, f):
    h, _ = hidden_states("sig", i, f)
    assert h.square().mean().sqrt().item() == pytest.approx(predicted_rms(i, f), rel=0.05)


def test_gain_map_is_gain_at_every_pair():
    options = {"T": 20, "d": 8, "seed": 3}
    maps = gain_map("sig", [-10, 0], [-1, 3, 6], eps=[None, 1e-6], **options)
    assert maps[None].shape == (3, 2)
    assert maps[1e-6][2, 0] == gain("sig", -10, 6, eps=1e-6, **options)
    assert maps[None][0, 1] == gain_of(*hidden_states("sig", 0, -1, **options))


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="form must be one of exp, sig, got 'gla'"):
        transfer.gain("gla", 0, 0)
