"""LS-attention: heads with a short window beside a few that see everything, in every layer.

Source: Hajra, "Short-Range Dependency Effects on Transformer Instability and a Decomposed Attention
Solution", arXiv 2505.15548.

Legend: B batch, T tokens, C dim, H query heads, L of them local, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subquad.mixers.base import Context
from subquad.mixers.parts.past import Span
from subquad.mixers.softmax import Softmax, ramp
from subquad.ops import checks
from subquad.ops.attention import attention


class LSAttention(Softmax):
    """The first ``local_heads`` heads see the last ``span`` tokens, the others all of them.

    Local structure then needs no large scores, which keeps training stable. The state of the local
    heads is a window. Positions are the model's (learned) unless ``rope_theta`` is given.

    Args:
        heads: H; local_heads: L; all but one where None.
        span: s, keys that a local head sees, the token's own included.
        inclusive_span: one key more, ``i - j <= s``, as the authors' later kernels have it.
        kv_heads: G; each serves local heads or global ones, never both.
        **options: of :class:`~subquad.mixers.softmax.Softmax`, but for ``window`` and ``sinks``.
    """

    WITHOUT = ("causal", "window", "sinks")
    past = ()

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 6,
        local_heads: int | None = None,
        span: int = 50,
        inclusive_span: bool = False,
        rope_theta: float | None = None,
        **options: Any,
    ) -> None:
        checks.positive("span", span)
        if options.keys() & {"window", "sinks"}:
            raise ValueError(f"window and sinks give way to span, got {sorted(options)}")
        super().__init__(dim=dim, heads=heads, rope_theta=rope_theta, **options)
        local_heads = heads - 1 if local_heads is None else local_heads
        if not 0 <= local_heads <= heads:
            raise ValueError(f"local_heads must lie in 0..{heads}, got {local_heads}")
        share = heads // self.kv_heads
        if local_heads % share:
            raise ValueError(
                f"local_heads must be a multiple of {share}, the heads that share a key head, "
                f"got {local_heads}"
            )
        self.local_heads, self.local_kv_heads = local_heads, local_heads // share
        self.span = span + inclusive_span

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        q, k, v = self.qkv(x, context)
        H, G = self.local_heads, self.local_kv_heads
        parts, states = [], []
        if H:
            near = {"local_k": k[:, :, :G], "local_v": v[:, :, :G]}
            span = Span(context, near, window=self.span, pad="local_pad")
            parts.append(self._attend(q[:, :, :H], span, *near))
            states.append(span.state())
        if self.heads > H:
            far = {"k": k[:, :, G:], "v": v[:, :, G:]}
            span = Span(context, far)
            parts.append(self._attend(q[:, :, H:], span, *far))
            states.append(span.state())
        return torch.cat(parts, 2), ChainMap(*states)  # type: ignore

    def _attend(self, q: Tensor, span: Span, k: str, v: str) -> Tensor:
        o = attention(
            span.rows(q),
            span[k],
            span[v],
            span.mask(),
            scale=self.scale,
            cu_seqlens=span.cu_seqlens,
        )
        return span.tokens(o)

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        far = self.kv_heads - self.local_kv_heads
        kept = self.local_kv_heads * min(T, self.span) + far * T
        return kept * 2 * self.head_dim * dtype.itemsize

    def pairs(self, T: int) -> int:
        far = self.heads - self.local_heads
        return (self.local_heads * ramp(T, self.span) + far * ramp(T, T)) // self.heads


def equal_mlp_dim(dim: int, heads: int, head_dim: int, *, mlp_dim: int, matrices: int = 2) -> int:
    """The inner width that gives a layer with a narrower attention as many parameters.

    Attention has ``4 dim heads head_dim`` weights and an MLP ``matrices dim mlp_dim`` (2 matrices
    for GELU, 3 for SwiGLU); with 2 matrices and ``mlp_dim = 4 dim`` it is
    ``4 dim + 2 (dim - heads head_dim)``.
    """
    return mlp_dim + 4 * (dim - heads * head_dim) // matrices
