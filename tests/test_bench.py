"""The benchmark: what crashes, is wrong or is missing becomes a row; rows are kept; tables and figures follow them."""

import json
import math
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from properties import ON_GPU
from tfla_lab import bench, bench_report, peers
from tfla_lab.isolate import Worker
from tfla_lab.peers import Kernel

# What the workers in these tests answer with; every question leaves a line in a file.
FAKE_ANSWERS = """
import os, time

def answer(task):
    if "load" in task:
        return {}
    with open(os.environ["FAKE_LOG"], "a") as log:
        print(task["kernel"], task.get("T"), task.get("configuration"), file=log)
    print("noise on standard output")
    name, configuration = task["kernel"], task.get("configuration") or {}
    if name == "aborts" and task["T"] != 512:
        print("Fake.cpp:1: Assertion `false' failed.", file=os.sys.stderr)
        os.abort()
    if name == "exits":
        os._exit(3)
    if name == "hangs":
        time.sleep(60)
    if name == "refuses" or configuration.get("chunk_size") == 7:
        raise RuntimeError("not on this machine\\nnor on others")
    if name == "faults":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if name == "wrong":
        return {"errors": {"h": 0.5}, "correct": False}
    ms = 1.0 / configuration.get("chunk_size", 1)
    row = {"errors": {"h": 0.001}, "correct": True, "forward_ms": ms, "process": os.getpid()}
    return row if name == "forward_only" else row | {"forward_backward_ms": 3 * ms, "memory_gib": 1.0}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The name of the fake answers, and the questions that were asked so far."""
    (tmp_path / "fake_answers.py").write_text(FAKE_ANSWERS)
    log = tmp_path / "log"
    log.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(log))
    return "fake_answers:answer", lambda: log.read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("refuses", "refuses: RuntimeError: not on this machine nor on others"),
        ("aborts", "crashes: SIGABRT: Fake.cpp:1: Assertion `false' failed."),
        ("exits", "crashes: exit status 3: noise on standard output"),
        ("hangs", "crashes: no answer after 1 s"),
        ("faults", "refuses: RuntimeError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_an_answer(fake, name, problem):
    worker = Worker(fake[0])
    before = worker.ask({"kernel": "right", "T": 1}, seconds=30)
    assert worker.ask({"kernel": name, "T": 1}, seconds=1 if name == "hangs" else 30) == {"problem": problem}
    after = worker.ask({"kernel": "right", "T": 1}, seconds=30)
    worker.stop()
    assert after["correct"]
    # An exception leaves the process as it was, unless it says that the GPU is in an unknown state.
    assert (before["process"] == after["process"]) == (name == "refuses")


def test_a_worker_without_its_module_says_so():
    worker = Worker("there_is_no_such_module:answer")
    assert "No module named 'there_is_no_such_module'" in worker.ask({}, seconds=30)["problem"]
    worker.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def kernel(name: str, **options) -> Kernel:
    return Kernel(name, f"title of {name}", None, None, None, None, **options)


FAKES = {
    k.name: k
    for k in (
        kernel("right", ours=True),
        kernel("aborts"),
        kernel("wrong"),
        kernel("refuses"),
        kernel("forward_only"),
        kernel("choosy", configurations=({"chunk_size": 2}, {"chunk_size": 7}, {"chunk_size": 4})),
        kernel("hopeless", configurations=({"chunk_size": 7}, {"chunk_size": 7, "again": True})),
        kernel("absent", module="there_is_no_such_module", package="no-such-package"),
    )
}


@pytest.fixture
def fake_kernels(monkeypatch):
    monkeypatch.setattr(bench, "KERNELS", FAKES)
    monkeypatch.setattr(bench_report, "KERNELS", FAKES)
    monkeypatch.setattr(bench, "STEPS", {})
    monkeypatch.setattr(bench_report, "STEPS", {})


def test_every_task_gets_its_row_whatever_happens(fake, fake_kernels, tmp_path):
    ask, asked = fake
    tasks = bench.plan(FAKES, {(16, 128, 256): (512, 2048, 8192)}, prefill=(65_536,))
    result, path = {"device": "GPU", "rows": []}, tmp_path / "result.json"
    bench.run(tasks, result, lambda: bench.write(path, result), ask=ask)
    assert json.loads(path.read_text()) == result

    rows = {name: [row for row in result["rows"] if row["kernel"] == name] for name in FAKES}
    assert rows["absent"] == [{"kernel": "absent", "problem": "not installed: pip install -e '.[bench]'"}]
    for name in set(FAKES) - {"absent", "choosy", "hopeless"}:
        assert sorted((r["pass"], r["T"], r["batch"]) for r in rows[name]) == [
            ("prefill", 65_536, 1), ("train", 512, 128), ("train", 2048, 32), ("train", 8192, 8),
        ]  # fmt: skip
    assert all(r["correct"] for name in ("right", "forward_only") for r in rows[name])
    # One that aborts does so for itself: its other lengths are asked anew.
    assert {r["T"]: r.get("problem", "")[:16] for r in rows["aborts"] if r["pass"] == "train"} == {
        512: "", 2048: "crashes: SIGABRT", 8192: "crashes: SIGABRT",
    }  # fmt: skip
    assert all(r["problem"].startswith("refuses: RuntimeError: not on this") for r in rows["refuses"])
    assert [r["errors"]["h"] for r in rows["wrong"]] == [0.5] * 4
    # Configurations are tried at one length, and the fastest is taken for the others.
    assert [(r["pass"], r["T"], r["configuration"]["chunk_size"]) for r in rows["choosy"]] == [
        ("train", 8192, 2), ("train", 8192, 7), ("train", 8192, 4),
        ("train", 512, 4), ("train", 2048, 4), ("prefill", 65_536, 4),
    ]  # fmt: skip
    assert [r["problem"][:9] for r in rows["hopeless"]] == ["refuses: "] * 2 + ["not tried"] * 3

    # A second run asks nothing; one that lost its last rows asks for these alone.
    before = asked()
    again = json.loads(path.read_text())
    bench.run(tasks, again, lambda: None, ask=ask)
    assert asked() == before
    assert sorted(map(json.dumps, again["rows"])) == sorted(map(json.dumps, result["rows"]))
    again["rows"] = [row for row in again["rows"] if row["kernel"] != "choosy" or row["T"] != 512]
    bench.run(tasks, again, lambda: None, ask=ask)
    assert asked()[len(before) :] == ["choosy 512 {'chunk_size': 4}"]


def test_a_configuration_that_is_asked_for_is_taken_at_every_length(fake, fake_kernels):
    tasks = [t | {"configuration": {"chunk_size": 2}} for t in bench.plan(["choosy"], {(16, 128, 256): (512, 8192)})]
    result = {"rows": []}
    bench.run(tasks, result, lambda: None, ask=fake[0])
    assert [(row["T"], row["configuration"]) for row in result["rows"]] == [(T, {"chunk_size": 2}) for T in (512, 8192)]


def test_the_plan_has_everything_once_at_constant_tokens():
    tasks = bench.plan([*bench.KERNELS, *bench.STEPS], bench.SHAPES, remember=bench.REMEMBER, decode=bench.DECODE)
    assert {t["kernel"] for t in tasks if t["pass"] == "remember"} == {n for n, k in bench.KERNELS.items() if k.ours}
    assert len({bench.identity(task) for task in tasks}) == len(tasks)
    assert all(t["T"] * t["batch"] == bench.TOKENS for t in tasks if t["pass"] == "train")
    assert {t["heads"] * t["d_hv"] for t in tasks} == {4096}
    # Attention has no head dimensions to follow: it stands beside all of them as it is.
    assert {(t["heads"], t["d_qk"], t["d_hv"]) for t in tasks if t["kernel"] == "sdpa_cudnn"} == {(32, 128, 128)}
    assert {t["T"] for t in tasks if t["kernel"] == "sdpa_cudnn" and t["pass"] == "train"} == set(bench.LENGTHS)
    assert {t["kernel"] for t in tasks if t["pass"] == "decode"} == set(bench.STEPS)


def test_processes_share_what_autotuning_compiles(monkeypatch):
    """Each compiles some, together all of them; and none is left with nothing to run."""
    import triton
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(triton.testing, "do_bench", triton.testing.do_bench)  # to be put back, and what follows
    everything = Autotuner.prune_configs
    tuner = object.__new__(Autotuner)
    tuner.early_config_prune = tuner.perf_model = None
    for number in (1, 4, 6, 40):
        tuner.configs, found = list(range(number)), []
        for share in range(bench.SHARES):
            monkeypatch.setattr(Autotuner, "prune_configs", everything)
            bench.shorten_autotuning.__wrapped__(once=True, share=share)
            found.append(tuner.prune_configs({}))
        assert all(found)
        assert set().union(*found) == set(tuner.configs)
        assert max(map(len, found)) == -(-number // bench.SHARES)


def test_results_of_another_machine_or_commit_are_not_mixed_in(monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    here = bench.open_result(path)
    assert here["rows"] == []
    assert {"mlstm_kernels", "fla-core"} <= set(here["versions"])
    rows = [{"kernel": name, "pass": "train"} for name in ("mlstm_tfla", "sdpa_flash")] + [{"kernel": "mlstm_tfla"}]
    bench.write(path, here | {"rows": rows, "copy_rate_tb_s": 4.0})
    assert bench.open_result(path)["rows"] == rows[:2]
    assert bench.open_result(path)["copy_rate_tb_s"] == 4.0
    assert bench.open_result(path, fresh=True)["rows"] == []
    bench.write(path, here | {"rows": rows, "commit": "another"})
    assert bench.open_result(path)["rows"] == rows[1:2]
    assert bench.open_result(path)["commit"] == here["commit"]
    bench.write(path, here | {"rows": rows, "device": "another"})
    with pytest.raises(ValueError, match=r"has device another, here is .*; --fresh starts over"):
        bench.open_result(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--T", "1000"], "argument --T: must divide 65536, or give --batch"),
        (["--batch", "0"], "argument --batch: must be at least 1"),
        (["--only", "nothing"], "argument --only: invalid choice: 'nothing'"),
        (["--only", "sdpa_flash", "--chunk-size", "64"], "argument --chunk-size: not for sdpa_flash"),
        (["--only", "mlstmsig_hopper", "--chunk-size", "64"], "argument --chunk-size: not for mlstmsig_hopper"),
        ([], "no GPU here: there is nothing to time"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench, "has_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "whole train remember prefill decode: 14 kernels, 4 steps, 8 lengths, 4 shapes"),
        ("--only mlstm_tfla", "whole train remember prefill: 1 kernels, 0 steps, 8 lengths, 4 shapes"),
        ("--quick", "part train: 14 kernels, 0 steps, 2 lengths, 2 shapes"),
        ("--T 512 --only mlstm_tfla --chunk-size 64 128", "part train: 1 kernels, 0 steps, 1 lengths, 1 shapes"),
        ("--heads 8 --dqk 256 --dhv 512 --only mlstm_tfla", "part train: 1 kernels, 0 steps, 8 lengths, 1 shapes"),
        ("--decode mlstm_decode_step", "part decode: 0 kernels, 1 steps, 0 lengths, 1 shapes"),
    ],
)
def test_the_command_line_says_what_is_measured(monkeypatch, arguments, expected):
    monkeypatch.setattr(bench, "has_gpu", lambda: True)
    tasks, whole = bench.tasks_of(bench.arguments_of(arguments.split()))
    names = {task["kernel"] for task in tasks}
    kinds = dict.fromkeys(sorted((t["pass"] for t in tasks), key=("train", "remember", "prefill", "decode").index))
    lengths = {t["T"] for t in tasks if t["pass"] == "train"}
    shapes = {(t["heads"], t["d_qk"], t["d_hv"]) for t in tasks}
    found = f"{len(names & set(bench.KERNELS))} kernels, {len(names & set(bench.STEPS))} steps"
    found += f", {len(lengths)} lengths, {len(shapes)} shapes"
    assert f"{'whole' if whole else 'part'} {' '.join(kinds)}: {found}" == expected
    if "--chunk-size" in arguments:
        assert [task["configuration"] for task in tasks] == [{"chunk_size": 64}, {"chunk_size": 128}]


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------
class Times(torch.autograd.Function):
    """x, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        if ctx.factor == 0:
            raise RuntimeError("there is no backward pass")
        return dx * ctx.factor, None


def spoiled(value: float = 1.0, gradient: float = 1.0) -> Kernel:
    """The chunkwise mLSTMsig with a wrong h or a wrong dv."""

    def load():
        def call(q, k, v, i, f, return_state=False):
            h, C = peers.sig_reference(q, k, Times.apply(v, gradient), i, f)
            return h * value, (C,)

        return call

    return Kernel("spoiled", "", load, peers.all_leaves, peers.sig_reference, peers.true_memory)


@pytest.mark.parametrize(
    ("spoils", "correct", "times"),
    [
        ({}, True, {"forward_ms", "forward_backward_ms"}),
        ({"value": 1.02}, True, {"forward_ms", "forward_backward_ms"}),
        ({"value": 1.06}, False, set()),
        ({"value": math.nan}, False, set()),
        ({"gradient": 1.06}, False, {"forward_ms"}),
        ({"gradient": math.nan}, False, {"forward_ms"}),
        ({"gradient": 0}, True, {"forward_ms"}),
    ],
)
@pytest.mark.parametrize("ours", [False, True])
def test_what_is_wrong_is_not_timed(monkeypatch, spoils, correct, times, ours):
    if ours and spoils == {"value": 1.02}:
        correct, times = False, set()  # for our own kernels that is too much
    made = spoiled(**spoils)
    monkeypatch.setattr(bench, "KERNELS", {"spoiled": Kernel(**{**made.__dict__, "ours": ours})})
    monkeypatch.setattr(bench, "median_ms", lambda function: (function(), (1.0, 0.1))[1])
    monkeypatch.setattr(bench, "peak_gib", lambda function: 0.5)
    monkeypatch.setattr(bench, "kernel_ms", lambda function: {})
    monkeypatch.setattr(bench, "default_chunk_size", lambda *_: 64)
    row = bench.measure("spoiled", 70, 2, NH=3, DQK=8, DHV=16, dtype=torch.float32, device="cpu")
    assert row["correct"] == correct
    assert {key for key in row if key.endswith("_ms") and "spread" not in key and "kernels" not in key} == times
    assert row.get("backward") == (
        None if spoils != {"gradient": 0} else "refuses: RuntimeError: there is no backward pass"
    )
    assert ("memory_gib" in row) == ("forward_backward_ms" in row)


def test_where_a_norm_follows_the_gradient_is_orthogonal_to_h(monkeypatch):
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            ctx.save_for_backward(h)
            return h.clone()

        @staticmethod
        def backward(ctx, dh):
            seen.append(((ctx.saved_tensors[0] * dh).sum(-1) / dh.norm(dim=-1)).abs().max())
            return dh

    def load():
        return lambda *x, return_state=False: (Watch.apply(peers.sig_reference(*x)[0]), None)

    monkeypatch.setattr(bench, "median_ms", lambda function: (1.0, 0.1))
    monkeypatch.setattr(bench, "peak_gib", lambda function: 0.5)
    for follows in (False, True):
        made = Kernel("k", "", load, peers.all_leaves, peers.sig_reference, None, norm_follows=follows)
        monkeypatch.setattr(bench, "KERNELS", {"k": made})
        assert bench.measure("k", 70, 1, NH=2, DQK=8, DHV=16, dtype=torch.float32, device="cpu")["correct"]
    assert seen[0] > 0.1
    assert seen[1] < 1e-5


def test_a_prompt_is_checked_with_the_state_after_it(monkeypatch):
    monkeypatch.setattr(bench, "median_ms", lambda function: (1.0, 0.1))
    monkeypatch.setattr(bench, "peak_gib", lambda function: 0.5)
    options = {"NH": 3, "DQK": 8, "DHV": 16, "dtype": torch.float32, "device": "cpu"}
    for factor in (1, 2):
        made = spoiled().__dict__ | {"memory": lambda state, factor=factor: factor * state[0]}
        monkeypatch.setattr(bench, "KERNELS", {"spoiled": Kernel(**made)})
        row = bench.measure_prefill("spoiled", 70, 1, **options)
        assert row["correct"] == (factor == 1) == ("forward_ms" in row)
        assert set(row["errors"]) == {"h", "C"}


def recurrence(q, k, v, decay):
    """h and C of C_t = decay_t C_(t-1) + k_t v_t^T, h_t = C_t^T q_t; (B, T, NH, ...), decay as k or without DQK."""
    C, h = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    decay = decay if decay.dim() == 4 else decay[..., None]
    for t in range(q.shape[1]):
        C = decay[:, t, :, :, None] * C + k[:, t, :, :, None] * v[:, t, :, None]
        h.append(torch.einsum("bhk,bhkv->bhv", q[:, t], C))
    return torch.stack(h, 1), C


@pytest.mark.parametrize("name", ["fla_simple_gla", "mamba2_ssd", "fla_gla"])
def test_references_are_what_the_peers_say_they_compute(name):
    """With the recurrences written out as those libraries' documentation has them."""
    inputs, _ = bench.draw(2, 3, 150, 8, 16, torch.float64, "cpu")
    made = peers.KERNELS[name]
    leaves = {key: x.double() for key, x in made.leaves(inputs).items()}
    assert all(x.shape[1] == 150 for x in leaves.values())
    h, C = made.reference(*leaves.values())
    q, k, v, gate = leaves.values()
    if name == "mamba2_ssd":
        expected = recurrence(q, k * gate[..., None], v, torch.exp(-gate))
        sig = peers.sig_reference(*inputs)  # and that is our cell
    else:
        expected = recurrence(q / math.sqrt(8), k, v, gate.exp())
        sig = peers.sig_reference(*inputs) if name == "fla_simple_gla" else None
    torch.testing.assert_close(h, expected[0])
    torch.testing.assert_close(C, expected[1])
    if sig is not None:
        torch.testing.assert_close(h.transpose(1, 2), sig[0], rtol=1e-5, atol=1e-6)  # gates are float32
        torch.testing.assert_close(C, sig[1], rtol=1e-5, atol=1e-5)


def test_the_reference_of_attention_is_attention():
    q, k, v = (torch.randn(1, 2, 1500, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    h, C = peers.attention_reference(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert C is None
    torch.testing.assert_close(h, expected)
    dh = torch.randn_like(h)
    for x, y in zip(torch.autograd.grad(h, (q, k, v), dh), torch.autograd.grad(expected, (q, k, v), dh), strict=True):
        torch.testing.assert_close(x, y)


@ON_GPU
@pytest.mark.parametrize("name", ["mlstm_tfla", "mlstmsig_tfla", "sdpa_flash"])
def test_a_kernel_is_measured_in_its_own_process(name):
    (task,) = bench.plan([name], {(4, 64, 64): (512,)}, batches=[2])
    worker = Worker(bench.ANSWER)
    row = worker.ask(task | {"configuration": bench.KERNELS[name].configurations[0]}, seconds=300)
    worker.stop()
    assert row["correct"], row
    assert 0 < row["forward_ms"] < row["forward_backward_ms"]
    assert row["memory_gib"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures
# ---------------------------------------------------------------------------------------------------------------------
def small_result() -> dict:
    """Made by hand: all that can happen, two lengths."""
    rows = [{"kernel": "absent", "problem": "not installed: pip install this"}]
    for T in (512, 8192):
        for name, ms in (("right", 0.75), ("choosy", 2.0), ("forward_only", 1.5)):
            row = {"pass": "train", "kernel": name, "T": T, "batch": 65_536 // T, "heads": 16, "d_qk": 128, "d_hv": 256}
            row |= {"dtype": "bfloat16", "configuration": {}, "errors": {"h": 2e-3}, "correct": True, "forward_ms": ms}
            if name == "forward_only":
                row["backward"] = "refuses: Error: no"
            else:
                row |= {"forward_backward_ms": 4 * ms, "memory_gib": 1.9}
            if name == "choosy":
                row["configuration"] = {"chunk_size": 128}
                slower = {"configuration": {"chunk_size": 64}, "forward_ms": 3.0, "forward_backward_ms": 9.0}
                rows += [row | slower] if T == 8192 else []
            rows.append(row)
    bad = {key: row[key] for key in ("pass", "T", "batch", "heads", "d_qk", "d_hv", "dtype")}
    rows.append(bad | {"kernel": "wrong", "configuration": {}, "errors": {"h": 0.5}, "correct": False})
    rows.append(rows[-1] | {"heads": 8, "d_qk": 256, "d_hv": 512, "errors": {"h": 0.75}})
    rows.append(bad | {"kernel": "aborts", "configuration": {"chunk_size": 32}, "problem": "crashes: SIGABRT: why"})
    result = {"device": "GPU", "versions": {"torch": "2"}, "date": "today", "commit": "abc", "rows": rows}
    return result | {"copy_rate_tb_s": 4.3, "matrix_rate_tflop_s": 690.0}


def test_the_section_has_every_number_and_every_reason(fake_kernels):
    text = bench_report.section(small_result())
    # 65,536 steps x 16 heads x 2 (128 + 256) entries of 2 bytes at 4.3 TB/s are 0.375 ms: half of 0.75
    for line in (
        "| **`title`** of right |  | 0.75 / 3.00 |  | 0.75 / 3.00 |  |  | 50% | 1.90 |",
        "| title of choosy | 128 | 2.00 / 8.00 |  | 2.00 / 8.00 |  |  | 19% | 1.90 |",
        "| title of forward_only |  | 1.50 / refuses |  | 1.50 / refuses |  |  | 25% |  |",
        "| title of wrong |  |  |  | wrong |  |  |  |  |",
        "| title of aborts | 32 |  |  | crashes |  |  |  |  |",
        "- title of absent: not installed: pip install this",
        "- title of forward_only, train, 16 × (128, 256) at T = 512, 8,192: forward + backward refuses: Error: no",
        "- title of wrong, train, 16 × (128, 256) at T = 8,192; 8 × (256, 512) at T = 8,192: wrong: h 0.5 to 0.75",
        "- title of aborts, train, chunk size 32, 16 × (128, 256) at T = 8,192: crashes: SIGABRT: why",
    ):
        assert line in text.splitlines()
    assert "4.3 TB/s; matrix products: 690.0 TFLOP/s" in text


def test_the_table_on_the_terminal_says_what_went_wrong(fake_kernels):
    lines = bench.table(small_result()["rows"]).splitlines()
    assert lines[2] == "| `absent` |  |  | not installed: pip install this |"
    assert "| `forward_only` | 512 |  | 1.50 ms | refuses: Error: no |" in lines
    assert "| `choosy` | 8192 | 64 | 3.00 ms | 9.00 ms | 1.90 GiB |" in lines
    assert "| `wrong` | 8192 |  | wrong: h 0.5 |" in lines


@pytest.mark.parametrize("key", bench_report.FIGURES)
def test_figures_are_the_same_every_time_and_have_what_was_measured(fake_kernels, tmp_path, key):
    drawing = bench_report.figure(small_result(), key, tmp_path / "a.svg")
    bench_report.figure(small_result(), key, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    (ax,) = drawing.axes
    assert ax.get_xscale() == ax.get_yscale() == "log"
    names = ["title of right", "title of choosy"] + ["title of forward_only"] * (key == "forward_ms")
    assert sorted(text.get_text() for text in ax.get_legend().get_texts()) == sorted(names)
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert (
        lines["title of choosy"] == {"forward_ms": [2, 2], "forward_backward_ms": [8, 8], "memory_gib": [1.9, 1.9]}[key]
    )


def test_the_report_fills_the_readme_between_its_marks(fake_kernels, tmp_path, capsys):
    result, readme = tmp_path / "result.json", tmp_path / "README.md"
    bench.write(result, small_result())
    readme.write_text(f"before\n{bench_report.START}\nold\n{bench_report.END}\nafter\n")
    for _ in range(2):
        assert bench_report.main([str(result), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"before\n{bench_report.START}\n## Against")
        assert text.endswith(f"`make bench`.\n{bench_report.END}\nafter\n")
    assert {file.name for file in tmp_path.glob("*.svg")} == {name for name, _ in bench_report.FIGURES.values()}
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="2"):
        bench_report.main([str(result), "--readme", str(readme)])
    assert "must contain the lines" in capsys.readouterr().err


def test_where_a_peer_is_faster_is_said(fake_kernels, monkeypatch):
    monkeypatch.setattr(bench_report, "HOPPER", ("right",))
    result = small_result()
    assert "No peer is faster than **`title`** of right at any length" in bench_report.section(result)
    of_right = {row["T"]: row for row in result["rows"] if row["kernel"] == "right"}
    # Another one of ours does not count.
    monkeypatch.setitem(FAKES, "quick", kernel("quick", ours=True))
    result["rows"].append(of_right[512] | {"kernel": "quick", "forward_ms": 0.1, "forward_backward_ms": 0.2})
    assert bench_report.losses(result).startswith("No peer")
    of_right[512]["forward_ms"], of_right[8192]["forward_backward_ms"] = 1.75, 8.5
    # At another shape, without a backward pass.
    wide = {"heads": 8, "d_qk": 256, "d_hv": 512}
    row = of_right[512] | wide
    del row["forward_backward_ms"]
    choosy = next(row for row in result["rows"] if row["kernel"] == "choosy" and row["T"] == 512)
    result["rows"] += [row, choosy | wide | {"forward_ms": 1.25}]
    assert bench_report.losses(result).splitlines()[2:] == [
        f"- **`title`** of right, {lost}"
        for lost in (
            "16 heads of (128, 256), T = 512: 1.75 / 3.00; title of forward_only **1.50** / refuses",
            "16 heads of (128, 256), T = 8,192: 0.75 / 8.50; title of choosy 2.00 / **8.00**",
            "8 heads of (256, 512), T = 512: 1.75 / –; title of choosy **1.25** / 8.00",
        )
    ]
    without = {"rows": [{"kernel": "right", "problem": "refuses: another GPU"}]}
    assert "No peer is faster" not in bench_report.section(small_result() | without)


def test_times_that_differ_from_call_to_call_are_remarked_upon():
    row = {"pass": "train", "kernel": "mlstm_tfla", "T": 1024, "heads": 2, "d_qk": 8, "d_hv": 16}
    row |= {"forward_ms": 1.0, "forward_spread_ms": 0.3, "forward_backward_ms": 4.0, "forward_backward_spread_ms": 0.1}
    assert bench_report.unsteady(row | {"kernels_ms": {"h": 0.75, "dq": 2.5}}) == (
        "- mlstm_tfla (04), 2 × (8, 16), T = 1,024: the quartiles of the times lie 0.30 / 0.10 ms apart; "
        "the kernels of forward + backward alone take 3.25 ms together."
    )
    del row["forward_backward_ms"], row["forward_backward_spread_ms"]
    assert bench_report.unsteady(row).endswith("lie 0.30 / 0.00 ms apart.")
    assert bench_report.unsteady(row | {"forward_spread_ms": 0.1}) == ""
    assert bench_report.unsteady({"kernel": "mlstm_tfla", "problem": "not installed"}) == ""


def test_readme_and_figures_are_those_of_the_committed_result(tmp_path):
    """Without a result there is no section and there are no figures."""
    result = json.loads(bench_report.RESULT.read_text()) if bench_report.RESULT.exists() else None
    readme = bench_report.README.read_text()
    expected = bench_report.insert(readme, bench_report.section(result) if result else "")
    assert readme == expected, "write it anew: python -m tfla_lab.bench_report"
    for key, (name, _) in bench_report.FIGURES.items():
        committed = bench_report.RESULTS / name
        assert committed.exists() == (result is not None), name
        if result:
            bench_report.figure(result, key, tmp_path / name)
            old, new = committed.read_text(), (tmp_path / name).read_text()
            if f"Matplotlib v{matplotlib.__version__}," in old:
                assert old == new, "draw it anew: python -m tfla_lab.bench_report"
            # Another Matplotlib places things a little differently, but writes the same words as comments.
            assert re.findall(r"<!-- (.*) -->", old) == re.findall(r"<!-- (.*) -->", new)


def test_what_is_not_installed_is_named_in_the_extra():
    """The peers of the comparison are what `pip install -e '.[bench]'` brings, but for the one that must be built."""
    text = (Path(bench.ROOT) / "pyproject.toml").read_text()
    extra = re.search(r"^bench = \[\n(.*?)^\]", text, re.S | re.M).group(1)
    packages = {k.package for k in (*bench.KERNELS.values(), *bench.STEPS.values()) if k.package} - {"flash_attn_3"}
    assert packages - set(re.findall(r'"([\w-]+)', extra)) == {"mamba_ssm"}
    assert "mamba_ssm" in bench.KERNELS["mamba2_ssd"].install
