"""The exercises of notebook 04c: their checks, and wrong answers that the checks must reject."""

from collections.abc import Callable

import numpy as np

from tfla_lab.check import CheckFailed
from tfla_lab.exercise import exercise, require


def _number(x, name: str, case: str) -> float:
    try:
        number = float(x)
    except (TypeError, ValueError):
        raise CheckFailed(f"{case}: {name} must be a number, got {x!r}") from None
    require(np.isfinite(number), f"{case}: {name} must be a finite number, got {number}")
    return number


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-6 * abs(y)


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 1: what one kernel for dk and dv would cost
# ---------------------------------------------------------------------------------------------------------------------
def _flops(L, B, d_qk, d_hv, *, products=(2, 2), pairs=None, states=2, factor=2):
    """FLOP with so many products along d_qk and d_hv in a tile, and so many with the state."""
    pairs = (L + B) / 2 if pairs is None else pairs
    return factor * (pairs * (products[0] * d_qk + products[1] * d_hv) + states * d_qk * d_hv)


def _bytes(L, d_qk, d_hv, *, columns=(3, 3), states=1.0, size=2):
    """Bytes with so many tensors of d_qk and of d_hv columns, and so many states a chunk."""
    return size * (columns[0] * d_qk + columns[1] * d_hv + states * d_qk * d_hv / L)


@exercise(1)
def check_1(fused_cost: Callable) -> None:
    """fused_cost(L, B, d_qk, d_hv) -> (FLOP, bytes) per step and head of a kernel that computes dk and dv together."""
    for L, B, d_qk, d_hv in ((256, 64, 128, 256), (64, 64, 128, 256), (1024, 32, 64, 192), (128, 16, 256, 64)):
        case = f"L = {L}, B = {B}, d_qk = {d_qk}, d_hv = {d_hv}"
        sizes = L, B, d_qk, d_hv
        answer = fused_cost(*sizes)
        require(
            isinstance(answer, (tuple, list, np.ndarray)) and len(answer) == 2,
            f"{case}: fused_cost must return the two numbers (FLOP, bytes), got {answer!r}",
        )
        flops, moved = (_number(x, name, case) for x, name in zip(answer, ("FLOP", "bytes"), strict=True))
        if not _close(flops, _flops(*sizes)):
            known = {
                "the scores are in it twice: that is what the two separate kernels do": _flops(*sizes, products=(3, 2)),
                "dP is in it twice, but one is enough": _flops(*sizes, products=(2, 3)),
                "dk and dv each have a product with the state, V dC^T and K dC": _flops(*sizes, states=1),
                "the products with the state are missing": _flops(*sizes, states=0),
                "tiles on the diagonal are computed in full: (L + B) / 2 pairs a step": _flops(*sizes, pairs=L / 2),
                "tiles on the diagonal are computed in full: not (L + 1) / 2 pairs": _flops(*sizes, pairs=(L + 1) / 2),
                "this is the whole square; a program begins at the diagonal": _flops(*sizes, pairs=L),
                "a multiplication and an addition are two FLOP": _flops(*sizes, factor=1),
                "these are the bytes; FLOP come first": _bytes(L, d_qk, d_hv),
            }
            hint = next((text for text, value in known.items() if _close(flops, value)), None)
            hint = hint or (
                "per pair there are four products (scores, dP, dk, dv), per step two with the state, and (L + B) / 2 "
                "pairs a step"
            )
            raise CheckFailed(f"{case}: {flops:g} FLOP per step and head is not right: {hint}")
        if not _close(moved, _bytes(L, d_qk, d_hv)):
            known = {
                "bfloat16 has 2 bytes": _bytes(L, d_qk, d_hv, size=4),
                "the outputs dk and dv are written, too": _bytes(L, d_qk, d_hv, columns=(2, 2)),
                "these are the outputs alone, and dC": _bytes(L, d_qk, d_hv, columns=(1, 1)),
                "q, k, v, dh and dC are loaded once for both": _bytes(L, d_qk, d_hv, columns=(5, 4), states=2),
                "q, k, v and dh are loaded once for both": _bytes(L, d_qk, d_hv, columns=(5, 4)),
                "dC is loaded once for both": _bytes(L, d_qk, d_hv, states=2),
                "dC is missing": _bytes(L, d_qk, d_hv, states=0),
                "there is one dC in L steps": _bytes(L, d_qk, d_hv, states=L),
            }
            hint = next((text for text, value in known.items() if _close(moved, value)), None)
            hint = hint or "read q, k, v, dh, write dk, dv, and one dC in L steps, 2 bytes each"
            raise CheckFailed(f"{case}: {moved:g} bytes per step and head is not right: {hint}")


def wrong_1_scores_twice(L, B, d_qk, d_hv):
    """The two kernels, added."""
    return _flops(L, B, d_qk, d_hv, products=(3, 2)), _bytes(L, d_qk, d_hv)


def wrong_1_traffic_of_both(L, B, d_qk, d_hv):
    """The two kernels' tensors, added."""
    return _flops(L, B, d_qk, d_hv), _bytes(L, d_qk, d_hv, columns=(5, 4), states=2)


def wrong_1_one_state_product(L, B, d_qk, d_hv):
    """One product with the state instead of two."""
    return _flops(L, B, d_qk, d_hv, states=1), _bytes(L, d_qk, d_hv)


def wrong_1_half_the_square(L, B, d_qk, d_hv):
    """Half the square, although a tile on the diagonal is computed as a whole."""
    return _flops(L, B, d_qk, d_hv, pairs=L / 2), _bytes(L, d_qk, d_hv)


def wrong_1_whole_square(L, B, d_qk, d_hv):
    """All tiles."""
    return _flops(L, B, d_qk, d_hv, pairs=L), _bytes(L, d_qk, d_hv)


def wrong_1_multiply_adds(L, B, d_qk, d_hv):
    """Multiply-adds instead of FLOP."""
    return _flops(L, B, d_qk, d_hv, factor=1), _bytes(L, d_qk, d_hv)


def wrong_1_float32(L, B, d_qk, d_hv):
    """Four bytes a number."""
    return _flops(L, B, d_qk, d_hv), _bytes(L, d_qk, d_hv, size=4)


def wrong_1_reads_only(L, B, d_qk, d_hv):
    """What is written is traffic, too."""
    return _flops(L, B, d_qk, d_hv), _bytes(L, d_qk, d_hv, columns=(2, 2))


def wrong_1_a_state_a_step(L, B, d_qk, d_hv):
    """A state for every step and not for every chunk."""
    return _flops(L, B, d_qk, d_hv), _bytes(L, d_qk, d_hv, states=L)


def wrong_1_order(L, B, d_qk, d_hv):
    """Bytes first."""
    return _bytes(L, d_qk, d_hv), _flops(L, B, d_qk, d_hv)


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 2: the best chunk size of a model
# ---------------------------------------------------------------------------------------------------------------------
SIZES = tuple(2**power for power in range(4, 13))


@exercise(2)
def check_2(best_chunk: Callable) -> None:
    """best_chunk(flops, moved, matrix_rate, memory_rate) -> the best power of two from 16 to 4096."""
    cases = [  # FLOP a + b L, bytes c + d / L, rates
        ("these heads on an H200", (66_000, 390, 2_300, 130_000, 690e12, 4.3e12)),
        ("large heads on an H200", (525_000, 1_540, 4_600, 1_050_000, 690e12, 4.3e12)),
        ("a card with slow memory", (66_000, 390, 2_300, 130_000, 300e12, 0.6e12)),
        ("a card with a slow matrix unit", (66_000, 390, 2_300, 130_000, 30e12, 3e12)),
        ("a best L between two powers of two, 186 if any number were allowed", (0, 1.0, 0, 186.0**2, 1.0, 1.0)),
        ("a best L between two powers of two, 362 if any number were allowed", (0, 2.0, 0, 2 * 361.0**2, 1.0, 1.0)),
        ("chunks smaller than 16 would be best", (1_000, 4_000, 100, 100, 1e12, 1e12)),
        ("chunks larger than 4096 would be best", (1_000, 1, 100, 1e9, 1e12, 1e12)),
    ]
    for name, (a, b, c, d, matrix_rate, memory_rate) in cases:

        def flops(L, a=a, b=b):
            return a + b * L

        def moved(L, c=c, d=d):
            return c + d / L

        def seconds(L, matrix_rate=matrix_rate, memory_rate=memory_rate, flops=flops, moved=moved):
            return flops(L) / matrix_rate + moved(L) / memory_rate

        L = _number(best_chunk(flops, moved, matrix_rate, memory_rate), "best_chunk", name)
        require(
            L in SIZES,
            f"{name}: the chunk size must be a power of two from 16 to 4096, got {L:g}. Which of them has the smallest "
            "time? That need not be the one nearest to the best real number.",
        )
        best = min(SIZES, key=seconds)
        if best != L:
            known = {
                "it has the fewest FLOP; the traffic takes time as well": min(SIZES, key=flops),
                "it has the least traffic; FLOP take time as well": min(SIZES, key=moved),
                "the rates are exchanged": min(
                    SIZES,
                    key=lambda L: flops(L) / memory_rate + moved(L) / matrix_rate,
                ),
                "the model adds the two times; it does not take the larger one": min(
                    SIZES,
                    key=lambda L: max(flops(L) / matrix_rate, moved(L) / memory_rate),
                ),
            }
            hint = next((text for text, value in known.items() if value == L), "try all nine sizes and compare")
            raise CheckFailed(
                f"{name}: L = {L:g} takes {seconds(L) / seconds(best):.3f} times as long as the best: {hint}"
            )


def wrong_2_flops_only(flops, moved, matrix_rate, memory_rate):
    """Counts operations alone."""
    return min(SIZES, key=flops)


def wrong_2_bytes_only(flops, moved, matrix_rate, memory_rate):
    """Counts traffic alone."""
    return min(SIZES, key=moved)


def wrong_2_larger_of_both(flops, moved, matrix_rate, memory_rate):
    """The roofline: all traffic hidden behind the products, or the other way round."""
    return min(SIZES, key=lambda L: max(flops(L) / matrix_rate, moved(L) / memory_rate))


def wrong_2_rates_exchanged(flops, moved, matrix_rate, memory_rate):
    """Each amount divided by the rate of the other."""
    return min(SIZES, key=lambda L: flops(L) / memory_rate + moved(L) / matrix_rate)


def wrong_2_no_rates(flops, moved, matrix_rate, memory_rate):
    """Adds FLOP and bytes as if one took as long as the other."""
    return min(SIZES, key=lambda L: flops(L) + moved(L))


def _any_number(flops, moved, matrix_rate, memory_rate):
    L = np.linspace(16, 4096, 4081)
    return L[np.argmin(flops(L) / matrix_rate + moved(L) / memory_rate)]


def wrong_2_any_number(flops, moved, matrix_rate, memory_rate):
    """Not a power of two."""
    return _any_number(flops, moved, matrix_rate, memory_rate)


def wrong_2_nearest_power(flops, moved, matrix_rate, memory_rate):
    """The power of two nearest to the best real number: 128 is nearer to 186, but 256 is better."""
    best = _any_number(flops, moved, matrix_rate, memory_rate)
    return min(SIZES, key=lambda L: abs(L - best))


def wrong_2_rounds_down(flops, moved, matrix_rate, memory_rate):
    """The next power of two below the best real number."""
    return 2 ** int(np.log2(_any_number(flops, moved, matrix_rate, memory_rate)))


def wrong_2_of_stage_03(flops, moved, matrix_rate, memory_rate):
    """Looks no further than 128, where stage 03 ends."""
    return min(SIZES[:4], key=lambda L: flops(L) / matrix_rate + moved(L) / memory_rate)


def wrong_2_the_time(flops, moved, matrix_rate, memory_rate):
    """The smallest time instead of its chunk size."""
    return min(flops(L) / matrix_rate + moved(L) / memory_rate for L in SIZES)


# ---------------------------------------------------------------------------------------------------------------------
# Exercise 3: the time of a decode step
# ---------------------------------------------------------------------------------------------------------------------
def _microseconds(batch, heads, d_qk, d_hv, copy_rate, *, state=None, size=4, ways=2):
    state = d_qk * d_hv + d_qk + 1 if state is None else state
    return 1e6 * batch * heads * state * size * ways / copy_rate


@exercise(3)
def check_3(decode_us: Callable) -> None:
    """decode_us(batch, heads, d_qk, d_hv, copy_rate) -> microseconds to read the state once and write it once."""
    for sizes in ((1, 16, 128, 256, 4e12), (64, 16, 128, 256, 4.3e12), (7, 4, 16, 8, 1e12), (256, 8, 256, 512, 2e12)):
        case = "batch {}, {} heads, d_qk = {}, d_hv = {}, {:g} bytes a second".format(*sizes)
        _, _, d_qk, d_hv, _ = sizes
        time = _number(decode_us(*sizes), "decode_us", case)
        expected = _microseconds(*sizes)
        if _close(time, expected):
            continue
        known = {
            "this is half of it: the state has 4 bytes a number, and it is read and written": _microseconds(*sizes) / 2,
            "this is a quarter of it: the state has 4 bytes a number, and it is read and written": _microseconds(*sizes)
            / 4,
            "n and m belong to the state, too": _microseconds(*sizes, state=d_qk * d_hv),
            "m belongs to the state, too: one number a head": _microseconds(*sizes, state=d_qk * d_hv + d_qk),
            "n is missing: d_qk numbers a head": _microseconds(*sizes, state=d_qk * d_hv + 1),
            "n has d_qk entries, not d_hv": _microseconds(*sizes, state=d_qk * d_hv + d_hv + 1),
            "every head has a state of its own": _microseconds(*sizes) / sizes[1],
            "every sequence of the batch has a state of its own": _microseconds(*sizes) / sizes[0],
            "these are milliseconds": _microseconds(*sizes) / 1e3,
            "these are seconds": _microseconds(*sizes) / 1e6,
        }
        hint = next((text for text, value in known.items() if _close(time, value)), None)
        hint = hint or (
            "C, n and m of every head and sequence, 4 bytes a number, once read and once written, "
            "divided by the copy rate; 10^6 microseconds are a second"
        )
        raise CheckFailed(f"{case}: {time:.6g} microseconds is not right: {hint}")


def wrong_3_read_only(batch, heads, d_qk, d_hv, copy_rate):
    """The new state has to be written as well."""
    return _microseconds(batch, heads, d_qk, d_hv, copy_rate, ways=1)


def wrong_3_bfloat16(batch, heads, d_qk, d_hv, copy_rate):
    """Two bytes a number, as for q, k and v."""
    return _microseconds(batch, heads, d_qk, d_hv, copy_rate, size=2)


def wrong_3_only_C(batch, heads, d_qk, d_hv, copy_rate):
    """C alone."""
    return _microseconds(batch, heads, d_qk, d_hv, copy_rate, state=d_qk * d_hv)


def wrong_3_n_of_d_hv(batch, heads, d_qk, d_hv, copy_rate):
    """n with the entries of v."""
    return _microseconds(batch, heads, d_qk, d_hv, copy_rate, state=d_qk * d_hv + d_hv + 1)


def wrong_3_one_head(batch, heads, d_qk, d_hv, copy_rate):
    """One head."""
    return _microseconds(batch, 1, d_qk, d_hv, copy_rate)


def wrong_3_one_sequence(batch, heads, d_qk, d_hv, copy_rate):
    """The batch left out, as if it shared one state."""
    return _microseconds(1, heads, d_qk, d_hv, copy_rate)


def wrong_3_milliseconds(batch, heads, d_qk, d_hv, copy_rate):
    """Another unit."""
    return _microseconds(batch, heads, d_qk, d_hv, copy_rate) / 1e3


def wrong_3_terabytes(batch, heads, d_qk, d_hv, copy_rate):
    """The rate taken to be in TB/s."""
    return _microseconds(batch, heads, d_qk, d_hv, copy_rate * 1e12)


WRONG_ANSWERS: dict[int, list[Callable]] = {
    1: [
        wrong_1_scores_twice, wrong_1_traffic_of_both, wrong_1_one_state_product, wrong_1_half_the_square,
        wrong_1_whole_square, wrong_1_multiply_adds, wrong_1_float32, wrong_1_reads_only, wrong_1_a_state_a_step,
        wrong_1_order,
    ],
    2: [
        wrong_2_flops_only, wrong_2_bytes_only, wrong_2_larger_of_both, wrong_2_rates_exchanged, wrong_2_no_rates,
        wrong_2_any_number, wrong_2_nearest_power, wrong_2_rounds_down, wrong_2_of_stage_03, wrong_2_the_time,
    ],
    3: [
        wrong_3_read_only, wrong_3_bfloat16, wrong_3_only_C, wrong_3_n_of_d_hv, wrong_3_one_head,
        wrong_3_one_sequence, wrong_3_milliseconds, wrong_3_terabytes,
    ],
}  # fmt: skip
