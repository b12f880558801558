"""GLA, gated linear attention: a forget gate per key channel, read from the input.

Source: Yang, Wang, Shen, Panda, Kim, "Gated Linear Attention Transformers with Hardware-Efficient
Training", arXiv 2312.06635, section 4.

Legend: B batch, T tokens, C dim, H heads of q, G heads of k and v, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.decay import widen
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.mixers.parts.recurrent import QKVMixer, low_rank
from subquad.ops import checks
from subquad.ops.layer.activation import ACTIVATIONS


class GLA(QKVMixer):
    """``S_t = diag(a_t) S_{t-1} + k_t v_t^T``, ``o_t = K^-0.5 S_t^T q_t``.

    ``log a_t = logsigmoid(W2 W1 x + b) / gate_normalizer`` per key channel; the output is
    ``Wo (rms_norm(o) * silu(Wg x))``.

    Args:
        dim: C, the model's width.
        heads: H, heads of q and of the state.
        kv_heads: G, a divisor of H; each k, v and gate head serves H/G consecutive q heads.
        expand_k: K = expand_k C / H; expand_v: V = expand_v C / H.
        gate_rank: of W1.
        gate_normalizer: tau; without it (1) memory is a few tokens.
        clamp_min: floor of the log decay; None for none.
        conv_size: kernel of short convolutions (with silu) of q, k and v; 0 for none.
        feature_map: of q and k, an element-wise key of ``ACTIVATIONS``; None for none.
        norm_eps: of the output norm.
    """

    FOREIGN = {
        **QKVMixer.FOREIGN,
        "g_norm_swish_gate.weight": "norm.weight",
        "g_norm.weight": "norm.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        clamp_min: float | None = None,
        conv_size: int = 0,
        feature_map: str | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        checks.divides("kv_heads", kv_heads, "heads", heads)
        checks.divides("heads", heads, "expand_k * dim", int(expand_k * dim))
        checks.divides("heads", heads, "expand_v * dim", int(expand_v * dim))
        if not gate_normalizer > 0:
            raise ValueError(f"gate_normalizer must be positive, got {gate_normalizer}")
        if clamp_min is not None and not clamp_min < 0:
            raise ValueError(f"clamp_min must be negative or None, got {clamp_min}")
        if feature_map is not None:
            checks.one_of("feature_map", feature_map, ACTIVATIONS)
        K, V = int(expand_k * dim) // heads, int(expand_v * dim) // heads
        activation = "silu" if conv_size else "identity"
        super().__init__(
            dim=dim,
            heads=heads,
            key_heads=kv_heads,
            value_heads=kv_heads,
            key_dim=K,
            value_dim=V,
            conv_size=conv_size,
            qk_activation=activation,
            v_activation=activation,
        )
        self.gate_normalizer, self.clamp_min = gate_normalizer, clamp_min
        self.feature_map = ACTIVATIONS[feature_map or "identity"]
        self.gk_proj = low_rank(dim, gate_rank, kv_heads * K, bias=True)
        self.g_proj = nn.Linear(dim, heads * V, bias=False)
        self.norm = GatedRMSNorm(V, eps=norm_eps)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        q, k, v, state = self.qkv(x, context)
        decay = F.logsigmoid(widen(self.gk_proj(x)).view_as(k)) / self.gate_normalizer
        if self.clamp_min is not None:
            decay = decay.clamp_min(self.clamp_min)
        q, k = self.feature_map(q), self.feature_map(k)
        o = self.recur(q, k, v, context, state, decay=decay)
        y = self.norm(o, self.g_proj(x).view_as(o))
        return self.o_proj(y.flatten(-2)), state
