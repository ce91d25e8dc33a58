"""What the forms for Hopper GPUs, in bfloat16 and with the copy engine's limits, must satisfy besides properties.py."""

import threading

import properties
import pytest
import torch
import torch.nn.functional as F
from properties import DEVICE
from tfla_lab.forms import GRADIENTS, run_torch
from tfla_lab.inputs import random_inputs

BFLOAT16 = torch.bfloat16
ON_HOPPER = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU: Gluon has no interpreter"
)
# (change of the arguments, error, message) of what is refused, whatever the device.
BAD = [
    (lambda x: {"q": x.q[0]}, ValueError, r"q must have shape \(B, NH, T, D\)"),
    (lambda x: {"f": 3.0}, TypeError, "f must be a torch.Tensor, got float"),
    (lambda x: {"q": x.q.half(), "k": x.k.half(), "v": x.v.half()}, TypeError, "q must be bfloat16, got torch.float16"),
    (lambda x: {"q": x.q[..., :12], "k": x.k[..., :12]}, ValueError, "q must have at most 256 columns, a multiple of"),
    (lambda x: {"v": x.v.repeat(1, 1, 1, 72)}, ValueError, "v must have at most 512 columns, a multiple of 8, got 576"),
    (lambda x: {"k": x.k.mT.contiguous().mT}, ValueError, "k must be contiguous in its last dimension .* got strides"),
    (lambda x: {"k": torch.cat([x.k, x.k[..., :4]], -1)[..., :16]}, ValueError, "k must .* multiples of 8, "),
    (lambda x: {"q": x.q[:, :1].expand_as(x.q)}, ValueError, "q must be .* got strides"),
    # a batch of one, cut out of a larger one whose entries are 164 numbers apart
    (
        lambda x: {"k": F.pad(x.k.repeat(2, 1, 1, 1).flatten(1), (0, 4))[:, :160].unflatten(1, (2, 5, 16))[:1]},
        ValueError,
        "k must .* of 8, got",
    ),
]


def error_names_the_argument(function, change, error, message) -> None:
    inputs = random_inputs(1, 2, 5, 16, 8, dtype=torch.float32, device=DEVICE)
    inputs = inputs._replace(q=inputs.q.to(BFLOAT16), k=inputs.k.to(BFLOAT16), v=inputs.v.to(BFLOAT16))
    with pytest.raises(error, match=message):
        function(**(inputs._asdict() | change(inputs)))


def too_many_steps_are_named(function) -> None:
    q, v, i = (torch.empty(1, 1, 2**23, *D, dtype=BFLOAT16, device="meta") for D in ((136,), (8,), ()))
    with pytest.raises(ValueError, match=r"q must have fewer than 2\^23 steps in heads so wide, got 8388608"):
        function(q, q, v, i, i)


def odd_address_is_named(function) -> None:
    x, *_ = properties.make(1, 2, 70, 16, 8, dtype=BFLOAT16)
    odd = torch.empty(x.v.numel() + 4, dtype=BFLOAT16, device=DEVICE)[4:].view_as(x.v)
    with pytest.raises(ValueError, match="v must begin at a multiple of 16 bytes, got address"):
        function(*x._replace(v=odd))


def traces_into_one_graph(function, dynamic) -> None:
    """Also without a GPU: torch.compile looks through all checks of arguments. What runs then is the launcher's own."""
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="eager")
    for T in (40, 56):
        x = torch.ones(1, 2, T, 8, dtype=BFLOAT16, requires_grad=True)
        with pytest.raises(ValueError, match="q must be on a Hopper GPU"):
            compiled(x, x, x, x[..., 0], x[..., 0], return_state=True)


def a_neighbour_that_is_not_a_number(function, dtype=BFLOAT16) -> None:
    """The copy engine's tiles end where the sequence does, not where the tile would."""
    inputs, dh, *_ = properties.make(2, 2, 70, 64, 64, dtype=dtype, with_state=False)
    clean = run_torch(function, inputs, dh)
    for x in (*inputs, dh):
        x[0, 1:].fill_(torch.nan), x[1:].fill_(torch.nan)
    spoilt = run_torch(function, inputs, dh)
    for name in ("h", *GRADIENTS):
        assert torch.equal(clean[name][0, 0], spoilt[name][0, 0]), name


def views_are_not_copied(function, dtype=BFLOAT16) -> None:
    """(B, T, NH, D) tensors seen through a transpose, and slices of a larger tensor; h in the layout of v."""
    B, NH, T, D = 2, 3, 140, 32
    whole = torch.randn(B, T, NH, 3 * D, device=DEVICE, dtype=dtype)
    q, k, v = whole.transpose(1, 2).split(D, dim=-1)
    i, f = torch.randn(2, B, T, NH, device=DEVICE).transpose(2, 3)
    for x in (q, k, v, i, f):
        x.contiguous = lambda *_, **__: pytest.fail("an input was copied")
    h = function(q, k, v, i, f)
    expected = function(*(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v, i, f)))
    assert torch.equal(h, expected)
    v = torch.randn(B, T, NH, D, device=DEVICE, dtype=dtype).transpose(1, 2)
    assert function(q, k, v, i, f).stride() == v.stride()


# ---------------------------------------------------------------------------------------------------------------------
# Spans
# ---------------------------------------------------------------------------------------------------------------------
def starts_of_spans_from_pieces(stage, BACKWARD, with_state) -> None:
    """Also without a GPU. Three spans of four pieces of four tiles, the last one cut; pieces without weight are NaN."""
    B, NH, NT, PIECE, PER_SPAN, SIZE = 1, 2, 2 * 16 + 11, 4, 4, 24
    PIECES, SPANS, generator = -(-NT // PIECE), 3, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    decay, C, first = 0.5 + random(B, NH, NT), random(B, NH, PIECES, SIZE), random(B, NH, SIZE)
    decay[0, 0, 9] = decay[0, 1, 17] = 0
    decay[0, 1, 20:28] = 1e-8  # whose product is 0 in float32
    blocks = [decay[:, :, n * PIECE : (n + 1) * PIECE].prod(dim=-1) for n in range(PIECES)]
    weights, starts = torch.ones(B, NH, PIECES), torch.zeros(B, NH, SPANS, SIZE)
    state = first if with_state else torch.zeros_like(first)
    for n in range(PIECES):
        piece = PIECES - 1 - n if BACKWARD else n
        span, number = divmod(piece, PER_SPAN)
        if piece == PIECES - 1 if BACKWARD else number == 0:
            starts[:, :, span] = state
        others = range(number) if BACKWARD else range(number + 1, min(PER_SPAN, PIECES - span * PER_SPAN))
        for other in others:
            weights[:, :, piece] *= blocks[span * PER_SPAN + other]
        state = state * blocks[piece][..., None] + C[:, :, piece]
        if BACKWARD and number == 0 and span > 0:
            starts[:, :, span - 1] = state
    C[weights == 0] = torch.nan
    decay, C, first = (x.to(DEVICE) for x in (decay, C, first))
    decays, found = (torch.full((B, NH, PIECES), torch.nan, device=DEVICE) for _ in range(2))
    sizes = PIECES, PER_SPAN, SIZE, BACKWARD, 16
    stage.pieces_kernel[(SPANS, B * NH)](decay, decays, found, NT, PIECE, PER_SPAN, BACKWARD, 4, 4)
    actual = torch.full((B, NH, SPANS, SIZE), torch.nan, device=DEVICE)
    stage.starts_kernel[(2, B * NH)](C, decays, found, first if with_state else None, actual, *sizes)
    torch.testing.assert_close(decays.cpu(), torch.stack(blocks, dim=-1))
    torch.testing.assert_close(found.cpu(), weights)
    assert (weights == 0).sum() >= 3
    torch.testing.assert_close(actual.cpu(), starts)


def starts_of_spans(stage, DQK, DHV, BACKWARD) -> None:
    """The state that each span starts from, against a walk over all tiles; the last span is cut."""
    B, NH, NT, SPAN, BLOCK = 1, 2, 2 * 16 + 11, 16, stage.BLOCK
    T = NT * BLOCK - 20
    k, v = (torch.randn(B, NH, T, D, device=DEVICE).to(BFLOAT16) for D in (DQK, DHV))
    rows, decay = torch.rand(B, NH, NT * 8, BLOCK, device=DEVICE), 0.8 + torch.rand(B, NH, NT, device=DEVICE) / 5
    decay[0, 0, 14] = decay[0, 1, 20] = 0
    first = torch.randn(B, NH, DQK, DHV, device=DEVICE)
    starts = stage.starts_of_spans(k, v, rows, decay, first, SPAN, backward=BACKWARD)
    assert starts.shape == (B, NH, 3, DQK, DHV)
    w = rows.view(B, NH, NT, 8, BLOCK)[:, :, :, 5 if BACKWARD else 6].double()
    k, v = (torch.cat([x, x.new_zeros(B, NH, 20, x.shape[-1])], dim=2).unflatten(2, (NT, BLOCK)) for x in (k, v))
    C = first.double()
    for n in range(NT):
        tile = NT - 1 - n if BACKWARD else n
        if tile in (15, 31, NT - 1) if BACKWARD else tile % SPAN == 0:
            assert (starts[:, :, tile // SPAN] - C).norm() < 3e-3 * C.norm(), tile
        C = decay[:, :, tile, None, None] * C
        C += (w[:, :, tile, :, None] * k[:, :, tile].double()).mT @ v[:, :, tile].double()


def in_a_thread_of_its_own(run) -> None:
    """As autograd calls it. With memory in PyTorch's cache, the thread may meet CUDA first in a descriptor."""
    run()
    torch.cuda.synchronize()
    errors = []

    def again() -> None:
        try:
            run()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    assert not errors
