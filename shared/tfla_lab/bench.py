"""Time and memory of the Triton forms on a GPU (`make bench`).

    python -m tfla_lab.bench [--only mlstm_tfla] [--T 2048 8192] [--chunk-size 64] [--output FILE]
    python -m tfla_lab.bench --decode mlstm_decode_step [--batch 1 64] [--output FILE]

The setting of the paper: always 65,536 tokens, so the batch is 65,536 / T; 16 heads of d_qk = 128, d_hv = 256, in
bfloat16. Before a configuration is timed, its first batch entry is compared with its cell's chunkwise form in float64:
h and the five gradients. A configuration that is wrong is reported with its error, not timed. Times are medians over
many launches, in milliseconds, of the whole call and of each of its kernels; memory is the peak of forward + backward
above the inputs and the gradient of h, in GiB. The card's own copy rate is measured beside them. With --decode, a step
for generation is timed instead, as it runs in a CUDA graph.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from tfla_lab.check import budget, relative_error, same_gauge, to_numpy
from tfla_lab.forms import CHUNKWISE, FORMS, GRADIENTS, STATE, has_gpu, run_torch
from tfla_lab.inputs import Inputs
from tfla_lab.record import describe_machine

TOKENS = 65_536


def median_ms(function: Callable[[], object], *, seconds: float = 0.3) -> tuple[float, float]:
    """Median and spread (interquartile range) of the run time in milliseconds, by device events, after a warm-up.

    Between two runs a buffer larger than the L2 cache is overwritten, so that no run finds its inputs there.
    """
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    warm_up = 3
    while len(times) < 10 + warm_up or sum(times) < 1000 * seconds:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    quartiles = statistics.quantiles(times[warm_up:], n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def kernel_ms(function: Callable[[], object], repeats: int = 15) -> dict[str, float]:
    """Median run time of every Triton kernel that the function launches, in milliseconds, by name."""
    import triton

    events: dict[str, list[tuple]] = {}

    def enter(launch) -> None:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events.setdefault(launch.get()["name"].removesuffix("_kernel"), []).append(pair)
        pair[0].record()

    def leave(launch) -> None:
        events[launch.get()["name"].removesuffix("_kernel")][-1][1].record()

    hooks = triton.knobs.runtime
    hooks.launch_enter_hook.add(enter)
    hooks.launch_exit_hook.add(leave)
    try:
        for _ in range(repeats):
            torch.cuda._sleep(2_000_000)  # a millisecond: the launches queue up, and no gap between them is measured
            function()
            torch.cuda.synchronize()
    finally:
        hooks.launch_enter_hook.remove(enter)
        hooks.launch_exit_hook.remove(leave)
    return {name: round(statistics.median(a.elapsed_time(b) for a, b in pairs), 4) for name, pairs in events.items()}


def copy_rate() -> float:
    """TB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds, _ = median_ms(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds / 1e9


def draw(B: int, NH: int, T: int, DQK: int, DHV: int, dtype: torch.dtype) -> tuple[Inputs, torch.Tensor]:
    """Inputs as in the regime "typical" of tfla_lab.inputs, drawn on the GPU; and a gradient of h."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    q, k, v, dh = (normal(B, NH, T, D).to(dtype) for D in (DQK, DQK, DHV, DHV))
    return Inputs(q, k, v, normal(B, NH, T), normal(B, NH, T) + 3), dh


def errors(function: Callable, inputs: Inputs, dh: torch.Tensor, *, cell: str, **options) -> dict[str, float]:
    """Relative errors of the first batch entry against the chunkwise form of the cell in float64."""
    actual = run_torch(function, inputs, dh, **options)
    first = Inputs(*(x[:1].double() for x in inputs))
    expected = run_torch(FORMS[CHUNKWISE[cell]].load(), first, dh[:1].double())
    names = ("h", *GRADIENTS)
    pairs = {name: (actual[name][:1].double(), expected[name]) for name in names}
    # NaN is an error like any other, and compares as none
    return {name: float(((x - y).norm() / y.norm()).nan_to_num(torch.inf)) for name, (x, y) in pairs.items()}


def measure(name: str, T: int, B: int, *, chunk_size: int, NH: int, DQK: int, DHV: int, dtype: torch.dtype) -> dict:
    """One row of the results."""
    function = FORMS[name].load()
    kind = str(dtype).removeprefix("torch.")
    row = {
        "kernel": name,
        "T": T,
        "batch": B,
        "heads": NH,
        "d_qk": DQK,
        "d_hv": DHV,
        "chunk_size": chunk_size,
        "dtype": kind,
    }
    inputs, dh = draw(B, NH, T, DQK, DHV, dtype)
    found = errors(function, inputs, dh, cell=FORMS[name].cell, chunk_size=chunk_size)
    row["errors"] = {tensor: float(f"{error:.2g}") for tensor, error in found.items()}
    row["correct"] = all(error <= budget(tensor, kind) for tensor, error in found.items())
    if not row["correct"]:
        return row

    leaves = [x.requires_grad_() for x in inputs]

    def forward_backward() -> None:
        torch.autograd.grad(function(*leaves, chunk_size=chunk_size), leaves, dh)

    with torch.no_grad():
        forward = median_ms(lambda: function(*inputs, chunk_size=chunk_size))
    both = median_ms(forward_backward)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward()
    peak = torch.cuda.max_memory_allocated() - before
    row["forward_ms"], row["forward_spread_ms"] = (round(x, 3) for x in forward)
    row["forward_backward_ms"], row["forward_backward_spread_ms"] = (round(x, 3) for x in both)
    row["memory_gib"] = round(peak / 2**30, 3)
    row["kernels_ms"] = kernel_ms(forward_backward)
    return row


# name: (module with the step, cell, stage with the same step in NumPy)
DECODE_STEPS = {
    "mlstm_decode_step": ("mlstm_decode", "exp", ("mlstm_recurrent", "mlstm_step")),
    "mlstmsig_decode_step": ("mlstmsig_tfla", "sig", ("mlstmsig_reference", "mlstmsig_step")),
}


def measure_decode(kernel: str, B: int, *, NH: int, DQK: int, DHV: int, dtype: torch.dtype) -> dict:
    """One row of the results of --decode: one step for B sequences."""
    import triton

    module, cell, (reference, reference_step) = DECODE_STEPS[kernel]
    decode_step = getattr(importlib.import_module(module), kernel)
    inputs, _ = draw(B, NH, 2, DQK, DHV, dtype)
    generator = torch.Generator("cuda").manual_seed(1)
    shapes = ((B, NH, DQK, DHV), (B, NH, DQK), (B, NH))[: len(STATE[cell])]
    state = tuple(torch.randn(shape, device="cuda", generator=generator) for shape in shapes)
    step = [x[:, :, 0] for x in inputs]
    h, after = decode_step(*step, state)
    first = (tuple(to_numpy(x[:1]) for x in y) for y in (step, state))
    (step_0, state_0), after = first, tuple(x[:1] for x in after)
    h_0, final = getattr(importlib.import_module(reference), reference_step)(*step_0, state_0)
    expected, actual = {"h": h_0, "C": final[0]}, {"h": h[:1], "C": after[0]}
    if cell == "exp":
        expected, actual = expected | same_gauge(final, final[2]), actual | same_gauge(after, final[2])
    found = {name: relative_error(x, expected[name]) for name, x in actual.items()}
    kind = str(dtype).removeprefix("torch.")
    row = {"kernel": kernel, "batch": B, "heads": NH, "d_qk": DQK, "d_hv": DHV, "dtype": kind}
    row["errors"] = {tensor: float(f"{error:.2g}") for tensor, error in found.items()}
    row["correct"] = all(error <= budget(tensor, kind) for tensor, error in found.items())
    if row["correct"]:
        milliseconds = triton.testing.do_bench_cudagraph(
            lambda: decode_step(*step, state), rep=200, return_mode="median"
        )
        moved = sum(2 * x.numel() * 4 for x in state) + sum(x.numel() * x.element_size() for x in (*step, h))
        row["step_us"], row["tb_s"] = round(1000 * milliseconds, 2), round(moved / milliseconds / 1e9, 3)
    return row


def default_chunk_size(name: str, DQK: int, DHV: int) -> int:
    """What a form takes if nothing is asked for."""
    function = FORMS[name].load()
    return function.__kwdefaults__["chunk_size"] or sys.modules[function.__module__].default_chunk_size(DQK, DHV)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| kernel | T | chunk | forward | forward + backward | memory |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        numbers = "wrong: " + ", ".join(f"{n} {e}" for n, e in row["errors"].items())
        if row["correct"]:
            numbers = f"{row['forward_ms']:.2f} ms | {row['forward_backward_ms']:.2f} ms | {row['memory_gib']:.2f} GiB"
        lines.append(f"| `{row['kernel']}` | {row['T']} | {row['chunk_size']} | {numbers} |")
    return "\n".join(lines)


def decode_table(result: dict) -> str:
    """The result of --decode as a Markdown table."""
    lines = ["| batch | time of a step | state and inputs moved at | of the copy rate |", "|--:|--:|--:|--:|"]
    for row in result["rows"]:
        numbers = "wrong: " + ", ".join(f"{n} {e}" for n, e in row["errors"].items())
        if row["correct"]:
            share = row["tb_s"] / result["copy_rate_tb_s"]
            numbers = f"{row['step_us']:.1f} µs | {row['tb_s']:.2f} TB/s | {share:.0%}"
        lines.append(f"| {row['batch']} | {numbers} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfla_lab.bench", description=__doc__.split("\n")[0])
    triton_forms = [form.name for form in FORMS.values() if form.library == "triton"]
    parser.add_argument("--only", choices=triton_forms, action="append", help="may be given more than once")
    parser.add_argument("--T", type=int, nargs="+", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--chunk-size", type=int, nargs="+", help="default: each form's own")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 65,536 / T; with --decode 1 .. 256")
    parser.add_argument("--decode", choices=DECODE_STEPS, help="time a step for generation instead")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dqk", type=int, default=128)
    parser.add_argument("--dhv", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args(argv)
    if not arguments.batch and any(T < 1 or TOKENS % T for T in arguments.T):
        parser.error(f"argument --T: must divide {TOKENS}, or give --batch")
    if arguments.batch and min(arguments.batch) < 1:
        parser.error("argument --batch: must be at least 1")
    if not has_gpu():
        parser.error("no GPU here: there is nothing to time")

    shape = {"NH": arguments.heads, "DQK": arguments.dqk, "DHV": arguments.dhv}
    shape["dtype"] = getattr(torch, arguments.dtype)
    rows = []
    if arguments.decode:
        rows = [
            measure_decode(arguments.decode, B, **shape)
            for B in tqdm(arguments.batch or [1, 4, 16, 64, 256], unit="row")
        ]
    else:
        names = arguments.only or triton_forms
        jobs = [
            (name, T, B, L)
            for name in names
            for L in arguments.chunk_size or [default_chunk_size(name, arguments.dqk, arguments.dhv)]
            for T in arguments.T
            for B in arguments.batch or [TOKENS // T]
        ]
        for name, T, B, L in tqdm(jobs, unit="row"):
            rows.append(measure(name, T, B, chunk_size=L, **shape))
    result = describe_machine() | {"copy_rate_tb_s": round(copy_rate(), 3), "rows": rows}
    print(decode_table(result) if arguments.decode else table(rows))
    print(f"copy rate {result['copy_rate_tb_s']} TB/s, {result['device']}, {result['date']}, {result['versions']}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
