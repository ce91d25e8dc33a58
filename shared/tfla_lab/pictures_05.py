"""Pictures for the notebook of stage 05, in the style of tfla_lab.plot; they compute no mLSTM of their own."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from tfla_lab import plot


def gain_maps(maps: Mapping[str, Mapping], i: Sequence[float], f: Sequence[float], bias: float | None = None) -> Figure:
    """Heat maps of gains: a row for each form, a column for each eps (None: before the norm, on a logarithmic scale).

    Args:
        maps: {form: {eps: G (len(f), len(i))}}, as tfla_lab.transfer.gain_map gives them.
        i, f: the gates, evenly spaced.
        bias: an input gate to mark by a line.
    """
    columns = list(next(iter(maps.values())))
    with plt.rc_context(plot.STYLE):
        figure, axes = plt.subplots(
            len(maps), len(columns), figsize=(10, 5.2), layout="constrained", sharex=True, sharey=True, squeeze=False
        )
    half_i, half_f = (i[1] - i[0]) / 2, (f[1] - f[0]) / 2
    extent = (i[0] - half_i, i[-1] + half_i, f[0] - half_f, f[-1] + half_f)
    for column, eps in enumerate(columns):
        norm = LogNorm(1e-3, 20) if eps is None else Normalize(0, 1)
        for row, (form, gains) in enumerate(maps.items()):
            ax = axes[row, column]
            gain = np.clip(gains[eps], norm.vmin, norm.vmax)
            image = ax.imshow(gain, origin="lower", extent=extent, aspect="auto", cmap=plot.HEAT, norm=norm)
            if bias is not None:
                ax.axvline(bias, color="white", linestyle=(0, (4, 2)), linewidth=1.2)
            ax.set_title(f"{form}, " + ("before the norm" if eps is None else f"after it, eps = {eps:g}"))
            if row == len(maps) - 1:
                ax.set_xlabel("input gate $\\tilde i$")
            if column == 0:
                ax.set_ylabel("forget gate $\\tilde f$")
        figure.colorbar(image, ax=list(axes[:, column]), pad=0.02).ax.set_title("G", fontsize=10)
    return figure


def name_of_byte(byte: int) -> str:
    """How a byte is written along an axis."""
    names = {0: "0 (file)", 9: "tab", 10: "newline", 13: "return", 32: "space"}
    return names.get(byte, chr(byte) if 32 < byte < 127 else f"0x{byte:02x}")


def gates_by_byte(ax: Axes, text: bytes, gate: Sequence[float], *, each: int = 10, least: int = 15) -> Axes:
    """A head's mean gate for the bytes that open it most and least, with the standard deviation as a whisker.

    Args:
        gate: a pre-activation for each byte of the text, (T,).
        each: so many bytes at each end.
        least: bytes that occur less often are left out.
    """
    codes, gate = np.frombuffer(text, np.uint8), np.asarray(gate, dtype=float)
    common = [byte for byte in np.unique(codes) if (codes == byte).sum() >= least]
    order = sorted(common, key=lambda byte: gate[codes == byte].mean())
    shown = order if len(order) <= 2 * each else order[:each] + order[-each:]
    means = np.array([gate[codes == byte].mean() for byte in shown])
    spread = np.array([gate[codes == byte].std() for byte in shown])
    low = means < gate.mean()
    for chosen, colour, hatch in ((low, plot.SKY, "//"), (~low, plot.ORANGE, "")):
        places = np.flatnonzero(chosen)
        style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
        ax.bar(places, means[chosen] - gate.mean(), bottom=gate.mean(), **style)
    ax.errorbar(range(len(shown)), means, yerr=spread, fmt="none", ecolor=plot.BLACK, elinewidth=0.9, capsize=2)
    ax.axhline(gate.mean(), color=plot.BLACK, linewidth=1, linestyle="-")
    if len(shown) < len(order):
        ax.axvline(each - 0.5, color=plot.GREY, linewidth=1, linestyle=(0, (2, 2)))
    labels = [name_of_byte(int(byte)) for byte in shown]
    ax.set_xticks(range(len(shown)), labels)
    for label in ax.get_xticklabels():
        label.set(rotation=90 if len(label.get_text()) > 1 else 0, family="monospace")
    ax.set_ylabel("mean of $\\tilde i$")
    return ax
