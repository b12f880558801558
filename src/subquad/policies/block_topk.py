"""Block-sparse top-k attention: for each block of queries, the key blocks whose mean fits best.

MInference 1.0 (Jiang et al. 2024, arXiv 2407.02490), "block_sparse", and its form in The Sparse
Frontier (Nawrot et al. 2025, arXiv 2504.17768).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.ops import checks, select
from subquad.policies.base import Call, Policy
from subquad.policies.parts import chosen

SCORES = 1 << 24  # block scores held at once


@dataclass(frozen=True)
class BlockTopK(Policy):
    """Prefill: each head and block of queries attends exactly to its ``topk`` key blocks.

    Attributes:
        block: tokens in a block, of queries and of keys.
        topk: key blocks for each block of queries.
        variant: "frontier" always takes the first block, the own one and the one before it;
            "minference" takes the best alone (there block=64, topk=100).
    """

    VARIANTS: ClassVar[tuple[str, ...]] = ("frontier", "minference")

    block: int = 16
    topk: int = 64
    variant: str = "frontier"

    def __post_init__(self) -> None:
        checks.positive("block", self.block)
        checks.positive("topk", self.topk)
        checks.one_of("variant", self.variant, self.VARIANTS)
        if self.variant == "frontier" and self.topk < 3:
            raise ValueError(
                f"topk must be at least 3 (first, own and previous block), got {self.topk}"
            )

    def prefill(self, call: Call) -> Tensor:
        return call.unpadded(self._prefill)

    def _prefill(self, call: Call) -> Tensor:
        index = self.select(call.q, call.layer.keys)
        return chosen.attend(call, index, self.block, self.block, unit=self.block)

    def select(self, q: Tensor, k: Tensor) -> Tensor:
        """The chosen blocks of ``k [B,S,G,K]`` for the last tokens ``q [B,T,H,K]``.

        Returns:
            int ``[B,H,R,n]``: a row for each block that holds a query, the blocks rising, -1 (for
            rows with fewer blocks before them) last. Of equals the earlier are taken.
        """
        (B, T, H, _), S, b = q.shape, k.shape[1], self.block
        first, blocks = (S - T) // b, -(-S // b)
        # Padding counts in the means, as the authors have it; a query block's scale is no matter.
        means, queries = select.means(k, b), select.means(q, b, S - T - first * b)
        step = max(1, SCORES * (1 + 15 * q.is_cuda) // (B * H * blocks))
        rows = [
            self._choose(queries[:, r : r + step], means, first + r)
            for r in range(0, blocks - first, step)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 2)

    def _choose(self, queries: Tensor, means: Tensor, first: int) -> Tensor:
        """Rows ``first..`` of :meth:`select` from the blocks' means."""
        b, forced = self.block, self.variant == "frontier"
        score = select.products(queries, means, first)
        return select.top(
            score, self.topk, size=b, sinks=int(forced), local=2 * forced, offset=first * b
        )
