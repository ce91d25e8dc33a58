"""The benchmark's result as the README shows it: tables, and three figures over the length of the sequence.

    python -m tfla_lab.bench_report [RESULT.json]

writes the section between the marks in README.md, and bench_forward.svg, bench_forward_backward.svg, bench_memory.svg
beside the result. Numbers are of the configuration that was fastest; what did not run, or ran wrong, is listed below.
"""

import argparse
import collections
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from tfla_lab import plot
from tfla_lab.bench import MAIN, WRONG, WRONG_GATE, fastest, is_ours, said, same_kernel
from tfla_lab.peers import KERNELS, STEPS
from tfla_lab.record import ROOT

RESULTS = ROOT / "shared" / "results"
RESULT = RESULTS / "bench_h200.json"
README = ROOT / "README.md"
START, END = "<!-- python -m tfla_lab.bench_report writes from here -->", "<!-- to here -->"
SHOWN = (512, 2048, 8192, 32_768, 65_536)  # lengths in the table
HEADLINE = 8192
HOPPER = ("mlstm_hopper", "mlstmsig_hopper")
UNSTEADY = 0.2  # share of a time from which on its spread is remarked upon
# key in a row: (file name, label of the axis)
FIGURES = {
    "forward_ms": ("bench_forward.svg", "forward (ms)"),
    "forward_backward_ms": ("bench_forward_backward.svg", "forward + backward (ms)"),
    "memory_gib": ("bench_memory.svg", "memory, forward + backward (GiB)"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------
def rows_of(result: dict, kind: str, name: str, shape: tuple[int, int, int] = MAIN) -> dict[int, dict]:
    """{length, or batch of decode: row} of a kernel beside an mLSTM of this shape: the fastest, else the first one."""
    shape = KERNELS[name].shape(*shape) if name in KERNELS else shape
    found = collections.defaultdict(list)
    for row in result["rows"]:
        if row.get("pass") == kind and row["kernel"] == name and (row["heads"], row["d_qk"], row["d_hv"]) == shape:
            found[row["batch"] if kind == "decode" else row["T"]].append(row)
    if kind != "train":
        return {at: rows[0] for at, rows in sorted(found.items())}
    return {T: fastest(rows, same_kernel(rows[0]), T) or rows[0] for T, rows in sorted(found.items())}


def floor_ms(row: dict, result: dict) -> float:
    """What it takes to read q, k, v once and to write h once, at the card's copy rate."""
    size = {"float32": 4}.get(row["dtype"], 2)
    moved = row["batch"] * row["heads"] * row["T"] * 2 * (row["d_qk"] + row["d_hv"]) * size
    return moved / result["copy_rate_tb_s"] / 1e9


def title(name: str) -> str:
    words = (KERNELS | STEPS)[name].title
    return f"**`{words.partition(' ')[0]}`** {words.partition(' ')[2]}" if is_ours({"kernel": name}) else words


def heads(row: dict) -> str:
    return "{heads} × ({d_qk}, {d_hv})".format(**row)


def short(row: dict) -> str:
    """The first word of why there is no number."""
    return said(row).partition(":")[0] or "–"


def cell(row: dict | None) -> str:
    """ "forward / forward + backward", in ms."""
    if row is None:
        return ""
    if "forward_ms" not in row:
        return short(row)
    return f"{row['forward_ms']:.2f} / " + (
        f"{row['forward_backward_ms']:.2f}" if "forward_backward_ms" in row else short(row)
    )


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---", *["--:"] * (len(head) - 1)], *lines)])


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
def main_table(result: dict) -> str:
    """A row for each kernel, at the main shape."""
    lines = []
    for name in KERNELS:
        rows = rows_of(result, "train", name)
        if rows:
            one = rows.get(HEADLINE, {})
            share = f"{floor_ms(one, result) / one['forward_ms']:.0%}" if "forward_ms" in one else ""
            memory = f"{one['memory_gib']:.2f}" if "memory_gib" in one else ""
            chunk = one.get("chunk_size") or one.get("configuration", {}).get("chunk_size", "")
            lines.append([title(name), f"{chunk}", *(cell(rows.get(T)) for T in SHOWN), share, memory])
    head = ["kernel", "chunk", *(f"T = {T:,}" for T in SHOWN), "of the floor", "GiB"]
    return markdown(head, lines)


def over_lengths(result: dict, kind: str, shape: tuple[int, int, int], head: str) -> str:
    """All kernels that have rows of a kind at a shape, over the lengths at which the mLSTM has some."""
    found = {name: rows for name in KERNELS if (rows := rows_of(result, kind, name, shape))}
    lengths = sorted({T for name, rows in found.items() if not KERNELS[name].attention for T in rows})
    lines = [[title(name), *(cell(rows.get(T)) for T in lengths)] for name, rows in found.items()]
    return markdown([head, *(f"T = {T:,}" for T in lengths)], lines)


def our_shapes(result: dict) -> dict[tuple[int, int, int], str]:
    """The shapes at which our kernels were timed, and how they are called."""
    ours = [row for row in result["rows"] if row.get("pass") == "train" and is_ours(row)]
    return {(row["heads"], row["d_qk"], row["d_hv"]): "{heads} heads of ({d_qk}, {d_hv})".format(**row) for row in ours}


def shapes_tables(result: dict) -> str:
    """A table for each of the other shapes."""
    others = {shape: words for shape, words in our_shapes(result).items() if shape != MAIN}
    return "\n\n".join(over_lengths(result, "train", shape, words) for shape, words in others.items())


def losses(result: dict) -> str:
    """Where a peer takes less time than a kernel for Hopper GPUs, at any length and shape. In bold what takes less.

    Of a peer's configurations, that counts which is fastest forward and backward.
    """
    lines = []
    for name, (shape, words) in itertools.product(HOPPER, our_shapes(result).items()):
        for T, own in rows_of(result, "train", name, shape).items():
            faster = []
            for peer in KERNELS.values():
                row = None if peer.ours else rows_of(result, "train", peer.name, shape).get(T)
                times = ("forward_ms", "forward_backward_ms")
                less = [row is not None and row.get(key, math.inf) < own.get(key, 0) for key in times]
                if any(less):
                    numbers = (f"**{x}**" if y else x for x, y in zip(cell(row).split(" / "), less, strict=True))
                    faster.append(f"{peer.title} {' / '.join(numbers)}")
            if faster:
                lines.append(f"- {title(name)}, {words}, T = {T:,}: {cell(own)}; {'; '.join(faster)}")
    names = " or ".join(title(name) for name in HOPPER)
    if not lines:
        return f"No peer is faster than {names} at any length and shape that was measured."
    head = f"Of all lengths and shapes that were measured, a peer is faster than {names} at these (bold is faster):"
    return "\n".join([head, "", *lines])


def remember_table(result: dict) -> str:
    """Our own kernels where next to nothing is forgotten."""
    return over_lengths(result, "remember", MAIN, "kernel")


def table_over(result: dict, kind: str, names: Iterable[str], number: str, head: str, column: str) -> str:
    """One number of each kernel, over lengths or batches.

    Args:
        kind: the rows' "pass".
        number: how a row's number is written, as str.format takes it.
        head, column: over the names, and over the numbers.
    """
    found = {name: rows for name in names if (rows := rows_of(result, kind, name))}
    columns = sorted({at for rows in found.values() for at in rows})

    def written(row: dict | None) -> str:
        if row is None:
            return ""
        return number.format(**row) if "forward_ms" in row or "step_us" in row else short(row)

    lines = [[title(name), *(written(rows.get(at)) for at in columns)] for name, rows in found.items()]
    return markdown([head, *(column.format(at) for at in columns)], lines)


def prefill_table(result: dict) -> str:
    """One long sequence: forward, with the state after it."""
    return table_over(result, "prefill", KERNELS, "{forward_ms:.2f}", "kernel", "T = {:,}")


# What walks along the sequence in mlstm_hopper.py and mlstmsig_hopper.py, by the names of the kernels that may do it.
WALKS = {
    "h": ("state_times_keys",),
    "dv": ("state_times_keys, 2",),
    "dq": ("dq", "state_times_values"),
    "dk": ("dk", "state_times_values, 2"),
}


def walks_table(result: dict) -> str:
    """What forward + backward at one length consist of, in ms."""
    lines = []
    for name in HOPPER:
        times = rows_of(result, "train", name)[HEADLINE]["kernels_ms"]
        walks = [sum(times.get(kernel, 0) for kernel in kernels) for kernels in WALKS.values()]
        numbers = *walks, sum(times.values()) - sum(walks), sum(times.values())
        lines.append([f"`{name}`", *(f"{number:.2f}" for number in numbers)])
    return markdown(["kernel", *WALKS, "all others", "together"], lines)


def steps_table(result: dict) -> str:
    """A step of generation, in µs."""
    return table_over(result, "decode", STEPS, "{step_us:.1f}", "step", "batch {}")


def unsteady(row: dict) -> str:
    """What to know of a row whose times differ much from call to call; else nothing."""
    times = [(row.get(f"{key}_spread_ms", 0.0), row.get(f"{key}_ms", 0.0)) for key in ("forward", "forward_backward")]
    if row.get("pass") != "train" or not any(spread > UNSTEADY * time for spread, time in times):
        return ""
    words = f"- {KERNELS[row['kernel']].title}, {heads(row)}, T = {row['T']:,}: the quartiles of the times lie "
    words += " / ".join(f"{spread:.2f}" for spread, _ in times) + " ms apart"
    if "kernels_ms" in row:
        words += f"; the kernels of forward + backward alone take {sum(row['kernels_ms'].values()):.2f} ms together"
    return words + "."


def spread(result: dict) -> str:
    """How far apart the quartiles of our kernels' times lie, in words."""
    shares = [
        row[f"{key}_spread_ms"] / row[f"{key}_ms"]
        for row in result["rows"]
        for key in ("forward", "forward_backward")
        if is_ours(row) and row.get("pass") == "train" and f"{key}_spread_ms" in row
    ]
    if not shares:
        return ""
    return f"; quartiles of ours are {statistics.median(shares):.0%} of the median apart, at most {max(shares):.0%}"


def remarks(result: dict) -> str:
    """What a reader should know of each kernel, and everything that has no number."""
    lines = [f"- {k.title}: {k.note}." for k in KERNELS.values() if k.note and rows_of(result, "train", k.name)]
    absent = [
        kernel.title for kernel in KERNELS.values() if not any(row["kernel"] == kernel.name for row in result["rows"])
    ]
    if absent:
        lines.append(f"- Not measured in this run: {', '.join(absent)}.")
    lines += filter(None, map(unsteady, result["rows"]))
    found = collections.defaultdict(list)
    for row in result["rows"]:
        if said(row):
            chunk = row.get("chunk_size") or (row.get("configuration") or {}).get("chunk_size")
            found[row["kernel"], row.get("pass"), chunk, short(row), "forward_ms" in row].append(row)
    for (name, kind, chunk, _, has_forward), rows in found.items():
        words = [(KERNELS | STEPS)[name].title]
        if kind:
            key, places = "batch" if kind == "decode" else "T", collections.defaultdict(list)
            for row in rows:
                places[heads(row)].append(row[key])
            at = (f"{shape} at {key} = {', '.join(f'{x:,}' for x in sorted(found))}" for shape, found in places.items())
            words += [kind, f"chunk size {chunk}", "; ".join(at)] if chunk else [kind, "; ".join(at)]
        lines.append(f"- {', '.join(words)}: {'forward + backward ' * has_forward}{said_of_all(rows)}")
    return "\n".join(lines)


def said_of_all(rows: list[dict]) -> str:
    """Why rows that share a reason have no numbers; errors of all of them, from the smallest to the largest."""
    if rows[0].get("correct", True):
        return said(rows[0])
    errors = {name: sorted(row["errors"][name] for row in rows) for name in rows[0]["errors"]}
    ranges = {name: f"{x[0]}" + f" to {x[-1]}" * (x[0] < x[-1]) for name, x in errors.items()}
    return said(rows[0] | {"errors": ranges})


def section(result: dict) -> str:
    """The README's section."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    NH, DQK, DHV = MAIN
    measured, more = {row.get("pass") for row in result["rows"]}, ""
    if tables := shapes_tables(result):
        more += f"Other head dimensions (d_qk, d_hv), as wide:\n\n{tables}\n\n"
    if any(row["kernel"] in HOPPER and "forward_ms" in row for row in result["rows"]):
        more += f"{losses(result)}\n\n"
    if "remember" in measured:
        more += "Where the kernels for Hopper GPUs cut sequences into spans, here at T = 65,536, they do not compute "
        more += "what is forgotten before it matters. With f around 13 instead of 3, where next to nothing is:\n\n"
        more += f"{remember_table(result)}\n\n"
    if "prefill" in measured:
        more += f"One long sequence, forward with the state after it, in ms:\n\n{prefill_table(result)}\n\n"
    if "decode" in measured:
        ours = any(row.get("pass") == "decode" and is_ours(row) for row in result["rows"])
        links = "[04](04_tfla_triton#on-an-h200), [05](05_mlstmsig#what-the-sigmoid-saves)"
        elsewhere = "" if ours else f"; ours, by themselves: {links}"
        more += f"A step of generation, in µs, as it runs in a CUDA graph{elsewhere}:\n\n{steps_table(result)}\n\n"
    return f"""## Against others' kernels

65,536 tokens in bfloat16 at each length, {NH} heads with d_qk = {DQK}, d_hv = {DHV} (attention: as wide, with heads of 128).
Milliseconds, forward / forward + backward; "of the floor" is the time that reading q, k, v once and writing h once would take at
the copy rate measured beside it ({result["copy_rate_tb_s"]} TB/s; matrix products: {result["matrix_rate_tflop_s"]} TFLOP/s) as a share of the forward
time at T = {HEADLINE:,}; GiB are the peak of forward + backward above the inputs, at the same length. Each kernel was checked against a
reference in float64 before it was timed: ours must keep their [budgets](#what-is-measured-what-is-tested), a peer is called wrong from an
error of {WRONG:.0%} on, {WRONG_GATE:.0%} in the gates' gradients. Each peer has the fastest of its own configurations. What has an empty cell was not measured.
Times are medians{spread(result)}.

{main_table(result)}

<img src="shared/results/bench_forward.svg" alt="Time of the forward pass over the length of the sequence" width="49%"> <img src="shared/results/bench_forward_backward.svg" alt="Time of forward and backward pass over the length of the sequence" width="49%"> <img src="shared/results/bench_memory.svg" alt="Memory of forward and backward pass over the length of the sequence" width="49%">

{more}{remarks(result)}

On an {result["device"]}, {result["date"]}, commit {result["commit"]}: {versions}. From
[`{RESULT.name}`](shared/results/{RESULT.name}), written by `make bench`."""  # noqa: E501


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def figure(result: dict, key: str, path: str | Path | None = None):
    """One of FIGURES: all kernels over the length, both axes logarithmic.

    Args:
        key: what is drawn, a key of FIGURES.
        path: where to save it, too; as SVG its bytes are the same every time.
    """
    costs = {}
    for name in KERNELS:
        rows = rows_of(result, "train", name)
        costs[KERNELS[name].title] = list(rows), [row.get(key) for row in rows.values()]
    deterministic = {"svg.hashsalt": key, "svg.fonttype": "path"}
    with plt.rc_context(matplotlib.rcParamsDefault | plot.STYLE | deterministic):
        # Placed by hand: a layout engine's last digits differ from run to run.
        drawing = plt.figure(figsize=(7.6, 4.2))
        ax = drawing.add_axes((0.09, 0.12, 0.55, 0.84))
        plot.cost_over_T(costs, ylabel=FIGURES[key][1], ax=ax)
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
        ours = {kernel.title for kernel in KERNELS.values() if kernel.ours}
        for line in ax.get_lines():
            line.set_linewidth(2.4 if line.get_label() in ours else 1.0)
        lines = [line for line in ax.get_lines() if len(line.get_xdata())]
        ax.legend(handles=lines, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
        if path is not None:
            try:
                drawing.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
            finally:
                plt.close(drawing)
    return drawing


def insert(text: str, new: str) -> str:
    """The README's text with a new section between the marks.

    Raises:
        ValueError: if the marks are not there.
    """
    if START not in text or END not in text:
        raise ValueError(f"the text must contain the lines {START} and {END}")
    before, after = text.partition(START)[0], text.partition(END)[2]
    return f"{before}{START}\n{new}{chr(10) * bool(new)}{END}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfla_lab.bench_report", description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, nargs="?", default=RESULT, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        result = json.loads(arguments.result.read_text())
        text = insert(arguments.readme.read_text(), section(result))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    matplotlib.use("Agg")
    for key, (name, _) in FIGURES.items():
        figure(result, key, arguments.result.with_name(name))
    arguments.readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
