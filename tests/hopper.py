"""What the forms for Hopper GPUs, in bfloat16 and with the copy engine's limits, must satisfy besides properties.py."""

import properties
import pytest
import torch
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
    (lambda x: {"q": x.q[..., :12], "k": x.k[..., :12]}, ValueError, "q must have at most 128 columns, a multiple of"),
    (lambda x: {"v": x.v.repeat(1, 1, 1, 40)}, ValueError, "v must have at most 256 columns, a multiple of 8, got 320"),
    (lambda x: {"k": x.k.mT.contiguous().mT}, ValueError, "k must be contiguous in its last dimension .* got strides"),
    (lambda x: {"k": torch.cat([x.k, x.k[..., :4]], -1)[..., :16]}, ValueError, "k must .* multiples of 8, "),
    (lambda x: {"q": x.q[:, :1].expand_as(x.q)}, ValueError, "q must be .* got strides"),
]


def error_names_the_argument(function, change, error, message) -> None:
    inputs = random_inputs(1, 2, 5, 16, 8, dtype=torch.float32, device=DEVICE)
    inputs = inputs._replace(q=inputs.q.to(BFLOAT16), k=inputs.k.to(BFLOAT16), v=inputs.v.to(BFLOAT16))
    with pytest.raises(error, match=message):
        function(**(inputs._asdict() | change(inputs)))


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
