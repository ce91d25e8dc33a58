"""Stage 05: a small language model over bytes, around the mLSTM cells of this and the earlier stages.

    x = embedding(tokens)
    x = x + mixer(norm(x));  x = x + feed_forward(norm(x))        once per layer
    logits = norm(x) embedding^T

The mixer moves information between steps. It is an mLSTM layer (kernel "exp" or "sig") or, as a yardstick with as many
parameters, causal softmax attention with rotary positions. Everything else works on each step alone.

    q, k, v, o = x W           i, f = 15 tanh((x W_g + bias) / 15)
    mLSTM layer:  y = (sigmoid(o) * norm_per_head(cell(q, k, v, i, f))) W_out

On a GPU the cell is a Triton kernel: mlstm_tfla or mlstmsig_tfla over sequences, mlstm_decode_step or
mlstmsig_decode_step to generate. Elsewhere, and in float64, it is the chunkwise form in PyTorch.

Glossary (name in code = shape; B batch, T steps, NH heads, d = d_model, d_hv = d / NH, d_qk = d_hv / 2):
    tokens   bytes, 0 .. 255                      (B, T), int64
    x        the residual stream                  (B, T, d)
    q, k     queries, keys                        (B, NH, T, d_qk); of attention (B, NH, T, d_hv)
    v, h     values, hidden states                (B, NH, T, d_hv)
    i, f     gate pre-activations                 (B, NH, T), float32 even where the rest has 16 bits
    o        pre-activation of the output gate    (B, T, d)
    state    what a layer knows of the past: (C, n, m) of exp, (C,) of sig, whatever the number of steps;
             (keys, values, steps) of attention, whose memory grows with every step

Not included: dropout, documents packed with f = -inf (the cells can: their docstrings).
"""

import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Config", "LanguageModel", "load", "save"]

KERNELS = ("exp", "sig", "attention")
VOCABULARY = 256  # bytes
CACHE_STEP = 256  # the cache of attention grows by so many steps at a time
State = list[tuple]  # one tuple a layer


@dataclasses.dataclass(frozen=True)
class Config:
    """What a model is. Raises ValueError, naming the argument, for what cannot be.

    Args:
        kernel: "exp", "sig" or "attention".
        d_model, layers, heads, d_ff: width, number of layers, heads of a layer, inner width of the feed-forward.
        head_norm: a norm over each head of h. Without it the scale of h goes on into the layer's output.
        assume_norm: of "exp" only: leave out the normalizer's gradient, which is right only if the norm follows. Only
            the Triton kernel has this shortcut: on a CPU it needs TRITON_INTERPRET=1.
        input_gate_bias: of the mLSTM: where the input gates start. At -10 they are nearly closed: a layer begins by
            adding little, and the spikes of the gradient norm that open gates bring stay away (the paper's finding).
        eps: of all norms. For the norm of h it decides from which input gate on a head is heard.
    """

    kernel: str = "exp"
    d_model: int = 512
    layers: int = 8
    heads: int = 4
    d_ff: int = 1408
    head_norm: bool = True
    assume_norm: bool = False
    input_gate_bias: float = -10.0
    gate_soft_cap: float = 15.0
    eps: float = 1e-6

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        for name in ("d_model", "layers", "heads", "d_ff"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {getattr(self, name)!r}")
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model must be a multiple of 2 * heads = {2 * self.heads}, got {self.d_model}")
        for name in ("gate_soft_cap", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if self.assume_norm and self.kernel != "exp":
            raise ValueError(f"assume_norm is for kernel 'exp': there is no normalizer in {self.kernel!r}")
        if not self.head_norm and self.kernel == "attention":
            raise ValueError("head_norm must be True for kernel 'attention', which never has a norm there to leave out")

    @property
    def d_hv(self) -> int:
        return self.d_model // self.heads

    @property
    def d_qk(self) -> int:
        return self.d_hv // 2


def use_triton(config: Config, q: Tensor) -> bool:
    """Whether the cell is a Triton kernel: on a GPU, but for float64, and wherever the shortcut is asked for."""
    return (q.is_cuda and q.dtype != torch.float64) or config.assume_norm


def cell(config: Config, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: tuple | None) -> tuple:
    """(h, the state after the last step), continuing from `state`; None is the empty memory.

    The modules of the stages are imported here, when they are needed: Triton need not be installed to run on a CPU.
    """
    sig = config.kernel == "sig"
    if not use_triton(config, q):
        from mlstm_chunkwise import mlstm_chunkwise as over_chunks

        if sig:
            from mlstmsig_reference import mlstmsig_chunkwise as over_chunks
        chunk_size = 64 if q.shape[2] > 16 else 16
        return over_chunks(q, k, v, i, f, chunk_size=chunk_size, initial_state=state, return_state=True)
    if q.shape[2] == 1 and state is not None:
        if sig:
            from mlstmsig_tfla import mlstmsig_decode_step as one_step
        else:
            from mlstm_decode import mlstm_decode_step as one_step
        h, state = one_step(*(x[:, :, 0] for x in (q, k, v, i, f)), state)
        return h[:, :, None], state
    if sig:
        from mlstmsig_tfla import mlstmsig_tfla

        return mlstmsig_tfla(q, k, v, i, f, initial_state=state, return_state=True)
    from mlstm_tfla import mlstm_tfla

    return mlstm_tfla(q, k, v, i, f, initial_state=state, return_state=True, assume_norm=config.assume_norm)


class MLSTM(nn.Module):
    """An mLSTM layer: 4 d^2 weights, as attention has, and the gates'."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.d_model
        self.config = config
        self.projection = nn.Linear(d, 3 * d, bias=False)  # q and k of d / 2, v and o of d
        self.gates = nn.Linear(d, 2 * config.heads)
        self.out = nn.Linear(d, d, bias=False)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, T, d) -> q, k, v, i, f of the cell, and o. q, k, v are views into one product."""
        d, heads = self.config.d_model, self.config.heads
        *qkv, o = self.projection(x).split([d // 2, d // 2, d, d], dim=-1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv)  # (B, NH, T, d_qk or d_hv)
        # A forget gate of 6 has steps of 1/32 in bfloat16: over thousands of steps, that is another memory.
        dtype, cap = torch.promote_types(x.dtype, torch.float32), self.config.gate_soft_cap
        with torch.autocast(x.device.type, enabled=False):
            gates = F.linear(x.to(dtype), self.gates.weight.to(dtype), self.gates.bias.to(dtype))
        i, f = (cap * torch.tanh(gates / cap)).transpose(1, 2).chunk(2, dim=1)  # (B, NH, T) each
        return q, k, v, i, f, o

    def forward(self, x: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        *inputs, o = self.inputs(x)
        h, state = cell(self.config, *inputs, state)
        h = h.transpose(1, 2)  # (B, T, NH, d_hv), no copy: h lies in memory as v does
        if self.config.head_norm:  # without weights of its own: W_out would absorb them
            h = F.rms_norm(h, (self.config.d_hv,), eps=self.config.eps)
        return self.out(torch.sigmoid(o) * h.flatten(2)), state


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, through PyTorch's scaled_dot_product_attention."""

    def __init__(self, config: Config):
        super().__init__()
        d = config.d_model
        self.config = config
        self.projection = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, state: tuple | None, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
        heads, d_hv = self.config.heads, self.config.d_hv
        qk, v = self.projection(x).unflatten(-1, (3, heads, d_hv)).split([2, 1], dim=2)
        cos, sin = rotation
        qk = (qk * cos + qk.roll(d_hv // 2, dims=-1) * sin).to(v.dtype)
        q, k, v = (y.transpose(1, 2) for y in (*qk.unbind(2), v.squeeze(2)))  # (B, NH, T, d_hv)
        if state is None:
            h, state = F.scaled_dot_product_attention(q, k, v, is_causal=True), (k, v, x.shape[1])
        elif x.shape[1] > 1:
            raise ValueError(
                f"tokens must be one step each where a state of attention is given, got {x.shape[1]} steps"
            )
        else:  # one step, which sees all steps so far
            keys, values, steps = state = extend_cache(state, k, v)
            h = F.scaled_dot_product_attention(q, keys[:, :, :steps], values[:, :, :steps])
        return self.out(h.transpose(1, 2).flatten(2)), state


def rotary_table(start: int, stop: int, d: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of steps start .. stop - 1, (T, 1, 1, d), the sines signed.

    Entries a = x[c] and b = x[c + d/2] turn together: a cos - b sin, b cos + a sin. So the product of a query and a key
    depends on how many steps lie between them.
    """
    frequency = 10_000.0 ** -(torch.arange(d // 2, device=like.device, dtype=torch.float64) * 2 / d)
    angle = torch.arange(start, stop, device=like.device, dtype=torch.float64)[:, None, None, None] * frequency
    dtype = torch.promote_types(like.dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def extend_cache(state: tuple, k: Tensor, v: Tensor) -> tuple:
    """The cache with the keys and values of one more step, written in place behind the others.

    So a cache can be continued in one way only; the states of the mLSTM are never changed.
    """
    keys, values, steps = state
    if steps == keys.shape[2]:  # full; to copy it now and then costs little beside reading it at every step
        longer = [x.new_empty(*x.shape[:2], steps + CACHE_STEP, x.shape[3]) for x in (keys, values)]
        for new, old in zip(longer, (keys, values), strict=True):
            new[:, :, :steps] = old
        keys, values = longer
    keys[:, :, steps], values[:, :, steps] = k[:, :, 0], v[:, :, 0]
    return keys, values, steps + 1


class FeedForward(nn.Module):
    """SwiGLU: (silu(x W_a) * x W_b) W_out, with W_a and W_b in one product."""

    def __init__(self, config: Config):
        super().__init__()
        self.projection = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.out = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.projection(x).chunk(2, dim=-1)
        return self.out(F.silu(a) * b)


class Block(nn.Module):
    """One layer: mixer and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm_mixer = nn.RMSNorm(config.d_model, config.eps)
        self.mixer = Attention(config) if config.kernel == "attention" else MLSTM(config)
        self.norm_ff = nn.RMSNorm(config.d_model, config.eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, state: tuple | None, *rotation: tuple) -> tuple[Tensor, tuple]:
        y, state = self.mixer(self.norm_mixer(x), state, *rotation)
        x = x + y
        return x + self.feed_forward(self.norm_ff(x)), state


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out. The weights are drawn from `seed` alone."""

    def __init__(self, config: Config, seed: int = 0):
        super().__init__()
        self.config = config
        # Its transpose gives the logits: a small model has better use for as many weights again.
        self.embedding = nn.Embedding(VOCABULARY, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, config.eps)
        self.draw_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        d, layers = self.config.d_model, self.config.layers
        self.embedding.weight.normal_(0, 0.02, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # What adds to the stream starts smaller the more layers there are.
                std = 2 / layers / d**0.5 if name.endswith(".out") else (2 / (5 * d)) ** 0.5
                module.weight.normal_(0, std, generator=generator)
            if isinstance(module, MLSTM):
                # Forget gates from 3 to 6: heads that remember from 20 steps (1 / (1 - sigmoid(3))) to 400. So there is
                # a memory of every length to begin with, and none has to be found by a gradient over long distances.
                i, f = module.gates.bias.chunk(2)
                i.fill_(self.config.input_gate_bias)
                f.copy_(torch.linspace(3, 6, self.config.heads))

    def stream(self, tokens: Tensor, states: State | None = None, layers: int | None = None) -> tuple[Tensor, State]:
        """x behind the first `layers` layers (None: all), and the states of those layers."""
        if tokens.ndim != 2 or tokens.shape[1] < 1 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens must be int64 or int32 of shape (B, T), T >= 1, got {tokens.dtype}, {tuple(tokens.shape)}"
            )
        x, new_states, rotation = self.embedding(tokens), [], ()
        states = [None] * self.config.layers if states is None else states
        if self.config.kernel == "attention":
            start = 0 if states[0] is None else states[0][2]
            rotation = (rotary_table(start, start + tokens.shape[1], self.config.d_hv, x),)
        for block, state in zip(self.blocks, states[:layers], strict=False):  # ends where the shorter one does
            x, state = block(x, state, *rotation)
            new_states.append(state)
        return x, new_states

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), int64 -> logits (B, T, 256); those at step t are for the byte t + 1."""
        return self.logits(self.stream(tokens)[0])

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> tuple[Tensor, State]:
        """Reads a prompt at once: tokens (B, T) -> the logits of its last step (B, 256), and the state after it."""
        x, state = self.stream(tokens)
        return self.logits(x[:, -1]), state

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """One byte on: token (B,), the state before it -> logits (B, 256), the state after it."""
        if token.ndim != 1:
            raise ValueError(f"token must have shape (B,), got {tuple(token.shape)}")
        x, state = self.stream(token[:, None], state)
        return self.logits(x[:, 0]), state

    def generate(self, prompt: bytes, n: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
        """n bytes that go on from a prompt of at least one byte; temperature 0 takes the likeliest each time."""
        if not prompt:
            raise ValueError("prompt must have at least one byte")
        if not temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        device, new = self.embedding.weight.device, []
        generator = torch.Generator(device).manual_seed(seed)
        logits, state = self.prefill(torch.tensor([list(prompt)], device=device))
        for _ in range(n):
            if new:
                logits, state = self.step(new[-1], state)
            if temperature == 0:
                new.append(logits.argmax(dim=-1))
            else:
                shares = torch.softmax(logits.float() / temperature, dim=-1)
                new.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
        return bytes(torch.cat(new).tolist()) if new else b""

    @torch.no_grad()
    def cell_inputs(self, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, NH, T, d_qk), v (B, NH, T, d_hv), i, f (B, NH, T) that the cell of a layer (from 0) gets."""
        if self.config.kernel == "attention":
            raise ValueError("kernel must be 'exp' or 'sig': attention has no gates")
        if not 0 <= layer < self.config.layers:
            raise ValueError(f"layer must be in 0 .. {self.config.layers - 1}, got {layer}")
        x, _ = self.stream(tokens, layers=layer)
        block = self.blocks[layer]
        return block.mixer.inputs(block.norm_mixer(x))[:5]


def save(model: LanguageModel, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the weights (in `dtype`; None: as they are) and the configuration to one safetensors file."""
    from safetensors.torch import save_file

    tensors = {name: x.detach().to("cpu", dtype or x.dtype).contiguous() for name, x in model.state_dict().items()}
    unfinished = Path(f"{path}.unfinished")
    save_file(tensors, unfinished, metadata={"config": json.dumps(dataclasses.asdict(model.config))})
    os.replace(unfinished, path)  # so that there is never half a file under this name


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model that `save` wrote. Raises ValueError, naming the file and what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        model = LanguageModel(Config(**json.loads(metadata["config"])))
        model.load_state_dict(tensors)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} holds no language model of this file: its metadata have no {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"the configuration in {path} is not one of this file: {error}") from error
    except RuntimeError as error:  # names of tensors, or shapes
        mismatch = " ".join(str(error).split())
        raise ValueError(f"the weights in {path} do not fit its configuration: {mismatch}") from error
    broken = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if broken:
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(broken)}")
    return model.to(device, dtype)
