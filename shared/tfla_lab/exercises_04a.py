"""The exercises of notebook 04a: their checks, and wrong answers that the checks must reject."""

from collections.abc import Callable

import numpy as np
import torch

from tfla_lab.check import CheckFailed, check
from tfla_lab.exercise import exercise, require
from tfla_lab.forms import FORMS, has_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: exercise 3 is skipped there
    triton = None


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 1: which tiles of a chunk are needed
# ---------------------------------------------------------------------------------------------------------------------
@exercise(1)
def check_1(visited_tiles: Callable) -> None:
    """visited_tiles(steps, BLOCK_LQ, BLOCK_LKV) -> the (row tile, column tile) that hold a pair j <= i < steps."""
    for steps, rows, columns in [
        (8, 4, 4), (16, 4, 4), (16, 16, 16), (16, 8, 4), (16, 4, 8), (32, 4, 16), (64, 32, 8), (64, 16, 64),
        (5, 4, 4), (13, 4, 4), (13, 8, 4), (9, 8, 2), (13, 4, 8), (1, 8, 4), (3, 16, 16),
    ]:  # fmt: skip
        case = f"{steps} steps, row tiles of {rows}, column tiles of {columns}"
        pairs = [tuple(int(x) for x in pair) for pair in visited_tiles(steps, rows, columns)]
        require(all(len(pair) == 2 for pair in pairs), f"{case}: every entry must be a pair (row tile, column tile)")
        twice = sorted(pair for pair in set(pairs) if pairs.count(pair) > 1)
        require(not twice, f"{case}: {twice} are there twice, and would be added twice")
        i, j = np.tril_indices(steps)
        needed = set(zip((i // rows).tolist(), (j // columns).tolist(), strict=True))
        missing, spare = sorted(needed - set(pairs)), sorted(set(pairs) - needed)
        for tiles, fault, reason in (
            (missing, "missing", "some of these columns are not behind some of these rows"),
            (spare, "not needed", "none of these pairs has j <= i"),
        ):
            if tiles:
                row, column = tiles[0]
                raise CheckFailed(
                    f"{case}: {fault}: {', '.join(map(str, tiles[:4]))}{' ...' if len(tiles) > 4 else ''}. Tile "
                    f"{tiles[0]} has the rows i from {row * rows} to {row * rows + rows - 1} and the columns j from "
                    f"{column * columns} to {column * columns + columns - 1}, counted from 0, up to {steps - 1}: "
                    f"{reason}."
                )


def _pairs(row_tiles: int, columns_of: Callable) -> list[tuple[int, int]]:
    return [(row, column) for row in range(row_tiles) for column in range(columns_of(row))]


def _up(x: int, y: int) -> int:
    return -(-x // y)


def wrong_1_all(steps, rows, columns):
    """The whole square."""
    return _pairs(_up(steps, rows), lambda row: _up(steps, columns))


def wrong_1_equal_tiles(steps, rows, columns):
    """Column tile <= row tile: right only if both tiles have the same size."""
    return _pairs(_up(steps, rows), lambda row: row + 1)


def wrong_1_below_diagonal(steps, rows, columns):
    """Only the tiles that lie wholly below the diagonal."""
    return _pairs(_up(steps, rows), lambda row: row * rows // columns)


def wrong_1_first_row(steps, rows, columns):
    """Up to the diagonal at the tile's first row: the lower rows of a tall tile see more columns."""
    return _pairs(_up(steps, rows), lambda row: row * rows // columns + 1)


def wrong_1_rounded_down(steps, rows, columns):
    """The number of column tiles rounded down: loses the diagonal tile if it is wider than the row tile."""
    return _pairs(_up(steps, rows), lambda row: min((row + 1) * rows, steps) // columns)


def wrong_1_no_last_row(steps, rows, columns):
    """The number of row tiles rounded down: the rows of a ragged end have no program."""
    return _pairs(steps // rows, lambda row: _up((row + 1) * rows, columns))


def wrong_1_past_the_end(steps, rows, columns):
    """Columns up to the last row of the tile, even if the sequence has ended before."""
    return _pairs(_up(steps, rows), lambda row: _up((row + 1) * rows, columns))


def wrong_1_upside_down(steps, rows, columns):
    """(column, row): the tiles above the diagonal."""
    return [(column, row) for row, column in _pairs(_up(steps, rows), lambda row: _up((row + 1) * rows, columns))]


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 2: h of one row tile
# ---------------------------------------------------------------------------------------------------------------------
@exercise(2)
def check_2(row_tile: Callable) -> None:
    """row_tile(r, B, q, k, v, C, n, m_state, b, u, m) -> h of the rows r B .. r B + B - 1 of a chunk, (rows, DHV)."""
    from mlstm_recurrent import log_sigmoid, mlstm_recurrent

    first = "the chunk has a single tile: state part and diagonal tile"
    typical = "the sum of the state part, the tiles to the left and the diagonal tile is off"
    floor = "the input gates are low, and e^(-m) wins the maximum in most rows"
    negative = "S is negative in some rows, and the denominator has |S|"
    hot = "the input gates are hot: above the diagonal b_i + u_j - m_i may be large, so mask the exponent, not e^(...)"
    heavy = "the state from before the chunk is large beside what the chunk writes"
    cases = [  # L, B, r, mean and spread of i, m before the chunk, what a failure here means
        (4, 4, 0, 0.0, 1.0, 0.0, first),
        (8, 4, 1, 0.0, 1.0, 0.0, typical),
        (8, 4, 0, 0.0, 1.0, 1.0, "the first row tile has nothing to its left"),
        (32, 8, 2, 0.0, 1.0, -1.0, typical),
        (32, 8, 3, -10.0, 1.0, -10.0, floor),
        (32, 8, 3, 3.0, 1.0, 3.0, negative),
        (32, 8, 1, 0.0, 1.0, 6.0, heavy),
        (32, 8, 2, 800.0, 3000.0, 700.0, hot),
        (10, 4, 2, 0.0, 1.0, 0.0, "the last row tile is cut short: it has only 2 rows"),
    ]
    for L, B, r, i_mean, i_spread, m_state, meaning in cases:
        case = f"L = {L}, B = {B}, r = {r}, i near {i_mean:g}, m = {m_state:g} before the chunk"
        rng = np.random.default_rng(L + r)
        q, k = rng.normal(size=(2, L, 6))
        if i_mean > 100:
            q, k = np.abs(q), np.abs(k)  # keeps away from n . q = 0, where no arithmetic has digits
        v, C, n = rng.normal(size=(L, 3)), rng.normal(size=(6, 3)), np.abs(rng.normal(size=6))
        i, f = rng.normal(i_mean, i_spread, L), rng.normal(2, 1, L)
        state = tuple(x[None, None] for x in (C, n, np.array(m_state)))
        h = mlstm_recurrent(*(x[None, None] for x in (q, k, v, i, f)), initial_state=state)[0, 0]
        b = np.cumsum(log_sigmoid(f))
        u = i - b
        m = b + np.maximum(np.maximum.accumulate(u), m_state)
        rows = slice(r * B, min(r * B + B, L))
        # What lies behind the tile is NaN: a tile above the diagonal must not be touched.
        k_seen, v_seen, u_seen = k.copy(), v.copy(), u.copy()
        for x in (k_seen, v_seen, u_seen):
            x[rows.stop :] = np.nan
        actual = np.asarray(row_tile(r, B, q.copy(), k_seen, v_seen, C, n, m_state, b.copy(), u_seen, m.copy()))
        expected = h[rows]
        require(
            actual.shape == expected.shape,
            f"{case}: h must have shape (rows of the tile, DHV) = {expected.shape}, got {actual.shape}",
        )
        require(
            bool(np.isfinite(actual).all()),
            f"{case}: h is not finite. The rows of k, v and u behind the tile are NaN, since no program needs them: "
            f"slices must end at step {rows.stop}. Or: {meaning}.",
        )
        try:
            check({"h": actual}, {"h": expected}, budgets={"h": 1e-5}, verbose=False)
        except CheckFailed as error:
            raise CheckFailed(f"{case}: {meaning}.{error}") from None


def _row_tile(
    r, B, q, k, v, C, n, m_state, b, u, m, *,
    state_in_S=True, norm_per_tile=False, causal=True, after_exp=False, row_gates=None, scale=True, absolute=True,
    floor=True, first_tile=0, tile_gate=False, state_weight=True, whole_square=False,
):  # fmt: skip
    """A right answer; the wrong ones leave something out."""
    rows, s = slice(r * B, min(r * B + B, len(q))), (q.shape[1] ** -0.5 if scale else 1.0)
    q_r, b_m, m_r = q[rows], (b - m)[rows], m[rows]
    w_state = np.exp(b_m + m_state) if state_weight else np.ones(len(q_r))
    h, S = s * w_state[:, None] * (q_r @ C), s * w_state * (q_r @ n)
    S = S if state_in_S else 0 * S
    D_min = np.exp(-m_r) if floor else np.zeros(len(q_r))
    if norm_per_tile:
        h = h / np.maximum(abs(S), D_min)[:, None]
    for column in range(first_tile if r else 0, -(-len(q) // B) if whole_square else r + 1):
        columns = slice(column * B, min(column * B + B, len(q)))
        exponent = b_m[:, None] + u[None, columns]
        if row_gates is not None:
            exponent = row_gates(b_m, u, rows, columns)
        mask = np.arange(rows.start, rows.stop)[:, None] >= np.arange(columns.start, columns.stop)[None, :]
        W = np.exp(exponent) * (mask if after_exp else 1)
        if causal and not after_exp:
            W = np.where(mask, W, 0.0)
        P = s * (q_r @ k[columns].T) * W
        S = S + P.sum(axis=1)
        if norm_per_tile:
            h = h + P @ v[columns] / np.maximum(abs(P.sum(axis=1)), D_min)[:, None]
        else:
            h = h + P @ v[columns]
    return h if norm_per_tile else h / np.maximum(abs(S) if absolute else S, D_min)[:, None]


def wrong_2_norm_per_tile(*x):
    """Divides in every tile by the tile's own denominator: a sum of ratios is not the ratio of sums."""
    return _row_tile(*x, norm_per_tile=True)


def wrong_2_no_state_in_S(*x):
    """The state adds to the numerator and not to S."""
    return _row_tile(*x, state_in_S=False)


def wrong_2_mask_of_tiles(*x):
    """Leaves out the tiles above the diagonal, and then masks nothing within the diagonal tile."""
    return _row_tile(*x, causal=False)


def wrong_2_mask_after_exp(*x):
    """Multiplies by the mask after exp: inf * 0 is NaN."""
    return _row_tile(*x, after_exp=True)


def wrong_2_gates_of_the_column(*x):
    """b and m of the columns in the place of those of the rows: only the diagonal of the chunk is right."""
    b, _, m = x[-3:]

    def exponent(b_m, u, rows, columns):
        return np.resize((b - m)[columns], rows.stop - rows.start)[:, None] + u[None, columns]

    return _row_tile(*x, row_gates=exponent)


def wrong_2_rows_from_0(*x):
    """Takes the gates of the first rows of the chunk for every tile."""
    b, _, m = x[-3:]

    def exponent(b_m, u, rows, columns):
        return (b - m)[: rows.stop - rows.start, None] + u[None, columns]

    return _row_tile(*x, row_gates=exponent)


def wrong_2_no_scale(*x):
    """Without s = 1 / sqrt(DQK)."""
    return _row_tile(*x, scale=False)


def wrong_2_no_absolute(*x):
    """max{S, e^(-m)} without |S|."""
    return _row_tile(*x, absolute=False)


def wrong_2_no_floor(*x):
    """Divides by |S| alone."""
    return _row_tile(*x, floor=False)


def wrong_2_state_unweighted(*x):
    """The state as it was at the chunk's beginning, not forgotten since."""
    return _row_tile(*x, state_weight=False)


def wrong_2_skips_the_first_tile(*x):
    """Begins with the second column tile."""
    return _row_tile(*x, first_tile=1)


def wrong_2_whole_square(*x):
    """Visits the tiles above the diagonal too."""
    return _row_tile(*x, whole_square=True)


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 3: a kernel with tiles
# ---------------------------------------------------------------------------------------------------------------------
GUARD, SENTINEL = 256, 12345.0  # this many entries in front of y and behind it hold a value that must stay


@exercise(3)
def check_3(row_sums: Callable) -> str | None:
    """row_sums(q, k, y, L) fills y (T,): y_i = sum of q_i . k_j over the steps j <= i of i's chunk; q, k (T, D)."""
    if reason := FORMS["mlstm_tfla"].missing():
        return reason
    device = "cuda" if has_gpu() else "cpu"
    for T, L, D in [(16, 16, 16), (64, 64, 16), (64, 32, 16), (50, 64, 16), (70, 32, 20)]:
        case = f"T = {T}, L = {L}, D = {D}"
        # All memory around q and k is NaN: reading anything else shows.
        around = torch.full((2, T + 2 * GUARD, D), torch.nan)
        around[:, GUARD : GUARD + T] = torch.from_numpy(np.random.default_rng(T).normal(size=(2, T, D))).float()
        q, k = around.to(device)[:, GUARD : GUARD + T]
        buffer = torch.full((T + 2 * GUARD,), SENTINEL, device=device)
        y = buffer[GUARD : GUARD + T].fill_(torch.nan)
        row_sums(q, k, y, L)
        y, outside = y.cpu(), torch.cat([buffer[:GUARD], buffer[GUARD + T :]]).cpu()
        require(
            bool((outside == SENTINEL).all()),
            f"{case}: something was written outside of y. The last tile hangs over the end: the store needs a mask.",
        )
        chunk = torch.arange(T) // L
        seen = torch.tril(chunk[:, None] == chunk[None, :])
        expected = ((q.double() @ k.double().T).cpu() * seen).sum(dim=1)
        if y.isnan().any():
            missing = y.isnan().nonzero()[:, 0]
            raise CheckFailed(
                f"{case}: y is NaN at {len(missing)} of {T} steps, the first of them {missing[0]}. Either no program "
                "wrote there, or something else than q and k was loaded (masks): all memory around them holds NaN."
            )
        try:
            check({"y": y}, {"y": expected}, budgets={"y": 5e-3}, verbose=False)
        except CheckFailed as error:
            off = ((y - expected).abs() > 0.02 * expected.abs().mean()).nonzero()[:, 0].tolist()
            where = ", ".join(map(str, off[:8])) + (" ..." if len(off) > 8 else "")
            raise CheckFailed(f"{case}: the sums are off, at the steps {where}.{error}") from None
    return None


if triton is not None:

    @triton.jit
    def row_sums_kernel(
        q_ptr, k_ptr, y_ptr, T, D, L, n_y, D_k,
        BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr,
    ):  # fmt: skip
        """A right kernel; the wrong answers launch it with what a wrong one would have computed with."""
        tile = tl.program_id(0)
        offs_i, offs_d = tile * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        mask_d = offs_d[None, :] < D_k
        q = tl.load(q_ptr + offs_i[:, None] * D + offs_d[None, :], mask=(offs_i[:, None] < T) & mask_d, other=0.0)
        y = tl.zeros((BLOCK,), dtype=tl.float32)
        first_step = tile * BLOCK // L * L if CHUNK else 0
        if FIRST == "diagonal":
            first_step = tile * BLOCK
        last_step = tile * BLOCK if FIRST == "no diagonal" else tile * BLOCK + BLOCK
        for first in range(first_step, last_step, BLOCK):
            offs_j = first + tl.arange(0, BLOCK)
            mask = (offs_j[:, None] < T) & mask_d
            k = tl.load(k_ptr + offs_j[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if CAUSAL:
                scores = tl.where(offs_i[:, None] >= offs_j[None, :], scores, 0.0)
            if FIRST == "last tile":
                y = tl.sum(scores, axis=1)
            else:
                y += tl.sum(scores, axis=1)
        tl.store(y_ptr + offs_i, y, mask=offs_i < n_y)


def _launch(q, k, y, L, *, programs=None, D_k=None, n_y=None, causal=True, chunk=True, first="") -> None:
    T, D = q.shape
    row_sums_kernel[(programs or triton.cdiv(T, 16),)](
        q, k, y, T, D, L, n_y or T, D_k or D, 16, triton.next_power_of_2(D), causal, chunk, first
    )


def wrong_3_no_mask(q, k, y, L):
    """No mask within the diagonal tile: its rows see columns behind them."""
    _launch(q, k, y, L, causal=False)


def wrong_3_diagonal_tile_only(q, k, y, L):
    """Visits the diagonal tile and none to its left."""
    _launch(q, k, y, L, first="diagonal")


def wrong_3_without_the_diagonal(q, k, y, L):
    """The loop ends where the row tile begins."""
    _launch(q, k, y, L, first="no diagonal")


def wrong_3_from_step_0(q, k, y, L):
    """The loop begins at the sequence's first step and not at the chunk's."""
    _launch(q, k, y, L, chunk=False)


def wrong_3_last_tile(q, k, y, L):
    """y = ... in the place of y += ...: only the last tile is left."""
    _launch(q, k, y, L, first="last tile")


def wrong_3_writes_past_the_end(q, k, y, L):
    """No mask in the store."""
    _launch(q, k, y, L, n_y=triton.cdiv(len(q), 16) * 16)


def wrong_3_no_column_mask(q, k, y, L):
    """No mask over the columns: a tile wider than D reads into the next row."""
    _launch(q, k, y, L, D_k=triton.next_power_of_2(q.shape[1]))


def wrong_3_one_program_a_chunk(q, k, y, L):
    """As many programs as chunks: the other row tiles have none."""
    _launch(q, k, y, L, programs=triton.cdiv(len(q), L))


WRONG_ANSWERS: dict[int, list[Callable]] = {
    1: [
        wrong_1_all, wrong_1_equal_tiles, wrong_1_below_diagonal, wrong_1_first_row, wrong_1_rounded_down,
        wrong_1_no_last_row, wrong_1_past_the_end, wrong_1_upside_down,
    ],
    2: [
        wrong_2_norm_per_tile, wrong_2_no_state_in_S, wrong_2_mask_of_tiles, wrong_2_mask_after_exp,
        wrong_2_gates_of_the_column, wrong_2_rows_from_0, wrong_2_no_scale, wrong_2_no_absolute, wrong_2_no_floor,
        wrong_2_state_unweighted, wrong_2_skips_the_first_tile, wrong_2_whole_square,
    ],
    # They launch a kernel, so they are wrong only where one can run.
    3: []
    if FORMS["mlstm_tfla"].missing()
    else [
        wrong_3_no_mask, wrong_3_diagonal_tile_only, wrong_3_without_the_diagonal, wrong_3_from_step_0,
        wrong_3_last_tile, wrong_3_writes_past_the_end, wrong_3_no_column_mask,
        wrong_3_one_program_a_chunk,
    ],
}  # fmt: skip
