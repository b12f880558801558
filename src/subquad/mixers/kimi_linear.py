"""Kimi Delta Attention (KDA), the linear layer of Kimi Linear: forgetting per key channel.

It is the gated delta rule with a decay for every key channel. The full model puts one MLA layer
after every three of these.

Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture",
arXiv 2510.26692, sections 3 and 4.

Legend: B batch, T tokens, C dim, H heads of q and k, HV heads of v, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.decay import (
    A_log_parameter,
    dt_bias_parameter,
    exempt,
    widen,
)
from subquad.mixers.parts.norm import GatedRMSNorm, l2_norm
from subquad.mixers.parts.recurrent import QKVMixer, low_rank
from subquad.ops import checks
from subquad.ops.layer import softplus_decay


class KimiDeltaAttention(QKVMixer):
    """``S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T``, ``o_t = K^-0.5 S_t^T q_t``.

    ``log a_t = -exp(A_log) softplus(Wf2 Wf1 x + dt_bias)`` per key channel; the output is
    ``Wo (rms_norm(o) * sigmoid(Wg2 Wg1 x + b))``. Both low ranks are V.

    Args:
        dim: C, the model's width.
        heads: H, heads of q and k.
        value_heads: HV, a multiple of H; each q/k head serves HV/H consecutive value heads.
        head_dim: K = V; ``C / H`` where None (the paper has 128 at every width).
        conv_size: kernel of the short convolutions of q, k and v; 0 for none.
        negative_eigenvalues: doubles beta, so that the transition's eigenvalues reach -1.
        decay_floor: bounds the gate: ``log a_t = decay_floor * sigmoid(exp(A_log) (f + dt_bias))``
            instead, e.g. -5.0; None for the paper's.
        gate_bias: whether the output gate has its bias b (the paper's formula has none).
        norm_eps: of the output norm.
    """

    delta = True
    FOREIGN = {
        **QKVMixer.FOREIGN,
        "f_a_proj.weight": "f_proj.0.weight",
        "f_b_proj.weight": "f_proj.1.weight",
        "g_a_proj.weight": "g_proj.0.weight",
        "g_b_proj.weight": "g_proj.1.weight",
        "g_b_proj.bias": "g_proj.1.bias",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        value_heads: int | None = None,
        head_dim: int | None = None,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        decay_floor: float | None = None,
        gate_bias: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        checks.positive("heads", heads)
        value_heads = heads if value_heads is None else value_heads
        checks.divides("heads", heads, "value_heads", value_heads)
        if decay_floor is not None and not decay_floor < 0:
            raise ValueError(f"decay_floor must be negative or None, got {decay_floor}")
        if head_dim is None:
            checks.divides("heads", heads, "dim", dim)
            head_dim = dim // heads
        super().__init__(
            dim=dim,
            heads=heads,
            key_heads=heads,
            value_heads=value_heads,
            key_dim=head_dim,
            value_dim=head_dim,
            conv_size=conv_size,
        )
        self.negative_eigenvalues = negative_eigenvalues
        self.decay_floor = decay_floor
        self.f_proj = low_rank(dim, head_dim, value_heads * head_dim)
        self.b_proj = nn.Linear(dim, value_heads, bias=False)
        self.g_proj = low_rank(dim, head_dim, value_heads * head_dim, bias=gate_bias)
        bounded = decay_floor is not None
        self.A_log = (
            exempt(torch.zeros(value_heads)) if bounded else A_log_parameter(value_heads, 1.0, 16.0)
        )
        self.dt_bias = dt_bias_parameter(value_heads * head_dim)
        self.norm = GatedRMSNorm(head_dim, eps=norm_eps, activation="sigmoid")

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        most = 2.0 if self.negative_eigenvalues else 1.0
        if self.decay_floor is None and self.one_token(x, context, "channel"):
            decay = self.f_proj(x).unflatten(-1, (self.state_heads, -1))
            y, state = self.decode(
                x, context, decay=decay, beta=self.b_proj(x), gate=self.g_proj(x),
                norm=self.norm, beta_scale=most,
            )  # fmt: skip
            return self.o_proj(y), state
        x = context.zero_padding(x)
        q, k, v, state = self.qkv(x, context)
        beta = torch.sigmoid(self.b_proj(x)) * most
        o = self.recur(l2_norm(q), l2_norm(k), v, context, state, decay=self.decay(x), beta=beta)
        y = self.norm(o, self.g_proj(x).view_as(o))
        return self.o_proj(y.flatten(-2)), state

    def decay(self, x: Tensor) -> Tensor:
        """Log decays ``[B,T,HV,K]``."""
        f = self.f_proj(x).unflatten(-1, (self.state_heads, -1))
        A_log, dt_bias = self.A_log[:, None], self.dt_bias.view(self.state_heads, -1)
        if self.decay_floor is None:
            return softplus_decay(f, A_log, dt_bias)
        return self.decay_floor * torch.sigmoid(widen(A_log).exp() * (widen(f) + widen(dt_bias)))
