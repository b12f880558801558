"""Keys and values of which a policy drops what it does not need, the same number for each head.

Legend: B batch, T new tokens, S cached entries, G key/value heads, N heads that choose (G, or the
query heads), K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.caches.kv import KVLayer, Rows

Chosen = Sequence[Sequence[Tensor]]


class EvictingLayer(KVLayer):
    """Everything until :meth:`evict`; then what was chosen, and all that follows it.

    Attributes:
        blank: how many entries those are in each row; None before the choice.
        queries: ``[B,w,H,K]``, of the last tokens, for a choice that waits; else None.
    """

    def _clear(self) -> None:
        super()._clear()
        self._places: Tensor | None = None
        self.blank: list[int] | None = None
        self.queries: Tensor | None = None

    @property
    def compressed(self) -> bool:
        return self.blank is not None

    @property
    def places(self) -> Tensor:
        """int32 ``[B,S,N]``, where each held token stands in its row, -1 where a row holds less
        than others (at its start)."""
        assert self._places is not None, "nothing chosen yet"
        B, n, N = self._places.shape
        after = torch.arange(
            self.seen - (self.keys.shape[1] - n), self.seen, device=self._places.device
        )
        start = torch.tensor(self.starts or [0], device=after.device)[:, None]
        after = (after - start).int()[..., None].expand(B, -1, N)
        return torch.cat([self._places, after], 1)

    @property
    def nbytes(self) -> int:
        held = (x for x in (self._places, self.queries) if x is not None)
        return super().nbytes + sum(x.untyped_storage().nbytes() for x in held)

    def watch(self, q: Tensor, last: int) -> None:
        """Remember the ``last`` queries of ``q [B,T,H,K]`` and of those before."""
        q = q if self.queries is None else torch.cat([self.queries, q], 1)
        self.queries = q[:, -last:].clone()

    def evict(self, chosen: Chosen, new: int = 0) -> None:
        """Hold on to some tokens of each row, and free the rest.

        Args:
            chosen: for each row and head the tokens, int ``[n]``, as the row counts them; n is the
                same for all heads of a row.
            new: so many last tokens stay besides.
        """
        starts, last = self.starts or [0] * self._batch, torch.arange(self.seen - new, self.seen)
        held = [
            torch.stack([torch.cat([i, last.to(i.device) - start]) for i in heads])
            for heads, start in zip(chosen, starts, strict=True)
        ]
        most = max(index.shape[1] for index in held)
        k, v = (
            torch.stack([_taken(row[s:], index, most) for row, s, index in zip(x, starts, held)])
            for x in (self.keys, self.values)
        )
        places = [_filled(index.T.to(torch.int32), most, -1) for index in held]
        self._keys, self._values, self._places = Rows(k), Rows(v), torch.stack(places)
        self.blank, self.queries = [most - index.shape[1] for index in held], None

    def store(self, k: Tensor, v: Tensor) -> None:
        if self._places is not None and k.shape[2] < self._places.shape[2]:
            share = self._places.shape[2] // k.shape[2]
            k, v = (x.repeat_interleave(share, 2) for x in (k, v))
        super().store(k, v)

    def row(self, b: int) -> KVLayer:
        if self.blank is None or self._places is None:
            return super().row(b)
        alone, own, held = EvictingLayer(), slice(b, b + 1), slice(self.blank[b], None)
        alone.seen, alone.blank = self.seen - (self.starts[b] if self.starts else 0), [0]
        alone._keys, alone._values = Rows(self.keys[own, held]), Rows(self.values[own, held])
        alone._places = self._places[own, held]
        return alone

    def select(self, rows: Tensor) -> None:
        if self._places is not None:
            self._places = self._places.index_select(0, rows.to(self._places.device))
        if self.blank is not None:
            self.blank = [self.blank[b] for b in rows.tolist()]
        if self.queries is not None:
            self.queries = self.queries.index_select(0, rows.to(self.queries.device))
        super().select(rows)


def _taken(x: Tensor, index: Tensor, most: int) -> Tensor:
    """``x [S,G,K]`` at ``index [N,n]``: ``[most,N,K]``, zeros in front."""
    N = index.shape[0]
    head = torch.arange(N, device=x.device) * x.shape[1] // N
    return _filled(x[index.T, head], most, 0)


def _filled(x: Tensor, length: int, value: int) -> Tensor:
    """``x [n,...]`` behind ``value`` up to ``length``."""
    return torch.cat([x.new_full((length - x.shape[0], *x.shape[1:]), value), x])
