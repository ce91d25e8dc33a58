"""The pictures: every function draws every edge case, says what its axes are, and refuses what it cannot draw."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tfla_lab import plot

INF = np.inf
FIVE_FORMS = Path(__file__).parents[1] / "shared" / "results" / "five_forms.svg"


@pytest.fixture(autouse=True)
def _style():
    with plt.rc_context():
        plot.use_style()
        yield
    plt.close("all")


def drawn(ax):
    """Renders the whole figure, which is where wrong scales and labels come out; checks what all pictures share."""
    ax.figure.canvas.draw()
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    return ax


def words(ax) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def triangle(T: int) -> np.ndarray:
    return np.tril(np.random.default_rng(0).random((T, T)) + 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "D",
    [
        np.ones((1, 1)),
        np.zeros((1, 1)),
        np.zeros((3, 3)),
        np.full((3, 3), -INF),
        np.full((2, 2), np.nan),
        triangle(4),
        triangle(50),
        np.tril(np.ones((5, 5))),
        np.tril(np.full((5, 5), 1e-300)),
        np.tril(np.logspace(-300, 0, 36).reshape(6, 6)),
    ],
    ids=["one", "one zero", "zeros", "-inf", "nan", "4", "50", "equal", "tiny", "wide"],
)
def test_gate_matrix_draws(D, log):
    ax = drawn(plot.gate_matrix(D, log=log, title="D"))
    assert ax.get_title() == "D"
    assert ax.images[0].get_array().mask.sum() == (~np.isfinite(D) | (D == 0)).sum()
    assert ax.patch.get_hatch()  # what is blank shows it


def test_gate_matrix_has_the_time_axis_downwards_and_says_what_its_colours_mean():
    ax = drawn(plot.gate_matrix(triangle(4), tokens=["the", "cat", "sat", "down"]))
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["the", "cat", "sat", "down"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["the", "cat", "sat", "down"]
    assert ax.images[0].colorbar.ax.get_ylabel() == "weight"
    assert len(ax.texts) == 10  # few enough to be written down


def test_gate_matrix_takes_torch_tensors_and_bytes():
    torch = pytest.importorskip("torch")
    ax = drawn(plot.gate_matrix(torch.tril(torch.ones(5, 5, requires_grad=True)), tokens=b"a b\n\xff"))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "␣", "b", "↵", "·"]


def test_gate_matrix_draws_into_the_axes_it_is_given():
    ax = plt.subplots()[1]
    assert plot.gate_matrix(triangle(3), ax=ax) is ax


@pytest.mark.parametrize(
    ("D", "options", "message"),
    [
        (np.ones((2, 3)), {}, "D must have shape"),
        (np.ones(3), {}, "D must have shape"),
        (np.ones((3, 3)), {"tokens": b"ab"}, "tokens must have T = 3"),
        (-np.ones((3, 3)), {"log": True}, "log needs weights >= 0"),
    ],
)
def test_gate_matrix_refuses(D, options, message):
    with pytest.raises(ValueError, match=message):
        plot.gate_matrix(D, **options)


@pytest.mark.parametrize(
    ("T", "i", "f"),
    [
        (1, -10, 3),
        (1, -INF, -INF),
        (0, 0, 0),
        (40, -INF, 3),
        (40, 0, -INF),
        (80, -1e4, 1e4),
        (81, -10, 3),
        (2048, -10, 3),
    ],
)
def test_gates_over_text_draws(T, i, f):
    ax = drawn(plot.gates_over_text(b"x" * T, np.full(T, i), np.full(T, f)))
    assert {"forget gate f", "input gate i"} <= set(words(ax))


def test_gates_over_text_shows_resets_and_padding():
    i, f = np.zeros(5), np.full(5, 3.0)
    assert len(words(drawn(plot.gates_over_text(b"a\tb d", i, f)))) == 2
    i[1], f[[2, 3]] = -INF, -INF
    ax = drawn(plot.gates_over_text(b"a\tb d", i, f))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "→", "b", "␣", "d"]
    assert words(ax)[2:] == ["f = −inf: forgets all before", "i = −inf: writes nothing"]


def test_gates_over_text_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        plot.gates_over_text(b"abc", np.zeros(3), np.zeros(4))


# ---------------------------------------------------------------------------------------------------------------------
# The chunk map
# ---------------------------------------------------------------------------------------------------------------------
def area(ax, colour: str) -> float:
    """Of all polygons that are filled with a colour."""
    total = 0.0
    for collection in ax.collections:
        if (
            len(collection.get_facecolor())
            and matplotlib.colors.to_hex(collection.get_facecolor()[0]) == colour.lower()
        ):
            for path in collection.get_paths():
                x, y = path.vertices[:-1].T
                total += abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return total


@pytest.mark.parametrize(
    ("T", "L"), [(1, 1), (1, 64), (12, 4), (13, 4), (16, 16), (16, 32), (5, 1), (300, 64), (2048, 16)]
)
def test_chunk_map_covers_the_causal_part_once(T, L):
    ax = drawn(plot.chunk_map(T, L, title="map"))
    lengths = [min(L, T - start) for start in range(0, T, L)]
    within = sum(n * (n + 1) / 2 for n in lengths)
    assert area(ax, plot.SKY) == pytest.approx(within)
    assert area(ax, plot.STATES["facecolor"]) == pytest.approx(T * (T + 1) / 2 - within)
    assert ("state handed on" in words(ax)) == (T > L)


@pytest.mark.parametrize(
    ("T", "L", "tile"), [(1, 1, 1), (16, 8, 4), (16, 8, (4, 2)), (16, 8, (2, 4)), (13, 8, 4), (64, 64, 16)]
)
def test_chunk_map_draws_the_tiles_that_are_computed(T, L, tile):
    ax = drawn(plot.chunk_map(T, L, tile=tile))
    rows, columns = (tile, tile) if isinstance(tile, int) else tile
    full = cut = 0
    for start in range(0, T, L):
        stop = min(start + L, T)
        for row in range(start, stop, rows):
            for column in range(start, stop, columns):
                last_row, last_column = min(row + rows, stop) - 1, min(column + columns, stop) - 1
                if column <= last_row:  # reaches the causal part
                    size = (last_row - row + 1) * (last_column - column + 1)
                    full, cut = full + size * (last_column <= row), cut + size * (last_column > row)
    assert (area(ax, plot.BLUE), area(ax, plot.SKY)) == (full, cut)


@pytest.mark.parametrize(("T", "L", "tile"), [(0, 4, None), (4, 0, None), (4, 2, 0), (4, 2, (2, 0)), (-1, 4, None)])
def test_chunk_map_refuses(T, L, tile):
    with pytest.raises(ValueError, match="at least 1"):
        plot.chunk_map(T, L, tile=tile)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [None, 1e-5])
@pytest.mark.parametrize(
    "errors",
    [
        {},
        {"a": np.array([])},
        {"a": np.array([1e-7])},
        {"a": np.zeros(3)},
        {"a": np.full(3, INF)},
        {"a": np.array([np.nan, 1e-3, 0])},
        {"a": np.full(2048, 1e-7), "b": np.full(2048, 1e-6), "c": np.full(100, 1e-6)},
        {str(number): np.full(4, 1e-7) for number in range(9)},
    ],
    ids=["none", "T=0", "T=1", "exact", "inf", "nan", "long", "many"],
)
def test_error_over_t_draws(errors, budget):
    ax = drawn(plot.error_over_t(errors, budget=budget))
    assert ax.get_yscale() == "log"
    assert ("budget 1e-05" in words(ax)) == (budget is not None)


def test_error_over_t_hides_no_bad_step():
    errors = np.full(2048, 1e-7)
    errors[777] = 0.5  # a single step in a long sequence
    errors[1500] = np.nan
    ax = drawn(plot.error_over_t({"form": errors, "good": np.zeros(2048)}, budget=1e-5))
    assert np.nanmax(ax.lines[0].get_ydata()) == 0.5
    assert ax.get_ylim()[1] > 0.5
    assert words(ax) == ["form", "form: not finite", "good (no error)", "budget 1e-05"]
    assert "worst of every 16 steps" in ax.get_xlabel()


@pytest.mark.parametrize(
    "costs",
    [
        {},
        {"a": ([], [])},
        {"a": ([1], [2.0])},
        {"a": ([1, 2], [0, None])},
        {"a": ([256, 512, 1024], [1, 2, 4]), "b": ([512, 1024], [10, np.nan])},
    ],
    ids=["none", "no lengths", "one", "not measured", "two"],
)
@pytest.mark.parametrize("slopes", [(), (1, 2), (1.5,)])
def test_cost_over_T_draws(costs, slopes):
    ax = drawn(plot.cost_over_T(costs, ylabel="time (ms)", slopes=slopes))
    assert ax.get_ylabel() == "time (ms)"
    assert words(ax) == list(costs)


def test_cost_over_T_draws_guides_with_their_slope():
    ax = drawn(plot.cost_over_T({"a": ([256, 1024], [3, 9])}, ylabel="time (ms)", slopes=(1, 2)))
    for line, slope in zip(ax.lines[1:], (1, 2), strict=True):
        x, y = line.get_data()
        assert np.log(y[1] / y[0]) / np.log(x[1] / x[0]) == pytest.approx(slope)


def test_lines_differ_without_colour():
    looks = [plot._line(number) for number in range(7)]
    assert len({look["color"] for look in looks}) == 7
    assert len({look["marker"] for look in looks}) == 7
    assert len({str(look["linestyle"]) for look in looks}) == 7


# ---------------------------------------------------------------------------------------------------------------------
# One computation in five forms
# ---------------------------------------------------------------------------------------------------------------------
def test_five_forms_gives_the_same_bytes_every_time(tmp_path):
    plt.rcParams["font.size"] = 20  # a style set elsewhere makes no difference
    plot.five_forms(tmp_path / "a.svg")
    assert plot.main(["--five-forms", str(tmp_path / "b.svg")]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_five_forms_is_committed_as_it_is_drawn(tmp_path):
    plot.five_forms(tmp_path / "new.svg")
    new, committed = (tmp_path / "new.svg").read_text(), FIVE_FORMS.read_text()
    if f"Matplotlib v{matplotlib.__version__}," in committed:
        assert new == committed, "draw it anew: python -m tfla_lab.plot --five-forms shared/results/five_forms.svg"
    # Another Matplotlib places things a little differently, but writes the same words (it notes them as comments).
    assert re.findall(r"<!-- (.*) -->", new) == re.findall(r"<!-- (.*) -->", committed)
    assert len(committed) < 150_000


def test_five_forms_draws_the_stages_it_is_given():
    figure = plot.five_forms(stages=("03", "01"))
    assert [ax.get_title() for ax in figure.axes] == ["03 chunkwise", "01 recurrent"]
    with pytest.raises(ValueError, match="got '09'"):
        plot.five_forms(stages=("01", "09"))


@pytest.mark.parametrize("path", ["missing/a.svg", "a.unknown"])
def test_five_forms_says_where_it_cannot_write(tmp_path, path, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(["--five-forms", str(tmp_path / path)])
    assert stop.value.code == 2
    assert "cannot write" in capsys.readouterr().err
