"""Break a copy of a kernel file on purpose, to see that the tests notice."""

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_numbers = itertools.count()


def load_mutant(path: str, old: str, new: str, folder: Path):
    """The module at `path`, with `old`, which must be there exactly once, replaced by `new`."""
    source = (ROOT / path).read_text()
    assert source.count(old) == 1, f"{source.count(old)} times in {path}: {old}"
    number = next(_numbers)
    # An operation's name is taken once it is registered.
    source = source.replace(old, new).replace('"tfla::', f'"tfla_mutant{number}::')
    name = f"mutant{number}_{Path(path).stem}"
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_noticed(suite: Callable, *arguments) -> None:
    """The suite fails by an assertion: a crash would prove nothing about what it compares."""
    with pytest.raises(AssertionError):
        suite(*arguments)
