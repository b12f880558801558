"""The kernels behind the signatures of :mod:`subquad.ops.layer.torch`."""

from __future__ import annotations

from torch import Tensor

from subquad.ops.layer.triton.conv_op import short_conv
from subquad.ops.layer.triton.gate_op import gated, softplus_decay
from subquad.ops.layer.triton.loss_op import token_losses
from subquad.ops.layer.triton.norm_op import norm

__all__ = ["gated", "gated_rms_norm", "l2_norm", "short_conv", "softplus_decay", "token_losses"]


def l2_norm(x: Tensor, eps: float) -> Tensor:
    return norm(x, None, None, False, eps, "identity", False, 1)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str,
    gate_first: bool,
    groups: int,
) -> Tensor:
    if gate is not None and gate.shape != x.shape:
        gate = gate.expand_as(x)
    return norm(x, gate, weight, True, eps, activation, gate_first, groups)
