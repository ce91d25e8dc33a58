"""Every kernel file works alone: copied into an empty folder, it imports nothing of this project, and runs."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNEL_FILES = sorted(ROOT.glob("0*/mlstm*.py"))  # the language model of stage 05 is built from them
IDS = [file.stem for file in KERNEL_FILES]

RUN = """
import sys, os
from pathlib import Path
root = Path({root!r})
sys.path = [""] + [p for p in sys.path if p and not (Path(p) / "tfla_lab").exists() and Path(p).parent != root]
import numpy as np
rng = np.random.default_rng(0)
q, k, v = rng.normal(size=(3, 1, 2, 40, 8)).astype(np.float32)
i, f = rng.normal(size=(2, 1, 2, 40)).astype(np.float32)
import {name} as module
assert Path(module.__file__).parent == Path.cwd(), module.__file__
if {name!r} == "mlstm_decode":
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h, state = module.mlstm_decode_step(*(torch.from_numpy(a[:, :, 0].copy()).to(device) for a in (q, k, v, i, f)))
    h = h[:, :, None].expand(1, 2, 40, 8)
elif {name!r} == "mlstmsig_reference":
    h, state = module.mlstmsig_recurrent(q, k, v, i, f, return_state=True)
    import torch
    x = [torch.from_numpy(a).requires_grad_() for a in (q, k, v, i, f)]
    for form in (module.mlstmsig_parallel, module.mlstmsig_chunkwise):
        assert abs(form(*x).detach().numpy() - h).max() < 1e-5
        form(*x).sum().backward()
elif {name!r}.endswith("_hopper"):
    import torch
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    x = [torch.from_numpy(a).bfloat16().to("cuda" if hopper else "cpu").requires_grad_() for a in (q, k, v, i, f)]
    h, state = torch.from_numpy(v), (None,) * (1 if "sig" in {name!r} else 3)
    try:
        h, state = getattr(module, {name!r})(*x, return_state=True)
        h.sum().backward()
    except ValueError as error:  # elsewhere it says what it needs
        assert not hopper and "q must be on a Hopper GPU" in str(error), error
elif "torch" in vars(module):
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = [torch.from_numpy(a).to(device).requires_grad_() for a in (q, k, v, i, f)]
    h, state = getattr(module, {name!r})(*x, return_state=True)
    h.sum().backward()
    assert all(torch.isfinite(a.grad).all() for a in x)
else:
    h, state = getattr(module, {name!r})(q, k, v, i, f, return_state=True)
assert h.shape == (1, 2, 40, 8) and len(state) == (1 if "sig" in {name!r} else 3)
ours = [m for m in sys.modules if m.startswith(("mlstm", "tfla"))]
assert ours == [{name!r}], ours
print("fine")
"""


@pytest.mark.parametrize("file", KERNEL_FILES, ids=IDS)
def test_runs_alone_in_an_empty_folder(file, tmp_path):
    if "import triton" in file.read_text():
        pytest.importorskip("triton", reason="Triton has no wheels for this system")
    shutil.copy(file, tmp_path)
    code = RUN.format(root=str(ROOT), name=file.stem)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize("file", KERNEL_FILES, ids=IDS)
def test_imports_numpy_torch_and_triton_only(file):
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - {"collections"} <= {"numpy", "torch", "triton"}  # Python brings named tuples
    if file.parent.name == "01_recurrent":
        assert imported == {"numpy"}


@functools.cache  # finding the text of a function takes long, and every mark asks for two files
def functions(path: Path) -> dict[str, str]:
    source = path.read_text()
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


@functools.cache
def named_tuples(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+) = (namedtuple\(.*\))$", path.read_text(), re.M))


def test_functions_marked_as_the_same_are_the_same():
    """Files that are copied alone must repeat some functions. They say so, and this keeps the two texts equal.

    So it does with the named tuples that they make.
    """
    marks = 0
    for file in KERNEL_FILES:
        for path, original, name in re.findall(r"^# same as (\S+)::(\w+)\n(?:@.*\n)*def (\w+)", file.read_text(), re.M):
            assert original == name, f"{file.name}: the mark for {original} stands above {name}"
            assert functions(file)[name] == functions(ROOT / path)[name], f"{file.name}: {name} differs from {path}"
            for kind in re.findall(r"\b(\w+)\(", functions(file)[name]):
                assert named_tuples(file).get(kind) == named_tuples(ROOT / path).get(kind), f"{file.name}: {kind}"
            marks += 1
    assert marks >= 4


def test_repeated_functions_are_marked():
    """And none is repeated without saying so."""
    seen: dict[str, Path] = {}
    # Where a function stands first is its original: in each stage, the portable kernels come before those for one GPU.
    for file in sorted(KERNEL_FILES, key=lambda file: (file.parent.name, "hopper" in file.stem)):
        for name, text in functions(file).items():
            if text in seen and text.count("\n") > 1:
                pairs = ((seen[text], file), (file, seen[text]))
                marked = [f"# same as {x.relative_to(ROOT)}::{name}\n" in y.read_text() for x, y in pairs]
                assert any(marked), (file.name, name)
            seen.setdefault(text, file)
