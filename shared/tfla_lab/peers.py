"""What the benchmark compares: the kernels of this repository, and those of others through their own public functions.

A Kernel knows how its inputs look (`leaves`), how it is called (`load`), and what it has to return (`reference`, in
float64). The others' inputs are brought into their own layouts before anything is timed, and where a kernel wants a
gate applied beforehand (log sigmoid of f, v times sigmoid of i), that is not timed either, to their advantage.

Which of them is installed, and what to do about those that are not, says `missing`. Nothing is imported before `load`.
"""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfla_lab.forms import CHUNKWISE, FORMS
from tfla_lab.inputs import Inputs

CHUNK = 64  # of the references


@dataclass(frozen=True)
class Kernel:
    """One kernel of the comparison.

    Attributes:
        name: short, as --only takes it.
        title: as tables and figures show it.
        load: imports it and returns call(*leaves, return_state, **configuration) -> (h, state or None). h has the
            layout that the kernel gives it: heads at `heads_axis`, as all leaves have them.
        leaves: the inputs as it takes them, {name: tensor}, from q, k, v, i, f.
        reference: reference(*leaves) -> (h, C), differentiable and in the leaves' dtype; C (B, NH, DQK, DHV) is the
            memory after the last step, free of any stabilizer; None for attention, which has no such state.
        memory: the same C from the state that `call` returns.
        module, package: what has to be importable, and its name on PyPI; empty for what is always here.
        configurations: what is tried, of which the fastest counts.
        ours: must keep the budgets of tfla_lab.check; others count as wrong only from a much larger error on.
        norm_follows: its gradient leaves the normalizer out. That is right behind a norm, where the gradient of h is
            orthogonal to h, so it is checked and timed with one that is.
        per_length: compiles anew for every length.
        autotuned: tries many tiles at its first call.
        note: what a reader of its times should know.
    """

    name: str
    title: str
    load: Callable[[], Callable]
    leaves: Callable[[Inputs], dict[str, Tensor]]
    reference: Callable
    memory: Callable[[Any], Tensor | None]
    module: str = ""
    package: str = ""
    install: str = "pip install -e '.[bench]'"
    heads_axis: int = 1
    configurations: tuple[dict, ...] = ({},)
    ours: bool = False
    attention: bool = False
    norm_follows: bool = False
    per_length: bool = False
    autotuned: bool = False
    note: str = ""

    def missing(self) -> str:
        """Why it cannot be loaded; empty if its package is there."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed: {self.install}"
        return ""

    @property
    def chunked(self) -> bool:
        """Whether it takes a chunk size."""
        return self.name in FORMS or "chunk_size" in self.configurations[0]

    def shape(self, NH: int, DQK: int, DHV: int) -> tuple[int, int, int]:
        """Heads and head dimensions with which it stands beside an mLSTM of these: of attention, the same width."""
        return (NH * DHV // 128, 128, 128) if self.attention else (NH, DQK, DHV)


# ---------------------------------------------------------------------------------------------------------------------
# References: (h, C) in float64, or whatever the leaves are
# ---------------------------------------------------------------------------------------------------------------------
def swap(x: Tensor) -> Tensor:
    """(B, T, NH, ...) <-> (B, NH, T, ...)."""
    return x.transpose(1, 2)


def true_memory(state: tuple) -> Tensor:
    """C free of its stabilizer, in float64, from (C, n, m) or (C,)."""
    C = state[0].double()
    return C * state[2].double().reshape(*C.shape[:2], 1, 1).exp() if len(state) == 3 else C


def exp_reference(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h, state = FORMS[CHUNKWISE["exp"]].load()(q, k, v, i, f, chunk_size=CHUNK, return_state=True)
    return h, true_memory(state)


def sig_reference(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    h, state = FORMS[CHUNKWISE["sig"]].load()(q, k, v, i, f, chunk_size=CHUNK, return_state=True)
    return h, true_memory(state)


def decay_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Scalar decay e^g per head and step, nothing at the input: the mLSTMsig with an open input gate. (B, T, NH, ..)"""
    f = g - torch.log1p(-g.exp())  # whose log sigmoid is g
    h, C = sig_reference(swap(q), swap(k), swap(v), torch.full_like(swap(g), 60.0), swap(f))
    return swap(h), C


def ssd_reference(q: Tensor, k: Tensor, v: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """C_t = e^(-dt) C_(t-1) + dt k v^T, read by q without the scale 1 / sqrt(d_qk). (B, T, NH, ...)"""
    return decay_reference(q * math.sqrt(q.shape[-1]), k, v * dt[..., None], -dt)


def gla_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A decay e^g for each key dimension: C_t = diag(e^g) C_(t-1) + k v^T, h_t = C_t^T s q_t. (B, T, NH, ...)

    In chunks; within one the decays are powers of its first step's, which float64 can hold.
    """
    B, T, NH, DQK = q.shape
    pad = (0, 0, 0, -T % CHUNK)
    chunks = [F.pad(swap(x), pad).unflatten(2, (-1, CHUNK)) for x in (q / math.sqrt(DQK), k, v, g)]
    C, h = q.new_zeros(B, NH, DQK, v.shape[-1]), []
    for q_c, k_c, v_c, g_c in zip(*(x.unbind(2) for x in chunks), strict=True):
        b = g_c.cumsum(2)
        q_b = q_c * b.exp()
        h.append((q_b @ (k_c * (-b).exp()).mT).tril() @ v_c + q_b @ C)
        last = b[:, :, -1:]
        C = last.mT.exp() * C + (k_c * (last - b).exp()).mT @ v_c
    return swap(torch.cat(h, 2)[:, :, :T]), C


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """Causal softmax attention, (B, NH, T, D), by blocks of queries that the backward pass computes again."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones_like(scores, dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
        return scores.masked_fill(later, -math.inf).softmax(-1) @ v

    h, size = [], 1024
    for start in range(0, q.shape[2], size):
        stop = min(start + size, q.shape[2])
        rows = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]
        h.append(torch.utils.checkpoint.checkpoint(block, *rows, use_reentrant=False))
    return torch.cat(h, 2), None


def attention_reference_bthd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    h, _ = attention_reference(swap(q), swap(k), swap(v))
    return swap(h), None


# ---------------------------------------------------------------------------------------------------------------------
# Inputs in the others' layouts
# ---------------------------------------------------------------------------------------------------------------------
def all_leaves(x: Inputs) -> dict[str, Tensor]:
    return x._asdict()


def gated_v(x: Inputs) -> Tensor:
    """The values with the sigmoid input gate applied, in float32."""
    return x.v.float() * torch.sigmoid(x.i)[..., None]


def decay_leaves(x: Inputs) -> dict[str, Tensor]:
    v, g = gated_v(x).to(x.v.dtype), F.logsigmoid(x.f)
    return {name: swap(y).contiguous() for name, y in (("q", x.q), ("k", x.k), ("v", v), ("g", g))}


def ssd_leaves(x: Inputs) -> dict[str, Tensor]:
    dt = F.softplus(-x.f)
    q, v = x.q / math.sqrt(x.q.shape[-1]), (gated_v(x) / dt[..., None]).to(x.v.dtype)
    return {name: swap(y).contiguous() for name, y in (("q", q), ("k", x.k), ("v", v), ("dt", dt))}


def gla_leaves(x: Inputs) -> dict[str, Tensor]:
    generator = torch.Generator(x.q.device).manual_seed(2)
    noise = torch.randn(x.q.shape, device=x.q.device, generator=generator)
    g = F.logsigmoid(x.f[..., None] + noise).to(x.q.dtype)
    return {name: swap(y).contiguous() for name, y in (("q", x.q), ("k", x.k), ("v", x.v), ("g", g))}


def attention_leaves(x: Inputs) -> dict[str, Tensor]:
    return {"q": x.q, "k": x.k, "v": x.v}


def attention_leaves_bthd(x: Inputs) -> dict[str, Tensor]:
    return {name: swap(y).contiguous() for name, y in attention_leaves(x).items()}


# ---------------------------------------------------------------------------------------------------------------------
# How each is called
# ---------------------------------------------------------------------------------------------------------------------
def own_call(module: str, name: str) -> Callable:
    """A function of this repository."""
    function = getattr(importlib.import_module(module), name)

    def call(*leaves: Tensor, return_state: bool = False, **configuration):
        result = function(*leaves, return_state=return_state, **configuration)
        return result if return_state else (result, None)

    return call


def mlstm_kernels_call(specifier: str, **options) -> Callable:
    from mlstm_kernels.torch import get_mlstm_kernel

    # Its gates go through torch.compile. As in a training run, each length gets code of its own; the usual limit of 8
    # would leave the ninth without any.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    kernel = get_mlstm_kernel(specifier)

    def call(q, k, v, i, f, return_state=False, **configuration):
        result = kernel(q=q, k=k, v=v, i=i, f=f, return_last_states=return_state, **options, **configuration)
        return result if return_state else (result, None)

    return call


def simple_gla_call() -> Callable:
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, g, return_state=False: chunk_simple_gla(q, k, v, g, output_final_state=return_state)


def gla_call() -> Callable:
    from fla.ops.gla import chunk_gla

    return lambda q, k, v, g, return_state=False: chunk_gla(q, k, v, g, output_final_state=return_state)


def ssd_call() -> Callable:
    # The package's own __init__ wants its compiled extension, which the SSD, in Triton, does not use: an empty package
    # in its place lets a wheel without the extension do.
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        package = sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def call(q, k, v, dt, return_state=False, **configuration):
        A = -torch.ones(v.shape[2], device=v.device)
        result = mamba_chunk_scan_combined(v, dt, A, k, q, return_final_states=return_state, **configuration)
        return result if return_state else (result, None)

    return call


def sdpa_call(backend: str) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(q, k, v, return_state=False):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True), None

    return call


def flash_attention_3_call() -> Callable:
    flash_attn_func = importlib.import_module(FLASH_ATTENTION_3[0]).flash_attn_func

    def call(q, k, v, return_state=False):
        h = flash_attn_func(q, k, v, causal=True)
        return (h[0] if isinstance(h, tuple) else h), None

    return call


# (module, package): built from its sources, or the forward pass alone, as a wheel
FLASH_ATTENTION_3 = next(
    (names for names in (("flash_attn_interface", "flash_attn_3"),) if importlib.util.find_spec(names[0])),
    ("fa3_fwd_interface", "fa3-fwd"),
)


def _ours(name: str, title: str) -> Kernel:
    reference = sig_reference if name.startswith("mlstmsig") else exp_reference
    return Kernel(name, title, lambda: own_call(name, name), all_leaves, reference, true_memory, ours=True)


NO_NORMALIZER = "the normalizer's gradient is left out: checked and timed with a gradient of h that is orthogonal to h"
GATES_BEFORE = "takes log sigmoid(f), and v times sigmoid(i), which are made before the clock starts"
WITHOUT_EXTENSION = (
    "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba_ssm"
)
FLOAT_GATES = "gates in float32: with gates in bfloat16, as in its README, Triton 3.6 aborts in LLVM"
# By name, in the order of the tables.
KERNELS = {
    kernel.name: kernel
    for kernel in (
        _ours("mlstm_limit_chunk", "mlstm_limit_chunk (03)"),
        _ours("mlstm_tfla", "mlstm_tfla (04)"),
        _ours("mlstm_hopper", "mlstm_hopper (04)"),
        _ours("mlstmsig_tfla", "mlstmsig_tfla (05)"),
        _ours("mlstmsig_hopper", "mlstmsig_hopper (05)"),
        Kernel(
            "mlstm_kernels_exp_limit", "mlstm_kernels exp, limit chunk",
            lambda: mlstm_kernels_call("chunkwise--triton_limit_chunk"),
            all_leaves, exp_reference, true_memory, "mlstm_kernels", "mlstm_kernels",
            configurations=({"chunk_size": 64},), norm_follows=True, per_length=True, note=NO_NORMALIZER,
        ),
        Kernel(
            "mlstm_kernels_exp", "mlstm_kernels exp, TFLA",
            lambda: mlstm_kernels_call("chunkwise--triton_xl_chunk"),
            all_leaves, exp_reference, true_memory, "mlstm_kernels", "mlstm_kernels",
            configurations=({"chunk_size": 128}, {"chunk_size": 64}, {"chunk_size": 256}),
            norm_follows=True, per_length=True, note=NO_NORMALIZER + "; " + FLOAT_GATES,
        ),
        Kernel(
            "mlstm_kernels_sig", "mlstm_kernels sig, TFLA",
            lambda: mlstm_kernels_call("chunkwise--triton_xl_chunk_siging", normalize=False),
            all_leaves, sig_reference, true_memory, "mlstm_kernels", "mlstm_kernels",
            configurations=({"chunk_size": 128}, {"chunk_size": 64}, {"chunk_size": 256}), per_length=True,
            note="with normalize=False, the cell of the paper",
        ),
        Kernel(
            "fla_simple_gla", "FLA simple_gla", simple_gla_call, decay_leaves, decay_reference, torch.Tensor.double,
            "fla", "fla-core", heads_axis=2, autotuned=True, note=GATES_BEFORE,
        ),
        Kernel(
            "mamba2_ssd", "Mamba-2 SSD", ssd_call, ssd_leaves, ssd_reference, lambda C: C.double().mT,
            "mamba_ssm", "mamba_ssm", heads_axis=2, install=WITHOUT_EXTENSION, autotuned=True,
            configurations=({"chunk_size": 128}, {"chunk_size": 64}, {"chunk_size": 256}),
            note="a group for each head, so that B and C are keys and queries; " + GATES_BEFORE,
        ),
        Kernel(
            "fla_gla", "FLA gla", gla_call, gla_leaves, gla_reference, torch.Tensor.double,
            "fla", "fla-core", heads_axis=2, autotuned=True,
            note="another cell: a decay for each key dimension, which it gets as logarithms in bfloat16",
        ),
        Kernel(
            "sdpa_flash", "attention, PyTorch flash", lambda: sdpa_call("FLASH_ATTENTION"), attention_leaves,
            attention_reference, lambda state: None, attention=True,
        ),
        Kernel(
            "sdpa_cudnn", "attention, cuDNN", lambda: sdpa_call("CUDNN_ATTENTION"), attention_leaves,
            attention_reference, lambda state: None, attention=True,
        ),
        Kernel(
            "flash_attention_3", "FlashAttention-3", flash_attention_3_call, attention_leaves_bthd,
            attention_reference_bthd, lambda state: None, *FLASH_ATTENTION_3, heads_axis=2, attention=True,
            note="the wheel on PyPI, fa3-fwd, has the forward pass alone",
        ),
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# One step of generation
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """A step of a cell for generation.

    Attributes:
        name, title, module, package: as of a Kernel.
        cell: "exp" or "sig".
        prepare: prepare(q, k, v, i, f, state) -> a function without arguments that makes one step: (h, state). q, k
            (B, NH, DQK), v, h (B, NH, DHV), i, f (B, NH); the state is (C, n, m) or (C,).
    """

    name: str
    title: str
    cell: str
    prepare: Callable[..., Callable[[], tuple[Tensor, tuple]]]
    module: str = ""
    package: str = ""

    missing = Kernel.missing
    install = Kernel.install


def own_step(module: str, name: str) -> Callable:
    def prepare(*inputs):
        step = getattr(importlib.import_module(module), name)
        return lambda: step(*inputs)

    return prepare


def mlstm_kernels_step(q, k, v, i, f, state) -> Callable:
    from mlstm_kernels.torch import get_mlstm_step_kernel

    step, (C, n, m) = get_mlstm_step_kernel("triton"), state
    gates, m = (i[..., None].contiguous(), f[..., None].contiguous()), m[..., None].contiguous()

    def run():
        h, (C_new, n_new, m_new) = step(q, k, v, *gates, C, n, m)
        return h, (C_new, n_new, m_new[..., 0])

    return run


def simple_gla_step(q, k, v, i, f, state) -> Callable:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    v = (v.float() * torch.sigmoid(i)[..., None]).to(v.dtype)
    q, k, v, g = (x[:, None].contiguous() for x in (q, k, v, F.logsigmoid(f)))

    def run():
        h, C = fused_recurrent_simple_gla(q, k, v, g, initial_state=state[0], output_final_state=True)
        return h[:, 0], (C,)

    return run


STEPS = {
    step.name: step
    for step in (
        Step("mlstm_decode_step", "mlstm_decode_step (04)", "exp", own_step("mlstm_decode", "mlstm_decode_step")),
        Step(
            "mlstmsig_decode_step", "mlstmsig_decode_step (05)", "sig",
            own_step("mlstmsig_tfla", "mlstmsig_decode_step"),
        ),
        Step("mlstm_kernels_step", "mlstm_kernels exp", "exp", mlstm_kernels_step, "mlstm_kernels", "mlstm_kernels"),
        Step("fla_simple_gla_step", "FLA simple_gla", "sig", simple_gla_step, "fla", "fla-core"),
    )
}  # fmt: skip
