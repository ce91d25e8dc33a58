"""Time and memory of the kernels here and of others' kernels, on a GPU (`make bench`).

    python -m tfla_lab.bench [--quick] [--only mlstm_tfla] [--output FILE] [--fresh]
    python -m tfla_lab.bench --only mlstm_tfla [--T 2048 8192] [--chunk-size 64 128] [--heads 8 --dqk 256 --dhv 512]
    python -m tfla_lab.bench --decode mlstm_decode_step [--batch 1 64] [--output FILE]

The setting of the paper: always 65,536 tokens, so the batch is 65,536 / T; 16 heads of d_qk = 128, d_hv = 256, in
bfloat16; then other head dimensions of the same model width, one long sequence, and a step of generation. Each kernel
runs in a process of its own, so that one that takes its process down is a row that says so (tfla_lab.isolate). Rows are
written as they come: a second run goes on where the first one ended.

Before a kernel is timed, the first and last heads of the first and last batch entries are compared with a reference in
float64: h and all gradients. What is wrong is reported with its error, not timed. The kernels here must keep the
budgets of tfla_lab.check; others' are called wrong from 5 % on (10 % for gates): rounding never reaches that, and what
the error was stands in the row. Of several configurations the fastest at T = 8192 is taken for the other lengths.

Times are medians in milliseconds, over launches that follow each other as in training, of the whole call and, of the
kernels here, of each of its kernels; the spread is the interquartile range. Memory is the peak of forward + backward
above the inputs and the gradient of h, in GiB. The card's own rates, of a copy and of a matrix product, are measured
beside them.
"""

import argparse
import concurrent.futures
import functools
import importlib
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tfla_lab.check import GATE_GRADIENTS, budget, relative_error, same_gauge, to_numpy
from tfla_lab.forms import FORMS, STATE, has_gpu
from tfla_lab.inputs import Inputs
from tfla_lab.isolate import Worker, reason
from tfla_lab.peers import KERNELS, STEPS, Kernel, swap
from tfla_lab.record import ROOT, describe_machine

TOKENS = 65_536
LENGTHS = tuple(2**n for n in range(9, 17))
# (heads, d_qk, d_hv): lengths. The first is the main one.
SHAPES = {(16, 128, 256): LENGTHS} | dict.fromkeys(((8, 256, 512), (64, 64, 64), (32, 128, 128)), LENGTHS[::2])
MAIN = next(iter(SHAPES))
SWEEP = 8192  # the length at which configurations are tried
PREFILL = (65_536, 131_072)  # steps of the one long sequence
REMEMBER = (8192, 65_536)  # lengths at which f is also larger by 10: next to nothing is forgotten
DECODE = (1, 4, 16, 64, 256)  # sequences that take a step together
WRONG, WRONG_GATE = 0.05, 0.1  # errors from which on others' kernels are called wrong
PATIENCE = 300  # seconds for one row, compilation included
TOGETHER = 8  # kernels whose code is compiled at the same time, before the first of them is timed
SHARES = 6  # processes among which the tiles of a kernel with @triton.autotune are divided to be compiled


# ---------------------------------------------------------------------------------------------------------------------
# Clocks
# ---------------------------------------------------------------------------------------------------------------------
def median_ms(function: Callable[[], object], *, seconds: float = 0.15, least: int = 7) -> tuple[float, float]:
    """Median and spread (interquartile range) of the run time in milliseconds, by device events, after a warm-up.

    The runs follow each other without waiting for the CPU, which is ahead of the GPU wherever it is the faster of the
    two: it starts ten milliseconds early, so that no interruption of it is taken for work of the GPU. Between two runs
    a buffer larger than the L2 cache is overwritten, so that no run finds its inputs there.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def times(runs: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        torch.cuda._sleep(20_000_000)  # cycles
        for start, end in pairs:
            flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    warm_up = min(times(3))
    quartiles = statistics.quantiles(times(max(least, int(1000 * seconds / warm_up))), n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def kernel_ms(function: Callable[[], object], repeats: int = 15) -> dict[str, float]:
    """Median run time of every Triton kernel that the function launches, in milliseconds, by name.

    The second launch of a kernel within one call is "name, 2".
    """
    import triton

    events: dict[str, list[list]] = {}
    launched: list[str] = []
    running: list[list] = []

    def enter(launch) -> None:
        name = launch.get()["name"].removesuffix("_kernel")
        launched.append(name)
        key = f"{name}, {launched.count(name)}" if launched.count(name) > 1 else name
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events.setdefault(key, []).append(pair)
        running.append(pair)
        pair[0].record()

    def leave(launch) -> None:
        running.pop()[1].record()

    hooks = triton.knobs.runtime
    hooks.launch_enter_hook.add(enter)
    hooks.launch_exit_hook.add(leave)
    try:
        for _ in range(repeats):
            torch.cuda._sleep(2_000_000)  # a millisecond: the launches queue up, and no gap between them is measured
            launched.clear()
            function()
            torch.cuda.synchronize()
    finally:
        hooks.launch_enter_hook.remove(enter)
        hooks.launch_exit_hook.remove(leave)
    return {name: round(statistics.median(a.elapsed_time(b) for a, b in pairs), 4) for name, pairs in events.items()}


def peak_gib(function: Callable[[], object]) -> float:
    """GiB that a run takes at its peak, above what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def copy_rate() -> float:
    """TB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds, _ = median_ms(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds / 1e9


def matrix_rate() -> float:
    """TFLOP/s of a product of two bfloat16 matrices, 8192 x 8192."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in "ab")
    milliseconds, _ = median_ms(lambda: a @ b)
    return 2 * 8192**3 / milliseconds / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------
def draw(
    B: int, NH: int, T: int, DQK: int, DHV: int, dtype: torch.dtype, device: str = "cuda", shift_f: float = 0
) -> tuple[Inputs, Tensor]:
    """Inputs as in the regime "typical" of tfla_lab.inputs, drawn on the device, f shifted; and a gradient of h."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    q, k, v, dh = (normal(B, NH, T, D).to(dtype) for D in (DQK, DQK, DHV, DHV))
    return Inputs(q, k, v, normal(B, NH, T), normal(B, NH, T) + 3 + shift_f), dh


def ends(x: Tensor, heads_axis: int) -> Tensor:
    """The first and the last heads of the first and the last batch entries, in float64."""
    for axis in (0, heads_axis):
        first_and_last = sorted({0, x.shape[axis] - 1})
        x = x.index_select(axis, torch.tensor(first_and_last, device=x.device))
    return x.detach().double()


def error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, two digits; what is not a number is an infinite error."""
    return float(f"{float(((actual - expected).norm() / expected.norm()).nan_to_num(torch.inf)):.2g}")


def allowed(kernel: Kernel, tensor: str, dtype: str) -> float:
    """The error up to which a tensor of this kernel counts as right."""
    if kernel.ours:
        return budget(tensor, dtype)
    return WRONG_GATE if tensor in (*GATE_GRADIENTS, "dg", "ddt") else WRONG


def right(kernel: Kernel, found: dict[str, float], dtype: str) -> bool:
    return all(size <= allowed(kernel, tensor, dtype) for tensor, size in found.items())


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------
def start_row(name: str, T: int, B: int, NH: int, DQK: int, DHV: int, dtype: torch.dtype, configuration: dict) -> dict:
    row = {"kernel": name, "T": T, "batch": B, "heads": NH, "d_qk": DQK, "d_hv": DHV}
    if name in FORMS:
        row["chunk_size"] = configuration.get("chunk_size") or default_chunk_size(name, DQK, DHV)
    return row | {"dtype": str(dtype).removeprefix("torch.")}


def default_chunk_size(name: str, DQK: int, DHV: int) -> int:
    """What a form takes if nothing is asked for."""
    function = FORMS[name].load()
    return function.__kwdefaults__["chunk_size"] or sys.modules[function.__module__].default_chunk_size(DQK, DHV)


def measure(
    name: str, T: int, B: int, *, NH: int, DQK: int, DHV: int, dtype: torch.dtype, device: str = "cuda",
    shift_f: float = 0, **configuration,
) -> dict:  # fmt: skip
    """One row of the results: forward, forward + backward, memory.

    "correct" says whether h and all gradients are right. Without a right h nothing is timed, without right gradients
    the forward pass alone. "backward" says why there is no backward pass where that is no error of numbers.
    """
    kernel, row = KERNELS[name], start_row(name, T, B, NH, DQK, DHV, dtype, configuration)
    call, kind = functools.partial(kernel.load(), **configuration), row["dtype"]
    inputs, dh = draw(B, NH, T, DQK, DHV, dtype, device, shift_f)
    leaves = kernel.leaves(inputs)
    names, leaves = list(leaves), [x.requires_grad_() for x in leaves.values()]
    dh = swap(dh).contiguous() if kernel.heads_axis == 2 else dh
    del inputs
    with torch.no_grad():
        h, _ = call(*leaves)
        if kernel.norm_follows:
            h, dh = h.float(), dh.float()
            dh = (dh - h * (h * dh).sum(-1, keepdim=True) / (h * h).sum(-1, keepdim=True)).to(dtype)
    few = [ends(x, kernel.heads_axis).requires_grad_() for x in leaves]
    expected, _ = kernel.reference(*few)
    row["errors"] = {"h": error(ends(h, kernel.heads_axis), expected.detach())}
    del h
    row["correct"] = right(kernel, row["errors"], kind)
    if not row["correct"]:
        return row

    with torch.no_grad():
        forward = median_ms(lambda: call(*leaves))
    row["forward_ms"], row["forward_spread_ms"] = (round(x, 4) for x in forward)

    def forward_backward() -> tuple:
        return torch.autograd.grad(call(*leaves)[0], leaves, dh)

    try:
        gradients = forward_backward()
    except Exception as refusal:
        return row | {"backward": reason(refusal), "spent": "CUDA" in str(refusal)}
    references = torch.autograd.grad(expected, few, ends(dh, kernel.heads_axis))
    for leaf, x, y in zip(names, gradients, references, strict=True):
        row["errors"][f"d{leaf}"] = error(ends(x, kernel.heads_axis), y)
    del gradients, references, expected, few
    row["correct"] = right(kernel, row["errors"], kind)
    if not row["correct"]:
        return row
    both = median_ms(forward_backward)
    row["forward_backward_ms"], row["forward_backward_spread_ms"] = (round(x, 4) for x in both)
    row["memory_gib"] = round(peak_gib(forward_backward), 3)
    if kernel.ours:
        row["kernels_ms"] = kernel_ms(forward_backward)
    return row


@torch.no_grad()
def measure_prefill(
    name: str, T: int, B: int, *, NH: int, DQK: int, DHV: int, dtype: torch.dtype, device: str = "cuda",
    **configuration,
) -> dict:  # fmt: skip
    """One row: the forward pass with the state after it, as a prompt is read."""
    kernel, row = KERNELS[name], start_row(name, T, B, NH, DQK, DHV, dtype, configuration)
    call = functools.partial(kernel.load(), return_state=True, **configuration)
    leaves = list(kernel.leaves(draw(B, NH, T, DQK, DHV, dtype, device)[0]).values())
    h, state = call(*leaves)
    expected, C = kernel.reference(*(ends(x, kernel.heads_axis) for x in leaves))
    row["errors"] = {"h": error(ends(h, kernel.heads_axis), expected)}
    if C is not None:
        row["errors"]["C"] = error(ends(kernel.memory(state), 1), C)
    del h, state, expected, C
    row["correct"] = right(kernel, row["errors"], row["dtype"])
    if row["correct"]:
        forward = median_ms(lambda: call(*leaves))
        row["forward_ms"], row["forward_spread_ms"] = (round(x, 4) for x in forward)
        row["memory_gib"] = round(peak_gib(lambda: call(*leaves)), 3)
    return row


# The same step in NumPy, of each cell.
REFERENCE_STEPS = {"exp": ("mlstm_recurrent", "mlstm_step"), "sig": ("mlstmsig_reference", "mlstmsig_step")}


@torch.no_grad()
def measure_decode(kernel: str, B: int, *, NH: int, DQK: int, DHV: int, dtype: torch.dtype) -> dict:
    """One row: a step for B sequences, as it runs in a CUDA graph."""
    import triton

    step, kind = STEPS[kernel], str(dtype).removeprefix("torch.")
    inputs, _ = draw(B, NH, 2, DQK, DHV, dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = ((B, NH, DQK, DHV), (B, NH, DQK), (B, NH))[: len(STATE[step.cell])]
    state = tuple(torch.randn(shape, device="cuda", generator=generator) for shape in shapes)
    tensors = [x[:, :, 0].contiguous() for x in inputs]
    run = step.prepare(*tensors, state)
    h, after = run()
    first = (tuple(to_numpy(x[:1]) for x in y) for y in (tensors, state))
    (tensors_0, state_0), after = first, tuple(x[:1] for x in after)
    module, name = REFERENCE_STEPS[step.cell]
    h_0, final = getattr(importlib.import_module(module), name)(*tensors_0, state_0)
    expected, actual = {"h": h_0, "C": final[0]}, {"h": h[:1], "C": after[0]}
    if step.cell == "exp":
        expected, actual = expected | same_gauge(final, final[2]), actual | same_gauge(after, final[2])
    found = {name: relative_error(x, expected[name]) for name, x in actual.items()}
    row = {"kernel": kernel, "batch": B, "heads": NH, "d_qk": DQK, "d_hv": DHV, "dtype": kind}
    row["errors"] = {tensor: float(f"{size:.2g}") for tensor, size in found.items()}
    row["correct"] = all(size <= (WRONG if step.module else budget(tensor, kind)) for tensor, size in found.items())
    if row["correct"]:
        milliseconds = triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median")
        moved = sum(2 * x.numel() * 4 for x in state) + sum(x.numel() * x.element_size() for x in (*tensors, h))
        row["step_us"], row["tb_s"] = round(1000 * milliseconds, 2), round(moved / milliseconds / 1e9, 3)
    return row


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, and the process that answers them
# ---------------------------------------------------------------------------------------------------------------------
# A task is what its row begins with: "pass" ("train", "remember", "prefill" or "decode"), "kernel", "T", "batch",
# "heads", "d_qk", "d_hv", "dtype", "configuration".
IDENTITY = ("pass", "kernel", "T", "batch", "heads", "d_qk", "d_hv", "dtype", "configuration")


def answer(task: dict) -> dict:
    """In a worker: the row of a task. Or, with one of these keys, "load": its kernel is imported; "compile": it runs
    once, so that all its code is compiled and waits in Triton's cache, or of that a "share"; "rates": the card's."""
    if "rates" in task:
        return {"copy_rate_tb_s": round(copy_rate(), 3), "matrix_rate_tflop_s": round(matrix_rate(), 1)}
    name, step = task["kernel"], task["pass"] == "decode"
    if "load" in task:
        if not step:
            KERNELS[name].load()
        return {}
    shorten_autotuning(once="compile" in task, share=task.get("share", 0))
    options = {"NH": task["heads"], "DQK": task["d_qk"], "DHV": task["d_hv"], "dtype": getattr(torch, task["dtype"])}
    if "compile" in task:
        compile_kernel(task, **options)
        return {}
    if step:
        return measure_decode(name, task["batch"], **options)
    remember = functools.partial(measure, shift_f=10)
    function = {"train": measure, "remember": remember, "prefill": measure_prefill}[task["pass"]]
    return function(name, task["T"], task["batch"], **options, **task["configuration"])


def compile_kernel(task: dict, *, NH: int, DQK: int, DHV: int, dtype: torch.dtype) -> None:
    """Runs the kernel of a task forward and backward, and looks at nothing."""
    kernel = KERNELS[task["kernel"]]
    leaves = [
        x.requires_grad_() for x in kernel.leaves(draw(task["batch"], NH, task["T"], DQK, DHV, dtype)[0]).values()
    ]
    h, _ = kernel.load()(*leaves, **task["configuration"])
    torch.autograd.grad(h, leaves, torch.zeros_like(h))
    torch.cuda.synchronize()


@functools.cache
def shorten_autotuning(once: bool, share: int) -> None:
    """Kernels with @triton.autotune try hundreds of tiles at their first call, each for an eighth of a second.

    A fifth of that finds the same tile. Where everything is only to be compiled, one run is enough, and of the tiles
    every SHARES-th, from number `share` on: other processes have the others.
    """
    import triton
    from triton.runtime.autotuner import Autotuner

    def run_once(function: Callable, **_) -> list[float]:
        function()
        return [1.0, 1.0, 1.0]

    do_bench = triton.testing.do_bench
    triton.testing.do_bench = run_once if once else functools.partial(do_bench, warmup=5, rep=20)
    if once:
        prune = Autotuner.prune_configs

        def prune_configs(self, *args, **kwargs) -> list:
            left = prune(self, *args, **kwargs)
            return left[share % len(left) :: SHARES]

        Autotuner.prune_configs = prune_configs


def identity(row: dict) -> str:
    return json.dumps([row.get(key) for key in IDENTITY])


def plan(
    names: Iterable[str], shapes: dict[tuple[int, int, int], Iterable[int]], *, dtype: str = "bfloat16",
    batches: list[int] | None = None, remember: Iterable[int] = (), prefill: Iterable[int] = (),
    decode: Iterable[int] = (),
) -> list[dict]:  # fmt: skip
    """The tasks, still without configurations: all lengths of all shapes; of the first shape also the others.

    Args:
        names: of KERNELS, and of STEPS for decode.
        batches: instead of 65,536 / T.
        remember: lengths, of our own kernels; what the others do does not depend on the gates.
        prefill: lengths, for one sequence.
        decode: numbers of sequences.
    """
    tasks = {}
    for number, (shape, lengths) in enumerate(shapes.items()):
        for name in names:
            if name in KERNELS:
                found = [("train", T, B) for T in lengths for B in batches or [TOKENS // T]]
                found += [("remember", T, TOKENS // T) for T in remember if KERNELS[name].ours and number == 0]
                found += [("prefill", T, 1) for T in (() if number else prefill)]
                heads, d_qk, d_hv = KERNELS[name].shape(*shape)
            else:
                found = [("decode", None, B) for B in (() if number else decode)]
                heads, d_qk, d_hv = shape
            for kind, T, B in found:
                task = {"pass": kind, "kernel": name, "T": T, "batch": B, "heads": heads, "d_qk": d_qk, "d_hv": d_hv}
                task["dtype"] = dtype
                tasks.setdefault(identity(task), task)
    return list(tasks.values())


def same_kernel(task: dict) -> tuple:
    return tuple(task[key] for key in ("kernel", "heads", "d_qk", "d_hv", "dtype"))


def sweep_length(tasks: list[dict], kernel: tuple) -> int:
    """Where the configurations of a kernel are tried."""
    lengths = sorted({t["T"] for t in tasks if t["pass"] == "train" and same_kernel(t) == kernel})
    return SWEEP if SWEEP in lengths or not lengths else lengths[len(lengths) // 2]


def fastest(rows: list[dict], kernel: tuple, T: int) -> dict | None:
    """The row of the configuration to take: the fastest forward and backward, else forward; None if none ran."""
    trained = [row for row in rows if row.get("pass") == "train" and row["T"] == T and "forward_ms" in row]
    there = [row for row in trained if same_kernel(row) == kernel]

    def cost(row: dict) -> tuple[bool, float]:
        return "forward_backward_ms" not in row, row.get("forward_backward_ms", row["forward_ms"])

    return min(there, key=cost, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
ANSWER = "tfla_lab.bench:answer"


def run(tasks: list[dict], result: dict, save: Callable[[], None], *, ask: str = ANSWER) -> None:
    """Appends a row to result["rows"] for each task that has none there, and calls save() after each.

    First everything at the length where configurations are tried, then the other lengths with the fastest. Tasks that
    have a configuration already keep it. `ask` is what the workers answer with, for tests.
    """
    rows, names = result["rows"], dict.fromkeys(task["kernel"] for task in tasks)
    rows[:] = [row for row in rows if "pass" in row]  # what was not installed may be there by now
    there = {name: (KERNELS | STEPS)[name].missing() for name in names}
    rows += [{"kernel": name, "problem": problem} for name, problem in there.items() if problem]
    save()
    tasks = [task for task in tasks if not there[task["kernel"]]]

    first, rest = [], []
    for task in tasks:
        configurations = KERNELS[task["kernel"]].configurations if task["pass"] != "decode" else ({},)
        if "configuration" in task:
            first.append(task)
        elif task["pass"] == "train" and task["T"] == sweep_length(tasks, same_kernel(task)):
            first += [task | {"configuration": configuration} for configuration in configurations]
        else:
            rest.append(task)
    # In a log file a line now and then is enough.
    progress = tqdm(total=len(first) + len(rest), unit="row", mininterval=0.1 if sys.stderr.isatty() else 20)
    run_stage(first, rows, save, progress, ask, compile_first=True)
    for number, task in enumerate(rest):
        if task["pass"] == "decode" or len(KERNELS[task["kernel"]].configurations) == 1:
            configuration = {} if task["pass"] == "decode" else KERNELS[task["kernel"]].configurations[0]
        else:
            best = fastest(rows, same_kernel(task), sweep_length(tasks, same_kernel(task)))
            configuration = best["configuration"] if best else None
        rest[number] = task | {"configuration": configuration}
    run_stage(rest, rows, save, progress, ask, compile_first=False)
    progress.close()


def run_stage(
    tasks: list[dict], rows: list[dict], save: Callable[[], None], progress: tqdm, ask: str, *, compile_first: bool
) -> None:
    """The rows of tasks that are complete, one kernel after the other, alone on the GPU."""
    done = {identity(row) for row in rows}
    todo = [task for task in tasks if identity(task) not in done]
    progress.update(len(tasks) - len(todo))
    groups = [list(group) for _, group in itertools.groupby(sorted(todo, key=same_kernel), key=same_kernel)]
    groups.sort(key=lambda group: todo.index(group[0]))
    for start in range(0, len(groups), TOGETHER):
        batch = groups[start : start + TOGETHER]
        progress.set_postfix_str("compiles " + ", ".join(dict.fromkeys(group[0]["kernel"] for group in batch)))
        # What is compiled anew for every length is not compiled yet.
        compile_all(
            [t for g in batch for t in g if compile_first or getattr(KERNELS.get(t["kernel"]), "per_length", False)],
            ask,
        )
        workers = [Worker(ask, first=group[0] | {"load": True}) for group in batch]
        for number, (group, worker) in enumerate(zip(batch, workers, strict=True)):
            for early in workers[number : number + 2]:
                early.start()
            for task in group:
                words = f"{task['kernel']}, {task['pass']}, T = {task['T']}"
                progress.set_postfix_str(words, refresh=sys.stderr.isatty())
                if task["configuration"] is None:
                    found = {"problem": "not tried: no configuration ran at the length where they are tried"}
                else:
                    found = worker.ask(task, seconds=PATIENCE)
                rows.append(task | found)
                save()
                progress.update()
            worker.stop()


def compile_all(tasks: list[dict], ask: str) -> None:
    """Runs all tasks for the compiler's sake, many at once, as far as processors and memory reach.

    What goes wrong here goes wrong again later, where it is written down.
    """

    def compile_task(task: dict) -> None:
        # Who was fastest in this crowd must not be remembered.
        worker = Worker(ask, environment={"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"})
        worker.ask(task | {"compile": True}, seconds=PATIENCE)
        worker.stop()

    tasks = [
        task | {"share": share}
        for task in tasks
        if task["pass"] == "train" and task["configuration"] is not None
        for share in range(SHARES if KERNELS[task["kernel"]].autotuned else 1)
    ]
    memory = torch.cuda.mem_get_info()[1] if has_gpu() else 0
    at_once = max(1, min((os.cpu_count() or 1) - 2, memory // (12 * 2**30)))
    if len(tasks) > 1 and at_once > 1:
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            list(pool.map(compile_task, tasks))


def is_ours(row: dict) -> bool:
    """Whether a row is of a kernel of this repository."""
    name = row["kernel"]
    return KERNELS[name].ours if name in KERNELS else not STEPS[name].module


def open_result(path: Path | None, *, fresh: bool = False) -> dict:
    """The result that a run goes on with: that of the file, if it is of this machine; else a new one.

    Rows of our own kernels count only for the commit that they were measured at.

    Raises:
        ValueError: if the file is of another machine or of other versions.
    """
    machine = describe_machine()
    for package in sorted({x.package for x in (*KERNELS.values(), *STEPS.values()) if x.package}):
        try:
            machine["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine["versions"][package] = "not installed"
    if fresh or path is None or not path.exists():
        return machine | {"rows": []}
    result = json.loads(path.read_text())
    for key in ("device", "versions"):
        if result[key] != machine[key]:
            raise ValueError(f"{path} has {key} {result[key]}, here is {machine[key]}; --fresh starts over")
    same = result["commit"] == machine["commit"]
    rows = [row for row in result["rows"] if "pass" in row and (same or not is_ours(row))]
    return result | machine | {"rows": rows}


def write(path: Path, result: dict) -> None:
    """As JSON, a line for each row; the file is complete at any time."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"})[:-1]
    body = ",\n".join(json.dumps(row) for row in result["rows"])
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(f'{head}, "rows": [\n{body}\n]}}\n')
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Tables, and the command line
# ---------------------------------------------------------------------------------------------------------------------
def said(row: dict) -> str:
    """Why a row has no times, or not all."""
    if not row.get("correct", True):
        return "wrong: " + ", ".join(f"{n} {e}" for n, e in row["errors"].items())
    return row.get("problem") or row.get("backward", "")


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| kernel | T | chunk | forward | forward + backward | memory |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        numbers = said(row)
        if "forward_ms" in row:
            numbers = f"{row['forward_ms']:.2f} ms | {numbers or 'not measured'}"
        if "forward_backward_ms" in row:
            numbers = f"{row['forward_ms']:.2f} ms | {row['forward_backward_ms']:.2f} ms | {row['memory_gib']:.2f} GiB"
        chunk = row.get("chunk_size") or (row.get("configuration") or {}).get("chunk_size", "")
        lines.append(f"| `{row['kernel']}` | {row.get('T', '')} | {chunk} | {numbers} |")
    return "\n".join(lines)


def decode_table(result: dict) -> str:
    """The result of --decode as a Markdown table."""
    lines = ["| batch | time of a step | state and inputs moved at | of the copy rate |", "|--:|--:|--:|--:|"]
    for row in result["rows"]:
        numbers = said(row)
        if "step_us" in row:
            share = row["tb_s"] / result["copy_rate_tb_s"]
            numbers = f"{row['step_us']:.1f} µs | {row['tb_s']:.2f} TB/s | {share:.0%}"
        lines.append(f"| {row['batch']} | {numbers} |")
    return "\n".join(lines)


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tfla_lab.bench", description=__doc__.split("\n")[0])
    names = [*KERNELS, *STEPS]
    listed = ", ".join(names)
    parser.add_argument("--only", choices=names, action="append", metavar="NAME", help=f"again for more: {listed}")
    parser.add_argument("--quick", action="store_true", help="T = 2048 and 8192 of the main shape alone")
    parser.add_argument("--T", type=int, nargs="+", help="these lengths of the main shape alone")
    parser.add_argument("--chunk-size", type=int, nargs="+", help="default: what each kernel takes, or is fastest with")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 65,536 / T; with --decode 1 .. 256")
    parser.add_argument("--decode", choices=STEPS, help="time a step for generation alone")
    parser.add_argument("--heads", type=int, help=f"one shape alone; default: {MAIN[0]}, and other shapes after it")
    parser.add_argument("--dqk", type=int, help=f"likewise; default: {MAIN[1]}")
    parser.add_argument("--dhv", type=int, help=f"likewise; default: {MAIN[2]}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="a JSON file; by default shared/results/bench_<GPU>.json for all")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever the output file holds")
    arguments = parser.parse_args(argv)
    if not arguments.batch and any(T < 1 or TOKENS % T for T in arguments.T or ()):
        parser.error(f"argument --T: must divide {TOKENS}, or give --batch")
    if arguments.batch and min(arguments.batch) < 1:
        parser.error("argument --batch: must be at least 1")
    chosen = [arguments.decode] if arguments.decode else arguments.only or names
    if arguments.chunk_size:
        without = [name for name in chosen if name in STEPS or not KERNELS[name].chunked]
        if arguments.only and without:
            parser.error(f"argument --chunk-size: not for {', '.join(without)}")
        chosen = [name for name in chosen if name not in without]
    arguments.only = chosen
    if not has_gpu():
        parser.error("no GPU here: there is nothing to time")
    return arguments


def tasks_of(arguments: argparse.Namespace) -> tuple[list[dict], bool]:
    """What the command line asks for, and whether that is the whole comparison (of these kernels)."""
    shape = tuple(x or y for x, y in zip((arguments.heads, arguments.dqk, arguments.dhv), MAIN, strict=True))
    batches, dtype = arguments.batch, arguments.dtype
    if arguments.decode:
        return plan(arguments.only, {shape: ()}, dtype=dtype, decode=batches or DECODE), False
    narrowed = arguments.quick or arguments.T or arguments.chunk_size or batches or dtype != "bfloat16"
    if narrowed or shape != MAIN:
        lengths = arguments.T or ((2048, 8192) if arguments.quick else LENGTHS)
        tasks = plan(arguments.only, {shape: lengths}, dtype=dtype, batches=batches)
        if arguments.chunk_size:
            tasks = [t | {"configuration": {"chunk_size": L}} for t in tasks for L in arguments.chunk_size]
        return tasks, False
    return plan(arguments.only, SHAPES, remember=REMEMBER, prefill=PREFILL, decode=DECODE), True


def show(result: dict) -> None:
    """Prints the tables of a result."""
    rows = [row for row in result["rows"] if "pass" in row]
    print("\n".join(f"{row['kernel']}: {row['problem']}" for row in result["rows"] if "pass" not in row))
    for kind in ("train", "remember", "prefill", "decode"):
        some = [row for row in rows if row["pass"] == kind]
        for shape in dict.fromkeys((row["heads"], row["d_qk"], row["d_hv"]) for row in some):
            print(f"\n{kind}, {shape[0]} heads, d_qk = {shape[1]}, d_hv = {shape[2]}")
            here = [row for row in some if (row["heads"], row["d_qk"], row["d_hv"]) == shape]
            if kind != "decode":
                print(table(here))
            for name in dict.fromkeys(row["kernel"] for row in here if kind == "decode"):
                print(f"{name}\n{decode_table(result | {'rows': [row for row in here if row['kernel'] == name]})}")
    rates = f"copy rate {result['copy_rate_tb_s']} TB/s, matrix rate {result['matrix_rate_tflop_s']} TFLOP/s"
    print(f"\n{rates}, {result['device']}, {result['date']}, {result['versions']}")


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    tasks, whole = tasks_of(arguments)
    path = arguments.output
    if whole and path is None:
        gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "_")
        path = ROOT / "shared" / "results" / f"bench_{gpu}.json"
    try:
        result = open_result(path, fresh=arguments.fresh)
    except ValueError as wrong:
        print(f"python -m tfla_lab.bench: {wrong}", file=sys.stderr)
        return 2
    if "copy_rate_tb_s" not in result:
        worker = Worker(ANSWER)
        result |= worker.ask({"rates": True}, seconds=PATIENCE)
        worker.stop()
    run(tasks, result, lambda: write(path, result) if path else None)
    show(result)
    return 0 if all(row.get("correct") and not said(row) for row in result["rows"] if is_ours(row)) else 1


if __name__ == "__main__":
    sys.exit(main())
