"""Keys and values of which each head keeps a number of its own, and really no more.

Legend: B batch, T new tokens, S cached entries, G key/value heads, N heads that choose (G, or the
query heads), K head dim, M entries kept by all rows and heads together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.caches.evicting import Chosen, EvictingLayer
from subquad.caches.kv import KVLayer, Rows


class Lists(NamedTuple):
    """What the heads of all rows keep, end to end: row b, head n the entries
    ``ptr[b*N+n] .. ptr[b*N+n+1]``.

    Attributes:
        k, v: ``[M,K]``; places: int32 ``[M]``, where each entry stands in its row.
        ptr: int32 ``[B*N+1]``, on the CPU, where it is read at every token.
    """

    k: Tensor
    v: Tensor
    places: Tensor
    ptr: Tensor

    def rows(self, rows: list[int], heads: int) -> Lists:
        """Those of the batch rows ``rows``, in that order; views where it is one."""
        bounds = self.ptr[::heads].tolist()
        own = [slice(bounds[b], bounds[b + 1]) for b in rows]
        k, v, places = (
            x[own[0]] if len(own) == 1 else torch.cat([x[i] for i in own])
            for x in (self.k, self.v, self.places)
        )
        sizes = self.ptr.diff().view(-1, heads)[rows].flatten()
        return Lists(k, v, places, _bounds(sizes))


def _bounds(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)


class HeadwiseLayer(EvictingLayer):
    """Everything until :meth:`evict`; then what each head chose, and apart from it, in ``keys``
    and ``values``, all that follows."""

    def _clear(self) -> None:
        super()._clear()
        self._lists: Lists | None = None

    @property
    def compressed(self) -> bool:
        return self._lists is not None

    @property
    def lists(self) -> Lists:
        assert self._lists is not None, "nothing chosen yet"
        return self._lists

    @property
    def heads(self) -> int:
        """N."""
        return (len(self.lists.ptr) - 1) // self._batch

    @property
    def lengths(self) -> Tensor:
        """Entries that each row and head kept of what it chose from: int ``[B,N]``."""
        return self.lists.ptr.diff().view(self._batch, -1)

    @property
    def nbytes(self) -> int:
        kept = sum(x.untyped_storage().nbytes() for x in self._lists or ())
        return super().nbytes + kept

    def evict(self, chosen: Chosen, new: int = 0) -> None:
        """As of the base, but each head has a number of its own."""
        starts, tail = self.starts or [0] * self._batch, self.keys.shape[1] - new
        N, G = len(chosen[0]), self.keys.shape[2]
        k, v = (
            torch.cat(
                [
                    x[b, starts[b] + index, n * G // N]
                    for b, heads in enumerate(chosen)
                    for n, index in enumerate(heads)
                ]
            )
            for x in (self.keys, self.values)
        )
        flat = [index for heads in chosen for index in heads]
        sizes = torch.tensor([len(index) for index in flat])
        self._lists = Lists(k, v, torch.cat(flat).to(torch.int32), _bounds(sizes))
        self._keys = Rows(self.keys[:, tail:].clone())
        self._values = Rows(self.values[:, tail:].clone())
        self.queries = None

    def store(self, k: Tensor, v: Tensor) -> None:
        KVLayer.store(self, k, v)

    def head(self, b: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """All that one row and head holds: keys and values ``[m,K]``, places ``[m]``."""
        i, lists, tail = b * self.heads + n, self.lists, self.keys.shape[1]
        own, g = slice(int(lists.ptr[i]), int(lists.ptr[i + 1])), n * self.keys.shape[2]
        g //= self.heads
        last = torch.arange(self.seen - tail, self.seen, device=lists.places.device)
        return (
            torch.cat([lists.k[own], self.keys[b, :, g]]),
            torch.cat([lists.v[own], self.values[b, :, g]]),
            torch.cat([lists.places[own], last]),
        )

    def row(self, b: int) -> KVLayer:
        if not self.compressed:
            return super().row(b)
        alone, own = HeadwiseLayer(), slice(b, b + 1)
        alone.seen = self.seen - (self.starts[b] if self.starts else 0)
        alone._keys, alone._values = Rows(self.keys[own]), Rows(self.values[own])
        alone._lists = self.lists.rows([b], self.heads)
        return alone

    def select(self, rows: Tensor) -> None:
        if self.compressed:
            taken = self.lists.rows(rows.tolist(), self.heads)
            self._lists = Lists(*(x.clone() for x in taken))
        super().select(rows)
