"""How a notebook's exercise is checked: one behaviour for all of them."""

import functools
from collections.abc import Callable

import numpy as np

from tfla_lab.check import CheckFailed


def exercise(number: int) -> Callable:
    """Turns a checker into check_<number>(answer), which says how the exercise went.

    "correct" where the checker returns, "not solved yet" for a stub that raises NotImplementedError, and "skipped" with
    the reason if the checker returns one. A wrong answer raises.
    """

    def decorate(checker: Callable) -> Callable:
        @functools.wraps(checker)
        def check(answer: Callable) -> None:
            try:
                with np.errstate(all="ignore"):
                    skipped = checker(answer)
            except NotImplementedError:
                print(f"Exercise {number}: not solved yet")
            else:
                print(f"Exercise {number}: skipped, {skipped}" if skipped else f"Exercise {number}: correct.")

        return check

    return decorate


def require(condition: bool, message: str) -> None:
    if not condition:
        raise CheckFailed(message)
