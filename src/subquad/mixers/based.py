"""BASED: linear attention with a Taylor feature map, beside a small window and short convolutions.

Source: Arora, Eyuboglu, Zhang et al., "Simple linear attention language models balance the
recall-throughput tradeoff", arXiv 2402.18668, sections 4 and 5. The window layers are the softmax
mixer with ``window``.

Legend: B batch, T tokens, C dim, H heads, K feature dim (d' in the paper), V value dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from subquad.mixers.base import Context, Mixer
from subquad.mixers.linear_attention import LinearAttention
from subquad.mixers.parts.conv import ShortConv
from subquad.ops import checks


class Based(LinearAttention):
    """``o_t = sum_i w_ti v_i / (sum_i w_ti + eps)``, ``w_ti = 1 + s + s^2/2``,
    ``s = q_t . k_i / sqrt(K)``: the exponential to second order, at least 1/2.

    Args:
        dim: C, the model's width, a multiple of ``heads``.
        heads: H.
        kv_heads: heads of k and v, a divisor of H; H where None.
        feature_dim: K, small: the state grows with its square.
        compressed: whether the feature map holds each product of two features once (width
            1 + K + K (K + 1) / 2 instead of 1 + K + K^2; the same attention, 0.56 of the state).
        eps: added to the sum of the weights.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {
        "proj_q.weight": "q_proj.weight",
        "proj_k.weight": "k_proj.weight",
        "proj_v.weight": "v_proj.weight",
        "out_proj.weight": "o_proj.weight",
    }

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 16,
        kv_heads: int | None = None,
        feature_dim: int = 16,
        compressed: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=feature_dim,
            feature_map="taylor",
            feature_options={"compressed": compressed},
            eps=eps,
        )


class BaseConv(Mixer):
    """``y = Wo (silu(conv(u1)) * u2) + bo``, ``[u1, u2] = Wi x + bi``: a gated short convolution.

    Args:
        dim: C, the model's width.
        expand: the width of u1 and u2 together, in C.
        conv_size: kernel of the causal depthwise convolution.
        conv_bias: whether it has one, as where the authors run their fused convolution.
    """

    FOREIGN: ClassVar[Mapping[str, str]] = {
        "conv.conv.weight": "conv.weight",
        "conv.conv.bias": "conv.bias",
        "out_proj.weight": "o_proj.weight",
        "out_proj.bias": "o_proj.bias",
    }

    def __init__(
        self, *, dim: int, expand: int = 4, conv_size: int = 3, conv_bias: bool = False
    ) -> None:
        super().__init__(dim=dim)
        checks.positive("expand", expand)
        if expand * dim % 2:
            raise ValueError(f"expand * dim must be even, got {expand} * {dim}")
        inner = expand * dim // 2
        self.in_proj = nn.Linear(dim, 2 * inner)
        self.conv = ShortConv(inner, conv_size, bias=conv_bias)
        self.o_proj = nn.Linear(inner, dim)

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        u, gate = self.in_proj(x).chunk(2, -1)
        # The bias would leave something at the padding for the convolution to see.
        u, last = self.conv(context.zero_padding(u), context.past("conv"), context.cu_seqlens)
        return self.o_proj(u * gate), {"conv": last}

    @property
    def splits(self) -> bool:
        return True

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return (self.conv.size - 1) * self.conv.weight.shape[0] * dtype.itemsize

    def flops(self, T: int) -> int:
        weights = (self.in_proj.weight, self.conv.weight, self.o_proj.weight)
        return 2 * T * sum(w.numel() for w in weights)
