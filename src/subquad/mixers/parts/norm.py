"""Norms of q and k, and the gated norm at the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad.ops import checks
from subquad.ops.layer import ACTIVATIONS, gated_rms_norm, l2_norm

__all__ = ["GatedRMSNorm", "l2_norm", "sum_norm"]


def sum_norm(x: Tensor) -> Tensor:
    """``x / sum x`` over the last axis (Schlag et al. 2021, arXiv 2102.11174), zero staying zero.

    Meant for positive feature maps: a sum that can vanish gives no useful norm.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide.sum(-1, keepdim=True)
    return (wide / (total + (total == 0))).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """``rms_norm(x) * weight * act(gate)`` over the last axis; the gate may be None.

    Args:
        width: of the last axis.
        eps: inside the root.
        activation: of the gate, a key of ``ACTIVATIONS``.
        gate_first: ``rms_norm(x * act(gate)) * weight`` instead, as in Mamba-2.
        groups: equal parts of the last axis, each with a norm of its own.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-5,
        activation: str = "silu",
        gate_first: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__()
        checks.one_of("activation", activation, ACTIVATIONS)
        checks.divides("groups", groups, "width", width)
        self.eps = eps
        self.activation = activation
        self.gate_first = gate_first
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return gated_rms_norm(
            x, gate, self.weight, eps=self.eps, activation=self.activation,
            gate_first=self.gate_first, groups=self.groups,
        )  # fmt: skip
