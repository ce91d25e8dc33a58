"""The pictures of the lab, with matplotlib: they are told what to draw and compute no mLSTM of their own.

Colours are those of Okabe and Ito, which colour-blind people can tell apart, and never stand alone: lines also differ
in dashes and markers, areas in lightness and hatches. Heat maps use cividis, which grows evenly lighter in grey print.

Every function draws into `ax`, or into a figure of its own, and returns the Axes. `python -m tfla_lab.plot --five-forms
PATH.svg` writes the picture of the README.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from tfla_lab.check import to_numpy

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 2)), (0, (2, 2)))
HEAT = "cividis"
PALE, GREY = "#F2F2F2", "#8C8C8C"
# The part of the T x T square that is reached through states.
STATES = {"facecolor": "#EDEDED", "edgecolor": "#A8A8A8", "hatch": "\\\\\\\\"}
# Of longer texts only the step numbers are legible along an axis.
MOST_CHARACTERS = 80
# Longer lines than this are drawn as the worst of each of so many windows.
MOST_POINTS = 128
# A logarithmic colour scale ends so many decades below its largest weight; what lies below has the darkest colour.
DECADES = 8

STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 150,
    "figure.figsize": (7.5, 3.6),
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS, linestyle=DASHES),
}


def use_style() -> None:
    """Sets palette, fonts, sizes and resolution for all figures that follow. Call it once, after the imports."""
    plt.rcParams.update(STYLE)


def _axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """`ax`, or the Axes of a new figure in our style."""
    if ax is not None:
        return ax
    with plt.rc_context(STYLE):
        return plt.subplots(figsize=figsize, layout="constrained")[1]


def _line(index: int) -> dict[str, Any]:
    """How the line with this number looks: no two of the first seven share a colour, a dash or a marker.

    The next seven look like these, with hollow markers.
    """
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": colour if index < len(COLOURS) else "white",
    }


def _characters(text: bytes | str | Sequence) -> list[str]:
    """One visible label a token: of bytes, the ASCII characters, with signs for blank, line break and the rest."""
    if isinstance(text, str):
        text = text.encode()
    if not isinstance(text, (bytes, bytearray)):
        return [str(token) for token in text]
    signs = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "→"}
    return [signs.get(byte, chr(byte) if 32 < byte < 127 else "·") for byte in text]


def _label_steps(axis, labels: list[str], size: float) -> None:
    """Labels for the steps 0, 1, ... along an axis."""
    axis.set_ticks(range(len(labels)), labels, fontfamily="monospace", fontsize=size)
    axis.set_tick_params(length=0, pad=2)


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------
def gate_matrix(
    D: Any, *, ax: Axes | None = None, title: str = "", log: bool = False, tokens: bytes | str | Sequence | None = None
) -> Axes:
    """The gate matrix of one head as a heat map: row t, column j shows how much step j weighs in the output of step t.

    Entries that are exactly 0 (all above the diagonal) or not finite are blank and hatched. Up to T = 8 the weights are
    also written down.

    Args:
        D: (T, T) weights, NumPy or torch.
        log: logarithmic colours, over at most eight decades below the largest weight.
        tokens: T labels for the steps, or T bytes of text.

    Raises:
        ValueError: if D is not square, log is asked for with weights below 0, or tokens has another length.
    """
    D = to_numpy(D)
    if D.ndim != 2 or D.shape[0] != D.shape[1]:
        raise ValueError(f"D must have shape (T, T), got {D.shape}")
    if tokens is not None and len(tokens) != len(D):
        raise ValueError(f"tokens must have T = {len(D)} entries, got {len(tokens)}")
    shown = np.ma.masked_where(~np.isfinite(D) | (D == 0), D)
    if log and shown.count() and shown.min() < 0:
        raise ValueError(f"log needs weights >= 0, got {shown.min():.3g}: pass the weights, not their logarithms")
    values = np.ma.log10(shown) if log else shown
    low, high = (float(values.min()), float(values.max())) if values.count() else (0.0, 0.0)
    if log:  # whole decades, at least one of them
        high = np.ceil(high)
        cut, low = low < high - DECADES, np.clip(np.floor(low), high - DECADES, high - 1)
    else:
        cut, low = False, min(low, 0)
    norm = Normalize(low, high if high > low else low + 1)

    ax = _axes(ax, (5.2, 4.4))
    ax.patch.set(facecolor=PALE, hatch="////", edgecolor="#CFCFCF", linewidth=0)
    T = len(D)
    image = ax.imshow(values, cmap=HEAT, norm=norm, interpolation="nearest", extent=(-0.5, T - 0.5, T - 0.5, -0.5))
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02, extend="min" if cut else "neither")
    bar.set_label("weight (log scale)" if log else "weight")
    if log:
        decades = np.arange(low, high + 1)
        bar.set_ticks(decades, labels=[f"$10^{{{decade:g}}}$" for decade in decades])
    bar.outline.set_visible(False)
    ax.spines[:].set_visible(False)
    if T <= 8:
        for t, j in np.argwhere(~np.ma.getmaskarray(shown)):
            dark = norm(values[t, j]) < 0.5
            ax.text(j, t, f"{shown[t, j]:.3g}", ha="center", va="center", color="white" if dark else "black")
    if tokens is not None and 0 < T <= MOST_CHARACTERS // 2:
        labels = _characters(tokens)
        for axis in (ax.xaxis, ax.yaxis):
            _label_steps(axis, labels, min(9, 260 / T))
        if max(map(len, labels)) > 40 / T:
            ax.tick_params(axis="x", rotation=90)
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(min(T, 8), integer=True))
    ax.set(xlabel="column j: step that was written", ylabel="row t: step that reads", title=title)
    return ax


def gates_over_text(text: bytes, i: Any, f: Any, *, ax: Axes | None = None) -> Axes:
    """The gate pre-activations of one head over the bytes that it reads.

    Gates at -inf have no height: f = -inf (everything before is forgotten) is a vertical line, i = -inf (nothing is
    written) a cross at the bottom.

    Args:
        text: T bytes; written along the axis if they are few enough to be read.
        i, f: (T,) pre-activations.

    Raises:
        ValueError: if the lengths differ.
    """
    i, f = to_numpy(i), to_numpy(f)
    if i.shape != (len(text),) or f.shape != (len(text),):
        raise ValueError(f"i and f must have shape ({len(text)},), a value for each byte, got {i.shape} and {f.shape}")
    ax, T = _axes(ax, (8, 2.8)), len(text)
    steps, few = np.arange(T), T <= MOST_CHARACTERS
    finite = np.concatenate([x[np.isfinite(x)] for x in (i, f)])
    ax.axhline(0, color=GREY, linewidth=0.8)
    for number, (x, label) in enumerate(((f, "forget gate f"), (i, "input gate i"))):
        line = _line(number) | {"marker": MARKERS[number] if few else None, "linewidth": 1.3 if few else 0.8}
        ax.plot(steps, np.where(np.isfinite(x), x, np.nan), markersize=3.5, label=label, **line)
    for number, t in enumerate(steps[f == -np.inf]):
        label = "f = −inf: forgets all before" if number == 0 else None
        ax.axvline(t - 0.5, color=BLACK, linestyle=(0, (2, 2)), linewidth=1.2, label=label)
    closed = steps[i == -np.inf]
    if closed.size:
        bottom = ax.get_xaxis_transform()  # x in steps, y from 0 to 1
        low = np.full(closed.shape, 0.04)
        ax.plot(closed, low, "x", color=VERMILION, transform=bottom, label="i = −inf: writes nothing")
    if finite.size and np.abs(finite).max() > 100:
        ax.set_yscale("symlog", linthresh=10)
    if few:
        _label_steps(ax.xaxis, _characters(text), min(9, 560 / max(T, 1)))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.set_xlim(-0.7, max(T, 1) - 0.3)
    ax.set(xlabel="text, a byte a step" if few else "step t (bytes of text)", ylabel="pre-activation")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
    return ax


# ---------------------------------------------------------------------------------------------------------------------
# Which part of the T x T square is computed how
# ---------------------------------------------------------------------------------------------------------------------
def chunk_map(
    T: int, chunk_size: int, *, tile: int | tuple[int, int] | None = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """The T x T square of all pairs (reading step t, written step j), by how the chunkwise form reaches them.

    Args:
        T: number of steps; need not be a multiple of the chunk size.
        chunk_size: L. The squares on the diagonal are matrix products, all that is left of them comes through states.
        tile: also draw the tiles that a chunk's square is cut into, as (rows, columns) or one number for both.
            Tiles above the diagonal are never computed.

    Raises:
        ValueError: if a size is below 1.
    """
    rows, columns = (tile, tile) if isinstance(tile, int) else tile or (1, 1)
    if min(T, chunk_size, rows, columns) < 1:
        raise ValueError(f"T, chunk_size and tile must be at least 1, got {T}, {chunk_size} and {tile}")
    ax = _axes(ax, (4.6, 5.0))
    borders = [*range(0, T, chunk_size), T]
    chunks = list(itertools.pairwise(borders))
    through_states = [_box(0, start, start, stop) for start, stop in chunks[1:]]
    ax.add_collection(PolyCollection(through_states, linewidth=0.6 if len(chunks) <= 16 else 0, zorder=3, **STATES))
    legend = []
    if tile is None:
        # The causal part of a chunk's square is a staircase, which looks like a triangle once the steps are small.
        ax.add_collection(PolyCollection([_stairs(*chunk) for chunk in chunks], facecolor=SKY, edgecolor="none"))
        legend.append(Patch(facecolor=SKY, label="within a chunk: matrix products"))
    else:
        full, cut = [], []
        for start, stop in chunks:
            for row in range(start, stop, rows):
                for column in range(start, min(row + rows, stop), columns):
                    box = _box(column, min(column + columns, stop), row, min(row + rows, stop))
                    (full if min(column + columns, stop) <= row + 1 else cut).append(box)
        edge = {"edgecolor": "white", "linewidth": 0.8 if len(full) + len(cut) < 2000 else 0.2}
        ax.add_collection(PolyCollection(full, facecolor=BLUE, **edge))
        ax.add_collection(PolyCollection(cut, facecolor=SKY, **edge))
        legend.append(Patch(facecolor=BLUE, label="tile below the diagonal"))
        legend.append(Patch(facecolor=SKY, label="tile on the diagonal: computed, then masked"))
    squares = [_box(start, stop, start, stop) for start, stop in chunks]
    width = 1.0 if len(chunks) <= 32 else 0.5
    ax.add_collection(PolyCollection(squares, facecolor="none", edgecolor=BLACK, linewidth=width, zorder=4))
    if len(chunks) > 1:
        legend.append(Patch(label="earlier chunks: through the state", **STATES))
        states = Line2D([], [], color=VERMILION, marker="o", linestyle="none", label="state handed on")
        ax.plot(
            borders[1:-1], borders[1:-1], "o", color=VERMILION, markeredgecolor="white", zorder=5,
            markersize=8 if len(chunks) <= 16 else 4,
        )  # fmt: skip
        legend.append(states)
    if T <= 32:
        grid = np.arange(1, T)
        ax.hlines(grid, 0, T, color="white", linewidth=0.4, zorder=2)
        ax.vlines(grid, 0, T, color="white", linewidth=0.4, zorder=2)
    ax.set(xlim=(0, T), ylim=(T, 0), aspect="equal", title=title)
    ax.set(xlabel="step j that was written", ylabel="step t that reads")
    ticks = borders[:: -(-len(chunks) // 8)]
    ax.set_xticks(ticks)
    ax.set_yticks(ticks)
    ax.spines[:].set_visible(True)
    ax.spines[:].set_color(GREY)
    ax.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4, handlelength=1.6)
    return ax


def _box(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _stairs(start: int, stop: int) -> list[tuple[float, float]]:
    """The entries on and below the diagonal between two steps, as a polygon."""
    corners = [corner for t in range(start, stop) for corner in ((t, t), (t + 1, t))]
    return [*corners, (stop, stop), (start, stop)]


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------
def error_over_t(errors: Mapping[str, Any], *, budget: float | None = None, ax: Axes | None = None) -> Axes:
    """The error at every step, for several forms, on a logarithmic scale.

    Long sequences are cut into windows, of which the worst step is drawn. Steps without any error have no point. One
    whose error is not finite is a cross at the upper edge.

    Args:
        errors: {label: (T,) relative errors}.
        budget: the error that is allowed, drawn as a dashed line.
    """
    ax = _axes(ax, (8, 3.4))
    errors = {label: np.atleast_1d(to_numpy(x)) for label, x in errors.items()}
    window = -(-max((len(x) for x in errors.values()), default=1) // MOST_POINTS) or 1
    everything = [budget] if budget else []
    for number, (label, x) in enumerate(errors.items()):
        starts = np.arange(0, len(x), window)
        worst = np.maximum.reduceat(np.where(np.isfinite(x), x, np.inf), starts) if x.size else x
        good, bad = np.isfinite(worst) & (worst > 0), ~np.isfinite(worst)
        everything += list(worst[good])
        # The markers of different lines stand at different steps, so that one line does not hide another.
        gap = max(1, len(worst) // 12)
        every = (number * gap // len(errors), gap)
        label = f"{label} (no error)" if x.size and not worst.any() else label
        ax.plot(
            starts, np.where(good, worst, np.nan), markevery=every, label=label, **_line(number) | {"linewidth": 1.2}
        )
        if bad.any():
            top, colour = ax.get_xaxis_transform(), COLOURS[number % len(COLOURS)]
            height = np.full(bad.sum(), 0.97)
            ax.plot(starts[bad], height, "x", color=colour, transform=top, label=f"{label}: not finite")
    if budget is not None:
        ax.axhline(budget, color=BLACK, linestyle=(0, (6, 3)), linewidth=1.4, label=f"budget {budget:.0e}")
    ax.set_yscale("log")
    if everything:
        ax.set_ylim(min(everything) / 3, max(everything) * 5)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set(xlabel="step t" if window == 1 else f"step t (the worst of every {window} steps)", ylabel="relative error")
    if errors or budget is not None:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax


def cost_over_T(
    costs: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, ylabel: str, ax: Axes | None = None,
    slopes: Iterable[float] = (),
) -> Axes:  # fmt: skip
    """Time or memory over the length of the sequence, both axes logarithmic: a power of T is a straight line.

    Args:
        costs: {label: (lengths T, values)}. Values that are not above 0 (not measured) are left out.
        ylabel: what was measured, with its unit.
        slopes: powers of T to draw as guides, e.g. (1, 2) for T and T^2.
    """
    ax = _axes(ax, (6, 3.8))
    lengths, values = [], []
    for number, (label, (T, y)) in enumerate(costs.items()):
        T, y = np.asarray(T, dtype=float), np.asarray([np.nan if value is None else value for value in y], dtype=float)
        there = np.isfinite(y) & (y > 0)
        ax.plot(T[there], y[there], label=label, **_line(number))
        lengths, values = [*lengths, *T[there]], [*values, *y[there]]
    if values:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        # The guides start below the cheapest of the first values, where they hide nothing.
        T = np.array([min(lengths), max(lengths)])
        start = min(y for t, y in zip(lengths, values, strict=True) if t == T[0]) / 2
        for number, power in enumerate(slopes):
            guide = start * (T / T[0]) ** power
            ax.plot(T, guide, color=GREY, linestyle=DASHES[2 - number % 2], linewidth=1.0, zorder=1)
            name = "$\\propto T$" if power == 1 else f"$\\propto T^{{{power:g}}}$"
            ax.annotate(name, (T[-1], guide[-1]), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        ticks = sorted(set(lengths))
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.08)
    ax.grid(color="#DDDDDD", linewidth=0.6)
    ax.set(xlabel="length of the sequence T (steps)", ylabel=ylabel)
    if costs:
        ax.legend(loc="upper left")
    return ax


# ---------------------------------------------------------------------------------------------------------------------
# One computation in five forms
# ---------------------------------------------------------------------------------------------------------------------
STEPS, CHUNK = 12, 4  # of the sequence that the panels draw
HEIGHT = 13.3  # of a panel, in the units of its own axes: a step is 1


def _arrow(ax: Axes, start: tuple[float, float], stop: tuple[float, float], colour: str = BLACK, **options) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0} | options
    ax.add_patch(FancyArrowPatch(start, stop, color=colour, **style))


def _panel_recurrent(ax: Axes) -> None:
    """A chain of states: each is made from the one before and from one key-value pair, and read by one query."""
    ax.set(xlim=(-0.3, 18.3), ylim=(HEIGHT - 0.3, -0.3))
    quiet = {"ha": "center", "va": "center", "fontsize": 10, "color": "#444444"}
    centres = {"1": 1.8, "2": 6.3, "3": 10.8, "T": 16.2}
    for t, x in centres.items():
        box = FancyBboxPatch((x - 1, 5), 2, 2, boxstyle="round,pad=0.1,rounding_size=0.4", linewidth=1.4)
        box.set(facecolor="#FBE3D3", edgecolor=VERMILION)
        ax.add_patch(box)
        ax.text(x, 6.05, f"$C_{t}$", ha="center", va="center", fontsize=13)
        _arrow(ax, (x, 10.1), (x, 7.2))
        ax.text(x, 10.8, f"$k_{t}, v_{t}$", **quiet)
        ax.text(x + 0.75, 8.6, f"$i_{t}$", **quiet)
        _arrow(ax, (x, 4.8), (x, 1.9))
        ax.text(x, 1.1, f"$h_{t}$", **quiet)
        ax.text(x + 0.85, 3.4, f"$q_{t}$", **quiet)
    for start, stop, gate in ((2.95, 5.15, "f_2"), (7.45, 9.65, "f_3"), (13.6, 15.05, "f_T")):
        _arrow(ax, (start, 6), (stop, 6), VERMILION, linewidth=1.8)
        ax.text((start + stop) / 2 - 0.1, 5.2, f"${gate}$", **quiet)
    for x in (12.3, 12.75, 13.2):
        ax.plot(x, 6, "o", color=VERMILION, markersize=2)


def _square(ax: Axes) -> None:
    """The frame of the T x T square, with its two axes named."""
    ax.set(xlim=(0.3 - (HEIGHT - STEPS), STEPS + 0.3), ylim=(HEIGHT - 0.3, -0.3))
    ax.add_patch(Rectangle((0, 0), STEPS, STEPS, facecolor="none", edgecolor=GREY, linewidth=0.8, zorder=4))
    ax.text(STEPS / 2, STEPS + 0.7, "written at step $j$", ha="center", va="center", fontsize=8)
    ax.text(-0.7, STEPS / 2, "read at step $t$", ha="center", va="center", fontsize=8, rotation=90)


def _cells(start: int, stop: int) -> tuple[list, np.ndarray]:
    """The causal cells of a square on the diagonal, and how far each is from the diagonal."""
    cells = [(t, j) for t in range(start, stop) for j in range(start, t + 1)]
    return [_box(j, j + 1, t, t + 1) for t, j in cells], np.array([t - j for t, j in cells])


def _panel_parallel(ax: Axes) -> None:
    """All weights at once: the lower triangle of the gate matrix. (Its shades are drawn, not computed.)"""
    _square(ax)
    boxes, distance = _cells(0, STEPS)
    ax.add_collection(PolyCollection(boxes, array=-distance, cmap=HEAT, edgecolor="white", linewidth=0.4))


def _panel_chunkwise(ax: Axes, chunk: int = CHUNK) -> None:
    """Squares on the diagonal, and states that are handed from chunk to chunk."""
    _square(ax)
    for start in range(0, STEPS, chunk):
        boxes, distance = _cells(start, start + chunk)
        cells = PolyCollection(boxes, array=-distance, cmap=HEAT, edgecolor="white", linewidth=0.4)
        cells.set_clim(1 - STEPS, 0)
        ax.add_collection(cells)
        ax.add_patch(Rectangle((start, start), chunk, chunk, fill=False, linewidth=1.2, zorder=4))
        if start:
            ax.add_patch(Polygon(_box(0, start, start, start + chunk), linewidth=0, **STATES))
            ax.add_patch(Rectangle((0, start), start, chunk, facecolor="none", edgecolor=GREY, linewidth=0.8))
            ax.plot(start, start, "o", color=VERMILION, markersize=9, markeredgecolor="white", zorder=6)
            name = f"$C_{start // chunk}$"
            ax.text(start + 0.55, start - 0.75, name, ha="left", va="center", fontsize=10, color=VERMILION)
    for start in range(chunk, STEPS - chunk, chunk):
        stop = start + chunk
        _arrow(ax, (start + 0.3, start - 0.25), (stop - 0.1, stop - 0.45), VERMILION, connectionstyle="arc3,rad=-0.45")


def _panel_tfla(ax: Axes) -> None:
    """Chunks too large for one program, cut into tiles; the tiles of one program are marked."""
    chunk, tile = 6, 2
    _panel_chunkwise(ax, chunk)
    for start in range(0, STEPS, chunk):
        for row in range(start, start + chunk, tile):
            for column in range(start, row + tile, tile):
                ax.add_patch(Rectangle((column, row), tile, tile, fill=False, linewidth=0.8, zorder=4))
    row = STEPS - tile
    ax.add_patch(Rectangle((0, row), STEPS, tile, fill=False, edgecolor=BLUE, linewidth=2.2, zorder=7))


def _panel_sig(ax: Axes) -> None:
    """The two input gates over their pre-activation: one grows without bound, the other ends at 1."""
    ax.set(xlim=(0.3 - (HEIGHT - STEPS), STEPS + 0.3), ylim=(HEIGHT - 0.3, -0.3))
    i = np.linspace(-STEPS / 2, STEPS / 2, 200)
    one = STEPS / 2.4  # a gate of 1, in the panel's units

    def place(gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shown = gate * one <= STEPS
        return i[shown] + STEPS / 2, STEPS - gate[shown] * one

    ax.plot([0, STEPS], [STEPS, STEPS], color=GREY, linewidth=0.8)
    ax.plot([0, STEPS], [STEPS - one] * 2, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    ax.plot(*place(np.exp(i)), color=VERMILION, linewidth=2)
    ax.plot(*place(1 / (1 + np.exp(-i))), color=BLUE, linewidth=2)
    ax.text(STEPS / 2 + 1.2, 1.2, "$e^i$", ha="left", va="center", fontsize=13, color=VERMILION)
    ax.text(STEPS - 0.2, STEPS - one - 0.8, "$\\sigma(i)$", ha="right", va="center", fontsize=13, color=BLUE)
    ax.text(-0.3, STEPS - one, "1", ha="right", va="center", fontsize=10)
    ax.text(-0.3, STEPS, "0", ha="right", va="center", fontsize=10)
    ax.text(STEPS / 2, STEPS + 0.7, "input gate $i$", ha="center", va="center", fontsize=8)


# stage: (title, caption, width in the units of HEIGHT, what draws it)
PANELS: dict[str, tuple[str, str, float, Callable[[Axes], None]]] = {
    "01": ("01 recurrent", "one step after the other", 18.6, _panel_recurrent),
    "02": ("02 parallel", "all $T × T$ weights at once", HEIGHT, _panel_parallel),
    "03": ("03 chunkwise", "chunks, and states between", HEIGHT, _panel_chunkwise),
    "04": ("04 TFLA", "large chunks, cut into tiles", HEIGHT, _panel_tfla),
    "05": ("05 mLSTMsig", "a gate that ends at 1: no $n$, no $m$", HEIGHT, _panel_sig),
}


def five_forms(path: str | Path | None = None, *, stages: Sequence[str] = tuple(PANELS)) -> Figure:
    """The one picture of the README: one computation in five forms, a panel for each of the given stages.

    Args:
        path: where to save it, too; as SVG its bytes are the same every time.
        stages: which panels, from left to right.

    Raises:
        ValueError: for a stage that has no panel.
    """
    for stage in stages:
        if stage not in PANELS:
            raise ValueError(f"stages must be among {', '.join(PANELS)}, got {stage!r}")
    # Everything is placed by hand, in inches: a layout engine's last digits differ from run to run.
    widths = [PANELS[stage][2] for stage in stages]
    unit = min(0.17, 9.4 / sum(widths))
    top, bottom, tall = 0.32, 0.3, HEIGHT * unit
    size = 10, top + tall + bottom
    gap = (size[0] - sum(widths) * unit) / len(stages)
    deterministic = {"svg.hashsalt": "five forms", "svg.fonttype": "path"}
    with plt.rc_context(matplotlib.rcParamsDefault | STYLE | deterministic):
        figure, left = plt.figure(figsize=size), gap / 2
        for stage in stages:
            title, caption, width, draw = PANELS[stage]
            ax = figure.add_axes((left / size[0], bottom / size[1], width * unit / size[0], tall / size[1]))
            left += width * unit + gap
            ax.axis("off")
            draw(ax)
            ax.set_title(title, fontweight="bold", fontsize=12, pad=4)
            ax.text(0.5, -0.02, caption, ha="center", va="top", fontsize=58 * unit, transform=ax.transAxes)
        if path is not None:
            try:
                figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
            finally:
                plt.close(figure)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfla_lab.plot", description="Draws the picture of the README.")
    parser.add_argument("--five-forms", metavar="PATH.svg", required=True, help="where to write it")
    path = parser.parse_args(argv).five_forms
    matplotlib.use("Agg")
    try:
        five_forms(path)
    except (OSError, ValueError) as error:
        parser.error(f"cannot write {path}: {error}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
