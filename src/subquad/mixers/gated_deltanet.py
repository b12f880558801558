"""Gated DeltaNet: the delta rule with a forget gate per head.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv 2412.06464, section 3.

Legend: B batch, T tokens, C dim, H heads of q and k, HV heads of v, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.decay import A_log_parameter, dt_bias_parameter
from subquad.mixers.parts.norm import GatedRMSNorm, l2_norm
from subquad.mixers.parts.recurrent import QKVMixer
from subquad.ops import checks
from subquad.ops.layer import softplus_decay


class GatedDeltaNet(QKVMixer):
    """``S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = K^-0.5 S_t^T q_t``.

    Args:
        dim: C, the model's width.
        heads: H, heads of q and k.
        value_heads: HV, a multiple of H; each q/k head serves HV/H consecutive value heads.
        head_dim: K; ``3 C / 4 H`` where None, as in the paper (H K = 0.75 C).
        expand_v: V = expand_v K.
        conv_size: kernel of the short convolutions of q, k and v; 0 for none.
        negative_eigenvalues: doubles beta, so that the transition's eigenvalues reach -1.
        norm_eps: of the output norm.
    """

    delta = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        conv_size: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        checks.positive("heads", heads)
        value_heads = heads if value_heads is None else value_heads
        checks.divides("heads", heads, "value_heads", value_heads)
        K = 3 * dim // (4 * heads) if head_dim is None else head_dim
        V = int(K * expand_v)
        super().__init__(
            dim=dim,
            heads=heads,
            key_heads=heads,
            value_heads=value_heads,
            key_dim=K,
            value_dim=V,
            conv_size=conv_size,
        )
        self.negative_eigenvalues = negative_eigenvalues
        self.a_proj = nn.Linear(dim, value_heads, bias=False)
        self.b_proj = nn.Linear(dim, value_heads, bias=False)
        self.g_proj = nn.Linear(dim, value_heads * V, bias=False)
        self.A_log = A_log_parameter(value_heads, 0.0, 16.0)
        self.dt_bias = dt_bias_parameter(value_heads)
        self.norm = GatedRMSNorm(V, eps=norm_eps)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        most = 2.0 if self.negative_eigenvalues else 1.0
        if self.one_token(x, context, "head"):
            y, state = self.decode(
                x, context, decay=self.a_proj(x), beta=self.b_proj(x), gate=self.g_proj(x),
                norm=self.norm, beta_scale=most,
            )  # fmt: skip
            return self.o_proj(y), state
        x = context.zero_padding(x)
        q, k, v, state = self.qkv(x, context)
        decay = softplus_decay(self.a_proj(x), self.A_log, self.dt_bias)
        beta = torch.sigmoid(self.b_proj(x)) * most
        o = self.recur(l2_norm(q), l2_norm(k), v, context, state, decay=decay, beta=beta)
        y = self.norm(o, self.g_proj(x).view_as(o))
        return self.o_proj(y.flatten(-2)), state
