"""One comparison for tests, notebooks and exercises: is this tensor equal to that one, as far as its dtype allows?

The error of a tensor is ||actual - expected|| / ||expected||, with `expected` from a float64 computation on the same
rounded inputs. It must stay within a budget that depends on the dtype and on what the tensor is.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

# dtype: budgets of outputs and states; of dq, dk, dv, dC_0, dn_0; of the gates' gradients
BUDGETS = {
    "float64": (1e-10, 1e-10, 1e-10),
    "float32": (1e-5, 2e-5, 1e-4),
    "float16": (1e-3, 1e-3, 2e-3),
    "bfloat16": (5e-3, 5e-3, 1e-2),
}
GATE_GRADIENTS = ("di", "df", "dm_0")
# Entries that are too small for the dtype: below the smallest normal number digits are lost, and some GPUs round to 0.
# For float16 it is half the smallest number of all, since everything is computed in float32 and only then rounded.
TINIEST = {"float64": 1e-307, "float32": 1e-37, "float16": 3e-8, "bfloat16": 1e-37}


class CheckFailed(AssertionError):
    """Raised by check; its text is the table."""


def budget(name: str, dtype: str) -> float:
    """The budget of the tensor called `name`: h, C, n, m; dq, dk, dv, dC_0, dn_0; di, df, dm_0."""
    return BUDGETS[dtype][2 if name in GATE_GRADIENTS else 1 if name.startswith("d") else 0]


def to_numpy(x: Any) -> np.ndarray:
    """A NumPy array, torch tensor or nested list as float64."""
    if hasattr(x, "detach"):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def dtype_name(x: Any) -> str:
    return str(getattr(x, "dtype", "float64")).removeprefix("torch.")


def relative_error(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected||; inf where actual is not finite, 0 where both are 0 or empty."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    if not np.isfinite(actual).all():
        return float("inf")
    # The largest entry is taken out first: the squares of 10^200 would overflow.
    size = max(np.abs(expected).max(initial=0), np.abs(actual - expected).max(initial=0)) or 1.0
    error, norm = np.linalg.norm((actual - expected) / size), np.linalg.norm(expected / size)
    return float(error / norm) if norm > 0 else float("inf") if error > 0 else 0.0


def check(
    actual: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    dtype: Any = None,
    budgets: Mapping[str, float] | None = None,
    scales: Mapping[str, float] | None = None,
    chunk_size: int | None = None,
    verbose: bool = True,
) -> None:
    """Compares the tensors of two dictionaries by name; prints a table; raises if one of them is off.

    Args:
        actual: {"h": ..., "dq": ..., ...}: NumPy arrays or torch tensors.
        expected: at least the same names, usually in float64.
        dtype: whose budgets to use, "bfloat16" or torch.bfloat16; by default that of each actual tensor.
        budgets: {name: budget} for tensors that have none of their own.
        scales: {name: norm of the sum of absolute values}, for tensors that are sums of terms which may cancel, down
            to an exact 0: what rounding the terms, in float32 or float64, leaves there is no error.
        chunk_size: also say in which chunk the worst step is.
        verbose: print the table also if all is well.

    Raises:
        CheckFailed: with the table, if a shape differs, a number is not finite, or an error is over its budget.
        KeyError: if a name is missing in expected.
    """
    rows, failed = [], False
    for name, x in actual.items():
        reference = to_numpy(expected[name])
        kind = dtype_name(x) if dtype is None else str(dtype).removeprefix("torch.")
        allowed = budgets[name] if budgets and name in budgets else budget(name, kind)
        tiniest = TINIEST.get(dtype_name(x), 0.0)
        x = to_numpy(x)
        if x.shape != reference.shape:
            rows.append((name, f"shape {x.shape}", f"{reference.shape}", "", False))
            continue
        bad = ~np.isfinite(x)
        error, where = relative_error(x, reference), ""
        if x.size and (bad.any() or error > 0):
            distance = np.where(bad, np.inf, np.abs(x - reference))
            worst = np.unravel_index(np.argmax(distance), x.shape)
            where = "(" + ", ".join(str(int(j)) for j in worst[:3]) + ")"
            if chunk_size and x.ndim >= 3 and name not in ("C", "n", "dC_0", "dn_0"):
                where += f" in chunk {worst[2] // chunk_size}"
        rounding = 1e-14 if kind == "float64" else 4 * 2.0**-24
        slack = tiniest * np.sqrt(x.size) + rounding * (scales or {}).get(name, 0.0)
        fine = not bad.any() and (error <= allowed or np.linalg.norm(x - reference) <= slack)
        rows.append((name, f"{bad.sum()} not finite" if bad.any() else f"{error:.1e}", f"{allowed:.0e}", where, fine))
    failed = not all(row[-1] for row in rows)

    lines = [f"{'tensor':<8}{'error':>16}{'budget':>10}   {'worst (b, h, t)'}"]
    lines += [f"{n:<8}{e:>16}{b:>10}   {w}{'' if fine else '   <-- off'}" for n, e, b, w, fine in rows]
    table = "\n".join(lines)
    if failed:
        raise CheckFailed("\n" + table)
    if verbose:
        print(table)


def same_gauge(state: tuple, m: Any) -> dict[str, np.ndarray]:
    """A state (C, n, m') as {"C": ..., "n": ...} with the stabilizer m.

    (C, n, m) and (C e^(-c), n e^(-c), m + c) are the same memory. Two forms of the mLSTM may round m differently, and
    so must be compared in one gauge.
    """
    C, n, m_state = (to_numpy(x) for x in state)
    shift = np.exp(np.clip(m_state - to_numpy(m), -800, 700))
    shift = np.where(m_state - to_numpy(m) < -740, 0.0, shift)
    return {"C": C * shift[..., None, None], "n": n * shift[..., None]}
