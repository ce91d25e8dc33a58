"""Inputs for the mLSTM: seeded random ones over gate regimes, and real ones made from text.

Everything is drawn with NumPy from a seed, so that every stage, dtype and device gets the same numbers.
"""

import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Inputs(NamedTuple):
    """q, k (B, NH, T, DQK), v (B, NH, T, DHV), i, f (B, NH, T): NumPy arrays or torch tensors."""

    q: Any
    k: Any
    v: Any
    i: Any
    f: Any


def _either(rng: np.random.Generator, shape, size: float) -> np.ndarray:
    return rng.choice([-size, size], size=shape)


def _some(rng: np.random.Generator, x: np.ndarray, share: float, value: float) -> np.ndarray:
    return np.where(rng.random(x.shape) < share, value, x)


# name: (draw(rng, shape) -> (i, f), what it is there for)
REGIMES: dict[str, tuple[Callable, str]] = {
    "typical": (lambda rng, n: (rng.normal(0, 1, n), rng.normal(3, 1, n)), "i ~ N(0, 1), f ~ N(3, 1)"),
    "initial": (lambda rng, n: (rng.normal(-10, 1, n), rng.normal(3, 1, n)), "i ~ N(-10, 1): e^(-m) wins the max"),
    "hot": (lambda rng, n: (rng.normal(15, 3, n), rng.normal(3, 1, n)), "i ~ N(15, 3): overflows without a stabilizer"),
    "forgetting": (lambda rng, n: (rng.normal(0, 1, n), rng.normal(-3, 2, n)), "f ~ N(-3, 2): short memory"),
    "shut": (
        lambda rng, n: (rng.normal(0, 1, n), _some(rng, rng.normal(3, 1, n), 0.05, -1e4)),
        "f = -10^4 at 5 % of the steps: differences of prefix sums lose their digits",
    ),
    "fifty": (lambda rng, n: (_either(rng, n, 50.0), _either(rng, n, 50.0)), "gates at +-50"),
    "saturated": (lambda rng, n: (_either(rng, n, 1e4), _either(rng, n, 1e4)), "gates at +-10^4"),
    "resets": (
        lambda rng, n: (rng.normal(0, 1, n), _some(rng, rng.normal(3, 1, n), 0.1, -np.inf)),
        "f = -inf at 10 % of the steps: documents packed into one sequence",
    ),
    "padding": (
        lambda rng, n: (_some(rng, rng.normal(0, 1, n), 0.3, -np.inf), rng.normal(3, 1, n)),
        "i = -inf at 30 % of the steps: nothing is written there",
    ),
}
# In these regimes m is so large that |n . s q| always wins against e^(-m), and h has a pole where n . s q = 0. Random
# q and k of both signs come close to it, and then no arithmetic can keep its digits. Entries of q and k that are
# positive keep away from the pole, as keys and queries that match do.
AWAY_FROM_POLE = ("hot", "fifty", "saturated")


def random_inputs(
    B: int,
    NH: int,
    T: int,
    DQK: int,
    DHV: int,
    *,
    regime: str = "typical",
    seed: int = 0,
    dtype: Any = np.float64,
    device: str = "cpu",
    layout: str = "BHTD",
) -> Inputs:
    """Random inputs: q, k, v ~ N(0, 1), the gates as the regime says.

    Args:
        regime: a key of REGIMES.
        dtype: of q, k, v. A NumPy dtype gives NumPy arrays; a torch dtype gives tensors on `device`. The gates are
            float32 where dtype has 16 bits.
        layout: "BHTD", or "BTHD": stored as (B, T, NH, D), as a model's projections give it, and seen as
            (B, NH, T, D) through a transpose.

    Raises:
        ValueError: for an unknown regime or layout.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {', '.join(REGIMES)}, got {regime!r}")
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, B, NH, T, DQK))
    if regime in AWAY_FROM_POLE:
        q, k = np.abs(q), np.abs(k)
    v = rng.normal(size=(B, NH, T, DHV))
    i, f = REGIMES[regime][0](rng, (B, NH, T))
    return Inputs(*(cast(x, dtype, device, layout, gate=x.ndim == 3) for x in (q, k, v, i, f)))


def random_state(B: int, NH: int, DQK: int, DHV: int, *, seed: int = 0, dtype: Any = np.float64, device: str = "cpu"):
    """A random state (C, n, m): C, n, m ~ N(0, 1), with the dtype that states have beside inputs of `dtype`."""
    rng = np.random.default_rng([seed, 1])
    shapes = (B, NH, DQK, DHV), (B, NH, DQK), (B, NH)
    return tuple(cast(rng.normal(size=shape), dtype, device, gate=True) for shape in shapes)


def cast(x: np.ndarray, dtype: Any, device: str = "cpu", layout: str = "BHTD", *, gate: bool = False) -> Any:
    """A float64 array as a NumPy array or torch tensor of the dtype; gates and states have at least 32 bits."""
    if layout not in ("BHTD", "BTHD"):
        raise ValueError(f"layout must be 'BHTD' or 'BTHD', got {layout!r}")
    if layout == "BTHD":
        x = np.ascontiguousarray(np.swapaxes(x, 1, 2))
    if is_torch(dtype):
        import torch

        dtype = torch.promote_types(dtype, torch.float32) if gate else dtype
        x = torch.from_numpy(np.ascontiguousarray(x)).to(device, dtype)
        return x.transpose(1, 2) if layout == "BTHD" else x
    x = x.astype(np.result_type(dtype, np.float32) if gate else dtype)
    return np.swapaxes(x, 1, 2) if layout == "BTHD" else x


def is_torch(dtype: Any) -> bool:
    return type(dtype).__module__ == "torch"


# ---------------------------------------------------------------------------------------------------------------------
# Real input
# ---------------------------------------------------------------------------------------------------------------------
def read_text(length: int, path: str | Path | None = None) -> bytes:
    """The first `length` bytes of a file, or by default of the Python standard library's own sources in sorted order.

    Raises:
        ValueError: if the file cannot be read or is shorter.
    """
    if path is not None:
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the text {path}: {error.strerror}") from error
    else:
        text = b""
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text += source.read_bytes()
            if len(text) >= length:
                break
    if len(text) < length:
        raise ValueError(f"the text {path or 'of the standard library'} has {len(text)} bytes, but {length} are needed")
    return text[:length]


# A language model over bytes that train_lm.py of stage 05 trained on Python sources: size "small", kernel "exp".
BYTE_LM = Path(__file__).parent / "byte_lm.safetensors"


@functools.cache
def byte_lm() -> Any:
    """The model in BYTE_LM, in float64 on the CPU."""
    import torch
    from language_model import load

    return load(BYTE_LM, dtype=torch.float64).requires_grad_(False)


def text_inputs(
    text: bytes, *, B: int = 1, NH: int = 4, DQK: int = 32, DHV: int = 64, dtype: Any = np.float64, device: str = "cpu"
) -> Inputs:
    """q, k, v, i, f of a trained mLSTM layer that reads `text`, a byte a step.

    It is the second and last layer of a small language model (BYTE_LM), which has 4 heads of d_qk = 32 and d_hv = 64.
    Fewer heads are some of these, from the first to the last; smaller heads are the first columns of these.

    Args:
        text: B * T bytes; the batch entries are consecutive pieces of it, each read from its own beginning.

    Raises:
        ValueError: if B does not divide the length of the text, or the layer has not so many heads or columns.
    """
    if len(text) % B:
        raise ValueError(f"the text must have a multiple of B = {B} bytes, got {len(text)}")
    config = byte_lm().config
    for name, size, most in (("NH", NH, config.heads), ("DQK", DQK, config.d_qk), ("DHV", DHV, config.d_hv)):
        if not 1 <= size <= most:
            raise ValueError(f"{name} must be 1 to {most}, which the trained layer has, got {size}")
    import torch

    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).reshape(B, -1).long()
    heads = np.linspace(0, config.heads - 1, NH).round().astype(int)
    q, k, v, i, f = (x.numpy()[:, heads] for x in byte_lm().cell_inputs(tokens, config.layers - 1))
    parts = (q[..., :DQK], k[..., :DQK], v[..., :DHV], i, f)
    return Inputs(*(cast(x, dtype, device, gate=x.ndim == 3) for x in parts))
