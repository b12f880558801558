"""Ada-SnapKV: as SnapKV, but the heads of a layer compete for one budget.

Feng et al. 2024, Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient
LLM Inference, arXiv 2407.11550; the other variant as in The Sparse Frontier (Nawrot et al. 2025,
arXiv 2504.17768).

Legend: w voting tokens, S tokens of a row, N heads of the cache, r query heads in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.caches.headwise import HeadwiseLayer
from subquad.ops import checks
from subquad.policies.base import Site
from subquad.policies.parts.compress import Compress


@dataclass(frozen=True, kw_only=True)
class AdaSnapKV(Compress):
    """After the prompt a layer keeps ``capacity`` tokens a head on average: heads that attend to
    much get more of it, heads that attend to little get less.

    See :class:`~subquad.policies.parts.compress.Compress` for the other options; None is for
    ``window`` 32, or 256 (frontier), ``kernel`` 7, or 21, ``pool`` "max", or "avg", ``share``
    "mean", or "max", and ``floor`` 0.5, or 0.2. The frontier spends the budget exactly, the
    original but for rounding.

    Attributes:
        floor: the share of the even budget that every head gets in any case, 0..1.
        skip: so many first layers divide their budget evenly (original).
        normalize: weigh a head's votes by what its best ones are of all (original).
        pyramid: with beta here, budgets fall evenly with the depth, from (2 - 1 / beta) to 1 / beta
            times the mean (original; the paper's is 20); None for the same in every layer.
    """

    DEFAULTS = {
        "original": {"window": 32, "kernel": 7, "pool": "max", "share": "mean", "floor": 0.5},
        "frontier": {"window": 256, "kernel": 21, "pool": "avg", "share": "max", "floor": 0.2},
    }

    capacity: int = 1024
    floor: float = None  # type: ignore[assignment]
    skip: int = 0
    normalize: bool = False
    pyramid: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in 0..1, got {self.floor}")
        checks.positive("skip", self.skip, zero=True)
        if self.pyramid is not None:
            checks.positive("pyramid", self.pyramid)
        if self.frontier and (self.skip or self.normalize or self.pyramid):
            raise ValueError("skip, normalize and pyramid belong to the original variant")

    def layer(self, site: Site) -> HeadwiseLayer:
        return HeadwiseLayer()

    def drops(self, site: Site, tokens: int) -> bool:
        if self.frontier:
            return tokens > self.capacity
        return tokens - self.window > self.budget(site)

    def budget(self, site: Site) -> int:
        """What a head of this layer keeps on average beside the window (original)."""
        mean = self.capacity - self.window
        if self.pyramid is None:
            return mean
        last = mean / self.pyramid
        first = 2 * mean - last
        return round(first + (last - first) * site.index / max(site.layers - 1, 1))

    def gather(self, weights: Tensor) -> Tensor:
        return weights.amax(1) if self.frontier else weights.mean(1)

    def choose(self, site: Site, score: Tensor) -> Sequence[Tensor]:
        if self.frontier:
            return self.spend(score)
        sizes = self.sizes(score, self.budget(site), even=site.index < self.skip)
        return [own.topk(size).indices for own, size in zip(score, sizes, strict=True)]

    def sizes(self, score: Tensor, budget: int, even: bool = False) -> list[int]:
        """How many tokens each head of ``score [N,S]`` keeps: as many as it has of the ``N *
        budget`` best of all heads, drawn towards ``budget`` by the floor."""
        N, S = score.shape
        if even:
            return [budget] * N
        if self.normalize:
            score = score * (score.topk(budget).values.sum(-1) / score.sum(-1))[:, None]
        winners = score.flatten().topk(N * budget).indices // S
        count = torch.bincount(winners, minlength=N)
        return (count * (1 - self.floor) + int(budget * self.floor)).round().int().tolist()

    def spend(self, score: Tensor) -> list[Tensor]:
        """The tokens that each head of ``score [N,S]`` keeps, rising (frontier): its best, as many
        as the floor says, and with the rest of the budget the best of all heads."""
        N = score.shape[0]
        least = max(int(self.capacity * self.floor), self.local + self.prefix)
        kept = torch.zeros_like(score, dtype=torch.bool)
        kept.scatter_(1, score.topk(least).indices, True)
        rest = score.masked_fill(kept, -torch.inf).flatten()
        kept.view(-1)[rest.topk(N * (self.capacity - least)).indices] = True
        return [own.nonzero()[:, 0] for own in kept]
