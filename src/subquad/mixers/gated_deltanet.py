"""Gated DeltaNet: the delta rule with a forget gate per head.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv 2412.06464, section 3.

Legend: B batch, T tokens, C dim, H heads of q and k, HV heads of v, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.conv import ShortConv
from subquad.mixers.parts.decay import A_log_parameter, dt_bias_parameter, softplus_decay
from subquad.mixers.parts.norm import GatedRMSNorm, l2_norm
from subquad.ops import checks
from subquad.ops.recurrence import cost, recurrence


class GatedDeltaNet(Mixer):
    """``S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = K^-0.5 S_t^T q_t``.

    Args:
        dim: C, the model's width.
        heads: H, heads of q and k.
        value_heads: HV, a multiple of H; each q/k head serves HV/H consecutive value heads.
        head_dim: K; ``3 C / 4 H`` where None, as in the paper (H K = 0.75 C).
        expand_v: V = expand_v K.
        conv_size: kernel of the short convolutions of q, k and v.
        negative_eigenvalues: doubles beta, so that the transition's eigenvalues reach -1.
        norm_eps: of the output norm.
    """

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
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        value_heads = heads if value_heads is None else value_heads
        checks.divides("heads", heads, "value_heads", value_heads)
        K = 3 * dim // (4 * heads) if head_dim is None else head_dim
        checks.positive("head_dim", K)
        V = int(K * expand_v)
        checks.positive("value_dim", V)
        self.heads, self.value_heads, self.key_dim, self.value_dim = heads, value_heads, K, V
        self.negative_eigenvalues = negative_eigenvalues

        self.q_proj = nn.Linear(dim, heads * K, bias=False)
        self.k_proj = nn.Linear(dim, heads * K, bias=False)
        self.v_proj = nn.Linear(dim, value_heads * V, bias=False)
        self.a_proj = nn.Linear(dim, value_heads, bias=False)
        self.b_proj = nn.Linear(dim, value_heads, bias=False)
        self.g_proj = nn.Linear(dim, value_heads * V, bias=False)
        self.q_conv = ShortConv(heads * K, conv_size)
        self.k_conv = ShortConv(heads * K, conv_size)
        self.v_conv = ShortConv(value_heads * V, conv_size)
        self.A_log = A_log_parameter(value_heads, 0.0, 16.0)
        self.dt_bias = dt_bias_parameter(value_heads)
        self.norm = GatedRMSNorm(V, eps=norm_eps)
        self.o_proj = nn.Linear(value_heads * V, dim, bias=False)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        q, q_conv = self.q_conv(self.q_proj(x), context.past("q_conv"), context.cu_seqlens)
        k, k_conv = self.k_conv(self.k_proj(x), context.past("k_conv"), context.cu_seqlens)
        v, v_conv = self.v_conv(self.v_proj(x), context.past("v_conv"), context.cu_seqlens)
        beta = torch.sigmoid(self.b_proj(x)) * (2 if self.negative_eigenvalues else 1)
        o, S = recurrence(
            l2_norm(q.unflatten(-1, (self.heads, -1))),
            l2_norm(k.unflatten(-1, (self.heads, -1))),
            v.unflatten(-1, (self.value_heads, -1)),
            decay=context.zero_padding(softplus_decay(self.a_proj(x), self.A_log, self.dt_bias)),
            beta=context.zero_padding(beta),
            state=context.past("S"),
            cu_seqlens=context.cu_seqlens,
        )
        y = self.norm(o, self.g_proj(x).unflatten(-1, (self.value_heads, -1)))
        state = {"S": S, "q_conv": q_conv, "k_conv": k_conv, "v_conv": v_conv}
        return self.o_proj(y.flatten(-2)), state

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        widths = 2 * self.heads * self.key_dim + self.value_heads * self.value_dim
        convs = (self.q_conv.size - 1) * widths * dtype.itemsize
        return convs + cost.state_bytes(H=self.value_heads, K=self.key_dim, V=self.value_dim)

    def flops(self, T: int) -> int:
        projections = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 2 * T * projections + cost.flops(
            B=1, T=T, H=self.value_heads, K=self.key_dim, V=self.value_dim, delta=True
        )
