"""Quest: of the cached pages, each new token reads those whose keys could fit it best.

Tang et al. 2024, QUEST: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv
2406.10774; the other variant as in The Sparse Frontier (Nawrot et al. 2025, arXiv 2504.17768).

Legend: B batch, H query heads, G key heads, K head dim, P pages, n chosen pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.caches.kv import KVLayer
from subquad.caches.paged import PagedLayer
from subquad.ops import checks
from subquad.ops.backend import interpreted
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
        default = 2 if self.variant == "original" else 0
        dense = default if self.dense_layers is None else self.dense_layers
        return KVLayer(site.window) if site.index < dense else PagedLayer(self.page)

    def decode(self, call: Call) -> Tensor:
        layer = call.layer
        if not isinstance(layer, PagedLayer):
            return call.dense()
        if call.real is None and call.site.window is None and layer.low.shape[1] > 1:
            pages = self._all_there(call.q[:, 0], layer.low, layer.high)
            tokens = pages * self.page
        else:
            lengths = torch.tensor(layer.lengths(), device=call.q.device)
            pages = self.select(call.q[:, 0], layer.low, layer.high, lengths, call.site.window)
            start = torch.tensor(call.starts, device=call.q.device)[:, None, None]
            tokens = torch.where(pages < 0, -1, start + pages * self.page)
        return chosen.attend(call, tokens[:, :, None], self.page, 1)

    def _all_there(self, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """:meth:`select` where every page is there: a launch saved is time saved."""
        if self.variant == "original":
            score = self.bounds(q, low, high)
            n = min(max(3, self.budget // self.page), score.shape[-1])
            return score.topk(n, -1, sorted=False).indices
        last = low.shape[1] - 1
        score = self.bounds(q, low[:, :last], high[:, :last])
        if self.share:
            score = score.unflatten(1, (low.shape[2], -1)).sum(2)
        best = score.topk(min(self.budget // self.page, last), -1, sorted=False).indices
        return F.pad(best, (0, 1), value=last)

    def bounds(self, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The largest score, without scale, that a key between ``low`` and ``high [B,P,G,K]`` could
        have with ``q [B,H,K]``: sum over features of max(q low, q high), ``[B,H,P]``."""
        if (q.is_cuda or interpreted()) and q.dtype != torch.float64:
            from subquad.ops.select import triton

            return triton.bounds(q, low, high)
        grouped = q.unflatten(1, (low.shape[2], -1))
        up = torch.einsum("bgrk,bpgk->bgrp", grouped.clamp_min(0), high)
        return (up + torch.einsum("bgrk,bpgk->bgrp", grouped.clamp_max(0), low)).flatten(1, 2)

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
        P, G = low.shape[1:3]
        page = torch.arange(P, device=q.device)
        there = page < -(-tokens[:, None] // self.page)
        if window is not None:
            there &= (page + 1) * self.page > tokens[:, None] - window
        # Bounds of pages that are not there are infinite.
        low, high = (x.masked_fill(~there[..., None, None], 0) for x in (low, high))
        score = self.bounds(q, low, high)
        if self.variant == "original":
            return self._best(score, there, max(3, self.budget // self.page))
        if self.share:
            score = score.unflatten(1, (G, -1)).sum(2)
        current = (tokens[:, None] - 1) // self.page
        best = self._best(score, there & (page < current), self.budget // self.page)
        return torch.cat([best, current[:, None].expand(-1, best.shape[1], 1)], -1)

    def _best(self, score: Tensor, there: Tensor, n: int) -> Tensor:
        score = score.masked_fill(~there[:, None], -torch.inf)
        top = score.topk(min(n, score.shape[-1]), -1)
        return torch.where(top.values == -torch.inf, -1, top.indices)
