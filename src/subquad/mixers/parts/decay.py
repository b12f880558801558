"""The softplus forget gate of Mamba-2, Gated DeltaNet and KDA, and its initialisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def softplus_decay(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay ``-exp(A_log) * softplus(x + dt_bias)`` in at least float32, <= 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return -A_log.to(wide).exp() * F.softplus(x.to(wide) + dt_bias.to(wide))


def A_log_parameter(heads: int, low: float, high: float) -> nn.Parameter:
    """``log A``, A uniform in ``(low, high)``; float32, exempt from weight decay."""
    return exempt(torch.empty(heads).uniform_(low, high).clamp_min_(1e-4).log_())


def dt_bias_parameter(width: int, low: float = 1e-3, high: float = 0.1) -> nn.Parameter:
    """The inverse softplus of a step log-uniform in ``[low, high]``, at least 1e-4."""
    dt = torch.empty(width).uniform_(math.log(low), math.log(high)).exp_().clamp_min_(1e-4)
    return exempt(dt + torch.log(-torch.expm1(-dt)))


def exempt(values: Tensor) -> nn.Parameter:
    """A parameter that the trainer leaves out of weight decay."""
    parameter = nn.Parameter(values)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter
