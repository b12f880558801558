"""Quest: of the cached pages, each new token reads those whose keys could fit it best.

Tang et al. 2024, QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv
2406.10774; the other variant as in The Sparse Frontier (Nawrot et al. 2025, arXiv 2504.17768).

Legend: B batch, H query heads, G key heads, K head dim, P pages, n chosen pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from subquad.caches.kv import KVLayer
from subquad.caches.paged import PagedLayer
from subquad.ops import checks
from subquad.ops.select import pages
from subquad.policies.base import Call, Policy, Site
from subquad.policies.parts import chosen


@dataclass(frozen=True)
class Quest(Policy):
    """Decoding: exact attention to the pages with the largest bound on their scores.

    Nothing is evicted: the cache is whole (and 2 / page larger), less of it is read.

    Attributes:
        budget: tokens read at a step; page: tokens in a page.
        variant: "original" takes max(3, budget // page) pages, each query head its own;
            "frontier" budget // page complete pages and, besides, the one being filled.
        share: the heads of a group choose together, by the sum of their bounds (frontier).
        dense_layers: so many first layers read everything; None for 2 (original) or 0 (frontier).
    """

    VARIANTS: ClassVar[tuple[str, ...]] = ("original", "frontier")

    budget: int = 1024
    page: int = 16
    variant: str = "original"
    share: bool = True
    dense_layers: int | None = None

    def __post_init__(self) -> None:
        checks.positive("page", self.page)
        checks.one_of("variant", self.variant, self.VARIANTS)
        checks.positive("budget", self.budget)
        if self.dense_layers is not None:
            checks.positive("dense_layers", self.dense_layers, zero=True)
        if self.budget < self.page:
            raise ValueError(f"budget must be at least page={self.page}, got {self.budget}")

    def layer(self, site: Site) -> KVLayer:
        default = 2 if self.original else 0
        dense = default if self.dense_layers is None else self.dense_layers
        return KVLayer(site.window) if site.index < dense else PagedLayer(self.page)

    def decode(self, call: Call) -> Tensor:
        layer = call.layer
        if not isinstance(layer, PagedLayer):
            return call.dense()
        q, window, low, high = call.q[:, 0], call.site.window, *layer.limits()
        if layer.starts is None and pages.by_kernels(q, low):
            starts = pages.best(
                q, low, high, self.pages, page=self.page, window=window,
                tokens=layer.seen if layer.clock is None else 1, clock=layer.clock,
                share=self.share and not self.original, current=not self.original,
            )  # fmt: skip
        else:
            found = self.select(q, low, high, layer.counted(q.device), window)
            start = torch.tensor(call.starts, device=q.device)[:, None, None]
            starts = torch.where(found < 0, -1, start + found * self.page)
        return chosen.attend(call, starts[:, :, None], self.page, 1)

    def repeats(self, site: Site) -> bool:
        return True

    @property
    def original(self) -> bool:
        return self.variant == "original"

    @property
    def pages(self) -> int:
        """How many are chosen; the current one counts in the original."""
        return max(3, self.budget // self.page) if self.original else self.budget // self.page

    def select(
        self, q: Tensor, low: Tensor, high: Tensor, tokens: Tensor, window: int | None = None
    ) -> Tensor:
        """The pages that a token of the queries ``q [B,H,K]`` reads.

        Args:
            low, high: ``[B,P,G,K]``; tokens: int ``[B]``, how many each row holds, the new one
                included; window: of the model's own.

        Returns:
            int ``[B,H,n]`` (``[B,G,n]`` where shared), the best first, -1 where a row has fewer.
        """
        page = torch.arange(low.shape[1], device=q.device)
        there = page < -(-tokens[:, None] // self.page)
        if window is not None:
            there &= (page + 1) * self.page > tokens[:, None] - window
        # Bounds of pages that are not there are infinite.
        low, high = (x.masked_fill(~there[..., None, None], 0) for x in (low, high))
        score = pages.bounds(q, low, high, share=self.share and not self.original)
        if self.original:
            return self._best(score, there, self.pages)
        current = (tokens[:, None] - 1) // self.page
        best = self._best(score, there & (page < current), self.pages)
        return torch.cat([best, current[:, None].expand(-1, best.shape[1], 1)], -1)

    def _best(self, score: Tensor, there: Tensor, n: int) -> Tensor:
        score = score.masked_fill(~there[:, None], -torch.inf)
        top = score.topk(min(n, score.shape[-1]), -1)
        return torch.where(top.values == -torch.inf, -1, top.indices)
