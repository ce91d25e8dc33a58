"""Pictures for the notebooks of stage 04, in the style of tfla_lab.plot; they compute no mLSTM of their own."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tfla_lab import plot


# ---------------------------------------------------------------------------------------------------------------------
# Notebook 04b: the backward pass
# ---------------------------------------------------------------------------------------------------------------------
def backward_tiles(ax: Axes, L: int, rows: int, columns: int, own: int, *, of_rows: bool, title: str) -> Axes:
    """Which tiles of a chunk's L x L square one program visits, numbered in its order, and the steps it owns (black).

    Args:
        rows, columns: of a tile.
        own: number of the tile of rows (of_rows, as for dq) or of columns (as for dk and dv) that the program owns.
    """
    for i, j in itertools.product(range(0, L, rows), range(0, L, columns)):
        first = own * rows if of_rows else own * columns
        mine = (i if of_rows else j) == first
        # The loops begin and end at whole tiles, as in the kernels.
        if of_rows:
            visited, number = mine and j < first + rows, j // columns
        else:
            begin = first // rows * rows
            visited, number = mine and i >= begin, (i - begin) // rows
        cut = j + columns > i + 1
        colour = (plot.SKY if cut else plot.BLUE) if visited else "#FFFFFF" if j >= i + rows else plot.PALE
        ax.add_patch(Rectangle((j, i), columns, rows, facecolor=colour, edgecolor=plot.GREY, linewidth=0.6))
        if visited:
            place = j + 0.18 * columns, i + 0.75 * rows  # below the diagonal
            ax.text(*place, str(number + 1), ha="center", va="center", color="black" if cut else "white")
    start, length = (own * rows, rows) if of_rows else (own * columns, columns)
    bar = (-0.06 * L, start, 0.04 * L, length) if of_rows else (start, -0.06 * L, length, 0.04 * L)
    ax.add_patch(Rectangle(bar[:2], *bar[2:], facecolor=plot.BLACK))
    ax.plot([0, L], [0, L], color=plot.VERMILION, linewidth=1.2, linestyle="-")
    ax.set(xlim=(-0.07 * L, L), ylim=(L, -0.07 * L), aspect="equal", title=title)
    ax.set(xlabel="step j that was written", ylabel="step i that reads")
    ax.set_xticks(range(0, L + 1, columns))
    ax.set_yticks(range(0, L + 1, rows))
    ax.spines[:].set_visible(False)
    return ax


def crossing_paths(ax: Axes, L: int, t: int) -> Axes:
    """The paths through a chunk from where something was written (columns) to where it is read (rows).

    The first column is the state before the chunk, the last row the one behind it. What crosses step t is coloured.
    """
    zones = (  # left, top, width, height, colour, hatch, label
        (0, t - 1, 1, L - t + 1, plot.ORANGE, "//", "state before → $h_r$"),
        (1, t - 1, t - 1, L - t + 1, plot.SKY, "", "$k_j v_j$ → $h_r$"),
        (1, L, t - 1, 1, plot.GREEN, "\\\\", "$k_j v_j$ → state after"),
        (0, L, 1, 1, plot.VERMILION, "xx", "state before → state after"),
    )
    for row, column in itertools.product(range(L + 1), range(L + 1)):
        if row == L or column <= row + 1:
            ax.add_patch(Rectangle((column, row), 1, 1, facecolor=plot.PALE, edgecolor="white"))
    for left, top, width, height, colour, hatch, label in zones:
        style = {"facecolor": colour, "edgecolor": "white", "hatch": hatch, "linewidth": 0}
        ax.add_patch(Rectangle((left, top), width, height, label=label, **style))
    ax.hlines(range(1, L + 1), 0, L + 1, color="white", linewidth=1)
    ax.vlines(range(1, L + 1), 0, L + 1, color="white", linewidth=1)
    ax.add_patch(Rectangle((0, t - 1), t, L - t + 2, fill=False, edgecolor=plot.BLACK, linewidth=1.6))
    ax.set(xlim=(0, L + 1), ylim=(L + 1, 0), aspect="equal", xlabel="written", ylabel="read")
    ax.set_xticks(np.arange(L + 1) + 0.5, ["state", *(f"{j}" for j in range(1, L + 1))])
    ax.set_yticks(np.arange(L + 1) + 0.5, [*(f"$h_{{{i}}}$" for i in range(1, L + 1)), "state"])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), title=f"what $\\bar f_{t}$ weakens", handleheight=1.4)
    return ax


# ---------------------------------------------------------------------------------------------------------------------
# Notebook 04a: the forward pass
# ---------------------------------------------------------------------------------------------------------------------
def tile_owners(square: Axes, outputs: Axes, T: int, L: int, rows: int, columns: int, tiles: int) -> None:
    """Which programs of h_kernel compute which tiles: left those of P that they form, right the tile of h they store.

    Args:
        L, rows, columns: steps in a chunk, in a row tile, in a column tile.
        tiles: of the head dimension. Programs with the same row tile stand side by side.
    """
    numbers = [range(tile * tiles, tile * tiles + tiles) for tile in range(T // rows)]
    programs = [", ".join(map(str, own)) if tiles < 3 else f"{own[0]} .. {own[-1]}" for own in numbers]
    for tile, name in enumerate(programs):
        top, chunk = tile * rows, tile * rows // L * L
        style = {"facecolor": plot.COLOURS[top % L // rows % 6], "edgecolor": "white"}
        centred = {"ha": "center", "va": "center", "color": "black" if top % L // rows % 6 > 2 else "white"}
        for left in range(chunk, top + rows, columns):
            square.add_patch(Rectangle((left, top), columns, rows, **style))
            square.text(left + columns / 2, top + rows / 2, name, **centred)
        square.add_patch(Rectangle((0, top), chunk, rows, linewidth=0, **plot.STATES))
        for column in range(tiles):
            outputs.add_patch(Rectangle((column, top), 1, rows, **style))
            outputs.text(column + 0.5, top + rows / 2, str(tile * tiles + column), **centred)
    for ax, width in ((square, T), (outputs, tiles)):
        ax.hlines(range(L, T, L), 0, width, color=plot.BLACK, linewidth=1.2)
        ax.set(xlim=(0, width), ylim=(T, 0), yticks=range(0, T + 1, rows))
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color(plot.GREY)
    square.set(aspect="equal", xlabel="step j that was written", ylabel="step i that reads", xticks=range(0, T + 1, L))
    square.set_title("tiles of P: formed by programs ...")
    outputs.set_xticks(np.arange(tiles) + 0.5, [f"tile {column}" for column in range(tiles)])
    outputs.set(xlabel="columns of h", yticklabels=[])
    outputs.set_title("tiles of h: stored by program ...")
