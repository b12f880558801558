"""All keys and values before their rotation, and a summary of every full chunk of them.

Legend: B batch, S cached entries, C full chunks, H query heads, K head dim.
"""

from __future__ import annotations

import copy

from torch import Tensor

from subquad.caches.kv import KVLayer, Rows


class Notes:
    """Of one row.

    Attributes:
        summaries: ``[1,C,H,K]``, one for each full chunk.
        queries: ``[n,H,K]``, of the tokens behind the last full chunk; None before the first token.
    """

    def __init__(self) -> None:
        self.summaries = Rows()
        self.queries: Tensor | None = None

    @property
    def nbytes(self) -> int:
        waiting = 0 if self.queries is None else self.queries.untyped_storage().nbytes()
        return self.summaries.nbytes + waiting


class ChunkLayer(KVLayer):
    """Chunks are counted from each row's first real token; a policy writes their ``notes``, one for
    each row, also through :meth:`row`."""

    def _clear(self) -> None:
        super()._clear()
        self.notes: list[Notes] = []

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(note.nbytes for note in self.notes)

    def store(self, k: Tensor, v: Tensor) -> None:
        super().store(k, v)
        if not self.notes:
            self.notes = [Notes() for _ in range(k.shape[0])]

    def row(self, b: int) -> KVLayer:
        alone, plain = ChunkLayer(), super().row(b)
        alone.seen, alone._keys, alone._values = plain.seen, plain._keys, plain._values
        alone.notes = [self.notes[b]]
        return alone

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.notes = [copy.deepcopy(self.notes[b]) for b in rows.tolist()]
