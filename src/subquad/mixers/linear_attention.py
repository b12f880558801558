"""Linear attention: a feature map in place of the exponential, so the past is one matrix.

Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive
Transformers with Linear Attention", arXiv 2006.16236, section 3.

Legend: B batch, T tokens, C dim, H heads, G heads of k and v, K key dim, F its width after the
feature map, V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.parts.feature_map import create_feature_map
from subquad.mixers.parts.norm import GatedRMSNorm
from subquad.ops import checks
from subquad.ops.recurrence import cost
from subquad.parallel import linear_attention, recurrence


class LinearAttention(Mixer):
    """``S_t = S_{t-1} + phi(k_t) v_t^T``, ``z_t = z_{t-1} + phi(k_t)``,
    ``o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)``.

    Args:
        dim: C, the model's width.
        heads: H.
        kv_heads: G, a divisor of H; consecutive query heads share one. H where None.
        head_dim: K; C / H where None.
        value_dim: V; C / H where None.
        feature_map: phi, one of ``parts.feature_map.FEATURE_MAPS``, separate for q and k.
        feature_options: of the feature map, e.g. ``{"nu": 2}`` for "dpfp".
        normalize: whether to divide by the sum of the weights. Otherwise ``o_t = F^-0.5 S_t^T
            phi(q_t)``; causal only.
        normalize_features: whether to divide phi(q) and phi(k) by their sum (+ 1e-4).
        output_norm: a root mean square norm per head after the reading; where None, just when
            ``normalize`` is off.
        causal: whether a token sees those after it too. Then the state adds up what earlier calls
            saw, and every token of a call sees all of it.
        eps: added to the sum of the weights.
        norm_eps: of the output norm.
    """

    repeats = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        feature_map: str = "elu",
        feature_options: Mapping[str, Any] | None = None,
        normalize: bool = True,
        normalize_features: bool = False,
        output_norm: bool | None = None,
        causal: bool = True,
        eps: float = 1e-6,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("heads", heads)
        kv_heads = heads if kv_heads is None else kv_heads
        checks.divides("kv_heads", kv_heads, "heads", heads)
        if head_dim is None or value_dim is None:
            checks.divides("heads", heads, "dim", dim)
        K = dim // heads if head_dim is None else head_dim
        V = dim // heads if value_dim is None else value_dim
        checks.positive("value_dim", V)
        if not (causal or normalize):
            raise ValueError("normalize must be True where causal is False, got False")
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, K, V
        self.normalize, self.normalize_features = normalize, normalize_features
        self.causal, self.eps = causal, eps

        self.feature_map_q = create_feature_map(feature_map, K, **(feature_options or {}))
        self.feature_map_k = create_feature_map(feature_map, K, **(feature_options or {}))
        self.q_proj = nn.Linear(dim, heads * K, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * K, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * V, bias=False)
        self.o_proj = nn.Linear(heads * V, dim, bias=False)
        normed = not normalize if output_norm is None else output_norm
        self.norm = GatedRMSNorm(V, eps=norm_eps) if normed else None

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = context.zero_padding(x)
        q = self.feature_map_q(self.q_proj(x).unflatten(-1, (self.heads, -1)))
        k = self.feature_map_k(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        if self.normalize_features:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        k = context.zero_padding(k)  # phi(0) is not zero
        cu = context.cu_seqlens
        if self.normalize:
            past = None if context.state is None else (context.state["S"], context.state["z"])
            o, (S, z) = linear_attention(
                q, k, v, causal=self.causal, eps=self.eps, state=past, cu_seqlens=cu
            )
            state = {"S": S, "z": z}
        else:
            o, S = recurrence(q, k, v, state=context.past("S"), cu_seqlens=cu)
            state = {"S": S}
        o = o if self.norm is None else self.norm(o)
        return self.o_proj(o.flatten(-2)), state

    @property
    def splits(self) -> bool:
        return True

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        width = self.value_dim + 1 if self.normalize else self.value_dim
        return cost.state_bytes(H=self.heads, K=self.feature_map_k.width, V=width)

    def flops(self, T: int) -> int:
        own = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        H, G, width = self.heads, self.kv_heads, self.feature_map_k.width
        maps = [m.weight.numel() for m in self.feature_map_q.modules() if isinstance(m, nn.Linear)]
        projections = sum(m.weight.numel() for m in own) + (H + G) * sum(maps)
        V = self.value_dim + 1 if self.normalize else self.value_dim
        if self.causal:
            return 2 * T * projections + cost.flops(B=1, T=T, H=H, K=width, V=V)
        return 2 * T * projections + 4 * T * H * width * V
