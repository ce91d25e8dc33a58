"""The tour: every form of the mLSTM on the same real text, with its errors, its time and its memory in one table.

    python -m tfla_lab.tour            (or: make tour)

The yardstick is the recurrence in float64 on the same rounded inputs, forward and backward: that of stage 01, and for
the mlstmsig forms that of stage 05. q, k, v and the gates are those of a trained layer that reads the text. The tour
runs whatever stands in tfla_lab.forms.FORMS. Exit status: 0 if all errors are within the budgets of tfla_lab.check, 1
if one is not (or if nothing could be run), 2 if the command line is wrong.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from tfla_lab.check import BUDGETS, CheckFailed, budget, check, relative_error, same_gauge, to_numpy
from tfla_lab.forms import FORMS, GRADIENTS, STATE, Form, has_gpu, interpreted, oracle, run_torch
from tfla_lab.inputs import Inputs, cast, read_text, text_inputs

MIB = 2**20
# glibc's mallopt: {parameter (its number in malloc.h): (within freed_memory_goes_back, outside)}
MALLOPT = {
    -3: (4096, 32 * MIB),  # M_MMAP_THRESHOLD: from this size on, memory is taken from the system for itself
    -4: (2**15, 2**16),  # M_MMAP_MAX: so many times; Linux allows a process twice as many mappings
    -1: (0, 64 * MIB),  # M_TRIM_THRESHOLD: of the rest, so much may be free at the end
    -2: (0, MIB // 8),  # M_TOP_PAD: and so much more is asked for
}
TIMED_RUNS = 3
# Pictures of single steps show so many of them: more could not be read.
STEPS_OF_GATES, STEPS_OF_MATRIX = 72, 32


@dataclass
class Row:
    """What the tour found out about one form."""

    form: Form
    dtype: str  # that it computes in
    not_run: str = ""  # why it did not run
    errors: dict[str, float] = field(default_factory=dict)
    error_over_t: np.ndarray | None = None
    times: dict[int, float] = field(default_factory=dict)  # T: ms
    peaks: dict[int, float | None] = field(default_factory=dict)  # T: MiB
    over_budget: str = ""  # the table of the check that failed

    @property
    def worst_gradient(self) -> str:
        """The gradient that comes closest to its budget, or is farthest above it."""
        return max(GRADIENTS, key=lambda name: self.errors[name] / budget(name, self.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Running a form
# ---------------------------------------------------------------------------------------------------------------------
def is_interpreted(form: Form) -> bool:
    return form.library == "triton" and interpreted()


def device_of(form: Form) -> str:
    return "cuda" if form.library != "numpy" and not is_interpreted(form) and has_gpu() else "cpu"


def reason_not_to_run(form: Form, dtype: str) -> str:
    """Why a form cannot run here with this dtype; empty if it can."""
    if form.library == "triton" and dtype == "float64":
        return "the Triton kernels take no float64"
    if is_interpreted(form) and dtype == "bfloat16":
        return "Triton's interpreter cannot compute in bfloat16"
    return form.missing()


def make_inputs(text: bytes, args: argparse.Namespace) -> tuple[Inputs, Any]:
    """The inputs of the trained layer that reads the text, and dh ~ N(0, 1): CPU tensors, rounded to the dtype."""
    import torch

    dtype = getattr(torch, args.dtype)
    inputs = text_inputs(text, B=args.batch, NH=args.heads, DQK=args.dqk, DHV=args.dhv, dtype=dtype)
    return inputs, cast(np.random.default_rng([args.seed, 2]).normal(size=tuple(inputs.v.shape)), dtype)


def hand_over(form: Form, x: Any) -> Any:
    """The same numbers as the form takes them: on its device, or as a NumPy array (which has float32 for bfloat16)."""
    if form.library != "numpy":
        return x.to(device_of(form))
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()


def forward_backward(form: Form, inputs: Inputs, dh: Any, chunk_size: int) -> dict[str, Any]:
    """One forward and one backward pass; names what comes out as forms.oracle does."""
    function, options = form.load(), {"chunk_size": chunk_size} if form.chunked else {}
    if form.library != "numpy":
        return run_torch(function, inputs, dh, **options)
    backward = getattr(importlib.import_module(form.module), form.name + "_backward")
    h, state = function(*inputs, return_state=True, **options)
    gradients = backward(dh, *inputs, **options)[: len(GRADIENTS)]
    named = dict(zip(GRADIENTS, gradients, strict=True))
    return {"h": h, **dict(zip(STATE[form.cell], state, strict=True)), **named}


def timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What run() returns, and the milliseconds it took."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, 1000 * (time.perf_counter() - start)


def synchronize(device: str) -> None:
    """Waits until the GPU has done all that it was told to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_memory(run: Callable[[], Any], device: str) -> tuple[Any, float | None]:
    """What run() returns, and the MiB that it needed at its peak beyond what was there before.

    On the GPU PyTorch keeps the books. On the CPU NumPy and PyTorch allocate each in their own way, so the only honest
    book is the operating system's: the peak of the process's resident memory, in pages of 4 KiB. Linux keeps it without
    any sampling, and lets a process set it back. Elsewhere there is no such number, and it is None. Call this within
    freed_memory_goes_back.
    """
    gc.collect()
    if device == "cuda":
        import torch

        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        synchronize(device)
        return result, (torch.cuda.max_memory_allocated() - before) / MIB
    before = reset_resident_peak()
    result = run()
    return result, None if before is None else max(0.0, resident("VmHWM") - before)


def glibc() -> Any:
    """The C library, if it is glibc; else None."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") else None


@contextlib.contextmanager
def freed_memory_goes_back() -> Iterator[None]:
    """Within it, freed memory goes back to the system at once, so that resident memory is memory in use.

    glibc would keep it for the next need, which would then not be seen, and scatter what it hands out again, which
    would be seen twice. That saves time, though: times are taken outside. Other C libraries are left as they are.
    """
    libc = glibc()
    for parameter, (within, _) in MALLOPT.items() if libc else ():
        libc.mallopt(parameter, within)
    try:
        yield
    finally:
        for parameter, (_, outside) in MALLOPT.items() if libc else ():
            libc.mallopt(parameter, outside)


def reset_resident_peak() -> float | None:
    """Sets VmHWM back to VmRSS, and returns it; None where the system has or allows no such thing."""
    if libc := glibc():
        libc.malloc_trim(0)  # what was freed before freed_memory_goes_back
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except OSError:
        return None


def resident(entry: str) -> float:
    """MiB of this process in memory: now ("VmRSS") or at the peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def lengths(args: argparse.Namespace) -> list[int]:
    """At which lengths to measure: the pictures also want an eighth, a quarter and a half of the text."""
    parts = set() if args.no_figures else {args.length // 8, args.length // 4, args.length // 2}
    return sorted(parts - {0} | {args.length})


def runner(form: Form, inputs: Inputs, dh: Any, chunk_size: int) -> Callable[[int], dict[str, Any]]:
    """run(T): one forward and backward pass of the form over the first T steps."""
    inputs, dh = Inputs(*(hand_over(form, x) for x in inputs)), hand_over(form, dh)
    return lambda T: forward_backward(form, Inputs(*(x[:, :, :T] for x in inputs)), dh[:, :, :T], chunk_size)


def compare(form: Form, inputs: Inputs, dh: Any, reference: dict[str, np.ndarray], args: argparse.Namespace) -> Row:
    """Runs one form, compares it with the reference and measures its memory."""
    dtype = "float32" if form.library == "numpy" and args.dtype == "bfloat16" else args.dtype
    row = Row(form, dtype, not_run=reason_not_to_run(form, args.dtype))
    if row.not_run:
        return row
    T, device, slow, run = args.length, device_of(form), is_interpreted(form), runner(form, inputs, dh, args.chunk_size)
    try:
        run(min(16, T) if slow else T)  # the warm-up loads libraries and compiles kernels: a few steps do, if need be
        (results, ms), row.peaks[T] = peak_memory(lambda: timed(lambda: run(T), device), device)
    except (TypeError, ValueError) as error:
        if " must be " not in str(error):  # the words of a form that does not take such inputs
            raise
        row.not_run = str(error)
        return row
    except (MemoryError, RuntimeError) as error:
        # On the CPU, PyTorch has no type of its own for this.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        row.not_run = "not enough memory"
        return row

    if form.cell == "exp":
        results |= same_gauge((results["C"], results["n"], results.pop("m")), reference["m"])
    row.errors = {name: relative_error(x, reference[name]) for name, x in results.items()}
    row.error_over_t = relative_error_over_t(results["h"], reference["h"])
    try:
        check(results, reference, dtype=dtype, chunk_size=args.chunk_size if form.chunked else None, verbose=False)
    except CheckFailed as failure:
        row.over_budget = str(failure).strip("\n")

    if slow:  # once must do
        row.times[T] = ms
    else:
        results.clear()
        for T in lengths(args)[:-1]:
            row.peaks[T] = peak_memory(functools.partial(run, T), device)[1]
    return row


def take_times(row: Row, inputs: Inputs, dh: Any, args: argparse.Namespace) -> None:
    """The milliseconds of a form, the median of a few runs."""
    if row.not_run or row.times:
        return
    run = runner(row.form, inputs, dh, args.chunk_size)
    for T in lengths(args):
        run(T)
        runs = [timed(functools.partial(run, T), device_of(row.form))[1] for _ in range(TIMED_RUNS)]
        row.times[T] = statistics.median(runs)


def relative_error_over_t(h: Any, reference: np.ndarray) -> np.ndarray:
    """||h_t - reference_t|| / ||reference_t|| at every step t, over all batch entries and heads."""
    error = np.sqrt(((to_numpy(h) - reference) ** 2).sum(axis=(0, 1, 3)))
    norm = np.sqrt((reference**2).sum(axis=(0, 1, 3)))
    return np.divide(error, norm, out=np.where(error == 0, 0.0, np.inf), where=norm > 0)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------------------------------
def table(rows: Sequence[Row], dtype: str) -> str:
    head = f"{'stage':<7}{'form':<20}{'error of h':>11}{'worst gradient':>17}{'ms':>11}{'peak MiB':>11}   device"
    lines = [head, "-" * (len(head) + len("(CPU, interpreted)") - len("device"))]
    for row in rows:
        start = f"{row.form.stage:<7}{row.form.name:<20}"
        if row.not_run:
            lines.append(f"{start}   not run: {row.not_run}")
            continue
        slow, name = is_interpreted(row.form), row.worst_gradient
        T = max(row.times)
        gradient, peak = f"{name} {row.errors[name]:.1e}", "-" if row.peaks[T] is None else f"{row.peaks[T]:.1f}"
        ms = f"({row.times[T]:.0f})" if slow else f"{row.times[T]:.1f}"
        device = "CPU, interpreted" if slow else "GPU" if device_of(row.form) == "cuda" else "CPU"
        mark = "   <-- over budget" if row.over_budget else ""
        lines.append(f"{start}{row.errors['h']:>11.1e}{gradient:>17}{ms:>11}{peak:>11}   {device}{mark}")
    h, gradient, gate = BUDGETS[dtype]
    lines += [
        "",
        "error      relative to the recurrence of the same cell in float64, on the same rounded inputs",
        f"budgets    in {dtype}: h {h:.0e}; dq, dk, dv {gradient:.0e}; di, df {gate:.0e}",
        "ms         forward and backward together; on the CPU with one thread",
        "peak MiB   the most memory used beyond the inputs",
    ]
    if any(is_interpreted(row.form) and not row.not_run for row in rows):
        lines.append(
            "(ms)       of Triton's interpreter on the CPU: they say nothing about the kernel's speed on a GPU"
        )
    if any(row.dtype != dtype for row in rows):
        lines.append("recurrent  computes in float32, with its budgets, on the bfloat16 inputs: NumPy has no bfloat16")
    return "\n".join(lines)


def save_figures(text: bytes, inputs: Inputs, rows: Sequence[Row], args: argparse.Namespace) -> list[str]:
    """Draws what the tour found into PNG files in args.output; returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    from tfla_lab import plot

    plot.use_style()
    figures = {}
    i, f = (torch.from_numpy(to_numpy(x)[0]) for x in (inputs.i, inputs.f))  # (NH, T) of the first batch entry

    steps = min(args.length, STEPS_OF_GATES)
    figures["gates_over_text"] = plot.gates_over_text(text[:steps], i[0, :steps], f[0, :steps]).figure

    try:
        from mlstm_parallel import gate_matrix
    except ImportError:  # a lab without stage 02
        pass
    else:
        steps = min(args.length, STEPS_OF_MATRIX)
        log_D = gate_matrix(i[:, :steps], f[:, :steps])[0]
        D = torch.exp(log_D - log_D.amax(dim=-1, keepdim=True))
        heads = sorted({0, args.heads - 1})
        figures["gate_matrix"], axes = plt.subplots(
            1, len(heads), figsize=(5.4 * len(heads), 4.6), layout="constrained", squeeze=False
        )
        for head, ax in zip(heads, axes[0], strict=True):
            plot.gate_matrix(D[head], ax=ax, tokens=text[:steps], title=f"Gate matrix of head {head + 1}")

    ran = [row for row in rows if not row.not_run]
    errors = {row.form.name: row.error_over_t for row in ran}
    figures["error_over_t"] = plot.error_over_t(errors, budget=budget("h", args.dtype)).figure

    figures["cost_over_T"], axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    native = [row for row in ran if not is_interpreted(row.form)]
    for ax, cost, ylabel in zip(
        axes, ("times", "peaks"), ("forward + backward (ms)", "peak memory (MiB)"), strict=True
    ):
        lines = {row.form.name: tuple(zip(*sorted(getattr(row, cost).items()), strict=True)) for row in native}
        plot.cost_over_T(lines, ylabel=ylabel, ax=ax, slopes=(1, 2))

    for name, figure in figures.items():
        figure.savefig(args.output / f"{name}.png")
        plt.close(figure)
    return [f"{name}.png" for name in figures]


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """One line for an error; the usage is long, and --help shows it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def whole_number(least: int) -> Callable[[str], int]:
    def parse(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {word!r}")
        return number

    return parse


def chunk_size(word: str) -> int:
    number = int(word) if word.isdecimal() else 0
    if number < 16 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"must be a power of two of at least 16, got {word!r}")
    return number


def stage(word: str) -> str:
    stages = sorted({form.stage for form in FORMS.values()})
    if word.zfill(2) not in stages:
        raise argparse.ArgumentTypeError(f"unknown stage {word!r}; there are {', '.join(stages)}")
    return word.zfill(2)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tfla_lab.tour",
        description="Runs every form of the mLSTM, forward and backward, on the same real text; prints the errors "
        "against the recurrence in float64, the time and the memory of each; and saves pictures.",
        epilog="Exit status: 0 if all errors are within their budgets, 1 if not, 2 for a wrong command line.",
    )
    size = whole_number(1)
    add = parser.add_argument
    add("--text", metavar="FILE", help="read this file (default: the Python standard library's sources)")
    add("--length", metavar="T", type=whole_number(2), default=2048,  # a single step has nothing to forget: df is 0
        help="steps of the sequence, a byte of text each (default: %(default)s)")  # fmt: skip
    add("--stage", metavar="NN", type=stage, action="append",
        help="run only this stage, such as 02; may be given several times (default: all)")  # fmt: skip
    add("--chunk-size", metavar="L", type=chunk_size, default=64, help="steps in a chunk (default: %(default)s)")
    add("--dtype", choices=tuple(BUDGETS), default="float32", help="of q, k and v (default: %(default)s)")
    add("--batch", metavar="B", type=size, default=1, help="pieces of text, T bytes each (default: %(default)s)")
    add("--heads", metavar="NH", type=size, default=2, help="of the trained layer's 4 heads (default: %(default)s)")
    add("--dqk", metavar="D", type=size, default=32, help="entries of a query or key, of its 32 (default: %(default)s)")
    add("--dhv", metavar="D", type=size, default=64, help="entries of a value, of its 64 (default: %(default)s)")
    add("--seed", metavar="N", type=whole_number(0), default=0, help="of the gradient of h (default: %(default)s)")
    add("--output", metavar="DIR", type=Path, default=Path("tour_output"),
        help="where the pictures go (default: %(default)s)")  # fmt: skip
    add("--no-figures", action="store_true", help="draw no pictures, and leave out the runs for them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        text = read_text(args.batch * args.length, args.text)
        inputs, dh = make_inputs(text, args)
        if not args.no_figures:
            args.output.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write pictures into {args.output}: {error.strerror}")

    import torch

    # On the CPU one thread each: matrices as small as these gain nothing from more, and threads that wait for a core
    # that others use would make the times meaningless.
    torch.set_num_threads(1)
    # Triton reads this when it is imported, which happens when the first Triton form is loaded.
    if not has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    forms = [form for form in FORMS.values() if form.stage in (args.stage or [form.stage])]
    shape = f"B = {args.batch}, NH = {args.heads}, T = {args.length}, d_qk = {args.dqk}, d_hv = {args.dhv}"
    print(
        f"The mLSTM on {args.text or 'the sources of the Python standard library'}: {shape}, {args.dtype}", flush=True
    )

    rows, saved = [], []
    with tqdm(
        total=1 + 2 * len(forms) + (not args.no_figures),
        bar_format="{l_bar}{bar:30}| {elapsed}",
        desc="recurrence in float64",
    ) as progress:
        with freed_memory_goes_back():
            references = {cell: oracle(inputs, dh, cell=cell) for cell in dict.fromkeys(form.cell for form in forms)}
            progress.update()
            for form in forms:
                slow = is_interpreted(form) and not reason_not_to_run(form, args.dtype)
                progress.set_description(f"{form.name}, interpreted (slow)" if slow else form.name)
                rows.append(compare(form, inputs, dh, references[form.cell], args))
                progress.update()
        for row in rows:
            progress.set_description(f"{row.form.name}, time")
            take_times(row, inputs, dh, args)
            progress.update()
        if not args.no_figures:
            progress.set_description("pictures")
            saved = save_figures(text, inputs, rows, args)
            progress.update()
        progress.set_description("done")

    print("\n" + table(rows, args.dtype))
    if saved:
        print(f"\nPictures in {args.output}: {', '.join(saved)}")
    for row in rows:
        if row.over_budget:
            print(f"\n{row.form.name} is over budget:\n{row.over_budget}")
    if all(row.not_run for row in rows):
        print("\nNothing could be run.")
        return 1
    if any(row.over_budget for row in rows):
        return 1
    print("\nAll errors are within their budgets.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
