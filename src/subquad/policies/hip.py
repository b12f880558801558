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

from subquad import mask
from subquad.caches.kv import KVLayer
from subquad.ops import checks, select
from subquad.ops.attention import attention, merge
from subquad.ops.backend import interpreted
from subquad.policies.base import Call, Policy, Site
from subquad.policies.parts import chosen


class HiPLayer(KVLayer):
    """All keys and values, and what the last search of an answer chose.

    Attributes:
        choice: int ``[B,H,1,n]``, tokens as each row counts them, -1 for none; None before.
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
        found = self.select(call.q, call.layer.keys)
        return self._attend(call, found, self.rows, self.window)

    def decode(self, call: Call) -> Tensor:
        layer = call.layer
        if not isinstance(layer, HiPLayer):
            return call.dense()
        if layer.choice is None or layer.seen - layer.chosen_at >= self.refresh:
            alone = dataclasses.replace(self, rows=1)
            found = [alone.select(row.q, row.layer.keys) for row in call.rows()]
            layer.choice, layer.chosen_at = torch.cat(found), layer.seen
        window = self.window + layer.seen - layer.chosen_at
        rows = zip(call.rows(), layer.choice[:, None], strict=True)
        return torch.cat([self._attend(row, found, 1, window) for row, found in rows])

    def select(self, q: Tensor, k: Tensor) -> Tensor:
        """The keys found for the last tokens ``q [B,T,H,K]`` among ``k [B,S,G,K]``.

        Returns:
            int ``[B,N,R,n]``, the first keys of the blocks, rising, -1 where there are fewer; a row
            for every ``rows`` queries (the last one may be short); N is H, or G where shared.
        """
        found = select.halving(
            q, k, -(-self.budget // self.block), rows=self.rows, size=self.block,
            window=self.window, center=self.representative == "center",
            heads=k.shape[2] if self.share else None,
        )  # fmt: skip
        return torch.where(found < 0, -1, found * self.block)

    def _attend(self, call: Call, found: Tensor, rows: int, window: int) -> Tensor:
        """Each query over the keys found for its row, its window and the sinks, each key once."""
        kernels = (call.q.is_cuda or interpreted()) and call.q.dtype != torch.float64
        if kernels and call.q.shape[1] > 1 and call.site.window is None and call.tally is None:
            return self._kernels(call, found, window)
        return self._gathered(call, found, rows, window)[0]

    def _kernels(self, call: Call, found: Tensor, window: int) -> Tensor:
        """The keys found beyond the windows, and windows and sinks, merged."""
        q, k, v = call.q, call.layer.keys, call.layer.values
        near = mask.causal() & (mask.window(window - 1) | mask.sinks(self.sinks))
        o, lse = attention(q, k, v, near, scale=call.scale, return_lse=True)
        before, b = k.shape[1] - q.shape[1], self.rows
        if (before - window) % b or self.sinks % self.block:
            return merge([(o, lse), *self._apart(call, found, window)])[0]
        # A query sees of these keys what a causal one would that stood a window earlier.
        alone = max(window - before, 0)  # queries that have nothing beyond their windows
        if alone >= q.shape[1]:
            return o
        begun = ((found >= 0) & (found < self.sinks)).sum(-1, keepdim=True)
        far = _shifted(found, begun, found.shape[-1])[:, :, alone // b :]
        offset = before - window + alone
        far = F.pad(torch.where(far < 0, -1, far // self.block), (0, 0, offset // b, 0), value=-1)
        rest = attention(
            q[:, alone:], k, v, mask.causal() & mask.blocks(far, self.block, b),
            scale=call.scale, offset=offset, return_lse=True,
        )  # fmt: skip
        return torch.cat([o[:, :alone], merge([(o[:, alone:], lse[:, alone:]), rest])[0]], 1)

    def _apart(self, call: Call, found: Tensor, window: int) -> list[tuple[Tensor, Tensor]]:
        """Where rows do not align with windows: blocks that all queries of a row see beyond their
        windows, by the block-sparse kernels, and the few blocks that some queries have in their
        windows and others beyond."""
        (q, k, v), b, c = (call.q, call.layer.keys, call.layer.values), self.rows, self.block
        T, S = q.shape[1], k.shape[1]
        n, row = found.shape[-1], torch.arange(found.shape[2], device=q.device)[:, None]
        near = S - T + 1 - window + b * row  # where the window of a row's first query begins
        # Lists rise, so what lies before the sinks' end is their beginning, and what some queries
        # have in their windows their end.
        begun = ((found >= 0) & (found < self.sinks)).sum(-1, keepdim=True)
        done = begun + ((found >= self.sinks) & (found + c <= near)).sum(-1, keepdim=True)
        far = _shifted(found, begun, n)
        far = torch.where(torch.arange(n, device=q.device) < done - begun, far, -1)
        cut = _shifted(found, begun - 1, 1)
        cut = torch.where((begun > 0) & (cut + c > self.sinks), cut, -1)
        rest = torch.cat([cut, _shifted(found, done, min(n, b // c + 3))], -1)
        return [
            attention(
                q, k, v, mask.blocks(torch.where(far < 0, -1, far // c), c, b),
                scale=call.scale, offset=0, return_lse=True,
            ),
            self._gathered(call, rest, b, window, alone=True),
        ]  # fmt: skip

    def _gathered(
        self, call: Call, found: Tensor, rows: int, window: int, alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """By copies of the keys, some rows at a time; ``alone``, without windows and sinks."""
        (B, T, _, K), S = call.q.shape, call.layer.keys.shape[1]
        (N, R, n), c = found.shape[1:], self.block
        q = F.pad(call.q, (0, 0, 0, 0, 0, R * rows - T)).unflatten(1, (R, rows))
        q = q.unflatten(3, (N, -1)).permute(0, 3, 1, 4, 2, 5)  # [B,N,R,f,rows,K]
        o = q.new_zeros(*q.shape[:-1], call.v.shape[3])
        lse = o.new_empty(o.shape[:-1], dtype=torch.float32)
        place = (S - T + torch.arange(R * rows, device=q.device)).view(R, rows)
        width = n * c + (0 if alone else window + rows + self.sinks)
        step = max(1, chosen.COPIED * (1 + 15 * q.is_cuda) // (N * width * max(K, rows)))
        for b in range(B):
            for r in range(0, R, step):
                here = (b, slice(None), slice(r, r + step))
                own = found[here], place[r : r + step], window
                tokens, keep = self._visible(call, *own, alone)
                if call.tally is not None:
                    call.count((keep & (place[r : r + step] < S)[..., None]).sum() * q.shape[3])
                k, v = (chosen._pick(x[b], tokens) for x in (call.layer.keys, call.layer.values))
                o[here], lse[here] = chosen._softmax(q[here], k, v, keep, call.scale)
        o, lse = (
            x.permute(0, 2, 4, 1, 3, *range(5, x.dim())).flatten(1, 2).flatten(2, 3)[:, :T]
            for x in (o, lse)
        )
        return o, lse

    def _visible(
        self, call: Call, found: Tensor, place: Tensor, window: int, alone: bool
    ) -> tuple[Tensor, Tensor]:
        """The keys ``[N,r,L]`` for the queries at ``place [r,rows]``, and who sees which, bool
        ``[N,r,rows,L]``. A key found that is in the window or a sink is not seen twice; ``alone``
        leaves these out."""
        (N, r, _), s, device = found.shape, self.sinks, found.device
        blocks = torch.where(found < 0, -self.block, found)[..., None]
        picked = (blocks + torch.arange(self.block, device=device)).flatten(-2)
        if alone:
            j = picked[:, :, None]
            keep = (j >= s) & (place[..., None] - j >= window)
            return picked, keep
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


def _shifted(lists: Tensor, by: Tensor, n: int) -> Tensor:
    """``n`` entries of the lists ``[...,m]`` from ``by [...,1]`` on; -1 beyond their ends."""
    place = by + torch.arange(n, device=lists.device)
    inside = (place >= 0) & (place < lists.shape[-1])
    return torch.where(inside, lists.gather(-1, place.clamp(0, lists.shape[-1] - 1)), -1)
