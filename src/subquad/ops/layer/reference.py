"""The layer's short steps as they are defined, token by token."""

from __future__ import annotations

from itertools import pairwise

import torch
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
    """``y_t = act(b + sum_j w_j x_{t-size+1+j})``, the past before token 0."""
    size = weight.shape[1]
    if cu_seqlens is None:
        texts = list(x)
    else:
        texts = [x[0, a:b] for a, b in pairwise(cu_seqlens.tolist())]
    out = []
    for n, text in enumerate(texts):
        before = text.new_zeros(size - 1, x.shape[2]) if past is None else past[n].to(x.dtype)
        rows = torch.cat([before, text])
        z = text.new_empty(0, x.shape[2])
        for t in range(len(text)):
            z = torch.cat([z, (rows[t : t + size] * weight.T).sum(0, keepdim=True)])
        out.append(ACTIVATIONS[activation](z if bias is None else z + bias))
    return torch.stack(out) if cu_seqlens is None else torch.cat(out)[None]


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(sum x^2 + eps)``."""
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    groups: int,
) -> Tensor:
    """``x / sqrt(mean x^2 + eps) * weight * act(gate)``, the mean over each group."""
    factor = torch.ones_like(x) if gate is None else ACTIVATIONS[activation](gate)
    if gate_first:
        x, factor = x * factor, torch.ones_like(x)
    parts = x.unflatten(-1, (groups, -1))
    y = parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()
    return y.flatten(-2) * weight * factor


def gated(x: Tensor, gate: Tensor, activation: str) -> Tensor:
    """``x * act(gate)``."""
    return x * ACTIVATIONS[activation](gate)


def softplus_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``-exp(A_log) log(1 + exp(x + dt_bias))``."""
    return -A_log.exp() * torch.logaddexp(x + dt_bias, torch.zeros_like(x))


def token_losses(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """``log sum_j exp(x_j) - x_label``, 0 for a label that is ignored."""
    there = labels != ignored
    picked = logits.gather(1, labels.where(there, 0)[:, None])[:, 0]
    return (logits.exp().sum(1).log() - picked) * there
