"""Norms and the gated norm at the output of a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.ops import checks

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum x^2 + eps)`` over the last axis, in float32 at least."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """``rms_norm(x) * weight * act(gate)`` over the last axis; the gate may be None."""

    def __init__(self, width: int, *, eps: float = 1e-5, activation: str = "silu") -> None:
        super().__init__()
        checks.one_of("activation", activation, ACTIVATIONS)
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return y if gate is None else y * ACTIVATIONS[self.activation](gate)
