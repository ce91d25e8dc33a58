"""What notebooks show: pieces of the stages' own sources, small tables, small figures."""

import ast
import importlib.util
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

PARTS = ("signature", "before the loop", "loop", "after the loop")


def source(
    module: str, name: str, part: str | None = None, *, start: str | None = None, stop: str | None = None
) -> str:
    """The source of a function, or a piece of it. The file is read, not imported: Triton need not be there.

    Args:
        module: e.g. "mlstm_chunkwise".
        name: of a function, or "Class.method".
        part: "signature" (with the docstring), "before the loop", "loop" or "after the loop": around the function's
            first `for`. None is everything.
        start, stop: narrow it down further, from the first line that contains `start` up to the one before the next
            line that contains `stop`.

    Raises:
        ValueError: if there is no such function, part or line.
    """
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    node = ast.parse(text)
    for step in name.split("."):
        found = [x for x in node.body if getattr(x, "name", None) == step]
        if not found:
            raise ValueError(f"{module} has no {name}")
        node = found[0]
    lines = text.splitlines()
    first, last = min([node.lineno, *(x.lineno for x in node.decorator_list)]) - 1, node.end_lineno
    if part is not None:
        body = node.body[1:] if ast.get_docstring(node) else node.body
        loop = next((x for x in body if isinstance(x, ast.For)), None)
        if part not in PARTS or (part != "signature" and loop is None):
            raise ValueError(f"{name} has no part {part!r}; parts are {', '.join(PARTS)}, around the first for")
        first, last = {
            "signature": lambda: (first, node.body[0].end_lineno),
            "before the loop": lambda: (node.body[0].end_lineno, loop.lineno - 1),
            "loop": lambda: (loop.lineno - 1, loop.end_lineno),
            "after the loop": lambda: (loop.end_lineno, last),
        }[part]()
    lines = lines[first:last]
    if start is not None:
        lines = lines[_line_with(start, lines, name) :]
    if stop is not None:
        lines = lines[: _line_with(stop, lines[1:], name) + 1]
    return textwrap.dedent("\n".join(lines)).strip("\n")


def _line_with(anchor: str, lines: list[str], name: str) -> int:
    for number, line in enumerate(lines):
        if anchor in line:
            return number
    raise ValueError(f"{name} has no line with {anchor!r}")


def show_source(module: str, name: str, part: str | None = None, **anchors: str) -> None:
    """Displays source(...) with colours."""
    from IPython.display import Markdown, display

    display(Markdown(f"```python\n{source(module, name, part, **anchors)}\n```"))


def show_table(header: Sequence, rows: Sequence[Sequence]) -> None:
    """Displays a table."""
    from IPython.display import Markdown, display

    lines = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    display(Markdown("\n".join(lines)))


def compact_figures() -> None:
    """Makes figures PNGs with a palette from now on: they look the same and take a third of the bytes."""
    from IPython import get_ipython
    from IPython.core.pylabtools import print_figure
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    def png(figure: Figure) -> bytes:
        image = Image.open(io.BytesIO(print_figure(figure, "png"))).convert("RGB")
        image.quantize(128).save(buffer := io.BytesIO(), "png", optimize=True)
        return buffer.getvalue()

    if shell := get_ipython():
        plt.switch_backend(plt.get_backend())  # loads it now; when it is loaded, it sets a formatter of its own
        shell.display_formatter.formatters["image/png"].for_type(Figure, png)
