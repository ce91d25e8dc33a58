"""The tour on small inputs: a row for every form, honest exit statuses, and errors that name their cause."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from tfla_lab import forms, tour
from tfla_lab.forms import FORMS, Form

torch = pytest.importorskip("torch")
SMALL = ["--length", "20", "--chunk-size", "16", "--heads", "1", "--dqk", "4", "--dhv", "6"]
TABLE_ONLY = [*SMALL, "--no-figures"]
NO_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed"


def rows(out: str) -> dict[str, list[str]]:
    """The table's rows by form, cut at blanks."""
    return {
        line.split()[1]: line.split() for line in out.splitlines() if len(line.split()) > 1 and line.split()[1] in FORMS
    }


def numbers(row: list[str]) -> tuple[float, str, float, float]:
    """Error of h, the worst gradient's name and error, ms."""
    return float(row[2]), row[3], float(row[4]), float(row[5].strip("()"))


def test_every_form_has_a_row_and_the_figures_are_saved(tmp_path, capsys):
    output = tmp_path / "deep" / "pictures"
    assert tour.main([*SMALL, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    table = rows(out)
    assert list(table) == list(FORMS)
    for name, row in table.items():
        if FORMS[name].missing():
            assert "not run" in " ".join(row)
            continue
        error, worst, gradient_error, ms = numbers(row)
        assert row[0] == FORMS[name].stage
        assert 0 < error <= 1e-5
        assert worst in ("dq", "dk", "dv", "di", "df")
        assert 0 < gradient_error <= 1e-4
        assert ms > 0
        interpreted = FORMS[name].library == "triton" and forms.interpreted()
        assert ("interpreted" in row, row[5].startswith("(")) == (interpreted, interpreted)
        assert ("GPU" in row) == (forms.has_gpu() and FORMS[name].library != "numpy" and not interpreted)
    assert "All errors are within their budgets." in out
    names = {"gates_over_text.png", "gate_matrix.png", "error_over_t.png", "cost_over_T.png"}
    assert {path.name for path in output.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.name in out for path in output.iterdir())
    assert all(name in err for name in FORMS)  # the progress bar says where it is


def test_numbers_come_from_the_text_that_is_named(tmp_path, capsys):
    text = tmp_path / "poem.txt"
    text.write_bytes(bytes(range(256)))
    results = []
    for argv in (
        [],
        ["--text", str(text)],
        ["--text", str(text), "--seed", "1"],
        ["--text", str(text), "--batch", "2"],
    ):
        assert tour.main([*TABLE_ONLY, "--stage", "02", *argv]) == 0
        results.append(numbers(rows(capsys.readouterr().out)["mlstm_parallel"])[:3])
    assert len(set(results)) == 4
    standard, named, other_seed, batch = (error for error, *_ in results)
    assert other_seed == named  # the seed is that of the gradient of h
    assert len({standard, named, batch}) == 3


def test_stages_can_be_chosen(capsys):
    assert tour.main([*TABLE_ONLY, "--stage", "2", "--stage", "01"]) == 0
    assert list(rows(capsys.readouterr().out)) == ["mlstm_recurrent", "mlstm_parallel"]


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float64", 0, 1e-10), ("float16", 1e-5, 1e-3), ("bfloat16", 1e-4, 5e-3)]
)
def test_dtypes(dtype, least, most, capsys):
    assert tour.main([*TABLE_ONLY, "--dtype", dtype, "--stage", "01", "--stage", "02"]) == 0
    out = capsys.readouterr().out
    assert least <= numbers(rows(out)["mlstm_parallel"])[0] <= most
    assert ("NumPy has no bfloat16" in out) == (dtype == "bfloat16")


@pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON)
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--dtype", "float64"], "the Triton kernels take no float64"),
        (["--chunk-size", "256"], "chunk_size must be 16, 32, 64 or 128, got 256"),
    ],
)
def test_a_form_that_does_not_take_the_input_says_so(argv, reason, capsys):
    assert tour.main([*TABLE_ONLY, "--stage", "03", *argv]) == 0
    table = rows(capsys.readouterr().out)
    assert " ".join(table["mlstm_limit_chunk"]).endswith(f"not run: {reason}")
    assert numbers(table["mlstm_chunkwise"])[0] < 1e-5


def test_without_triton_its_row_says_why(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    assert tour.main([*TABLE_ONLY, "--stage", "03"]) == 0
    out = capsys.readouterr().out
    assert "not run: Triton is not installed" in out
    assert numbers(rows(out)["mlstm_chunkwise"])[0] < 1e-5
    monkeypatch.setattr(tour, "FORMS", {"mlstm_limit_chunk": FORMS["mlstm_limit_chunk"]})
    assert tour.main(TABLE_ONLY) == 1
    assert "Nothing could be run." in capsys.readouterr().out


def test_a_new_form_is_picked_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FORMS, "later", Form("mlstm_chunkwise", "07", "mlstm_chunkwise", "torch", chunked=True))
    assert tour.main([*SMALL, "--stage", "07", "--output", str(tmp_path)]) == 0
    assert rows(capsys.readouterr().out)["mlstm_chunkwise"][0] == "07"


# ---------------------------------------------------------------------------------------------------------------------
# Wrong results
# ---------------------------------------------------------------------------------------------------------------------
def wrong_output(function):
    def run(*inputs, **options):
        h, state = function(*inputs, **options)
        return h * 1.0001, state

    return run


def wrong_gradient(function):
    def run(q, *inputs, **options):
        return function(q + 1e-3 * (q - q.detach()), *inputs, **options)  # the same numbers, dq 0.1 % too large

    return run


def not_a_number(function):
    def run(*inputs, **options):
        h, state = function(*inputs, **options)
        return h.index_fill(2, torch.tensor([1], device=h.device), torch.nan), state

    return run


def wrong_state(function):
    def run(*inputs, **options):
        h, (C, n, m) = function(*inputs, **options)
        return h, (C, n * 1.001, m)

    return run


@pytest.mark.parametrize(
    ("break_it", "tensor"), [(wrong_output, "h"), (wrong_gradient, "dq"), (not_a_number, "h"), (wrong_state, "n")]
)
def test_a_broken_budget_ends_with_1_and_names_the_tensor(break_it, tensor, monkeypatch, capsys, tmp_path):
    import mlstm_parallel

    monkeypatch.setattr(mlstm_parallel, "mlstm_parallel", break_it(mlstm_parallel.mlstm_parallel))
    figures = ["--output", str(tmp_path)] if break_it is not_a_number else ["--no-figures"]
    assert tour.main([*SMALL, "--stage", "01", "--stage", "02", *figures]) == 1
    out = capsys.readouterr().out
    assert "over budget" in " ".join(rows(out)["mlstm_parallel"])
    assert "over budget" not in " ".join(rows(out)["mlstm_recurrent"])
    assert "All errors" not in out
    off = [line.split()[0] for line in out.splitlines() if line.endswith("<-- off")]
    assert tensor in off
    if break_it is wrong_gradient:
        assert rows(out)["mlstm_parallel"][3] == "dq"
        assert off == ["dq"]


def test_a_fault_of_a_form_is_not_taken_for_a_refusal(monkeypatch):
    import mlstm_parallel

    for fault in (ValueError("too many values to unpack"), RuntimeError("boom"), TypeError("unexpected argument")):

        def fail(*inputs, fault=fault, **options):
            raise fault

        monkeypatch.setattr(mlstm_parallel, "mlstm_parallel", fail)
        with pytest.raises(type(fault), match=str(fault)):
            tour.main([*TABLE_ONLY, "--stage", "02"])


@pytest.mark.parametrize("fault", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_form_that_needs_too_much_memory_says_so(fault, monkeypatch, capsys):
    import mlstm_parallel

    def fail(*inputs, **options):
        raise fault

    monkeypatch.setattr(mlstm_parallel, "mlstm_parallel", fail)
    assert tour.main([*TABLE_ONLY, "--stage", "01", "--stage", "02"]) == 0
    assert "not run: not enough memory" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Wrong command lines
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "{tmp}/missing.txt"], "cannot read the text {tmp}/missing.txt: No such file"),
        (["--text", "{tmp}"], "cannot read the text {tmp}: Is a directory"),
        (["--text", "{tmp}/short.txt"], "short.txt has 5 bytes, but 2048 are needed"),
        (["--text", "{tmp}/short.txt", "--length", "3", "--batch", "2"], "has 5 bytes, but 6 are needed"),
        (["--length", "999999999999"], "bytes, but 999999999999 are needed"),
        (["--stage", "09"], "argument --stage: unknown stage '09'; there are 01, "),
        (["--stage", "two"], "unknown stage 'two'"),
        (["--length", "1"], "argument --length: must be a whole number of at least 2, got '1'"),
        (["--length", "many"], "argument --length: must be a whole number of at least 2, got 'many'"),
        (["--heads", "0"], "argument --heads: must be a whole number of at least 1, got '0'"),
        (["--batch", "-1"], "argument --batch: must be a whole number of at least 1, got '-1'"),
        (["--dqk", "1.5"], "argument --dqk: must be a whole number of at least 1, got '1.5'"),
        (["--dhv", ""], "argument --dhv: must be a whole number of at least 1, got ''"),
        (["--heads", "5"], "NH must be 1 to 4, which the trained layer has, got 5"),
        (["--dqk", "33"], "DQK must be 1 to 32, which the trained layer has, got 33"),
        (["--dhv", "65"], "DHV must be 1 to 64, which the trained layer has, got 65"),
        (["--seed", "-1"], "argument --seed: must be a whole number of at least 0, got '-1'"),
        (["--chunk-size", "48"], "argument --chunk-size: must be a power of two of at least 16, got '48'"),
        (["--chunk-size", "8"], "must be a power of two of at least 16, got '8'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (
            ["--output", "{tmp}/short.txt/pictures"],
            "cannot write pictures into {tmp}/short.txt/pictures: Not a directory",
        ),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_command_line_ends_with_2_and_one_line(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SystemExit) as stop:
        tour.main([word.format(tmp=tmp_path) for word in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert message.format(tmp=tmp_path) in err
    assert err.count("\n") == 1
    assert not out


def run_module(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tfla_lab.tour", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, check=False)


def test_help_lists_every_option():
    done = run_module("--help")
    assert done.returncode == 0
    for option in ("text", "length", "stage", "chunk-size", "dtype", "heads", "batch", "dqk", "dhv", "output", "seed"):
        assert f"--{option} " in done.stdout
    assert "--no-figures" in done.stdout
    assert "2048" in done.stdout
    assert "Exit status" in done.stdout


@pytest.mark.skipif(bool(NO_TRITON) or forms.has_gpu(), reason=NO_TRITON or "there is a GPU")
def test_without_a_gpu_triton_is_interpreted_unasked():
    done = run_module(*TABLE_ONLY, "--stage", "03")
    assert done.returncode == 0, done.stderr
    assert "CPU, interpreted" in done.stdout
    done = run_module(*TABLE_ONLY, "--stage", "03", TRITON_INTERPRET="0")
    assert "not run: no GPU here, and TRITON_INTERPRET=1 is not set" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory on the CPU is measured on Linux only")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_peak_memory_sees_what_either_library_allocates(library):
    if tour.reset_resident_peak() is None:
        pytest.skip("this system does not let a process set back its memory peak")

    def run():
        make = np.ones if library == "numpy" else torch.ones
        x = make(5 * tour.MIB if library == "numpy" else 10 * tour.MIB)  # 40 MiB, as float64 or float32
        del x  # the peak is over before run() ends
        return make(3).sum()

    with tour.freed_memory_goes_back():
        for _ in range(3):  # what was freed before does not count, and is not reused unseen
            result, peak = tour.peak_memory(run, "cpu")
            assert result == 3
            assert 38 <= peak <= 42  # of 40; the kernel counts resident pages in batches


def test_peak_memory_is_left_out_where_the_system_does_not_tell(monkeypatch, capsys):
    monkeypatch.setattr(tour, "reset_resident_peak", lambda: None)
    assert tour.peak_memory(lambda: 5, "cpu") == (5, None)
    if not forms.has_gpu():
        assert tour.main([*TABLE_ONLY, "--stage", "02"]) == 0
        assert rows(capsys.readouterr().out)["mlstm_parallel"][6] == "-"


def test_relative_error_over_t():
    reference = np.ones((2, 3, 4, 5))
    h = reference.copy()
    h[:, :, 1] *= 1.5
    h[0, 0, 2, 0] = np.nan
    np.testing.assert_allclose(tour.relative_error_over_t(h, reference), [0, 0.5, np.nan, 0])
    np.testing.assert_allclose(tour.relative_error_over_t(h[:, :, :2], 0 * reference[:, :, :2]), [np.inf, np.inf])
    np.testing.assert_allclose(tour.relative_error_over_t(0 * reference, 0 * reference), 0)
