"""The layer's short steps as PyTorch's own functions, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.layer.activation import ACTIVATIONS


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> Tensor:
    """Shifted products: on a CPU they beat F.conv1d, which wants the channels first."""
    size = weight.shape[1]
    weight = weight.to(x.dtype)

    def convolve(rows: Tensor) -> Tensor:
        T = rows.shape[1] - size + 1
        y = rows[:, :T] * weight[:, 0]
        if bias is not None:
            y = y + bias.to(rows.dtype)
        for j in range(1, size):
            y = torch.addcmul(y, rows[:, j : j + T], weight[:, j])
        return ACTIVATIONS[activation](y)

    return over_windows(x, past, cu_seqlens, size, convolve)


def over_windows(
    x: Tensor,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    size: int,
    run: Callable[[Tensor], Tensor],
) -> Tensor:
    """A function of the last ``size`` inputs of every token, which never sees another sequence's.

    Args:
        x: ``[B,T,D]``; past: ``[N,size-1,D]``, zeros where None.
        run: from rows ``[B,M,D]`` to the results ``[B,M-size+1,D]`` of all windows in them.
    """
    pad = size - 1
    if cu_seqlens is None:
        if past is None:
            past = x.new_zeros(x.shape[0], pad, x.shape[2])
        return run(torch.cat([past.to(x.dtype), x], 1))
    # Put each sequence's past before it, convolve all at once, drop the seams.
    N = cu_seqlens.numel() - 1
    if past is None:
        past = x.new_zeros(N, pad, x.shape[2])
    steps = torch.arange(x.shape[1], device=x.device)
    which = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
    place = steps + (which + 1) * pad
    starts = cu_seqlens[:-1, None] + torch.arange(N, device=x.device)[:, None] * pad
    seams = (starts + torch.arange(pad, device=x.device)).flatten()
    rows = x.new_empty(x.shape[1] + N * pad, x.shape[2])
    rows = rows.index_copy(0, place, x[0]).index_copy(0, seams, past.to(x.dtype).flatten(0, 1))
    return run(rows[None])[:, place - pad]


def l2_norm(x: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    groups: int,
) -> Tensor:
    if gate is not None:
        gate = ACTIVATIONS[activation](gate)
        if gate_first:
            x, gate = x * gate, None
    parts = x.unflatten(-1, (groups, -1))
    y = F.rms_norm(parts, parts.shape[-1:], None, eps).flatten(-2)
    y = y * weight.to(x.dtype)
    return y if gate is None else y * gate


def gated(x: Tensor, gate: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate) * x


def softplus_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    return -_wide(A_log).exp() * F.softplus(_wide(x) + _wide(dt_bias))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def token_losses(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return F.cross_entropy(_wide(logits), labels, reduction="none", ignore_index=ignored)
