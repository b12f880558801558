"""HiP: for each block of queries a search over halved segments finds the keys that fit it best.

Lee et al. 2024, A Training-free Sub-quadratic Cost Transformer Model Serving Framework with
Hierarchically Pruned Attention, arXiv 2406.09827 (the search of its v1.1).

Legend: B batch, T queries, S keys, H query heads, G key heads, K head dim; R rows, each a block of
b queries; c keys in a block; n blocks in the budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.caches.kv import KVLayer
from subquad.ops import checks, select
from subquad.ops.backend import uses_kernels
from subquad.policies.base import Call, Policy, Site
from subquad.policies.parts import chosen


class HiPLayer(KVLayer):
    """All keys and values, and what the last search of an answer chose.

    Attributes:
        choice: int ``[B,H,1,n]``, blocks as each row counts them, -1 for none; None before.
        chosen_at: ``seen`` at that time.
    """

    def _clear(self) -> None:
        super()._clear()
        self.choice: Tensor | None = None
        self.chosen_at = 0

    def select(self, rows: Tensor) -> None:
        if self.choice is not None:
            self.choice = self.choice.index_select(0, rows.to(self.choice.device))
        super().select(rows)


@dataclass(frozen=True)
class HiP(Policy):
    """Prompt and answer attend to some ``budget`` keys that a hierarchical search finds, to the
    last ``window`` and to the first ``sinks``.

    The keys before the window are cut in ``budget / block`` segments; these are halved again and
    again, and the best halves, by one block of keys each, survive. No key is out of reach.

    Attributes:
        budget: keys that a search finds; block: c, neighbours that it takes together.
        rows: b, queries that share a search, as they stand in a piece of text.
        window, sinks: tokens attended to in any case.
        representative: the block by which a segment is known, its "first" or the one at its
            "center".
        share: the query heads of a group search together.
        dense_layers: so many first layers attend to everything.
        refresh: decoded tokens that go by one search; the window grows in between.
        answers: whether decoded tokens search, too; else they attend to everything, or as a policy
            says that is joined.
    """

    REPRESENTATIVES: ClassVar[tuple[str, ...]] = ("first", "center")

    budget: int = 512
    block: int = 2
    rows: int = 32
    window: int = 256
    sinks: int = 16
    representative: str = "first"
    share: bool = False
    dense_layers: int = 3
    refresh: int = 1
    answers: bool = True

    def __post_init__(self) -> None:
        for name in ("budget", "block", "rows", "window", "refresh"):
            checks.positive(name, getattr(self, name))
        for name in ("sinks", "dense_layers"):
            checks.positive(name, getattr(self, name), zero=True)
        checks.one_of("representative", self.representative, self.REPRESENTATIVES)

    @property
    def shapes_decode(self) -> bool:
        return self.answers

    def layer(self, site: Site) -> KVLayer:
        dense = site.index < self.dense_layers or not self.answers
        return KVLayer(site.window) if dense else HiPLayer()

    def prefill(self, call: Call) -> Tensor:
        if call.site.index < self.dense_layers:
            return call.dense()
        if isinstance(call.layer, HiPLayer):
            call.layer.choice = None
        return call.unpadded(self._prefill)

    def _prefill(self, call: Call) -> Tensor:
        found = self.search(call.q, call.layer.keys)
        return self._attend(call, found, self.rows, self.window)

    def decode(self, call: Call) -> Tensor:
        layer = call.layer
        if not isinstance(layer, HiPLayer):
            return call.dense()
        if layer.choice is None or layer.seen - layer.chosen_at >= self.refresh:
            alone = dataclasses.replace(self, rows=1)
            found = [alone.search(row.q, row.layer.keys) for row in call.rows()]
            layer.choice, layer.chosen_at = torch.cat(found), layer.seen
        window = self.window + layer.seen - layer.chosen_at
        rows = zip(call.rows(), layer.choice[:, None], strict=True)
        return torch.cat([self._attend(row, found, 1, window) for row, found in rows])

    def select(self, q: Tensor, k: Tensor) -> Tensor:
        """The first keys of the blocks that :meth:`search` finds; -1 where there are fewer."""
        found = self.search(q, k)
        return torch.where(found < 0, -1, found * self.block)

    def search(self, q: Tensor, k: Tensor) -> Tensor:
        """The blocks found for the last tokens ``q [B,T,H,K]`` among ``k [B,S,G,K]``.

        Returns:
            int ``[B,N,R,n]``, rising, -1 where there are fewer; a row for every ``rows`` queries
            (the last one may be short); N is H, or G where shared.
        """
        return select.halving(
            q, k, -(-self.budget // self.block), rows=self.rows, size=self.block,
            window=self.window, center=self.representative == "center",
            heads=k.shape[2] if self.share else None,
        )  # fmt: skip

    def _attend(self, call: Call, found: Tensor, rows: int, window: int) -> Tensor:
        """Each query over the keys found for its row, its window and the sinks, each key once."""
        q, k, v = call.q, call.layer.keys, call.layer.values
        wide = max(q.shape[3], v.shape[3]) * q.element_size() > 512
        kernels = uses_kernels(q) and q.dtype != torch.float64 and not wide
        if kernels and call.site.window is None and call.tally is None:
            from subquad.ops.attention.triton.found import found_attention

            return found_attention(
                q, k, v, found, rows=rows, size=self.block, window=window, sinks=self.sinks,
                scale=call.scale,
            )  # fmt: skip
        return self._gathered(call, found, rows, window)

    def _gathered(self, call: Call, found: Tensor, rows: int, window: int) -> Tensor:
        """By copies of the keys, some rows at a time."""
        (B, T, _, K), S = call.q.shape, call.layer.keys.shape[1]
        (N, R, n), c = found.shape[1:], self.block
        q = F.pad(call.q, (0, 0, 0, 0, 0, R * rows - T)).unflatten(1, (R, rows))
        q = q.unflatten(3, (N, -1)).permute(0, 3, 1, 4, 2, 5)  # [B,N,R,f,rows,K]
        o = q.new_zeros(*q.shape[:-1], call.v.shape[3])
        place = (S - T + torch.arange(R * rows, device=q.device)).view(R, rows)
        width = n * c + window + rows + self.sinks
        step = max(1, chosen.COPIED * (1 + 15 * q.is_cuda) // (N * width * max(K, rows)))
        for b in range(B):
            for r in range(0, R, step):
                here = (b, slice(None), slice(r, r + step))
                tokens, keep = self._visible(call, found[here], place[r : r + step], window)
                if call.tally is not None:
                    call.count((keep & (place[r : r + step] < S)[..., None]).sum() * q.shape[3])
                k, v = (chosen._pick(x[b], tokens) for x in (call.layer.keys, call.layer.values))
                o[here] = chosen._softmax(q[here], k, v, keep, call.scale)[0]
        return o.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2, 3)[:, :T]

    def _visible(
        self, call: Call, found: Tensor, place: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        """The keys ``[N,r,L]`` for the queries at ``place [r,rows]``, and who sees which, bool
        ``[N,r,rows,L]``. A key found that is in the window or a sink is not seen twice."""
        (N, r, _), s, c, device = found.shape, self.sinks, self.block, found.device
        blocks = torch.where(found < 0, -c, found * c)[..., None]
        picked = (blocks + torch.arange(c, device=device)).flatten(-2)
        near = place[:, :1] + torch.arange(1 - window, place.shape[1], device=device)
        first = torch.arange(s, device=device)
        tokens = torch.cat([picked, near.expand(N, -1, -1), first.expand(N, r, -1)], -1)
        # What each of the three parts may show: keys beyond the window, in it, and before.
        i, begin = torch.arange(tokens.shape[-1], device=device), picked.shape[2]
        kind = (i >= begin).long() + (i >= begin + near.shape[1])
        j = tokens[:, :, None]
        distance = place[..., None] - j
        own = torch.where(j < s, 2, (distance < window).long())
        keep = (own == kind) & (j >= 0) & (distance >= 0)
        if call.site.window is not None:
            keep &= distance < call.site.window
        return tokens, keep
