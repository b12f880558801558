"""SnapKV: the last tokens of a prompt vote for the earlier ones that stay in the cache.

Li et al. 2024, SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469; the
other variant as in The Sparse Frontier (Nawrot et al. 2025, arXiv 2504.17768).

Legend: w voting tokens, S tokens of a row, N heads of the cache, r query heads in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from subquad.policies.base import Site
from subquad.policies.parts.compress import Compress


@dataclass(frozen=True, kw_only=True)
class SnapKV(Compress):
    """After the prompt each head keeps those of its tokens that the last ones attend to most, with
    their true positions.

    See :class:`~subquad.policies.parts.compress.Compress` for the options; None is for ``window``
    32, or 256 (frontier), ``kernel`` 5, or 21, ``pool`` "avg" and ``share`` "mean". The authors
    keep a cache for each query head: ``share="none"``.
    """

    DEFAULTS = {
        "original": {"window": 32, "kernel": 5, "pool": "avg", "share": "mean"},
        "frontier": {"window": 256, "kernel": 21, "pool": "avg", "share": "mean"},
    }

    capacity: int = 2048

    def repeats(self, site: Site) -> bool:
        return site.window is None  # which of the kept tokens it hides follows from their places

    def gather(self, weights: Tensor) -> Tensor:
        return weights.sum(1)

    def choose(self, site: Site, score: Tensor) -> Sequence[Tensor]:
        n = self.capacity if self.frontier else self.capacity - self.window
        return list(score.topk(n, -1).indices)
