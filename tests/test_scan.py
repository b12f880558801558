"""The element-wise scan: chunked = token by token, with its gradients."""

import math

import pytest
import torch

from kit import close, poisoned
from subquad.ops.scan import scan
from subquad.ops.scan.chunk import _scan

LENGTHS = (1, 2, 3, 16, 17, 50)


def inputs(B=2, T=17, D=3, complex=False, strong=False, N=None):
    dtype = torch.complex128 if complex else torch.float64
    x = torch.randn(B, T, D, dtype=dtype)
    rate = -torch.rand(B, T, D, dtype=torch.float64) * (60 if strong else 1)
    decay = torch.complex(rate, torch.randn_like(rate)) if complex else rate
    state = torch.randn(N or B, D, dtype=dtype)
    return x, decay, state


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
def test_chunked_is_token_by_token(T, complex):
    for strong in (False, True):
        x, decay, state = inputs(T=T, complex=complex, strong=strong)
        for past in (None, state):
            with poisoned():
                got = scan(x, decay, state=past, backend="torch")
            for a, b in zip(got, scan(x, decay, state=past, backend="reference"), strict=True):
                close(a, b, 1e-12)


@pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
def test_packed_is_looped(complex):
    x, decay, state = inputs(B=1, T=20, complex=complex, N=5)
    cu = torch.tensor([0, 0, 7, 8, 8, 20], dtype=torch.int32)
    for past in (None, state):
        got = scan(x, decay, state=past, cu_seqlens=cu, backend="torch")
        want = scan(x, decay, state=past, cu_seqlens=cu, backend="reference")
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-12)


@pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
def test_gradients(complex):
    cu = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    for packed in (None, cu):
        leaves = inputs(B=1, T=7, complex=complex, N=None if packed is None else 3)
        leaves = [t.requires_grad_() for t in leaves]

        def run(x, decay, state, packed=packed):
            return scan(x, decay, state=state, cu_seqlens=packed, backend="torch")

        assert torch.autograd.gradcheck(run, leaves, check_grad_dtypes=True)


def test_op_keeps_the_rules_of_torch():
    x, decay, state = inputs(T=5)
    torch.library.opcheck(_scan.overload, (x.requires_grad_(), decay.exp(), state))


def test_one_gate_sums_and_no_gate_forgets():
    x, decay, _ = inputs(T=50)
    close(scan(x, torch.zeros_like(decay))[0], x.cumsum(1))
    close(scan(x, torch.full_like(decay, -math.inf))[0], x)


def test_state_is_kept_in_float32():
    x, decay, _ = inputs()
    h, last = scan(x.bfloat16(), decay.bfloat16())
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": torch.zeros(2, 16, 3)}, "decay must have T=17"),
        ({"decay": torch.ones(2, 17, 3)}, "decay must be a log gate"),
        ({"decay": torch.full((2, 17, 3), math.nan)}, "decay must be a log gate"),
        ({"decay": torch.zeros(2, 17, 3, dtype=torch.complex64)}, "both be complex or real"),
        ({"state": torch.zeros(1, 3)}, "state must have shape"),
        ({"cu_seqlens": torch.tensor([0, 17])}, "a batch of 1"),
        ({"backend": "fast"}, "backend of scan must be one of"),
    ],
)
def test_bad_input(change, message):
    x, decay, _ = inputs()
    with pytest.raises(ValueError, match=message):
        scan(x, **({"decay": decay} | change))
