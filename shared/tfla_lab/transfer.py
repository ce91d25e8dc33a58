"""How strongly a head is heard, as a function of its gates: the gain of the mLSTM's cells, before and after a norm.

Following the TFLA paper (arXiv 2503.14376, the section on transfer behaviour): both gates are held constant over the
sequence, q, k, v ~ N(0, 1), and the gain is

    G = mean_t max|h_t| / mean_t max|v_t|,        max over the head dimension.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

FORMS = ("exp", "sig")


def hidden_states(
    form: str, i: float, f: float, *, T: int = 512, d: int = 128, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """h and v, (T, d), of one head with d_qk = d_hv = d and gates that are i and f at every step.

    Args:
        form: "exp" (mlstm_parallel of stage 02) or "sig" (mlstmsig_parallel of stage 05).
        i, f: gate pre-activations.
        seed: of q, k and v, which are the same for all gates and both forms.
    """
    if form == "exp":
        from mlstm_parallel import mlstm_parallel as cell
    elif form == "sig":
        from mlstmsig_reference import mlstmsig_parallel as cell
    else:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    rng = np.random.default_rng(seed)
    q, k, v = (torch.from_numpy(x).to(dtype) for x in rng.normal(size=(3, 1, 1, T, d)))
    gates = (torch.full((1, 1, T), float(x), dtype=dtype) for x in (i, f))
    return cell(q, k, v, *gates)[0, 0], v[0, 0]


def rms_norm(h: Tensor, eps: float) -> Tensor:
    """h / sqrt(mean square over the head dimension + eps)."""
    return h / torch.sqrt(h.square().mean(dim=-1, keepdim=True) + eps)


def gain_of(h: Tensor, v: Tensor, eps: float | None = None) -> float:
    """G for given h and v, (T, d); with eps, of the h behind RMSNorm."""
    y = h if eps is None else rms_norm(h, eps)
    return (y.abs().amax(dim=-1).mean() / v.abs().amax(dim=-1).mean()).item()


def gain(form: str, i: float, f: float, *, eps: float | None = None, **options) -> float:
    """G at one pair of gates, before the norm (eps None) or after it; options are those of hidden_states."""
    return gain_of(*hidden_states(form, i, f, **options), eps)


def gain_map(
    form: str, i: Sequence[float], f: Sequence[float], *, eps: Iterable[float | None] = (None, 1e-6, 1e-2), **options
) -> dict[float | None, np.ndarray]:
    """{eps: G (len(f), len(i))} for all pairs of gates. Every h is computed once, for all eps."""
    eps = list(eps)
    maps = {x: np.empty((len(f), len(i))) for x in eps}
    for row, f_value in enumerate(f):
        for column, i_value in enumerate(i):
            h, v = hidden_states(form, i_value, f_value, **options)
            for x in eps:
                maps[x][row, column] = gain_of(h, v, x)
    return maps


def predicted_rms(i: float, f: float) -> float:
    """sqrt(E h^2) of the mLSTMsig in a long sequence of such inputs: sigmoid(i) / sqrt(1 - sigmoid(f)^2)."""
    sigmoid_i, sigmoid_f = 1 / (1 + np.exp(-i)), 1 / (1 + np.exp(-f))
    return sigmoid_i / np.sqrt(1 - sigmoid_f**2)
