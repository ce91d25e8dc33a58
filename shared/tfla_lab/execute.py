"""Execute notebooks and write them back as they are committed.

    python -m tfla_lab.execute 01_recurrent/01_recurrent.ipynb ...

from top to bottom, in the interpreter where there is no GPU; without time stamps, with pictures reduced to 256 colours
and pieces of the same printed output joined, so that a run that changes nothing gives nearly the same file.
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbclient
import nbformat
from PIL import Image


def reduce_colours(png: str) -> str:
    """A base64 PNG with a palette: about a third of the bytes, and the same to the eye."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture = picture.quantize(256, kmeans=3, dither=Image.Dither.NONE)
    target = io.BytesIO()
    picture.save(target, "PNG", optimize=True)
    return base64.b64encode(target.getvalue()).decode()


def join_streams(outputs: list) -> list:
    """What one cell prints arrives in pieces, cut by chance."""
    joined: list = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": path.parent}}
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type != "code":
            continue
        cell.outputs = join_streams(cell.outputs)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = reduce_colours(output.data["image/png"])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
