"""The exercises of stage 03: their checks, and wrong answers that the checks must reject."""

from collections.abc import Callable

import numpy as np
import torch

from tfla_lab.check import CheckFailed, check, same_gauge
from tfla_lab.exercise import exercise
from tfla_lab.forms import FORMS, has_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: exercise 3 is skipped there
    triton = None


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 1: padding
# ---------------------------------------------------------------------------------------------------------------------
@exercise(1)
def check_1(pad_gates: Callable) -> None:
    """pad_gates(i, f, L) -> (i, f), both (NC, L): padded steps must change nothing, whatever k and v hold there."""
    from mlstm_recurrent import mlstm_recurrent

    def final_state(k, v, i, f):
        x = (k, k, v, i, f)
        return mlstm_recurrent(*(y[None, None] for y in x), return_state=True)[1]

    rng = np.random.default_rng(0)
    forgets = "keys and values of 0 were padded, and still the memory has changed: a padded step forgets"
    writes = "the padded steps write what stands in k and v there into the memory"
    too_large = (
        "the gates of this case are i near -20,000 and f near -30,000. Beside them the padding's input gate is large: "
        "it writes, or raises m so far that the memory underflows to 0"
    )
    typical = [(T, L, 1.0, 3.0, (forgets, writes)) for T, L in ((13, 8), (8, 8), (1, 4), (21, 4))]
    for T, L, i_mean, f_mean, messages in [*typical, (3, 4, -2e4, -3e4, (too_large, too_large))]:
        case = f"T = {T}, L = {L}"
        i, f = rng.normal(i_mean, 1, T), rng.normal(f_mean, 1, T)
        k, v = rng.normal(size=(2, T, 3))
        i_chunks, f_chunks = (np.asarray(x) for x in pad_gates(i.copy(), f.copy(), L))
        NC = -(-T // L)
        for name, x, original in (("i", i_chunks, i), ("f", f_chunks, f)):
            assert x.shape == (NC, L), (
                f"{case}: {name} must have shape (NC, L) = {(NC, L)}, got {x.shape}. "
                "NC is T / L rounded up: a T that is a multiple of L needs no padding."
            )
            assert np.array_equal(x.ravel()[:T], original), (
                f"{case}: the steps of {name} are out of order. Chunk c holds the steps c L .. c L + L - 1, and the "
                "padding stands at the very end."
            )
        padding = NC * L - T
        expected = final_state(k, v, i, f)
        for content, message in zip((0.0, 100.0), messages, strict=True):
            k_long, v_long = (np.concatenate([x, np.full((padding, 3), content)]) for x in (k, v))
            actual = final_state(k_long, v_long, i_chunks.ravel(), f_chunks.ravel())
            m = expected[2]
            try:
                check(same_gauge(actual, m), same_gauge(expected, m), verbose=False)
            except CheckFailed as error:
                raise CheckFailed(f"{case}: {message}.{error}") from None


def _pad(x: np.ndarray, L: int, fill: float) -> np.ndarray:
    return np.concatenate([x, np.full(-len(x) % L, fill)]).reshape(-1, L)


def wrong_1_forgets_everything(i, f, L):
    """f = -inf: "the padding is another document". It forgets what the last real step left."""
    return _pad(i, L, -np.inf), _pad(f, L, -np.inf)


def wrong_1_f_zero(i, f, L):
    """f = 0, the usual padding: but f is a pre-activation, and sigmoid(0) = 1/2 forgets half at every step."""
    return _pad(i, L, -np.inf), _pad(f, L, 0.0)


def wrong_1_f_nearly_open(i, f, L):
    """f = 10 is nearly open: it still forgets one part in 20,000 at every step."""
    return _pad(i, L, -np.inf), _pad(f, L, 10.0)


def wrong_1_i_zero(i, f, L):
    """i = 0 writes k v^T with weight e^0 = 1."""
    return _pad(i, L, 0.0), _pad(f, L, np.inf)


def wrong_1_i_very_small(i, f, L):
    """i = -10^4 is not small beside a memory that is smaller still: only -inf is below every number."""
    return _pad(i, L, -1e4), _pad(f, L, np.inf)


def wrong_1_in_front(i, f, L):
    """Pads in front: all steps move to other places."""
    return tuple(_pad(x[::-1], L, fill)[::-1, ::-1] for x, fill in ((i, -np.inf), (f, np.inf)))


def wrong_1_one_chunk_too_many(i, f, L):
    """Adds L - T % L steps: a whole empty chunk where T is a multiple of L."""
    return tuple(
        np.concatenate([x, np.full(L - len(x) % L, fill)]).reshape(-1, L) for x, fill in ((i, -np.inf), (f, np.inf))
    )


def wrong_1_interleaved(i, f, L):
    """Step t goes to chunk t % NC: chunks must be stretches of consecutive steps."""
    return tuple(_pad(x, L, fill).reshape(L, -1).T for x, fill in ((i, -np.inf), (f, np.inf)))


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 2: the state after a chunk
# ---------------------------------------------------------------------------------------------------------------------
@exercise(2)
def check_2(chunk_update: Callable) -> None:
    """chunk_update(C, n, m, k, v, i, f_bar) -> (C, n, m): the state after the chunk, in any gauge that stays finite."""
    from mlstm_recurrent import log_sigmoid, mlstm_recurrent

    rng = np.random.default_rng(0)
    typical = "the weights of the steps, or the decay of the old memory, are off"
    cases = [  # L, mean of i, m before the chunk, step of a reset, what a failure here means
        (1, 0.0, 0.0, None, "the update of a single step is that of stage 01: g = f_bar, a = i"),
        (4, 0.0, 0.0, None, typical),
        (16, 0.0, 1.5, None, typical + "; here m is not 0 before the chunk"),
        (16, 800.0, 0.0, None, "the input gates are hot, and m_c must be large enough for e^(a - m_c)"),
        (16, 0.0, 900.0, None, "the old memory is huge, and m_c must be large enough for e^(g + m - m_c)"),
        (
            8,
            0.0,
            0.0,
            3,
            "f_bar is -inf at step 3, a reset: what was written before it is gone, and g - b_j is inf - inf",
        ),
    ]
    for L, i_mean, m, reset, meaning in cases:
        C, n = rng.normal(size=(5, 3)), rng.normal(size=5)
        k, v = rng.normal(size=(L, 5)), rng.normal(size=(L, 3))
        i, f = rng.normal(i_mean, 1, L), rng.normal(1, 1, L)
        if reset is not None:
            f[reset] = -np.inf
        state = tuple(x[None, None] for x in (C, n, np.array(m)))
        steps = (x[None, None] for x in (k, k, v, i, f))
        expected = mlstm_recurrent(*steps, initial_state=state, return_state=True)[1]
        with np.errstate(all="ignore"):
            actual = chunk_update(C.copy(), n.copy(), m, k.copy(), v.copy(), i.copy(), log_sigmoid(f))
        assert isinstance(actual, tuple), f"chunk_update must return the tuple (C, n, m), got {type(actual).__name__}"
        assert len(actual) == 3, f"chunk_update must return the three (C, n, m), got {len(actual)}"
        actual = tuple(np.asarray(x)[None, None] for x in actual)
        case = f"L = {L}, i near {i_mean:g}, m = {m:g} before the chunk"
        with np.errstate(all="ignore"):
            for name, x, y in zip("Cnm", actual, expected, strict=True):
                assert x.shape == y.shape, f"{case}: {name} must have shape {y.shape[2:]}, got {x.shape[2:]}"
            try:
                check(same_gauge(actual, expected[2]), same_gauge(expected, expected[2]), verbose=False)
            except CheckFailed as error:
                raise CheckFailed(f"{case}: {meaning}.{error}") from None


def _weights(i: np.ndarray, f_bar: np.ndarray) -> tuple[np.ndarray, float]:
    """a, as a suffix sum, and g."""
    return np.append(np.cumsum(f_bar[:0:-1])[::-1], 0.0) + i, f_bar.sum()


def _update(C, n, k, v, decay, weight) -> tuple[np.ndarray, np.ndarray]:
    return decay * C + (weight[:, None] * k).T @ v, decay * n + weight @ k


def wrong_2_prefix(C, n, m, k, v, i, f_bar):
    """b_j + i_j instead of a_j: what was forgotten before step j, not what is forgotten after it."""
    g, a = f_bar.sum(), np.cumsum(f_bar) + i
    m_c = max(g + m, a.max())
    return *_update(C, n, k, v, np.exp(g + m - m_c), np.exp(a - m_c)), m_c


def wrong_2_own_gate(C, n, m, k, v, i, f_bar):
    """The suffix sum from r = j: a step's own forget gate does not touch what that step writes."""
    a, g = _weights(i, f_bar)
    a = a + f_bar
    m_c = max(g + m, a.max())
    return *_update(C, n, k, v, np.exp(g + m - m_c), np.exp(a - m_c)), m_c


def wrong_2_no_decay(C, n, m, k, v, i, f_bar):
    """The old memory is not forgotten at all."""
    a, g = _weights(i, f_bar)
    m_c = max(g + m, a.max())
    return *_update(C, n, k, v, np.exp(m - m_c), np.exp(a - m_c)), m_c


def wrong_2_no_rescale(C, n, m, k, v, i, f_bar):
    """The old memory decays by e^g, but is still in the gauge of the old m."""
    a, g = _weights(i, f_bar)
    m_c = max(g + m, a.max())
    return *_update(C, n, k, v, np.exp(g), np.exp(a - m_c)), m_c


def wrong_2_old_m(C, n, m, k, v, i, f_bar):
    """Everything in the gauge of the old m: right for small gates, overflows for hot ones."""
    a, g = _weights(i, f_bar)
    return *_update(C, n, k, v, np.exp(g), np.exp(a - m)), m


def wrong_2_m_of_the_chunk_alone(C, n, m, k, v, i, f_bar):
    """m_c = max a: the old memory, which may be the larger part, overflows."""
    a, g = _weights(i, f_bar)
    m_c = a.max()
    return *_update(C, n, k, v, np.exp(g + m - m_c), np.exp(a - m_c)), m_c


def wrong_2_difference(C, n, m, k, v, i, f_bar):
    """a = g - b + i, as the paper writes it: inf - inf = NaN in front of a reset."""
    b = np.cumsum(f_bar)
    g, a = b[-1], b[-1] - b + i
    m_c = max(g + m, a.max())
    return *_update(C, n, k, v, np.exp(g + m - m_c), np.exp(a - m_c)), m_c


def wrong_2_n_unweighted(C, n, m, k, v, i, f_bar):
    """n adds up the keys without their weights."""
    a, g = _weights(i, f_bar)
    m_c = max(g + m, a.max())
    C, _ = _update(C, n, k, v, np.exp(g + m - m_c), np.exp(a - m_c))
    return C, np.exp(g + m - m_c) * n + k.sum(axis=0), m_c


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 3: a Triton kernel
# ---------------------------------------------------------------------------------------------------------------------
GUARD, SENTINEL = 512, 12345.0  # this many entries in front of y and behind it hold a value that must stay


@exercise(3)
def check_3(rows_dot: Callable) -> str | None:
    """rows_dot(x, z, y) launches the kernel on (T, D) views x, z and fills y (T,) with the row sums of x * z."""
    if reason := FORMS["mlstm_limit_chunk"].missing():
        return reason
    device = "cuda" if has_gpu() else "cpu"
    cases = [(32, 16, 1, 1), (37, 16, 1, 1), (32, 20, 1, 1), (50, 24, 3, 2), (1, 1, 2, 1)]
    for T, D, heads_x, heads_z in cases:
        x, z = (_one_head(T, D, heads, seed).to(device) for seed, heads in ((0, heads_x), (1, heads_z)))
        x, z = x[GUARD : GUARD + T, 0, :D], z[GUARD : GUARD + T, 0, :D]
        case = f"T = {T}, D = {D}, strides of x {x.stride()}, of z {z.stride()}"
        buffer = torch.full((T + 2 * GUARD,), SENTINEL, device=device)
        y = buffer[GUARD : GUARD + T].fill_(torch.nan)
        rows_dot(x, z, y)
        y, outside = y.cpu(), torch.cat([buffer[:GUARD], buffer[GUARD + T :]]).cpu()
        assert (outside == SENTINEL).all(), (
            f"{case}: something was written outside of y. The last tile hangs over the end: the store needs a mask."
        )
        expected = (x.double() * z.double()).sum(dim=-1).cpu()
        if y.isnan().any():
            missing = y.isnan().nonzero()[:, 0]
            raise CheckFailed(
                f"{case}: y is NaN at {len(missing)} of {T} steps, the first of them {missing[0]}. Either no program "
                "wrote there (each needs its own steps), or something else than x and z was loaded (masks, strides): "
                "all memory around them holds NaN."
            )
        try:
            check({"y": y}, {"y": expected}, verbose=False)
        except CheckFailed as error:
            raise CheckFailed(f"{case}: the sums are off.{error}") from None
    return None


def _one_head(T: int, D: int, heads: int, seed: int) -> torch.Tensor:
    """A (T + guards, heads, D) tensor that is NaN but for head 0 of the T steps: reading anything else shows."""
    x = torch.full((T + 2 * GUARD, heads, D), torch.nan)
    x[GUARD : GUARD + T, 0] = torch.from_numpy(np.random.default_rng(seed).normal(size=(T, D))).float()
    return x


if triton is not None:

    @triton.jit
    def rows_dot_kernel(x_ptr, z_ptr, y_ptr, stride_x, stride_z, T, D, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
        """A right kernel; the wrong answers launch it with what a wrong one would have computed with."""
        offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        offs_d = tl.arange(0, BLOCK_D)
        mask = (offs_t[:, None] < T) & (offs_d[None, :] < D)
        x = tl.load(x_ptr + offs_t[:, None] * stride_x + offs_d[None, :], mask=mask, other=0.0)
        z = tl.load(z_ptr + offs_t[:, None] * stride_z + offs_d[None, :], mask=mask, other=0.0)
        tl.store(y_ptr + offs_t, tl.sum(x * z, axis=1), mask=offs_t < T)


def _launch(x, z, y, *, programs=None, stride_x=None, stride_z=None, T=None, D=None) -> None:
    block_d = triton.next_power_of_2(x.shape[1])
    rows_dot_kernel[(programs or triton.cdiv(x.shape[0], 16),)](
        x, z, y, stride_x or x.stride(0), stride_z or z.stride(0), T or x.shape[0], D or x.shape[1], 16, block_d
    )


def wrong_3_first_tile(x, z, y):
    """The program's number is not used, or only one program is launched: the first 16 steps are all there is."""
    _launch(x, z, y, programs=1)


def wrong_3_no_column_mask(x, z, y):
    """No mask over the columns: a tile wider than D reads into the next row."""
    _launch(x, z, y, D=triton.next_power_of_2(x.shape[1]))


def wrong_3_no_row_mask(x, z, y):
    """No mask over the rows: the last tile writes behind the end of y."""
    _launch(x, z, y, T=triton.cdiv(x.shape[0], 16) * 16)


def wrong_3_no_strides(x, z, y):
    """Rows taken to be D apart, as in a contiguous matrix: reads the other heads of a strided view."""
    _launch(x, z, y, stride_x=x.shape[1], stride_z=z.shape[1])


def wrong_3_one_stride(x, z, y):
    """The stride of x used for z, too."""
    _launch(x, z, y, stride_z=x.stride(0))


WRONG_ANSWERS: dict[int, list[Callable]] = {
    1: [
        wrong_1_forgets_everything, wrong_1_f_zero, wrong_1_f_nearly_open, wrong_1_i_zero, wrong_1_i_very_small,
        wrong_1_in_front, wrong_1_one_chunk_too_many, wrong_1_interleaved,
    ],
    2: [
        wrong_2_prefix, wrong_2_own_gate, wrong_2_no_decay, wrong_2_no_rescale, wrong_2_old_m,
        wrong_2_m_of_the_chunk_alone, wrong_2_difference, wrong_2_n_unweighted,
    ],
    # They launch a kernel, so they are wrong only where one can run.
    3: []
    if FORMS["mlstm_limit_chunk"].missing()
    else [wrong_3_first_tile, wrong_3_no_column_mask, wrong_3_no_row_mask, wrong_3_no_strides, wrong_3_one_stride],
}  # fmt: skip
