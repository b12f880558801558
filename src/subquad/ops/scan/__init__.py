"""The element-wise gated scan, ``h_t = exp(decay_t) h_{t-1} + x_t``, one number per channel.

The vector-state recurrence of HGRN, moving averages and diagonal state spaces. The decay may be
complex (a rotation besides the forgetting). Legend: B batch, T tokens, D channels, N sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops import checks
from subquad.ops.backend import Backend, Request, choose, without_autocast

__all__ = ["BACKENDS", "request", "scan"]


def _always(request: Request) -> tuple[bool, str]:
    return True, "takes everything"


BACKENDS = (
    Backend("torch", _always, "subquad.ops.scan.chunk:scan"),
    Backend("reference", _always, "subquad.ops.scan.reference:scan"),
)


def request(
    *,
    T: int,
    D: int,
    B: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    state: bool = False,
) -> Request:
    """The scan's :class:`~subquad.ops.backend.Request` for a shape."""
    flags = {"packed": packed, "state": state}
    traits = frozenset(name for name, on in flags.items() if on)
    return Request(device, dtype, {"B": B, "T": T, "D": D}, traits)


def scan(
    x: Tensor,
    decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence, every channel for itself.

    Args:
        x: ``[B,T,D]``, what enters; float or complex.
        decay: ``[B,T,D]``, log of the forget gate, its real part <= 0; complex where x is.
        state: ``[N,D]``, h before the first token; zero where None.
        cu_seqlens: int32 ``[N+1]``, the boundaries of packed sequences (B must be 1).
        backend: run this implementation; None lets the verifiers choose.

    Returns:
        ``h [B,T,D]`` in the dtype of x, and ``[N,D]``, h after the last token, in at least float32
        (complex64). Both are differentiable, also with respect to ``state``.

    Raises:
        ValueError: for shapes or boundaries that do not fit, a real decay for a complex x or the
            reverse, and a decay that is NaN or has a positive real part.
    """
    checks.shapes({"x": (x, "B T D"), "decay": (decay, "B T D")})
    if x.is_complex() != decay.is_complex():
        raise ValueError(f"x and decay must both be complex or real, got {x.dtype}, {decay.dtype}")
    rate = decay.real if decay.is_complex() else decay
    if checks.readable(rate) and not bool(rate.amax() <= 0):
        raise ValueError(f"decay must be a log gate, <= 0, got a maximum of {float(rate.amax())}")
    B, T, D = x.shape
    checks.cu_seqlens(cu_seqlens, B=B, T=T)
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if state is not None:
        checks.shape("state", state, (N, D))
    traits: dict[str, Any] = {"packed": cu_seqlens is not None, "state": state is not None}
    asked = request(B=B, T=T, D=D, device=x.device.type, dtype=x.dtype, **traits)
    run = choose("scan", BACKENDS, asked, backend).load()
    with without_autocast(x.device.type):
        return run(x, decay, state, cu_seqlens)
