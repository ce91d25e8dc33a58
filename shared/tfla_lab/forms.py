"""The forms of the mLSTM that the stages contain, and one way to run them all, forward and backward.

A form that is not there (a file of a later stage, or Triton on a machine that has none) is left out or says why.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfla_lab.check import to_numpy
from tfla_lab.inputs import Inputs


@dataclass(frozen=True)
class Form:
    """One function with the signature (q, k, v, i, f, *, initial_state, return_state)."""

    name: str  # of the function
    stage: str  # "01" .. "05"
    module: str
    library: str  # "numpy", "torch" or "triton"
    chunked: bool = False
    cell: str = "exp"  # or "sig": two cells, each with forms that are equal

    def load(self) -> Callable:
        return getattr(importlib.import_module(self.module), self.name)

    def missing(self) -> str:
        """Why it cannot run here; empty if it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"stage {self.stage} is not installed: pip install -e ."
        if self.library == "triton" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed (there is none for this system)"
        if self.library == "triton" and not interpreted() and not has_gpu():
            return "no GPU here, and TRITON_INTERPRET=1 is not set"
        return ""


FORMS = {
    form.name: form
    for form in (
        Form("mlstm_recurrent", "01", "mlstm_recurrent", "numpy"),
        Form("mlstm_parallel", "02", "mlstm_parallel", "torch"),
        Form("mlstm_chunkwise", "03", "mlstm_chunkwise", "torch", chunked=True),
        Form("mlstm_limit_chunk", "03", "mlstm_limit_chunk", "triton", chunked=True),
        Form("mlstm_tfla", "04", "mlstm_tfla", "triton", chunked=True),
        Form("mlstmsig_recurrent", "05", "mlstmsig_reference", "numpy", cell="sig"),
        Form("mlstmsig_parallel", "05", "mlstmsig_reference", "torch", cell="sig"),
        Form("mlstmsig_chunkwise", "05", "mlstmsig_reference", "torch", chunked=True, cell="sig"),
        Form("mlstmsig_tfla", "05", "mlstmsig_tfla", "triton", chunked=True, cell="sig"),
    )
}
# What the state of a cell consists of, and the form of it that is compared with where the recurrence is too slow.
STATE = {"exp": ("C", "n", "m"), "sig": ("C",)}
CHUNKWISE = {"exp": "mlstm_chunkwise", "sig": "mlstmsig_chunkwise"}
GRADIENTS = ("dq", "dk", "dv", "di", "df")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def oracle(
    inputs: Inputs, dh: Any, *, initial_state: tuple | None = None, dstate: tuple | None = None, cell: str = "exp"
) -> dict[str, np.ndarray]:
    """The recurrence in float64 on the same numbers: h, the state, all gradients.

    That is C, n, m, dC_0, dn_0, dm_0 of the cell "exp" (stage 01), and C, dC_0 of "sig" (stage 05).
    """
    if cell == "exp":
        from mlstm_recurrent import mlstm_recurrent as forward
        from mlstm_recurrent import mlstm_recurrent_backward as backward
    else:
        from mlstmsig_reference import mlstmsig_recurrent as forward
        from mlstmsig_reference import mlstmsig_recurrent_backward as backward

    q, k, v, i, f = (to_numpy(x) for x in inputs)
    state = None if initial_state is None else tuple(to_numpy(x) for x in initial_state)
    dstate = None if dstate is None else tuple(to_numpy(x) for x in dstate)
    h, final = forward(q, k, v, i, f, initial_state=state, return_state=True)
    *gradients, dstate_0 = backward(to_numpy(dh), q, k, v, i, f, initial_state=state, dstate=dstate)
    named = dict(zip(GRADIENTS, gradients, strict=True))
    named |= {f"d{part}_0": x for part, x in zip(STATE[cell], dstate_0, strict=True)}
    return {"h": h, **dict(zip(STATE[cell], final, strict=True)), **named}


def run_torch(
    function: Callable,
    inputs: Inputs,
    dh: Any,
    *,
    initial_state: tuple | None = None,
    dstate: tuple | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs a form on torch tensors, forward and backward through autograd, and names what comes out as oracle does.

    The initial state's gradients are there only with an initial state, the final state's parts always. `dstate` is the
    gradient of the returned state. Where the memory layout of an input matters, it is kept.
    """
    import torch

    leaves = [x.detach().requires_grad_() for x in inputs]
    state = None if initial_state is None else tuple(x.detach().requires_grad_() for x in initial_state)
    h, final = function(*leaves, initial_state=state, return_state=True, **options)
    outputs, gradients = [h], [dh]
    if dstate is not None:
        outputs, gradients = [h, *final], [dh, *dstate]
    wanted = leaves + list(state or ())
    results = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True, materialize_grads=True)
    names = (*GRADIENTS, *(f"d{part}_0" for part in STATE["exp"]))[: len(wanted)]
    parts = dict(zip(STATE["exp"], (x.detach() for x in final), strict=False))
    return {"h": h.detach(), **parts, **dict(zip(names, results, strict=True))}
