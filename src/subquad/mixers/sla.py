"""SLA: softmax over a few key blocks, linear attention over the rest, added.

Source: Zhang, Wang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable
Sparse-Linear Attention", arXiv 2509.24006; the variant "main" is the authors' later release.

Legend: B batch, T tokens, C dim, H query heads, G key/value heads, K head dim, M blocks of queries,
N blocks of keys, c critical ones of a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.mixers.base import Context
from subquad.mixers.parts.grid import whole
from subquad.mixers.softmax import Softmax
from subquad.ops import checks, select
from subquad.ops.attention.chosen_rows import chosen_rows
from subquad.ops.backend import without_autocast
from subquad.ops.kernel_attention.marginal import PHI, marginal

VARIANTS = ("paper", "main")


class SLA(Softmax):
    """``o_i = softmax(scale q_i . k) v over critical blocks + W linear(phi(q_i), phi(k), v) + b``.

    For whole images and volumes: no token is before another. A row of ``query_block`` queries ranks
    the key blocks by its mean query and their mean keys (less the mean of all keys). The best
    ``max(1, int(topk N))`` are critical, the last ``int(negligible N)`` are skipped, the others are
    marginal: linear attention reads them. No gradient goes through the choice. W ``[K,K]`` and b
    are shared by the heads and zero at first, so that a softmax layer's weights give block-sparse
    softmax before any fine-tuning.

    Args:
        dim: C, the model's width.
        heads: H.
        kv_heads: G, a divisor of H; H where None.
        head_dim: K; C / H where None.
        topk: part of the key blocks that is critical.
        negligible: part that is skipped, in the variant "paper".
        block: keys in a block; the last block may be short.
        query_block: queries in a block, ``block`` where None.
        feature_map: phi, "softmax" over the features of a head, "elu" (+ 1) or "relu".
        variant: "paper", or "main", where every query's linear part reads all tokens.
        rope_theta, qk_norm, scale, bias, out_bias, norm_eps: as of
            :class:`~subquad.mixers.softmax.Softmax`, but that nothing is rotated at first.
    """

    past = ()
    ADDED = ("linear_proj.weight", "linear_proj.bias")

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        topk: float = 0.05,
        negligible: float = 0.1,
        block: int = 64,
        query_block: int | None = None,
        feature_map: str = "softmax",
        variant: str = "paper",
        rope_theta: float | None = None,
        qk_norm: bool = False,
        scale: float | None = None,
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        checks.positive("block", block)
        query_block = block if query_block is None else query_block
        checks.positive("query_block", query_block)
        checks.one_of("feature_map", feature_map, PHI)
        checks.one_of("variant", variant, VARIANTS)
        for name, part in (("topk", topk), ("negligible", negligible)):
            if not 0 <= part <= 1:
                raise ValueError(f"{name} must be a part of the blocks, in 0..1, got {part!r}")
        super().__init__(
            dim=dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope_theta=rope_theta,
            qk_norm=qk_norm, causal=False, scale=scale, bias=bias, out_bias=out_bias,
            norm_eps=norm_eps,
        )  # fmt: skip
        self.topk, self.negligible, self.variant = topk, negligible, variant
        self.block, self.query_block = block, query_block
        self.feature_map = feature_map
        self.linear_proj = nn.Linear(self.head_dim, self.head_dim)
        nn.init.zeros_(self.linear_proj.weight)
        nn.init.zeros_(self.linear_proj.bias)

    def heads_out(self, x: Tensor, context: Context) -> tuple[Tensor, Mapping[str, Tensor]]:
        whole(context)
        return self.attend(*self.qkv(x, context)), {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Both branches, ``o [B,T,H,K]`` of q ``[B,T,H,K]``, k and v ``[B,T,G,K]``."""
        critical, rest = self.choose(q, k)
        rows = self.query_block
        exact = chosen_rows(q, k, v, critical, self.block, rows=rows, scale=self.scale)
        o = marginal(q, k, v, rest, self.block, rows=rows, phi=self.feature_map)
        with without_autocast(q.device.type):
            W, b = (t.to(o.dtype) for t in (self.linear_proj.weight, self.linear_proj.bias))
            o = exact + F.linear(o, W, b)
        return o.to(v.dtype)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Which key blocks each block of queries reads how.

        Args:
            q: ``[B,T,H,K]``; k: ``[B,T,G,K]``.

        Returns:
            The critical blocks, int32 ``[B,H,M,c]``, rising; and bool ``[B,H,M,N]``, whether the
            linear part reads a block.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.detach().to(wide), k.detach().to(wide)
        keys = select.pool(k, self.block) - k.mean(1, keepdim=True)
        rows = select.pool(q, self.query_block).unflatten(2, (keys.shape[2], -1))
        with without_autocast(q.device.type):
            scores = torch.einsum("bmgrk,bngk->bgrmn", rows, keys).flatten(1, 2)
        critical, skipped = self.counts(keys.shape[1])
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rest = torch.ones_like(scores, dtype=torch.bool)
        if self.variant == "paper":
            rest.scatter_(-1, order[..., :critical], False)
            rest.scatter_(-1, order[..., order.shape[-1] - skipped :], False)
        return order[..., :critical].sort(-1)[0].int(), rest

    def counts(self, N: int) -> tuple[int, int]:
        """How many of N key blocks are critical for a row, and how many are skipped."""
        critical = max(1, int(self.topk * N))
        return critical, min(int(self.negligible * N), N - critical)

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """Not defined.

        Raises:
            ValueError: always: W mixes the features of what is read.
        """
        raise ValueError("sla has no weights of tokens: W mixes what its linear part reads")

    def state_bytes(self, T: int, dtype: torch.dtype = torch.float32) -> int:
        return 0

    def pairs(self, T: int) -> int:
        """Pairs of one head under softmax, all blocks taken as full."""
        critical, _ = self.counts(-(-T // self.block))
        return T * min(T, critical * self.block)

    def flops(self, T: int) -> int:
        """Both branches, the product of the map of blocks with their states, and the map."""
        own = sum(m.weight.numel() for name, m in self.named_modules() if name[1:] == "_proj")
        M, N, K = -(-T // self.query_block), -(-T // self.block), self.head_dim
        linear = 3 * T * K**2 + M * N * K * (K + 1)
        return 2 * T * own + self.heads * (4 * self.pairs(T) * K + 2 * linear)
