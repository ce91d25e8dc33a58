"""What the READMEs say is true: their Python runs, their tables and links are right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("0*/README.md"))]
BLOCKS = [
    pytest.param(readme, block, id=f"{readme.parent.name if readme.parent != ROOT else 'top'}-{number}")
    for readme in READMES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", readme.read_text(), re.S))
]


@pytest.mark.parametrize(("readme", "block"), BLOCKS)
def test_python_blocks_run_beside_copied_files(readme, block, tmp_path):
    """In an empty folder with the stage's kernel files copied into it (all stages' for the top README)."""
    if any(name in block for name in ("limit_chunk", "tfla", "decode")):
        pytest.importorskip("triton", reason="Triton has no wheels for this system")
    folder = readme.parent
    for file in folder.glob("0*/mlstm*.py") if folder == ROOT else folder.glob("mlstm*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "example.py").write_text(block)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_stage_readme_has_an_example():
    assert set(READMES) == {param.values[0] for param in BLOCKS}


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()) + re.findall(r'src="([^"]+)"', readme.read_text()):
        if not target.startswith("http"):
            assert (readme.parent / target).exists(), target


def test_line_counts_in_the_table():
    text = (ROOT / "README.md").read_text()
    counts = re.findall(r"\[`(\w+\.py)`\]\(([^)]+)\) \((\d+) lines\)", text)
    assert {name for name, _, _ in counts} == {file.name for file in ROOT.glob("0*/mlstm*.py")}
    for _, path, count in counts:
        assert len((ROOT / path).read_text().splitlines()) == int(count), path


def load(name: str) -> dict:
    return json.loads((ROOT / "shared/results" / name).read_text())


@pytest.mark.parametrize(("stage", "files"), [
    ("03_chunkwise", ["stage03_h200.json", "stage03_h200_chunks.json"]),
    ("04_tfla_triton", ["stage04_h200.json", "stage04_h200_chunks.json", "stage04_h200_lengths.json"]),
    ("05_mlstmsig", ["stage05_h200.json", "stage05_h200_chunks.json"]),
])  # fmt: skip
def test_result_tables_equal_the_result_files(stage, files):
    """Every number in a results table stands in the JSON file that the README names."""
    from tfla_lab.bench import table

    readme = (ROOT / stage / "README.md").read_text()
    for name in files:
        result = load(name)
        assert table(result["rows"]) in readme, name
        assert result["device"] in readme
        for package in ("torch", "triton"):
            assert f"{package} {result['versions'][package].partition('+')[0]}" in readme.lower()


@pytest.mark.parametrize("stage", ["04_tfla_triton", "05_mlstmsig"])
def test_tables_of_decoding_and_of_compilation(stage):
    from tfla_lab.aot import table
    from tfla_lab.bench import decode_table

    readme = (ROOT / stage / "README.md").read_text()
    assert decode_table(load(f"stage{stage[:2]}_h200_decode.json")) in readme
    compiled = load(f"stage{stage[:2]}_aot.json")
    assert table(compiled["rows"], "bfloat16 128/256 L=256") in readme
    assert f"Triton {compiled['triton']}" in readme


@pytest.mark.parametrize(("stage", "kernel"), [("04_tfla_triton", "mlstm_hopper"), ("05_mlstmsig", "mlstmsig_hopper")])
def test_tables_of_the_hopper_kernels(stage, kernel):
    from tfla_lab.bench import table
    from tfla_lab.bench_report import rows_of, walks_table

    readme, result = (ROOT / stage / "README.md").read_text(), load("bench_h200.json")
    assert table(list(rows_of(result, "train", kernel).values())) in readme
    assert stage == "05_mlstmsig" or walks_table(result) in readme


def test_tables_of_the_language_model():
    from tfla_lab.lm_report import generation_table, runs_table

    readme = (ROOT / "05_mlstmsig/README.md").read_text()
    for name in ("stage05_lm.json", "stage05_lm_rates.json"):
        assert runs_table(load(name)["runs"]) in readme, name
    assert generation_table(load("stage05_lm_generation.json")) in readme
