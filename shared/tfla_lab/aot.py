"""Compile the Triton kernels ahead of time, for GPUs that need not be there.

    python -m tfla_lab.aot [--file mlstm_tfla] [--target sm_90] [--verbose | --json]

runs the launchers of a kernel file on tensors without data, catches every launch, and compiles it for the target as the
launch would have. So exactly what a user's call compiles is compiled, with the tiles that the launcher picks. Reported
per kernel: shared memory against what the target has and, for NVIDIA, registers and the stack (bytes that spilled out
of registers). Exit status 1 if one does not compile or needs too much shared memory. The records
shared/results/stage0N_aot.json are what --json printed for the files of a stage; they name the compiled sources by
their digests, so that the tests see whether a record still holds.
"""

import argparse
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

# Shared memory per program in bytes.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
DTYPES = ("bfloat16", "float16", "float32")


class Launch:
    """One caught launch: which kernel, and everything that its compilation depends on."""

    def __init__(self, kernel, args, kwargs):
        import torch

        names = kernel.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
        pointer |= {torch.float64: "*fp64", torch.int32: "*i32"}
        self.kernel, self.options, self.signature, self.constexprs, self.attrs = kernel, options, {}, {}, {}
        for index, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
            value = values[name]
            known = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or known:
                self.signature[name], self.constexprs[(index,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                self.signature[name] = pointer[value.dtype]
            elif hasattr(value, "block_shape"):
                kind = pointer[value.base.dtype][1:]
                self.signature[name] = f"tensordesc<{kind}{value.block_shape},{value.layout!r}>"
            else:
                self.signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
            if isinstance(value, torch.Tensor) or aligned:
                self.attrs[(index,)] = [["tt.divisibility", 16]]

    def key(self) -> str:
        return repr((self.kernel.fn.__qualname__, self.signature, self.constexprs, self.attrs, self.options))

    def compile(self, target: str) -> dict:
        import triton
        from triton.backends.compiler import GPUTarget

        backend, arch, warp_size, limit = TARGETS[target]
        source_type = triton.compiler.ASTSource
        if self.kernel.is_gluon():
            from triton.experimental.gluon._runtime import GluonASTSource as source_type
        source = source_type(self.kernel, self.signature, self.constexprs, self.attrs)
        compiled = triton.compile(source, target=GPUTarget(backend, arch, warp_size), options=self.options)
        row = {"kernel": self.kernel.fn.__name__, "shared": compiled.metadata.shared, "limit": limit}
        if backend == "cuda":
            row |= resource_usage(compiled.asm["cubin"])
        return row


def resource_usage(cubin: bytes) -> dict:
    """Registers and stack bytes, as cuobjdump (it comes with Triton) reads them off the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", text)[1]), "stack": int(re.search(r"STACK:(\d+)", text)[1])}


def tensors(dtype: str, DQK: int, DHV: int, shape: tuple[int, ...] = (2, 4, 1024)) -> tuple[list, list]:
    """q, k, v, i, f, h and a state, without data."""
    import torch

    def empty(*sizes: int, kind: str = "float32") -> torch.Tensor:
        return torch.empty(*sizes, dtype=getattr(torch, kind), device="meta")

    q, k, v, h = (empty(*shape, D, kind=dtype) for D in (DQK, DQK, DHV, DHV))
    B, NH = shape[:2]
    return [q, k, v, empty(*shape), empty(*shape), h], [empty(B, NH, DQK, DHV), empty(B, NH, DQK), empty(B, NH)]


def mlstm_limit_chunk(stage, dtype: str):
    """(label, launches), forward and backward.

    Of the chunk sizes for which the launchers pick the same tiles and warps, the largest, with heads of several tiles,
    and the smallest of all, with heads of one small tile; so every choice that they have is compiled for every dtype.
    """
    sizes = [(128, 256, 64), (128, 256, 128), (16, 32, 16)]
    if dtype == "float32":  # the only one whose tiles are smaller from 64 steps on
        sizes.append((128, 256, 32))
    if dtype == "bfloat16":
        sizes.append((128, 256, 16))
    for DQK, DHV, L in sizes:
        (*x, h), state = tensors(dtype, DQK, DHV)
        variants = [state]
        if (dtype, L) == ("bfloat16", 64):  # whether there is a state is a branch of its own, the same for all others
            variants.append((None,) * 3)
        with catch_launches() as launches:
            for start in variants:
                stage.launch_forward(*x, *start, L)
                stage.launch_backward(h, *start, *x, *start, L)
        yield f"{dtype} {DQK}/{DHV} L={L}", launches


def mlstm_tfla(stage, dtype: str):
    """Likewise. The chunk size is no part of what is compiled, but no tile is larger than a chunk."""
    sizes = [(128, 256, 256), (16, 32, 16)]
    if dtype == "bfloat16":  # the only one with several tables of tiles, and tiles of more than 32 steps
        sizes += [(128, 256, 64), (128, 256, 32), (128, 256, 16), (16, 32, 256), (512, 512, 256)]
    for DQK, DHV, L in sizes:
        (*x, h), state = tensors(dtype, DQK, DHV)
        variants = [(state, False)]
        if (dtype, DQK, L) == ("bfloat16", 128, 256):
            variants += [(state, True), ((None,) * 3, False)]
        with catch_launches() as launches:
            for start, assume_norm in variants:
                _, C_T, _, _, *saved = stage.launch_forward(*x, *start, L, assume_norm)
                stage.launch_backward(h, *start, *x, *start, C_T, *saved, L, assume_norm)
        yield f"{dtype} {DQK}/{DHV} L={L}", launches


def mlstm_hopper(stage, dtype: str):
    """In bfloat16 alone; a kernel for each power of two that the heads fit into; sequences whole and in spans."""
    if dtype != "bfloat16":
        return
    for DQK, DHV in ((128, 256), (256, 512), (128, 512), (256, 128), (64, 64), (72, 104)):
        (*x, h), state = tensors(dtype, DQK, DHV, (2, 4, 2048))
        with catch_launches() as launches:
            for start, SPAN in ((state, 32), ((None,) * 3, 32), ((None,) * 3, 16)):
                stage.span_of = lambda x, NT, tiles, *_, SPAN=SPAN: SPAN
                _, C_T, _, _, *saved = stage.launch_forward(*x, *start, False, start[0] is not None)
                stage.launch_backward(h, *start, *x, *start, C_T, *saved, False)
        yield f"{dtype} {DQK}/{DHV}", launches


def mlstm_decode(stage, dtype: str):
    for DQK, DHV in ((128, 256), (16, 32)):
        (*x, _), state = tensors(dtype, DQK, DHV, (2, 4))
        with catch_launches() as launches:
            stage.launch_step(*x, *state)
        yield f"{dtype} {DQK}/{DHV}", launches


def mlstmsig_tfla(stage, dtype: str):
    """Likewise; its file has the decode step too."""
    sizes = [(128, 256, 256), (16, 32, 16)]
    if dtype == "bfloat16":
        sizes += [(128, 256, 64), (128, 256, 16), (16, 32, 256), (512, 512, 256)]
    for DQK, DHV, L in sizes:
        (*x, h), (C_0, *_) = tensors(dtype, DQK, DHV)
        with catch_launches() as launches:
            for start in (C_0, None) if (dtype, DQK, L) == ("bfloat16", 128, 256) else (C_0,):
                _, _, *saved = stage.launch_forward(*x, start, L)
                stage.launch_backward(h, start, *x, *saved, L)
            stage.launch_step(*(y[:, :, 0] for y in x), C_0)
        yield f"{dtype} {DQK}/{DHV} L={L}", launches


def mlstmsig_hopper(stage, dtype: str):
    """As mlstm_hopper."""
    if dtype != "bfloat16":
        return
    for DQK, DHV in ((128, 256), (256, 512), (128, 512), (256, 128), (64, 64), (72, 104)):
        (*x, h), (C_0, *_) = tensors(dtype, DQK, DHV, (2, 4, 2048))
        with catch_launches() as launches:
            for start, SPAN in ((C_0, 32), (None, 32), (None, 16)):
                stage.span_of = lambda x, NT, tiles, *_, SPAN=SPAN: SPAN
                _, *saved = stage.launch_forward(*x, start, start is not None)
                stage.launch_backward(h, start, *x, start, *saved)
        yield f"{dtype} {DQK}/{DHV}", launches


FILES = {
    function.__name__: function
    for function in (mlstm_limit_chunk, mlstm_tfla, mlstm_decode, mlstm_hopper, mlstmsig_tfla, mlstmsig_hopper)
}
# Files that are for some targets alone.
ONLY = {"mlstm_hopper": ("sm_90",), "mlstmsig_hopper": ("sm_90",)}


class catch_launches:
    """Within it a kernel[grid](...) is not run but appended, once each, to the list that it gives."""

    def __enter__(self) -> list[Launch]:
        from triton.runtime.jit import JITFunction

        self.run, self.launches, seen = JITFunction.run, [], set()

        def run(kernel, *args, grid, warmup, **kwargs):
            launch = Launch(kernel, args, kwargs)
            if launch.key() not in seen:
                seen.add(launch.key())
                self.launches.append(launch)

        assert "grid" in inspect.signature(JITFunction.run).parameters
        JITFunction.run = run
        return self.launches

    def __exit__(self, *_) -> None:
        from triton.runtime.jit import JITFunction

        JITFunction.run = self.run


def digest(file: str) -> str:
    """Of a kernel file, and of what is compiled of it: another digest, another record."""
    text = Path(importlib.util.find_spec(file).origin).read_text() + inspect.getsource(FILES[file])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_dtype(file: str, target: str, dtype: str) -> list[dict]:
    stage = importlib.import_module(file)
    stage.describe_gpu = lambda device: (TARGETS[target][0] == "hip", TARGETS[target][3])
    rows = []
    for label, launches in FILES[file](stage, dtype):
        for launch in launches:
            try:
                row = launch.compile(target)
                row["error"] = "" if row["shared"] <= row["limit"] else "too much shared memory"
            except Exception as error:  # whatever the compiler raises is the result
                row = {"kernel": launch.kernel.fn.__name__, "error": f"{type(error).__name__}: {error}"[:300]}
            rows.append({"file": file, "target": target, "configuration": label, **row})
    return rows


def table(rows: list[dict], configuration: str) -> str:
    """Registers, stack bytes and shared memory of one configuration as a Markdown table, a column per target."""
    rows = [row for row in rows if row["configuration"] == configuration]
    lines = ["| kernel | " + " | ".join(TARGETS) + " |", "|---|" + "--:|" * len(TARGETS)]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for target in TARGETS:
            # Launches with and without a state, say, are compiled apart: the one that needs most counts.
            found = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
            most = {key: max(row[key] for row in found) for key in ("registers", "stack", "shared") if key in found[0]}
            registers = f"{most['registers']} / {most['stack']} / " if "stack" in most else ""
            cells.append(f"{registers}{most['shared'] / 1024:.0f} KB")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfla_lab.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--file", choices=FILES, action="append", help="may be given more than once; default: all")
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be given more than once; default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="likewise")
    parser.add_argument("--verbose", action="store_true", help="print every kernel, not only what fails or spills")
    parser.add_argument("--json", action="store_true", help="print every kernel, as JSON and nothing else")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("Triton's interpreter is on: unset TRITON_INTERPRET")

    import torch._dynamo  # noqa: F401, what the launchers import anyway, once here instead of in every process

    # One process a job: some versions of the compiler end the whole process on some kernels.
    jobs = [
        (file, target, dtype)
        for file in arguments.file or FILES
        for target in arguments.target or TARGETS
        for dtype in arguments.dtype or DTYPES
        if target in ONLY.get(file, TARGETS)
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = [row for result in pool.map(compile_dtype, *zip(*jobs, strict=True)) for row in result]
    bad = sum(1 for row in rows if row["error"])
    if arguments.json:
        head = {"triton": metadata.version("triton"), "sources": {f: digest(f) for f in arguments.file or FILES}}
        lines = ",\n".join(json.dumps(row) for row in rows)
        print(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}')
        return 1 if bad else 0
    for row in rows:
        if arguments.verbose or row["error"] or row.get("stack"):
            print(*(f"{name}={value}" for name, value in row.items() if value != ""))
    print(f"{len(rows)} kernels compiled, {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
