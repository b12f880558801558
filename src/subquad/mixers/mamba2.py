"""Mamba-2: a selective state space with one decay per head, as a gated linear attention.

Source: Dao, Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", arXiv 2405.21060, sections 6 and 7.

Legend: B batch, T tokens, C dim, D inner width, H heads, P head width, G groups of B and C,
N state size (the recurrence's key dim; P is its value dim).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.decay import (
    A_log_parameter,
    dt_bias_parameter,
    exempt,
    softplus_step,
    widen,
)
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.mixers.parts.recurrent import RecurrentMixer
from subquad.ops import checks

NORMS = ("groups", "whole")


class Mamba2(RecurrentMixer):
    """``S_t = exp(A d_t) S_{t-1} + d_t B_t x_t^T``, ``y_t = S_t^T C_t + D x_t``.

    ``d = softplus(dt + dt_bias)``, ``A = -exp(A_log)``; x, B and C pass one short convolution and
    silu; the output is ``Wo rms_norm(y * silu(z))``.

    Args:
        dim: C, the model's width.
        heads: H; the inner width over head_dim where None.
        head_dim: P; the inner width over heads where None, and 64 where both are.
        state_dim: N.
        groups: G, a divisor of H; each B and C serves H/G consecutive heads.
        expand: the inner width is expand C.
        conv_size: kernel of the short convolution, which has a bias.
        dt_limit: least and greatest step d; None for no limit.
        norm: "groups" (G norms side by side) or "whole" (one over the inner width).
        norm_eps: of the output norm.
    """

    FOREIGN = {
        "conv1d.weight": "conv.weight",
        "conv1d.bias": "conv.bias",
        "out_proj.weight": "o_proj.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int | None = None,
        head_dim: int | None = None,
        state_dim: int = 128,
        groups: int = 1,
        expand: float = 2.0,
        conv_size: int = 4,
        dt_limit: tuple[float, float] | None = None,
        norm: str = "groups",
        norm_eps: float = 1e-5,
    ) -> None:
        inner = int(expand * dim)
        if heads is None:
            head_dim = 64 if head_dim is None else head_dim
            checks.divides("head_dim", head_dim, "expand * dim", inner)
            heads = inner // head_dim
        checks.divides("heads", heads, "expand * dim", inner)
        P = inner // heads
        if head_dim not in (None, P):
            raise ValueError(f"head_dim must be expand * dim / heads = {P}, got {head_dim}")
        checks.divides("groups", groups, "heads", heads)
        checks.one_of("norm", norm, NORMS)
        if dt_limit is not None and not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit must be (low, high), 0 <= low <= high, got {dt_limit}")
        super().__init__(dim=dim, heads=heads, key_dim=state_dim, value_dim=P)
        self.groups, self.dt_limit = groups, dt_limit
        # z, x and B and C together, dt
        self.widths = (inner, inner + 2 * groups * state_dim, heads)
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv = ShortConv(self.widths[1], conv_size, bias=True)
        self.A_log = A_log_parameter(heads, 1.0, 16.0)
        self.dt_bias = dt_bias_parameter(heads)
        self.D = exempt(torch.ones(heads))
        parts = groups if norm == "groups" else 1
        self.norm = GatedRMSNorm(inner, eps=norm_eps, gate_first=True, groups=parts)
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        state: dict[str, Tensor] = {}
        z, xBC, dt = self.in_proj(context.zero_padding(x)).split(self.widths, -1)
        xBC = self.convolve("conv", xBC, context, state)
        GN = self.groups * self.key_dim
        u, B, C = xBC.split((self.widths[0], GN, GN), -1)
        u = u.unflatten(-1, (self.state_heads, -1))
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        step = softplus_step(dt, self.dt_bias)
        if self.dt_limit is not None:
            step = step.clamp(*self.dt_limit)
        decay = -widen(self.A_log).exp() * step
        v = (u * step[..., None]).to(u.dtype)
        y = self.recur(C, B, v, context, state, decay=decay, scale=1.0)
        y = y + self.D.to(u.dtype)[:, None] * u
        return self.o_proj(self.norm(y.flatten(-2), z)), state
