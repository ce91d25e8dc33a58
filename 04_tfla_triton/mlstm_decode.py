"""Stage 04: one step of the mLSTM in Triton, for generation: the recurrence of stage 01 as a single kernel.

    m' = max(log sigmoid(f) + m, i)
    C' = f' C + i' k v^T,   n' = f' n + i' k      f' = e^(log sigmoid(f) + m - m'),  i' = e^(i - m')
    h  = C'^T (s q) / max{ |n' . s q|, e^(-m') }                                   s = 1 / sqrt(DQK)

A step reads the state once and writes it once. That is all its time: there are 5 operations for every 8 bytes. To turn
a prompt into a state, use mlstm_tfla(..., return_state=True) of mlstm_tfla.py beside this file.

Glossary (name in code = shape): q, k (B, NH, DQK); v, h (B, NH, DHV); i, f gate pre-activations (B, NH);
C, n, m the state (B, NH, DQK, DHV), (B, NH, DQK), (B, NH), float32 whatever the inputs are.

Not included: gradients (train with mlstm_tfla).

Copy this file: it needs torch and triton.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "mlstm_decode.py needs Triton, which comes with PyTorch on Linux. "
        "mlstm_step in mlstm_recurrent.py in 01_recurrent computes the same without it."
    ) from error

__all__ = ["mlstm_decode_step"]

State = tuple[Tensor, Tensor, Tensor]

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1, for machines without a GPU
# A forget gate below this, f = -inf above all, begins a new document: the old state is left out, not multiplied by 0.
LOG_FORGOTTEN = tl.constexpr(-1e7)
# The floor e^(-m) of the denominator must stay a number that one can divide by, or a query of zeros would meet 0 / 0.
M_CAP = tl.constexpr(60.0)


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, f_ptr, C_ptr, n_ptr, m_ptr, h_ptr, C_next_ptr, n_next_ptr, m_next_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ib, stride_ih, stride_fb, stride_fh,
    stride_hb, stride_hh,
    NH, s, DQK: tl.constexpr, DHV: tl.constexpr, BLOCK_DQK: tl.constexpr, BLOCK_DHV: tl.constexpr,
):  # fmt: skip
    """One step of one head, for a tile of the columns of C. Grid: (tiles of DHV) * B * NH.

    C (DQK x DHV)
    +---+---+---+---+
    |   | x |   |   |    loop over DQK: C' = f' C + i' k v^T, stored; h += C'^T (s q); n' likewise
    |   | x |   |   |
    +---+---+---+---+    The first tile of a head also writes n' and m'.
    """
    program = tl.program_id(0)
    tile_v, bh = program % tl.cdiv(DHV, BLOCK_DHV), (program // tl.cdiv(DHV, BLOCK_DHV)).to(tl.int64)
    b, h = bh // NH, bh % NH
    offs_v = tile_v * BLOCK_DHV + tl.arange(0, BLOCK_DHV)

    i = tl.load(i_ptr + b * stride_ib + h * stride_ih).to(tl.float32)
    f = tl.load(f_ptr + b * stride_fb + h * stride_fh).to(tl.float32)
    # log(1 + x) loses x below float32's last digit, there x itself is better
    x = tl.exp(-tl.abs(f))
    f_bar = tl.minimum(f, 0.0) - tl.where(x < 1e-4, x * (1.0 - 0.5 * x), tl.log(1.0 + x))
    m = tl.maximum(tl.load(m_ptr + bh), LOG_FORGOTTEN)  # -inf: an empty memory
    keep = (f_bar >= LOG_FORGOTTEN) | (f_bar != f_bar)  # NaN stays NaN
    m_next = tl.maximum(tl.where(keep, f_bar + m, -float("inf")), i)
    m_next = tl.where(m_next == -float("inf"), 0.0, m_next)  # nothing kept, nothing written: the memory is empty
    w_f, w_i = tl.where(keep, tl.exp(f_bar + m - m_next), 0.0), tl.exp(i - m_next)

    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + offs_v, mask=offs_v < DHV, other=0.0).to(tl.float32)
    numerator = tl.zeros((BLOCK_DHV,), dtype=tl.float32)
    S = tl.full((), 0.0, dtype=tl.float32)
    for first in range(0, DQK, BLOCK_DQK):
        offs_k = first + tl.arange(0, BLOCK_DQK)
        mask_k = offs_k < DQK
        q = tl.load(q_ptr + b * stride_qb + h * stride_qh + offs_k, mask=mask_k, other=0.0).to(tl.float32) * s
        k = tl.load(k_ptr + b * stride_kb + h * stride_kh + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        offs_C = bh * DQK * DHV + offs_k[:, None] * DHV + offs_v[None, :]
        mask = mask_k[:, None] & (offs_v[None, :] < DHV)
        C = tl.load(C_ptr + offs_C, mask=mask, other=0.0)  # (BLOCK_DQK, BLOCK_DHV)
        n = tl.load(n_ptr + bh * DQK + offs_k, mask=mask_k, other=0.0)
        C = tl.where(keep, C * w_f, 0.0) + (w_i * k)[:, None] * v[None, :]
        n = tl.where(keep, n * w_f, 0.0) + w_i * k
        numerator += tl.sum(q[:, None] * C, axis=0)
        S += tl.sum(q * n, axis=0)
        tl.store(C_next_ptr + offs_C, C, mask=mask)
        if tile_v == 0:
            tl.store(n_next_ptr + bh * DQK + offs_k, n, mask=mask_k)
    if tile_v == 0:
        tl.store(m_next_ptr + bh, m_next)
    out = numerator / tl.maximum(tl.abs(S), tl.exp(-tl.minimum(m_next, M_CAP)))
    h_ptr += b * stride_hb + h * stride_hh
    tl.store(h_ptr + offs_v, out.to(h_ptr.dtype.element_ty), mask=offs_v < DHV)


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, NH, DQK), DHV = q.shape, v.shape[-1]
    C, n, m = (x.contiguous() for x in (C, n, m))
    h, C_next, n_next, m_next = (torch.empty_like(x) for x in (v, C, n, m))
    # 32 KB of C a tile: enough in flight to keep the memory busy, and a whole cache line in each row.
    BLOCK_DQK, BLOCK_DHV = min(128, triton.next_power_of_2(DQK)), min(64, triton.next_power_of_2(DHV))
    if B > 0:
        decode_kernel[(triton.cdiv(DHV, BLOCK_DHV) * B * NH,)](
            q, k, v, i, f, C, n, m, h, C_next, n_next, m_next,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *i.stride(), *f.stride(), *h.stride()[:2],
            NH, DQK**-0.5, DQK, DHV, BLOCK_DQK, BLOCK_DHV, num_warps=4,
        )  # fmt: skip
    return h, C_next, n_next, m_next


# torch.compile sees it as one operation that it need not look into.
step_op = torch.library.custom_op("tfla::mlstm_decode_step", launch_step, mutates_args=())


@step_op.register_fake
def _(q, k, v, i, f, C, n, m):
    return torch.empty_like(v), *(x.new_empty(x.shape) for x in (C, n, m))


def mlstm_decode_step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """One step of the mLSTM recurrence (paper section 2), in Triton.

    Functional: the given state is left as it is, a new one is returned. Assign it over the old one, and the allocator
    hands the same two blocks of memory out in turn. In a CUDA graph, copy it back into the graph's input.

    Args:
        q, k: (B, NH, DQK); float16, bfloat16 or float32, contiguous in the last dimension.
        v: (B, NH, DHV), the dtype of q.
        i, f: gate pre-activations, (B, NH), the dtype of q or float32. f = -inf forgets the state, i = -inf writes
            nothing.
        state: (C, n, m), (B, NH, DQK, DHV), (B, NH, DQK), (B, NH), float32; None is the empty memory.

    Returns:
        h, (B, NH, DHV) in the dtype of v, and the state after the step, in float32. There is no gradient: under
        autograd, a backward pass through it raises an error.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check_step(q, k, v, i, f, state)
    if state is None:
        shapes = ((*q.shape, v.shape[-1]), q.shape, q.shape[:-1])
        state = tuple(torch.zeros(shape, dtype=torch.float32, device=q.device) for shape in shapes)
    h, *state = step_op(q, k, v, i, f, *state)
    return h, tuple(state)


def _check_step(q, k, v, i, f, state) -> None:
    """Raises an error that names the argument, what it was and what it must be."""
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 3 or x.shape[1] < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have shape (B, NH, D) with NH >= 1 and D >= 1, got {tuple(x.shape)}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    expected = [("k", k, q.shape, (q.dtype,)), ("v", v, (*q.shape[:-1], v.shape[-1]), (q.dtype,))]
    expected += [(name, x, q.shape[:-1], (q.dtype, torch.float32)) for name, x in (("i", i), ("f", f))]
    if state is not None:
        if not isinstance(state, (tuple, list)) or len(state) != 3:
            raise TypeError(f"state must be a tuple (C, n, m), got {type(state).__name__}")
        shapes = ((*q.shape, v.shape[-1]), q.shape, q.shape[:-1])
        for part, x, shape in zip("Cnm", state, shapes, strict=True):
            expected.append((f"state's {part}", x, shape, (torch.float32,)))
    for name, x, shape, dtypes in expected:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)} to fit q and v, got {tuple(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(sorted({str(d) for d in dtypes}))} to fit q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"q must be on a GPU, got {q.device}; to run on the CPU, set the environment variable TRITON_INTERPRET=1 "
            "before Triton is imported, or use mlstm_step in mlstm_recurrent.py"
        )
