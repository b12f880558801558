"""FlexPrefill: as many columns, diagonals or blocks as cover a share of each head's attention.

Lai et al. 2025, FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence
Inference, arXiv 2502.20766; the other variant as in The Sparse Frontier (arXiv 2504.17768).

Legend: B batch, T queries, S keys, H query heads, G key heads, K head dim, b tokens in a block, n
blocks of keys, R blocks of queries, L last queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops import checks
from subquad.policies.base import Call, Policy
from subquad.policies.parts import chosen, lines

MOST = 1 << 14  # blocks that a kernel holds


@dataclass(frozen=True)
class FlexPrefill(Policy):
    """Prefill: each head takes, text by text, what covers ``gamma`` of its attention; decoding is
    as it was.

    Attributes:
        gamma: the share to cover, in 0..1.
        tau: a head whose pooled estimate is closer to the truth than this (Jensen-Shannon distance,
            at most 0.833) takes blocks of its own for each query; 0 for no head.
        min_budget, max_budget: tokens; None for no upper limit.
        block: b. unit: so many covered tokens ask for one block (the authors' 128 for any b).
        variant: "authors", or "frontier": columns and diagonals as vertical-slash attention takes
            them, from 512 queries, as many as cover ``gamma``.
        last_q, sinks, local, slash_block: of the frontier variant, as in VerticalSlash.
    """

    VARIANTS: ClassVar[tuple[str, ...]] = ("authors", "frontier")

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None
    block: int = 128
    unit: int = 128
    variant: str = "authors"
    last_q: int = 512
    sinks: int = 4
    local: int = 64
    slash_block: int = 64

    def __post_init__(self) -> None:
        checks.one_of("variant", self.variant, self.VARIANTS)
        for name in ("block", "unit", "last_q", "slash_block"):
            checks.positive(name, getattr(self, name))
        for name in ("min_budget", "sinks", "local"):
            checks.positive(name, getattr(self, name), zero=True)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in 0..1, got {self.gamma!r}")
        if self.tau < 0:
            raise ValueError(f"tau must be at least 0, got {self.tau!r}")
        if self.max_budget is not None:
            checks.positive("max_budget", self.max_budget)
            if self.max_budget < self.min_budget:
                raise ValueError(
                    f"max_budget must be at least min_budget={self.min_budget}, "
                    f"got {self.max_budget}"
                )

    def prefill(self, call: Call) -> Tensor:
        return call.unpadded(self._frontier if self.variant == "frontier" else self._prefill)

    def _prefill(self, call: Call) -> Tensor:
        b, S = self.block, call.layer.keys.shape[1]
        if max(2 * b, math.ceil(self.min_budget / b) * b) >= S:
            return call.dense()
        index = self.select(call.q, call.layer.keys, call.scale, call.site.window)
        return chosen.attend(call, index, b, b, unit=b)

    def select(self, q: Tensor, k: Tensor, scale: float, window: int | None = None) -> Tensor:
        """The blocks of ``k [B,S,G,K]`` for the last tokens ``q [B,T,H,K]``.

        Returns:
            int ``[B,H,R,c]``: a row for each block that holds a query, the blocks rising, -1 last.
        """
        b, S, T = self.block, k.shape[1], q.shape[1]
        first, n = (S - T) // b, -(-S // b)
        last = q[:, -b:]
        sums = lines.last_rows(last, k, scale, window)
        least = math.ceil(self.min_budget / b)
        most = n if self.max_budget is None else min(math.ceil(self.max_budget / b), n)
        if lines.by_kernels(q) and n <= MOST:
            from subquad.ops.select import triton_cover

            aware, pairs, widest = None, None, min(2 * max(most, 1), n)
            if self.tau > 0:
                aware, means = triton_cover.query_aware(last, k, sums[0], b, scale, self.tau)
                lead, widest = S - T - first * b, n
                pairs = triton_cover.best_pairs(q, means, aware, b, lead, scale, self.gamma)
            target = self.gamma * last.shape[1]
            taken = triton_cover.cover(sums, aware, target, b, self.unit, least, most)
            return triton_cover.union(taken, pairs, n - first, widest)
        sums, more = sums / last.shape[1], None
        pooled_k, m = _means(k, 0, b), torch.arange(first, n, device=q.device)[:, None]
        aware = self._query_aware(last, pooled_k, _summed(sums[0], b), scale)
        if self.tau > 0 and bool(aware.any()):
            pooled_q = _means(q, S - T - first * b, b)
            more = aware[..., None, None] & self._global(pooled_q, pooled_k, m, scale)
        return lines.trimmed(self._union(sums, aware, more, n - first, least, most))

    def _union(
        self, sums: Tensor, aware: Tensor, more: Tensor | None, R: int, least: int, most: int
    ) -> Tensor:
        """The lists of R rows: the best columns and diagonals of ``sums [2,B,H,S]``, as many as
        cover ``gamma`` (where ``aware [B,H]`` the least number), and ``more [B,H,R,n]``."""
        count = (cover(sums, self.gamma) // self.unit + 1).clamp(least, most)
        v, s = torch.where(aware, least, count)
        columns, diagonals = _summed(sums[0], self.block), _summed(sums[1].flip(-1), self.block)
        n = columns.shape[-1]
        vertical = _best(columns, v, 0)
        slash = _best(diagonals, s, n - 1).flip(-1)  # by distance in blocks
        m, c = (torch.arange(x, n, device=sums.device) for x in (n - R, 0))
        distance = (m[:, None] - c).clamp_min(0).expand(*slash.shape[:2], -1, -1)
        near = slash[:, :, None].expand(-1, -1, R, -1).gather(-1, distance)
        kept = (vertical[:, :, None] | near) & (c <= m[:, None])
        if more is not None:
            kept |= more
        return lines.listed(kept, c.expand_as(kept))

    def _query_aware(self, q: Tensor, pooled_k: Tensor, columns: Tensor, scale: float) -> Tensor:
        """Heads whose attention between pooled queries and keys is near the pooled attention:
        bool ``[B,H]``."""
        mean = q.float().mean(1).unflatten(1, (pooled_k.shape[2], -1)) * scale
        guess = torch.einsum("bgrk,bngk->bgrn", mean, pooled_k).flatten(1, 2).softmax(-1)
        middle = (guess + columns) / 2
        apart = [torch.xlogy(x, x / middle.clamp_min(1e-38)).sum(-1) for x in (guess, columns)]
        return (0.5 * (apart[0] + apart[1])).clamp_min(0).sqrt() < self.tau

    def _global(self, pooled_q: Tensor, pooled_k: Tensor, m: Tensor, scale: float) -> Tensor:
        """The largest entries of the pooled attention of all rows, up to ``gamma`` of its mass:
        bool ``[B,H,R,n]``."""
        grouped = pooled_q.unflatten(2, (pooled_k.shape[2], -1)) * scale
        score = torch.einsum("bmgrk,bngk->bgrmn", grouped, pooled_k).flatten(1, 2)
        later = torch.arange(score.shape[-1], device=m.device) > m
        mass = score.masked_fill(later, -torch.inf).softmax(-1)
        ordered = mass.flatten(2).sort(-1, descending=True)
        taken = ordered.values.cumsum(-1) <= self.gamma * mass.shape[2]
        kept = torch.zeros_like(taken).scatter_(-1, ordered.indices, taken)
        return kept.view_as(mass) & ~later

    def _frontier(self, call: Call) -> Tensor:
        k, own = call.layer.keys, call.q[:, -self.last_q :]
        by_key, by_distance = lines.last_rows(own, k, call.scale, call.site.window)
        columns, distances = (
            _cover_best(x / own.shape[1], self.gamma, self.min_budget, forced)
            for x, forced in ((by_key, self.sinks), (by_distance, self.local))
        )
        starts, single = lines.blocks(
            columns, distances, call.q.shape[1], k.shape[1], self.slash_block
        )
        return chosen.attend(call, starts, self.slash_block, self.slash_block, single)


def cover(x: Tensor, gamma: float) -> Tensor:
    """How many of the largest of ``x [...,n]`` make up ``gamma``, and one more: int ``[...]``."""
    return (x.sort(-1, descending=True).values.cumsum(-1) <= gamma).sum(-1) + 1


def _cover_best(x: Tensor, gamma: float, least: int, forced: int) -> Tensor:
    """Places of the largest of ``x [B,H,S]``, rising, as many as each head needs to cover
    ``gamma``; -1 at the end."""
    count = cover(x, gamma).clamp(min=max(least, forced), max=x.shape[-1])
    x = x.clone()
    x[..., :forced] = torch.inf
    order = x.argsort(-1, descending=True)[..., : int(count.max())]
    rank = torch.arange(order.shape[-1], device=x.device)
    return lines.listed(rank < count[..., None], order)


def _best(x: Tensor, count: Tensor, forced: int) -> Tensor:
    """The ``count [B,H]`` largest of ``x [B,H,n]``, the one ``forced`` first of all (also where the
    count is 0): bool."""
    x = x.clone()
    x[..., forced] = torch.inf
    rank = x.argsort(-1, descending=True).argsort(-1)
    return rank < count[..., None].clamp_min(1)


def _summed(x: Tensor, b: int) -> Tensor:
    """Sums over blocks of ``x [B,H,S]``."""
    return F.pad(x, (0, -x.shape[-1] % b)).unflatten(-1, (-1, b)).sum(-1)


def _means(x: Tensor, lead: int, b: int) -> Tensor:
    """Means over blocks of ``x [B,T,H,K]``, its first token at place ``lead`` of a block: float32
    ``[B,n,H,K]``."""
    tail = -(lead + x.shape[1]) % b
    total = F.pad(x.float(), (0, 0, 0, 0, lead, tail)).unflatten(1, (-1, b)).sum(2)
    count = torch.full((total.shape[1], 1, 1), float(b), device=x.device)
    count[0] -= lead
    count[-1] -= tail
    return total / count
